"""The names that a whole ``generate`` runs under, wherever it calls the model."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vera_fx._context import holding, now


@dataclass(slots=True)
class Held:
    """What holds for every call of one bank's model inside `names_for_rows`.

    Attributes:
        bank: the bank.
        names: the adapters' names, one per row.
        stored: those that no module of the bank holds, kept in memory for the whole block.
        kept: a place for the mixture that was gathered last (`vera_fx.mixing.kept_mix`).
    """

    bank: object
    names: tuple[str, ...]
    stored: Mapping[str, Any] = field(default_factory=dict)
    kept: Any = None


@contextlib.contextmanager
def names_for_rows(
    bank: object, names: tuple[str, ...], stored: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Inside the block every call of the bank's model has the adapters ``names`` for its rows.

    A call with a multiple of as many rows, as in beam search, repeats each name in place.
    """
    with holding("names", Held(bank, names, stored or {})):
        yield


def held_by(bank: object) -> Held | None:
    """What holds for calls of the bank's model; None outside of `names_for_rows`."""
    held = now("names")
    return held if held is not None and held.bank is bank else None
