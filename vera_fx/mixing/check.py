"""Batches that mix adapters: the names of a call, checked and made ready for a graph."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from vera_fx.bank.bank import AdapterBank, bank_of
from vera_fx.bank.names import BASE
from vera_fx.bank.packed import Packed
from vera_fx.base.hf import tokenwise
from vera_fx.errors import AdapterError, listing, nearest
from vera_fx.mixing.gather import TableNames
from vera_fx.mixing.mixer import Mix, Mixer

STORE = "store"
"""Where a bank keeps the `vera_fx.checkpoint.store.AdapterStore` that serves further names."""


def mix_of(model: nn.Module, names: Any) -> Mix:
    """The mixture that ``adapter_names`` asks for.

    Raises:
        AdapterError: as `check_mixture`.
    """
    check_mixture(model, names)
    bank = bank_of(model)
    if not bank.enabled:
        names = [BASE] * len(names)
    tables = names.tables if isinstance(names, TableNames) else None
    return mixer_of(model).mix(names, stored_of(bank, names), tables)


def mixer_of(model: nn.Module) -> Mixer:
    """The mixer for the adapters that the bank has now."""
    bank = bank_of(model)
    mixer = bank.__dict__.get("mixer")
    if mixer is None or not mixer.is_current():
        bank.slots.follow()
        mixer = bank.__dict__["mixer"] = Mixer(bank, tokenwise(model))
    return mixer


def stored_of(bank: AdapterBank, names: Sequence[str]) -> Mapping[str, Packed]:
    """Those of the names that only a store knows, loaded."""
    store = bank.__dict__.get(STORE)
    away = [n for n in dict.fromkeys(names) if n != BASE and n not in bank.adapters]
    return store.take(away) if store is not None and away else {}


def check_mixture(model: nn.Module, names: Any) -> None:
    """Refuse names that no mixture can be made of.

    Raises:
        AdapterError: the names are no sequence of known names, adapters are merged, or gradients are
            taken in train mode and an adapter that may train does not.
    """
    bank = bank_of(model)
    _check_state(bank)
    _check_names(bank, names)
    if model.training and torch.is_grad_enabled() and not isinstance(names, TableNames):
        _check_training(bank, names)


def _check_training(bank: AdapterBank, names: Sequence[str]) -> None:
    """No silent training without an adapter: one that may train does, or was said not to."""
    for row, name in enumerate(names if bank.enabled else ()):
        if name != BASE and name in bank.adapters:
            adapter = bank.adapter(name)
            if adapter.trainable and not adapter.learning:
                raise AdapterError(
                    f"adapter_names[{row}] is {name!r}, which may train but does not now, and the model "
                    "is in train mode; call vera_fx.train_adapters(model, [...]) with all adapters that "
                    f"are to train, or vera_fx.set_trainable(model, {name!r}, trainable=False) to use it "
                    "as it is"
                )


def _check_state(bank: AdapterBank) -> None:
    if bank.merged:
        raise AdapterError(
            f"adapter_names cannot be used while {listing(bank.merged)} is merged into the base; "
            "unmerge the model first"
        )

    cut = next((path for path, target in bank.structure.targets.items() if target.cut), None)
    if cut is not None:
        raise AdapterError(
            f"adapter_names cannot be used under tensor parallelism ({cut!r} is cut over processes); call "
            "the model once per adapter (set_adapter)"
        )


def _check_names(bank: AdapterBank, names: Any) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise AdapterError(
            f"adapter_names must be a list with one adapter's name per row, got {names!r}"
        )
    for row, name in enumerate(cast("Sequence[Any]", names)):
        if name != BASE and name in bank.adapters:
            _check_kind(bank, row, name)
        elif name != BASE:
            _check_stored(bank, row, name)


def _check_kind(bank: AdapterBank, row: int, name: str) -> None:
    kind = bank.adapter(name).kind
    if kind.not_mixed:
        raise AdapterError(
            f"adapter_names[{row}] is {name!r}, a {kind.name} adapter: {kind.not_mixed}; call the model "
            "for this adapter alone (set_adapter), or merge it"
        )


def _check_stored(bank: AdapterBank, row: int, name: Any) -> None:
    store = bank.__dict__.get(STORE)
    if store is None or name not in store:
        known = [*bank.adapters, *(store.names() if store is not None else ()), BASE]
        raise AdapterError(
            f"adapter_names[{row}] is {name!r}, which is no adapter"
            f"{nearest(str(name), known) or f'; known: {listing(known)}'}"
        )
