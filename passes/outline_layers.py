"""Make one function of equal layers, so that torch.compile compiles each kind of layer once."""

import itertools
import math
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from vera_fx.passes.checkpoint_layers import Segment
from vera_fx.passes.engine.graph import Tag, is_call
from vera_fx.passes.engine.outlining import (
    Outliner,
    Run,
    apart,
    body_nodes,
    fingerprint,
    module_runs,
)
from vera_fx.passes.engine.protocol import Numerics
from vera_fx.passes.engine.reports import Action, PassReport, Reason, Rewrite, Skip
from vera_fx.passes.plans.layer_time import LayerTime
from vera_fx.passes.sites.layer_edges import at_what_is_kept
from vera_fx.passes.sites.shared_nodes import is_numbered, lift, shared_by_layers

_ME = "OutlineLayers"

_TOLERATED = 0.05
"""What calls of bodies may cost, as a share of the work in them."""

_LARGEST = 4
"""Layers in a body at most: larger ones win back little of a call and take long to compile."""


@dataclass(frozen=True, slots=True)
class OutlineLayers:
    """Call layers that compute the same as one function; what stands between them becomes others.

    A model of N equal layers is then N calls of one body: a compiler that compiles function by
    function compiles it once, where the flat graph costs N times as much (PEFT's does, too). The
    outer graph only calls bodies and must not be compiled itself (`is_outlined`).

    A call costs the host some 0.2 ms of a step. Where that is much beside a layer's work, a body
    holds several layers; where it is much beside those of the largest body, as on most
    accelerators, the graph stays flat.

    Before::

        %x: f32[s0, s1] = input
        %tanh: f32[s0, s1] = tanh(%x)
        %sin: f32[s0, s1] = sin(%tanh)
        %sin_1: f32[s0, s1] = sin(%sin)
        return [%sin_1]

    After::

        %x: f32[s0, s1] = input
        %_body_0 = _body_0
        %call: tuple = call(%_body_0, %x)
        %getitem: f32[s0, s1] = getitem(%call, 0)
        %_body_1 = _body_1
        %call_1: tuple = call(%_body_1, %getitem)
        %getitem_1: f32[s0, s1] = getitem(%call_1, 0)
        %_body_2 = _body_1
        %call_2: tuple = call(%_body_2, %getitem_1)
        %getitem_2: f32[s0, s1] = getitem(%call_2, 0)
        return [%getitem_2]

    Needs: ``nn_module_stack`` on captured nodes; layers whose paths end in a number, as those of
    ``ModuleList`` and ``Sequential`` do. Runs last: other passes do not look into bodies.
    Keeps: every value and gradient; parameters stay reads of the outer graph.
    Skips: equal layers with too little work for a call; a graph without enough equal layers is left
    as it is.
    """

    least: int = 4
    """How many equal layers make it worth while; 0 for never."""

    saved: float = 0.25
    """The share of the graph that sharing must save: every body is compiled on its own."""

    time: LayerTime | None = None
    """What estimates a layer's work; None to outline without asking, each layer by itself."""

    numerics: ClassVar[Numerics] = Numerics.BITWISE

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Outline the largest equal layers, and everything else between them."""
        if not self.least or is_outlined(gm.graph):
            return PassReport(())
        shared = shared_by_layers(gm.graph)
        nodes = [node for node in body_nodes(gm.graph) if node not in shared]
        layers = self._equal_layers(gm, nodes)
        if not layers:
            return PassReport(())
        size, seconds = self._layers_in_a_body(layers)
        if size > _LARGEST:
            return PassReport((), (Skip(layers[0].path, Reason.HOST_BOUND, _told(seconds)),))
        lift(shared, nodes[0])
        runs = list(_grouped(_with_gaps(nodes, layers), size))
        outliner = Outliner(gm, "body", lambda body, _: body.forward, operator.call)
        names = [outliner.outline(run, Tag(_ME, run.path)) for run in runs]
        return PassReport(
            tuple(self._told(run, name, seconds) for run, name in zip(runs, names, strict=True))
        )

    def _told(self, run: Run, body: str, seconds: float) -> Rewrite:
        if not run.path or self.time is None:
            where = run.path or "between layers"
            return Rewrite(where, Action.LAYER_OUTLINED, body, count=len(run.nodes))
        action = Action.LAYER_OUTLINED_FOR_ITS_WORK
        return Rewrite(run.path, action, body, role=_told(seconds), count=len(run.nodes))

    def _equal_layers(self, gm: GraphModule, nodes: Sequence[Node]) -> list[Run]:
        """The outermost numbered modules of which at least ``least`` calls compute the same."""
        runs = module_runs(nodes, is_numbered)
        layers = list(apart([run for _, run in _repeated(runs, self.least)]))
        # The last layer ends in a norm that nobody recomputes, and is no equal of the others yet.
        equal = _repeated(at_what_is_kept(_with_siblings(layers, runs)), self.least)
        layers = [run for _, run in equal]
        bodies = {key: _size(gm, run.nodes) for key, run in equal}
        saved = sum(_size(gm, run.nodes) for run in layers) - sum(bodies.values())
        return layers if saved >= self.saved * _size(gm, nodes) else []

    def _layers_in_a_body(self, layers: Sequence[Run]) -> tuple[int, float]:
        """How many layers one call must be for, and a layer's seconds."""
        if self.time is None:
            return 1, 0.0
        seconds = sum(self.time(run.nodes) for run in layers) / len(layers)
        device = self.time.device
        size = math.ceil(device.call / (_TOLERATED * max(seconds, 1e-12)))
        return max(size, 1), seconds


