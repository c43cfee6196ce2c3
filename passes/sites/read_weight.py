"""Base products whose weight the graph reads: ``nn.Linear`` and all that multiply by a plain tensor.

A call is a site if its weight operand is the target's parameter, followed through casts and
transpositions, or if the call was made inside the target module itself (parametrised weights).
Weights that several targets share (tied) are told apart by the module that made the call.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.graph import is_call, owner_path, tag_of, tensor_of
from vera_fx.passes.engine.protocol import SiteError
from vera_fx.passes.sites.products import BaseCall, linear_call
from vera_fx.passes.sites.target import Target

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
_FLIP = {"out_in": "in_out", "in_out": "out_in"}


@dataclass(frozen=True, slots=True)
class ReadWeight:
    """A product by a tensor that the graph reads.

    Attributes:
        layout: ``"out_in"`` if the weight is ``(out, in)`` as in ``nn.Linear``, ``"in_out"`` if it is
            ``(in, out)`` as in Hugging Face's ``Conv1D``.
    """

    layout: str = "out_in"

    @property
    def plans(self) -> tuple[str, ...]:
        """All: the weight can be read and folded into."""
        return ("factored", "scaled", "merged", "dense")

    def calls(
        self, gm: GraphModule, targets: Sequence[Target], by_path: Mapping[str, Target]
    ) -> Mapping[Node, Target]:
        """Every linear call by the targets' weights.

        Raises:
            SiteError: a weight is used by something that is not a linear call, or by a call that cannot
                be given to one target.
        """
        owners: dict[str, list[Target]] = {}
        for target in targets:
            for weight in target.weights:
                owners.setdefault(weight, []).append(target)
        found = dict(_calls_of_weights(gm, owners, by_path))
        return found | dict(_calls_of_parametrised(gm, targets))

    def call(self, node: Node) -> BaseCall | None:
        """The linear call at ``node``."""
        return linear_call(node)


def _calls_of_weights(
    gm: GraphModule, owners: Mapping[str, list[Target]], by_path: Mapping[str, Target]
) -> Iterator[tuple[Node, Target]]:
    """Every use of a target's weight attribute, as (linear call, target)."""
    for node in gm.graph.nodes:
        if node.op != "get_attr" or str(node.target) not in owners:
            continue
        for user, operand, swapped in _final_uses(node):
            target = _owner_of(user, owners[str(node.target)], by_path)
            if target is not None:
                _check_call(user, operand, target, swapped=swapped)
                yield user, target


def _final_uses(node: Node, *, swapped: bool = False) -> list[tuple[Node, Node, bool]]:
    """Uses of a weight past casts and transpositions: (user, operand, is it transposed?)."""
    uses: list[tuple[Node, Node, bool]] = []
    for user in node.users:
        if tag_of(user) is not None:  # a branch that depends on the weight
            continue
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
    call = linear_call(user)
    where = f"target {target.path!r}: its weight is used by {user.target} ({user.name})"
    if call is None or call.weight is not operand:
        raise SiteError(f"{where}, which is no linear call; exclude it from target_modules")
    wanted = target.product.layout if not swapped else _FLIP[target.product.layout]
    if call.layout != wanted or tensor_of(call.x).shape[-1] != target.in_features:
        raise SiteError(
            f"{where} the other way round, with an input of width {tensor_of(call.x).shape[-1]} where "
            f"the module takes {target.in_features} features; exclude it from target_modules"
        )


def _calls_of_parametrised(
    gm: GraphModule, targets: Sequence[Target]
) -> Iterator[tuple[Node, Target]]:
    """Linear calls made inside a target whose weight is computed on the way (parametrised)."""
    computed = {path: t for t in targets if not t.weights for path in t.paths}
    for node in gm.graph.nodes:
        target = computed.get(owner_path(node))
        if target is not None and linear_call(node) is not None:
            yield node, target
