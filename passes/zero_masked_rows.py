"""Say in the graph what attention gives for a query that may look at no key."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.emit import emit
from vera_fx.passes.engine.graph import Tag, is_call, node_arg, replace_uses, tag_of, tensor_of
from vera_fx.passes.engine.protocol import Numerics
from vera_fx.passes.engine.reports import Action, PassReport, Reason, Rewrite, Skip

aten = torch.ops.aten

_ME = "ZeroMaskedRows"
_MASK = 3


@dataclass(frozen=True, slots=True)
class ZeroMaskedRows:
    """Put the zeros of fully masked rows of an attention into the graph.

    torch defines the output of a query whose mask excludes every key (a padded token) as zero, by
    its fused kernels and by its own softmax. ONNX's converter decomposes the operator into a plain
    softmax over equal scores, which averages all values instead. Exports that go there need the
    zeros as operators.

    Before::

        %x: f32[s0, s1] = input
        %unsqueeze: f32[1, s0, s1] = unsqueeze(%x, 0)
        %unsqueeze_1: f32[1, 1, s0, s1] = unsqueeze(%unsqueeze, 1)
        %numpy_t: f32[s1, s0] = numpy_T(%x)
        %matmul: f32[s0, s0] = matmul(%x, %numpy_t)
        %gt: bool[s0, s0] = gt(%matmul, 3)
        %scaled_dot_product_attention: f32[1, 1, s0, s1] = scaled_dot_product_attention(%unsqueeze_1, %unsqueeze_1, %unsqueeze_1, %gt)
        return [%scaled_dot_product_attention]

    After::

        %x: f32[s0, s1] = input
        %unsqueeze: f32[1, s0, s1] = unsqueeze(%x, 0)
        %unsqueeze_1: f32[1, 1, s0, s1] = unsqueeze(%unsqueeze, 1)
        %numpy_t: f32[s1, s0] = numpy_T(%x)
        %matmul: f32[s0, s0] = matmul(%x, %numpy_t)
        %gt: bool[s0, s0] = gt(%matmul, 3)
        %scaled_dot_product_attention: f32[1, 1, s0, s1] = scaled_dot_product_attention(%unsqueeze_1, %unsqueeze_1, %unsqueeze_1, %gt)
        %looks: bool[s0, 1] = any.dim(%gt, -1, True)
        %zeroed: f32[1, 1, s0, s1] = where.ScalarOther(%looks, %scaled_dot_product_attention, 0.0)
        return [%zeroed]

    Needs: attention as ``scaled_dot_product_attention`` with a boolean mask.
    Keeps: every value and every gradient.
    Skips: attention with an additive mask, whose rows may be masked by large finite numbers.
    """  # noqa: E501

    numerics: ClassVar[Numerics] = Numerics.BITWISE

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Zero the rows of every attention that has a boolean mask."""
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        for node in list(gm.graph.nodes):
            mask = _mask(node)
            if mask is None or _is_done(node):
                continue
            if tensor_of(mask).dtype != torch.bool:
                skips.append(Skip(node.name, Reason.MASK_ADDITIVE))
                continue
            _zero(gm, node, mask)
            rewrites.append(Rewrite(node.name, Action.ROWS_ZEROED))
        return PassReport(tuple(rewrites), tuple(skips))


def _mask(node: Node) -> Node | None:
    if not is_call(node, aten.scaled_dot_product_attention.default):
        return None
    given = node.kwargs.get("attn_mask")
    return given if isinstance(given, Node) else node_arg(node, _MASK)


def _is_done(node: Node) -> bool:
    tags = [tag_of(user) for user in node.users]
    return any(tag is not None and tag.made_by == _ME for tag in tags)


def _zero(gm: GraphModule, node: Node, mask: Node) -> None:
    with gm.graph.inserting_after(node):
        anchor = gm.graph.create_node("call_function", aten.alias.default, (node,))
    with gm.graph.inserting_before(anchor):
        looks = emit(gm, aten.any.dim, (mask, -1, True), like=node, tag=Tag(_ME, role="looks"))
        rows = (looks, node, 0.0)
        zeroed = emit(gm, aten.where.ScalarOther, rows, like=node, tag=Tag(_ME, role="zeroed"))
    gm.graph.erase_node(anchor)
    replace_uses(node, zeroed)
