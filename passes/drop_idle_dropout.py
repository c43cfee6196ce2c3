"""Drop dropout that drops nothing: of eval mode, or with a probability of 0."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.graph import is_call, node_arg
from vera_fx.passes.engine.protocol import Numerics
from vera_fx.passes.engine.reports import Action, PassReport, Rewrite

_DROPOUT = torch.ops.aten.dropout.default


@dataclass(frozen=True, slots=True)
class DropIdleDropout:
    """Let readers of an idle dropout read its input, which is what it returns.

    An eager call would cost as much as a small operator. In compiled code it becomes a copy, across
    which nothing is recomputed in backward.

    Before::

        %x: f32[s0, s1] = input
        %cos: f32[s0, s1] = cos(%x)
        %dropout: f32[s0, s1] = dropout(%cos, 0.5, False)
        %sin: f32[s0, s1] = sin(%dropout)
        return [%sin]

    After::

        %x: f32[s0, s1] = input
        %cos: f32[s0, s1] = cos(%x)
        %sin: f32[s0, s1] = sin(%cos)
        return [%sin]

    Needs: graphs selected by the mode and the probabilities of the model's modules.
    Keeps: every value and every gradient.
    Skips: nothing.
    """

    numerics: ClassVar[Numerics] = Numerics.BITWISE

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Erase every dropout that is off."""
        rewrites: list[Rewrite] = []
        for node in gm.graph.nodes:
            source = node_arg(node, 0)
            if source is not None and _is_idle(node):
                node.replace_all_uses_with(source)
                gm.graph.erase_node(node)
                rewrites.append(Rewrite(node.name, Action.DROPOUT_ERASED))
        return PassReport(tuple(rewrites))


def _is_idle(node: Node) -> bool:
    return is_call(node, _DROPOUT) and not (node.args[1] and node.args[2])
