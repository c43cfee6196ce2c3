"""Integers inside a call's objects that a graph leaves open, as sizes of tensors.

A sliding-window cache counts its tokens in a plain integer. As a constant of the signature it would
ask for another graph with every token. So a graph is given an empty tensor of that size in its
place: torch.export makes the size a symbol, and inside the traced forward the symbol is the integer
again. Comparisons with it (is the window full?) become conditions under which the graph is admitted.
"""

from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

OPEN = ("cumulative_length", "cumulative_length_int", "max_cache_len", "batch_size")
"""Attributes of transformers' cache layers (5.23): tokens seen, and a static cache's sizes."""


_PLAIN = frozenset({Tensor, torch.dtype, torch.device, bool, int, float, str, type(None)})


def integers_as_sizes(value: Any) -> Any:
    """``value`` itself, or a copy of it in which open integers are empty tensors ``(0, integer)``.

    Objects and lists on the way to such an integer are copied, everything else is shared.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, list):
        parts = [integers_as_sizes(part) for part in cast("list[Any]", value)]
        same = all(new is old for new, old in zip(parts, cast("list[Any]", value), strict=True))
        return value if same else parts
    if not _has_state(value):
        return value
    changed: dict[str, Any] = {}
    for name, old in vars(value).items():
        new = _as_size(old) if name in OPEN else integers_as_sizes(old)
        if new is not old:
            changed[name] = new
    return _replaced(value, changed) if changed else value


def sizes_as_integers(value: Any) -> None:
    """Turn the empty tensors inside ``value`` back into integers, in place."""
    if isinstance(value, list):
        for part in cast("list[Any]", value):
            sizes_as_integers(part)
    elif _has_state(value):
        for name, part in vars(value).items():
            if name in OPEN and _is_size(part):
                value.__dict__[name] = part.shape[1]
            else:
                sizes_as_integers(part)


def _has_state(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, Tensor | nn.Module | type)


def _as_size(integer: Any) -> Any:
    return torch.empty(0, integer) if type(integer) is int and integer >= 0 else integer


def _is_size(value: Any) -> TypeGuard[Tensor]:
    # The first size is 0, so that the integer is never taken for the rows of a batch.
    return isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] == 0  # noqa: PLR2004


def _replaced(value: Any, changed: dict[str, Any]) -> Any:
    kind = cast("type[Any]", type(value))
    twin = kind.__new__(kind)  # pyright: ignore
    twin.__dict__.update(vars(value) | changed)
    return twin
