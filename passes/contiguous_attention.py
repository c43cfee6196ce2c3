"""Say in the graph that attention's output lies in order."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.emit import emit
from vera_fx.passes.engine.graph import Tag, is_call, replace_uses, tag_of
from vera_fx.passes.engine.protocol import Numerics
from vera_fx.passes.engine.reports import Action, PassReport, Rewrite

aten = torch.ops.aten

_ME = "ContiguousAttention"


@dataclass(frozen=True, slots=True)
class ContiguousAttention:
    """Copy the output of every attention into contiguous memory.

    Which strides attention's output has is up to its kernel. Models are traced with those of one
    kernel and take views accordingly; a compiler that decomposes the operator gets other strides, of
    which the same view may not exist. Exports that go there need the copy.

    Before::

        %x: f32[s0, s1] = input
        %unsqueeze: f32[1, s0, s1] = unsqueeze(%x, 0)
        %unsqueeze_1: f32[1, 1, s0, s1] = unsqueeze(%unsqueeze, 1)
        %scaled_dot_product_attention: f32[1, 1, s0, s1] = scaled_dot_product_attention(%unsqueeze_1, %unsqueeze_1, %unsqueeze_1)
        return [%scaled_dot_product_attention]

    After::

        %x: f32[s0, s1] = input
        %unsqueeze: f32[1, s0, s1] = unsqueeze(%x, 0)
        %unsqueeze_1: f32[1, 1, s0, s1] = unsqueeze(%unsqueeze, 1)
        %scaled_dot_product_attention: f32[1, 1, s0, s1] = scaled_dot_product_attention(%unsqueeze_1, %unsqueeze_1, %unsqueeze_1)
        %in_order: f32[1, 1, s0, s1] = clone(%scaled_dot_product_attention, memory_format=torch.contiguous_format)
        return [%in_order]

    Needs: attention as ``scaled_dot_product_attention``; what follows is traced anew.
    Keeps: every value and every gradient.
    Skips: nothing.
    """  # noqa: E501

    numerics: ClassVar[Numerics] = Numerics.BITWISE

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Add the copies."""
        found = [
            node
            for node in gm.graph.nodes
            if is_call(node, aten.scaled_dot_product_attention.default) and not _is_done(node)
        ]
        for node in found:
            with gm.graph.inserting_after(node):
                copy = emit(
                    gm,
                    aten.clone.default,
                    (node,),
                    kwargs={"memory_format": torch.contiguous_format},
                    like=node,
                    tag=Tag(_ME, role="in_order"),
                )
            replace_uses(node, copy)
        return PassReport(tuple(Rewrite(node.name, Action.MADE_CONTIGUOUS) for node in found))


def _is_done(node: Node) -> bool:
    tags = [tag_of(user) for user in node.users]
    return any(tag is not None and tag.made_by == _ME for tag in tags)
