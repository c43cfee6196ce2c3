"""Compute again in backward what costs less to compute than to keep."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.functions import (
    recomputed,
)
from vera_fx.passes.engine.graph import is_call, tag_of
from vera_fx.passes.engine.protocol import Numerics
from vera_fx.passes.engine.reports import Action, PassReport, Rewrite

aten = torch.ops.aten

_CHEAP = frozenset(
    {
        aten.gelu.default,
        aten.layer_norm.default,
        aten.mul.Tensor,
        aten.rms_norm.default,
        aten.silu.default,
    }
)
"""Operators whose operands, and not whose result, the base keeps for its own gradients anyway."""

_VIEWS = frozenset({aten.view.default, aten.reshape.default})


@dataclass(frozen=True, slots=True)
class RecomputeInBackward:
    """Let compiled code compute a site's input and merged weight again instead of keeping them.

    A frozen base keeps no input of its linear layers. The plan ``dense`` needs them for ``G.T @ x``,
    but where the input is a norm or a pointwise function, its own operands are kept, and
    a second evaluation costs next to nothing. torch.compile would not do so by itself: what a
    product in backward reads counts as not recomputable.

    Before::

        %lin_weight: f32[5, 3] = lin.weight
        %lin_bias: f32[5] = lin.bias
        %x: f32[s0, 3] = input
        %slot_vera_a: f32[2, 4] = slot.vera_A
        %slot_vera_b: f32[7, 2] = slot.vera_B
        %slot_lambda_d: f32[2] = slot.lambda_d
        %slot_lambda_b: f32[5] = slot.lambda_b
        %silu: f32[s0, 3] = silu(%x)
        %cut_A: f32[2, 3] = slice(%slot_vera_a, 1, 0, 3)
        %cut_B: f32[5, 2] = slice(%slot_vera_b, 0, 0, 5)
        %merged_weight: f32[5, 3] = merged_weight(%lin_weight, %cut_A, %cut_B, %slot_lambda_d, %slot_lambda_b)
        %merged: f32[s0, 5] = merged_linear(%silu, None, %merged_weight, %lin_weight, %lin_bias, %cut_A, %cut_B, %slot_lambda_d, %slot_lambda_b)
        return [%merged]

    After::

        %lin_weight: f32[5, 3] = lin.weight
        %lin_bias: f32[5] = lin.bias
        %x: f32[s0, 3] = input
        %slot_vera_a: f32[2, 4] = slot.vera_A
        %slot_vera_b: f32[7, 2] = slot.vera_B
        %slot_lambda_d: f32[2] = slot.lambda_d
        %slot_lambda_b: f32[5] = slot.lambda_b
        %silu: f32[s0, 3] = recomputed(aten.silu.default, %x)
        %cut_A: f32[2, 3] = slice(%slot_vera_a, 1, 0, 3)
        %cut_B: f32[5, 2] = slice(%slot_vera_b, 0, 0, 5)
        %merged_weight: f32[5, 3] = merged_weight_again(%lin_weight, %cut_A, %cut_B, %slot_lambda_d, %slot_lambda_b)
        %merged: f32[s0, 5] = merged_linear(%silu, None, %merged_weight, %lin_weight, %lin_bias, %cut_A, %cut_B, %slot_lambda_d, %slot_lambda_b)
        return [%merged]

    Needs: sites merged by `MergeWeight`.
    Keeps: every value and gradient; eager code as it is.
    Skips: nothing; an input that is no cheap function of what is kept stays kept.
    """  # noqa: E501

    folds: frozenset[str] = frozenset()
    """Sites whose merged weight is computed again."""

    numerics: ClassVar[Numerics] = Numerics.BITWISE

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Mark the inputs of ``dense`` sites, and the merged weights of ``folds``."""
        rewrites: list[Rewrite] = []
        readers: dict[Node, list[str]] = {}
        for node in gm.graph.nodes:
            tag = tag_of(node)
            if tag is None:
                continue
            if tag.again is not None and tag.site in self.folds and node.target is not tag.again:
                node.target = tag.again
                rewrites.append(Rewrite(tag.site, Action.WEIGHT_RECOMPUTED))
            source = None if tag.keeps is None else _source(node.args[tag.keeps])
            if source is not None:
                readers.setdefault(source, []).append(tag.site)
        for source, sites in readers.items():
            source.args = (cast("Any", source.target), *source.args)
            source.target = recomputed
            rewrites += (Rewrite(site, Action.INPUT_RECOMPUTED, source.name) for site in sites)
        return PassReport(tuple(rewrites))


def _source(value: object) -> Node | None:
    """The cheap call that ``value`` is the result of, or a view of; None if there is none."""
    while isinstance(value, Node) and is_call(value, *_VIEWS):
        value = value.args[0]
    cheap = isinstance(value, Node) and is_call(value, *_CHEAP) and not value.kwargs
    return value if cheap and isinstance(value, Node) else None
