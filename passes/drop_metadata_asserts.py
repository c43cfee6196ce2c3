"""Drop the checks of dtype, device and layout that capture leaves beside every cast."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule

from vera_fx.passes.engine.graph import is_call
from vera_fx.passes.engine.protocol import Numerics
from vera_fx.passes.engine.reports import Action, PassReport, Rewrite

_ASSERT = torch.ops.aten._assert_tensor_metadata.default


@dataclass(frozen=True, slots=True)
class DropMetadataAsserts:
    """Remove ``_assert_tensor_metadata``: the call's signature has already fixed what it checks.

    A graph runs only for calls of its signature, which pins dtype and device of every input, so
    these checks cannot fail; in eager mode each costs as much as a small operator.

    Before::

        %x: f32[s0, s1] = input
        %_assert_tensor_metadata_default = _assert_tensor_metadata(%x, dtype=torch.float32, device=cpu, layout=torch.strided)
        %to: f64[s0, s1] = to.dtype(%x, torch.float64)
        return [%to]

    After::

        %x: f32[s0, s1] = input
        %to: f64[s0, s1] = to.dtype(%x, torch.float64)
        return [%to]

    Needs: graphs selected by signature.
    Keeps: every value and every gradient.
    Skips: nothing.
    """

    numerics: ClassVar[Numerics] = Numerics.BITWISE

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Erase every such check."""
        checks = [node for node in gm.graph.nodes if is_call(node, _ASSERT)]
        for node in checks:
            gm.graph.erase_node(node)
        return PassReport(tuple(Rewrite(node.name, Action.CHECK_ERASED) for node in checks))
