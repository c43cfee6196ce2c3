"""Programs whose rows may each have another adapter: form ``"rows"``."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vera_fx.errors import ExportError
from vera_fx.export.module import INDEX, VECTORS, ProgramModule

_OUTSIDE = f"{INDEX} has an entry that is not the number of a stacked adapter"


class RowProgramModule(ProgramModule):
    """Takes stacked vectors and an index per row, and gathers each row's own inside the program."""

    stacked = True

    def run(self, given: Mapping[str, Any]) -> Any:
        """Gather, then run the graph."""
        arguments = dict(given)
        stacks, index = arguments.pop(VECTORS), arguments.pop(INDEX)
        first, *others = (stack.shape[0] for stack in stacks.values())
        if any(count != first for count in others):
            raise ExportError("the stacked vectors are of several numbers of adapters")
        within = (index >= 0) & (index < first)
        # Kernels word it otherwise, and some count negative numbers from the end.
        torch.ops.aten._assert_async.msg(within.all(), _OUTSIDE)
        rows = {key: stack.index_select(0, index) for key, stack in stacks.items()}
        return super().run({**arguments, VECTORS: rows})


def row_arguments(vectors: Mapping[str, Tensor], rows: int) -> dict[str, Any]:
    """What an example call of such a program has beside the model's own arguments.

    Args:
        vectors: an adapter's tensors by key.
        rows: how many rows the example call has.
    """
    # Two entries, so that their number stays open.
    stacks = {key: torch.stack([value, value]) for key, value in vectors.items()}
    device = next(iter(vectors.values())).device
    return {VECTORS: stacks, INDEX: torch.arange(rows, device=device) % 2}
