"""Projections of a ``state_dict`` under the numbers that the model at hand gives them.

A bank numbers its projections as adapters come and go, so that another model with the same adapters may have
other numbers for the same tensors. By number alone an adapter would silently get another one's projections.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vera_fx.bank.bank import AdapterBank
from vera_fx.base.modules import BANK
from vera_fx.errors import CheckpointError, listing

Sets = dict[str, dict[str, Tensor]]
"""Tensors by name, by number."""


def renumber(bank: AdapterBank, state: dict[str, Any], prefix: str) -> None:
    """Rename the projections in ``state``, in place, before any of it is loaded.

    Args:
        bank: of the model that loads.
        state: the whole state.
        prefix: of the model's own keys in it.

    Raises:
        CheckpointError: it cannot be told whose projections those of the state are.
    """
    start = f"{prefix}{BANK}.projections."
    given = _given(state, start)
    numbers = _matched(given, _wanted(bank, state, prefix))
    moved = {old: new for old, new in numbers.items() if old != new}
    stay = given.keys() - moved.keys()
    if any(new in stay for new in moved.values()):
        raise _unknown(given.keys())
    values = {
        f"{start}{new}.{name}": state.pop(f"{start}{old}.{name}")
        for old, new in moved.items()
        for name in given[old]
    }
    state.update(values)


def _given(state: Mapping[str, Any], start: str) -> Sets:
    found: Sets = {}
    for key in (key for key in state if key.startswith(start)):
        number, _, name = key.removeprefix(start).partition(".")
        found.setdefault(number, {})[name] = state[key]
    return found


def _wanted(bank: AdapterBank, state: Mapping[str, Any], prefix: str) -> Sets:
    """The projections of those adapters that the state is of, if a state has them at all."""
    start = f"{prefix}{BANK}.adapters."
    names = {key.removeprefix(start).partition(".")[0] for key in state if key.startswith(start)}
    numbers = {bank.adapter(name).projections for name in names if name in bank.adapters}
    sets = {number: dict(bank.shared.pair(number).state_dict()) for number in numbers}
    return {number: tensors for number, tensors in sets.items() if tensors}


def _matched(given: Sets, wanted: Sets) -> dict[str, str]:
    """The number here of each set there: of the same tensors, or of the only ones of those sizes."""
    left_given, left, numbers = dict(given), dict(wanted), dict[str, str]()
    for old, tensors in given.items():
        order = sorted(left, key=lambda number: number != old)
        new = next((number for number in order if _equal(tensors, left[number])), None)
        if new is not None:
            numbers[old] = new
            del left[new], left_given[old]
    for old, tensors in left_given.items():
        here = list(_fitting(tensors, left))
        if len(here) > 1 or (here and len(list(_fitting(tensors, left_given))) > 1):
            raise _unknown(given.keys())
        if here:
            numbers[old] = here[0]
    return numbers


def _equal(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether they are the same, as far as the dtype of what is given tells."""
    if not _fits(given, own) or any(t.is_meta for t in (*given.values(), *own.values())):
        return False
    return all(torch.equal(own[name].to(t), t) for name, t in given.items())


def _fitting(tensors: Mapping[str, Tensor], sets: Sets) -> Iterator[str]:
    return (number for number, others in sets.items() if _fits(tensors, others))


def _fits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)


def _unknown(numbers: Collection[str]) -> CheckpointError:
    return CheckpointError(
        f"this state_dict has projections {listing(sorted(numbers))}, and they are not those that this "
        "model's adapters have, so that it cannot be told whose they are; save adapters with "
        "vera_fx.save_adapters and load each with vera_fx.load_adapter"
    )