def _told(seconds: float) -> str:
    return f"{1e3 * seconds:.2g} ms"


def _grouped(runs: Iterable[Run], size: int) -> Iterator[Run]:
    """The runs, with ``size`` equal neighbouring layers made one; what is left over comes first."""
    stretch: list[Run] = []
    key = None
    for run in runs:
        found = fingerprint(run.nodes) if run.path and size > 1 else None
        if found is None or found != key:
            yield from _cut(stretch, size)
            stretch = []
        key = found
        stretch.append(run)
    yield from _cut(stretch, size)


def _cut(stretch: Sequence[Run], size: int) -> Iterator[Run]:
    rest = len(stretch) % size
    starts = [*([0] if rest else []), *range(rest, len(stretch), size)]
    for start, end in itertools.pairwise([*starts, len(stretch)]):
        group = stretch[start:end]
        yield Run(group[0].path, tuple(node for run in group for node in run.nodes))


def _repeated(runs: Sequence[Run], least: int) -> list[tuple[str, Run]]:
    """Those of which there are so many equal ones, each with what it is equal by."""
    keys = [fingerprint(run.nodes) for run in runs]
    counts = Counter(keys)
    return [(key, run) for key, run in zip(keys, runs, strict=True) if counts[key] >= least]


def _with_siblings(layers: Sequence[Run], runs: Sequence[Run]) -> list[Run]:
    """The layers, and the runs of the same lists of modules that hold none of them."""
    parents, taken = {_parent(run) for run in layers}, {n for run in layers for n in run.nodes}
    others = [run for run in runs if _parent(run) in parents and taken.isdisjoint(run.nodes)]
    return [*layers, *apart(others)]


def _parent(run: Run) -> str:
    return run.path.rpartition(".")[0]


def _size(gm: GraphModule, nodes: Sequence[Node]) -> int:
    """How many nodes there are, with those inside segments."""
    held = (
        gm.__dict__.get(str(source.target)) for node in nodes for source in node.all_input_nodes
    )
    return len(nodes) + sum(len(h.body.graph.nodes) for h in held if isinstance(h, Segment))


def is_outlined(graph: Graph) -> bool:
    """True if the graph does nothing but call bodies."""
    return any(is_call(node, operator.call) for node in graph.nodes)


def _with_gaps(nodes: Sequence[Node], layers: Sequence[Run]) -> Iterator[Run]:
    """The layers, and between them whatever computes tensors, in order."""
    inside: dict[Node, Run] = {node: run for run in layers for node in run.nodes}
    gap: list[Node] = []
    for node in nodes:
        if node not in inside:
            gap.append(node)
            continue
        yield from _gap(gap)
        gap = []
        if node is inside[node].nodes[0]:
            yield inside[node]
    yield from _gap(gap)


def _gap(nodes: Sequence[Node]) -> Iterator[Run]:
    values: list[Any] = [node.meta.get("val") for node in nodes]
    if any(isinstance(value, Tensor) for value in values):
        yield Run("", tuple(nodes))
