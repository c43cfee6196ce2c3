"""Recompute a layer's activations in backward instead of keeping them."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule
from torch.utils import checkpoint

from vera_fx.passes.engine.graph import Tag, is_call
from vera_fx.passes.engine.outlining import Outliner, apart, body_nodes, module_runs
from vera_fx.passes.engine.protocol import Numerics
from vera_fx.passes.engine.reports import Action, PassReport, Rewrite
from vera_fx.passes.sites.shared_nodes import lift, shared_by_layers

_ME = "CheckpointLayers"


@dataclass(slots=True, eq=False)
class Segment:
    """A part of a graph as a module of its own, held by the graph but no submodule of it."""

    body: GraphModule
    number: int

    def __str__(self) -> str:
        return f"segment{self.number}"


def run_segment(segment: Segment, *inputs: Any) -> tuple[Any, ...]:
    """Run a segment; in backward it runs again, with the same random numbers."""
    # Called by its full name: torch.compile knows it by that, and not through a `typing.cast`.
    return checkpoint.checkpoint(segment.body, *inputs, use_reentrant=False)  # pyright: ignore


@dataclass(frozen=True, slots=True)
class CheckpointLayers:
    """Put every call of the given layers into a segment that `torch.utils.checkpoint` runs.

    This is what a model's own gradient checkpointing does, for layers that capture has flattened.
    Parameters stay reads of the outer graph, so a segment never holds one that was replaced since.

    Before::

        %lin_weight: f32[5, 3] = lin.weight
        %lin_bias: f32[5] = lin.bias
        %x: f32[s0, 3] = input
        %slot_vera_a: f32[2, 4] = slot.vera_A
        %slot_vera_b: f32[7, 2] = slot.vera_B
        %slot_lambda_d: f32[2] = slot.lambda_d
        %slot_lambda_b: f32[5] = slot.lambda_b
        %linear: f32[s0, 5] = linear(%x, %lin_weight, %lin_bias)
        %cut_A: f32[2, 3] = slice(%slot_vera_a, 1, 0, 3)
        %z: f32[s0, 2] = linear(%x, %cut_A)
        %h: f32[s0, 2] = mul(%z, %slot_lambda_d)
        %cut_B: f32[5, 2] = slice(%slot_vera_b, 0, 0, 5)
        %u: f32[s0, 5] = linear(%h, %cut_B)
        %update: f32[s0, 5] = mul(%u, %slot_lambda_b)
        %add: f32[s0, 5] = add(%linear, %update)
        return [%add]

    After::

        %lin_weight: f32[5, 3] = lin.weight
        %lin_bias: f32[5] = lin.bias
        %x: f32[s0, 3] = input
        %slot_vera_a: f32[2, 4] = slot.vera_A
        %slot_vera_b: f32[7, 2] = slot.vera_B
        %slot_lambda_d: f32[2] = slot.lambda_d
        %slot_lambda_b: f32[5] = slot.lambda_b
        %_segment_0 = _segment_0
        %run_segment: tuple = run_segment(%_segment_0, %x, %lin_weight, %lin_bias, %slot_vera_a, %slot_lambda_d, %slot_vera_b, %slot_lambda_b)
        %getitem: f32[s0, 5] = getitem(%run_segment, 0)
        return [%getitem]

    Needs: ``nn_module_stack`` on captured nodes. Runs last: other passes do not look into segments.
    Keeps: every value and gradient; dropout draws the same numbers again.
    Skips: nothing.
    """  # noqa: E501

    layers: frozenset[str] = frozenset()
    """Paths of the layers."""

    numerics: ClassVar[Numerics] = Numerics.BITWISE

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Move the calls of the layers into segments."""
        if any(is_call(node, run_segment) for node in gm.graph.nodes):
            return PassReport(())
        shared = shared_by_layers(gm.graph)
        nodes = [node for node in body_nodes(gm.graph) if node not in shared]
        runs = module_runs(nodes, self.layers.__contains__)
        if runs:
            lift(shared, nodes[0])
        outliner = Outliner(gm, "segment", Segment, run_segment)
        rewrites: list[Rewrite] = []
        for run in apart(runs):
            outliner.outline(run, Tag(_ME, run.path))
            rewrites.append(Rewrite(run.path, Action.LAYER_CHECKPOINTED, count=len(run.nodes)))
        return PassReport(tuple(rewrites))
