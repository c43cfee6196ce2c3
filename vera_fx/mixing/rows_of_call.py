"""Which rows a call has, and whose adapters they ask for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vera_fx.capturing.signature import Call
from vera_fx.errors import AdapterError

_ROW_INPUTS = ("decoder_input_ids", "input_ids", "decoder_inputs_embeds", "inputs_embeds")


def row_count(call: Call) -> int:
    """How many rows a call has; 0 if it has no input to tell by."""
    arguments = [call.arguments[name] for name in _ROW_INPUTS if name in call.arguments]
    tensors = (t for t in [*arguments, *call.leaves] if isinstance(t, Tensor) and t.ndim)
    return next((tensor.shape[0] for tensor in tensors), 0)


def row_names(call: Call, names: Sequence[str]) -> list[str]:
    """The names for the rows of a call that may have a multiple of as many rows.

    Raises:
        AdapterError: the call's rows are no multiple of the names.
    """
    rows = row_count(call)
    if rows % len(names):
        raise AdapterError(
            f"{len(names)} adapter_names were given for a call with {rows} rows, which is no multiple"
        )
    return [name for name in names for _ in range(rows // len(names))]


def rows_among(values: Sequence[Tensor], leaves: Sequence[Tensor], rows: int) -> frozenset[int]:
    """Numbers of the inputs that hold one row per index of their first dimension.

    The first input of that many rows sets the batch's size. Others belong to it if tracing has
    found their first size to be the same, or if they have that many rows and further dimensions.

    Args:
        values: the graph's fake inputs.
        leaves: the call's inputs.
        rows: how many names the call was given.

    Raises:
        AdapterError: no input has as many rows.
    """
    given = leaves[: len(values)]
    found = [n for n, leaf in enumerate(given) if leaf.ndim and leaf.shape[0] == rows]
    if not found:
        shapes = ", ".join(str(list(leaf.shape)) for leaf in given) or "none"
        raise AdapterError(
            f"{rows} adapter_names were given, one per row, but no input has {rows} rows: the "
            f"inputs have the shapes {shapes}"
        )
    first = _size(values[found[0]].shape[0])
    return frozenset(n for n in found if leaves[n].ndim > 1 or _size(values[n].shape[0]) == first)


def _size(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
