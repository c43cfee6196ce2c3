"""Finds the sites: the linear calls in a captured graph whose weight belongs to a target.

A call is a site if its weight operand is the target's parameter, followed through casts and
transpositions, or if the call was made inside the target module itself (parametrised weights).
Weights that several targets share (tied) are told apart by the module that made the call.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.graph import is_call, node_arg, owner_path, tensor_of
from vera_fx.passes.engine.protocol import SiteError

aten = torch.ops.aten

_SAME = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.clone.default,
)
_SWAP = (
    aten.t.default,
    aten.numpy_T.default,
    aten.transpose.int,
    aten.permute.default,
    aten.mT.default,
)


@dataclass(frozen=True, slots=True)
class Target:
    """A module chosen for adaptation, as the graph knows it.

    Attributes:
        path: the module's path in the model.
        in_features: width of its input.
        out_features: width of its output.
        layout: ``"out_in"`` if the weight is ``(out, in)`` as in ``nn.Linear``, ``"in_out"`` if it
            is ``(in, out)`` as in Hugging Face's ``Conv1D``.
        weights: every attribute path under which the weight can appear in a graph: more than the
            module's own if the parameter is tied to another module's, none if it is computed
            (``torch.nn.utils.parametrize``).
        aliases: further paths of the very same module, if it is registered more than once.
    """

    path: str
    in_features: int
    out_features: int
    layout: str
    weights: tuple[str, ...]
    aliases: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path under which the module can make a call."""
        return (self.path, *self.aliases)


@dataclass(frozen=True, slots=True)
class Site:
    """One linear call: ``node`` computes ``x @ W.T (+ bias)`` for the target's weight."""

    target: Target
    node: Node
    index: int

    @property
    def x(self) -> Node:
        """The call's input as the graph has it now: adapting a site before it changes it."""
        call = _as_call(self.node)
        if call is None:
            raise SiteError(
                f"{self.node.name} of target {self.target.path!r} is a linear call no more"
            )
        return call[0]

    @property
    def name(self) -> str:
        """The target's path, with ``#2``, ``#3``... for its further calls in one graph."""
        return self.target.path if self.index == 0 else f"{self.target.path}#{self.index + 1}"


@dataclass(frozen=True, slots=True)
class SiteSearch:
    """All sites of a graph, in order, and the targets that the graph never calls."""

    sites: tuple[Site, ...]
    uncalled: tuple[str, ...]


def find_sites(gm: GraphModule, targets: Sequence[Target]) -> SiteSearch:
    """Find every site of ``targets`` in ``gm``.

    Raises:
        SiteError: a target's weight is used by something that is not a linear call, or by a call
            that cannot be given to one target. Nothing is left out in silence.
    """
    by_path = {path: target for target in targets for path in target.paths}
    owners: dict[str, list[Target]] = {}
    for target in targets:
        for weight in target.weights:
            owners.setdefault(weight, []).append(target)
    calls = _calls_of_weights(gm, owners, by_path) | _calls_of_parametrised(gm, by_path)
    sites: list[Site] = []
    counts: Counter[str] = Counter()
    for node in gm.graph.nodes:
        if (target := calls.get(node)) is not None:
            sites.append(Site(target, node, counts[target.path]))
            counts[target.path] += 1
    return SiteSearch(
        tuple(sites), tuple(target.path for target in targets if not counts[target.path])
    )


def _calls_of_weights(
    gm: GraphModule, owners: Mapping[str, list[Target]], by_path: Mapping[str, Target]
) -> dict[Node, Target]:
    """Every use of a target's weight attribute, as {linear call: target}."""
    calls: dict[Node, Target] = {}
    for node in gm.graph.nodes:
        if node.op != "get_attr" or str(node.target) not in owners:
            continue
        for user, operand, swapped in _final_uses(node):
            target = _owner_of(user, owners[str(node.target)], by_path)
            if target is not None:
                _check_call(user, operand, target, swapped=swapped)
                calls[user] = target
    return calls


