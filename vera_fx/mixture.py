"""The names that a whole ``generate`` runs under, wherever it calls the model."""

import contextlib
import threading
from collections.abc import Iterator

# Not a ContextVar: hooks ask for it, and Dynamo can trace them only with a thread's own state.
_held = threading.local()


@contextlib.contextmanager
def names_for_rows(bank: object, names: tuple[str, ...]) -> Iterator[None]:
    """Inside the block every call of the bank's model has the adapters ``names`` for its rows.

    A call with a multiple of as many rows, as in beam search, repeats each name in place.
    """
    before = getattr(_held, "now", None)
    _held.now = bank, names
    try:
        yield
    finally:
        _held.now = before


def held_names(bank: object) -> tuple[str, ...] | None:
    """The names that hold for calls of the bank's model; None outside of `names_for_rows`."""
    held = getattr(_held, "now", None)
    return held[1] if held is not None and held[0] is bank else None


def in_mixture(bank: object) -> bool:
    """True inside `names_for_rows` of this bank's model."""
    return held_names(bank) is not None
