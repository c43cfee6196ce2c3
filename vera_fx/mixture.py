"""The names that a whole ``generate`` runs under, wherever it calls the model."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_held: ContextVar[tuple[object, tuple[str, ...]] | None] = ContextVar("row_names", default=None)


@contextlib.contextmanager
def names_for_rows(bank: object, names: tuple[str, ...]) -> Iterator[None]:
    """Inside the block every call of the bank's model has the adapters ``names`` for its rows.

    A call with a multiple of as many rows, as in beam search, repeats each name in place.
    """
    token = _held.set((bank, names))
    try:
        yield
    finally:
        _held.reset(token)


def held_names(bank: object) -> tuple[str, ...] | None:
    """The names that hold for calls of the bank's model; None outside of `names_for_rows`."""
    held = _held.get()
    return held[1] if held is not None and held[0] is bank else None


def in_mixture(bank: object) -> bool:
    """True inside `names_for_rows` of this bank's model."""
    return held_names(bank) is not None