def _final_uses(node: Node, *, swapped: bool = False) -> list[tuple[Node, Node, bool]]:
    """Uses of a weight past casts and transpositions: (user, operand, is it transposed?)."""
    uses: list[tuple[Node, Node, bool]] = []
    for user in node.users:
        if is_call(user, *_SAME):
            uses += _final_uses(user, swapped=swapped)
        elif is_call(user, *_SWAP) and tensor_of(user).ndim == 2:  # noqa: PLR2004
            uses += _final_uses(user, swapped=not swapped)
        else:
            uses.append((user, node, swapped))
    return uses


def _owner_of(
    user: Node, candidates: Sequence[Target], by_path: Mapping[str, Target]
) -> Target | None:
    """The target on whose behalf ``user`` reads the weight; None for a tied module of another."""
    caller = owner_path(user)
    if by_path.get(caller) in candidates:
        return by_path[caller]
    aliases = {weight for target in candidates for weight in target.weights}
    if f"{caller}.weight" in aliases:
        return None
    if len(aliases) == 1:
        return candidates[0]
    raise SiteError(
        f"{user.name} in {caller or 'the model'} uses a weight that is tied between "
        f"{sorted(aliases)}, and nothing tells which of them it stands for; "
        f"exclude {sorted(target.path for target in candidates)} from target_modules"
    )


def _check_call(user: Node, operand: Node, target: Target, *, swapped: bool) -> None:
    """Raise if ``user`` is no linear call by the target's weight that can be adapted."""
    call = _as_call(user)
    where = f"target {target.path!r}: its weight is used by {user.target} ({user.name})"
    if call is None or call[1] is not operand:
        raise SiteError(f"{where}, which is no linear call; exclude it from target_modules")
    x, _, layout = call
    wanted = target.layout if not swapped else _FLIP[target.layout]
    if layout != wanted or tensor_of(x).shape[-1] != target.in_features:
        raise SiteError(
            f"{where} the other way round, with an input of width {tensor_of(x).shape[-1]} where "
            f"the module takes {target.in_features} features; exclude it from target_modules"
        )


def _calls_of_parametrised(gm: GraphModule, by_path: Mapping[str, Target]) -> dict[Node, Target]:
    """Linear calls made inside a target whose weight is computed on the way (parametrised)."""
    calls: dict[Node, Target] = {}
    for node in gm.graph.nodes:
        target = by_path.get(owner_path(node))
        if target is not None and not target.weights and _as_call(node) is not None:
            calls[node] = target
    return calls


def linear_operands(node: Node) -> tuple[Node, Node, Node | None, str]:
    """Input, weight, bias and the weight's orientation of a linear call of a site."""
    call = _as_call(node)
    if call is None:
        raise TypeError(f"{node.name} is no linear call")
    x, weight, layout = call
    bias = node_arg(node, 2 if layout == "out_in" else 0) if _takes_bias(node) else None
    return x, weight, bias, layout


def _takes_bias(node: Node) -> bool:
    return is_call(node, aten.linear.default, aten.addmm.default)


def _as_call(node: Node) -> tuple[Node, Node, str] | None:
    """``node`` as a linear call (input, weight, the weight's orientation); None if it is none."""
    if is_call(node, aten.linear.default):
        x, weight, layout = node_arg(node, 0), node_arg(node, 1), "out_in"
    elif is_call(node, aten.addmm.default):
        x, weight, layout = node_arg(node, 1), node_arg(node, 2), "in_out"
    elif is_call(node, aten.mm.default, aten.matmul.default):
        x, weight, layout = node_arg(node, 0), node_arg(node, 1), "in_out"
    else:
        return None
    # addmm(..., alpha=2) scales the product, and such a call is no linear layer's.
    return None if x is None or weight is None or node.kwargs else (x, weight, layout)


_FLIP = {"out_in": "in_out", "in_out": "out_in"}
