"""Reads one saved adapter as plain data that fits a bank: every size and name checked first."""

import dataclasses
import functools
import threading
from collections.abc import Container, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vera_fx.bank.bank import bank_of
from vera_fx.bank.blueprint import Blueprint
from vera_fx.bank.build import build_adapter, draw
from vera_fx.bank.packed import Group, Packed
from vera_fx.bank.projections import Projections
from vera_fx.checkpoint.peft_config import CONFIG_FILE
from vera_fx.checkpoint.saved import open_saved
from vera_fx.checkpoint.state_dict import owned_tensors, plan_of
from vera_fx.checkpoint.weights_file import (
    HASH,
    check_finite,
    check_shared,
    check_state,
    is_stray,
    projections_hash,
    shared_keys,
    take_shared,
)
from vera_fx.config import AdapterConfig
from vera_fx.errors import CheckpointError, listing
from vera_fx.mixing.check import mixer_of

_KINDS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """What all adapters of one configuration have in common on one model.

    Attributes:
        layout: their targets.
        tensors: every tensor, without values, under its key in files.
        vectors: for each target's path, the key of each of its vectors by name.
        copies: path of every tensor of the base that is replaced -> its key.
    """

    layout: Blueprint
    tensors: Mapping[str, Tensor]
    vectors: Mapping[str, Mapping[str, str]]
    copies: Mapping[str, str]


class Packer:
    """Reads adapters for one model's bank. Reads the model and never changes it."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._bank = model, bank_of(model)
        self._lock = threading.Lock()
        self._forms: dict[AdapterConfig, Form] = {}
        self._hash = functools.lru_cache(_KINDS)(lambda known: projections_hash(known.tensors))

    def read(self, folder: Path) -> Packed:
        """The adapter in ``folder``.

        Raises:
            CheckpointError: files that are missing, damaged, of other sizes or not finite; other
                projections, targets or trained copies than those of the bank's own adapters.
        """
        with open_saved(folder) as saved:
            config, metadata, source = saved.config, saved.weights.metadata, str(saved.weights.path)
            form = self._form(config, folder)
            known = set(shared_keys(form.layout.kind).values())
            check_state(form.tensors, saved.weights.entries, source=source, others=known)
            state = saved.weights.read()
            check_shared(form.layout.kind, state, metadata, source)
        saved.warn_of_changes(stacklevel=2)
        check_finite({k: v for k, v in state.items() if not is_stray(k)}, source, remedy="")
        key = self._projections(form, state, metadata, folder)
        mixer = mixer_of(self._model)
        group = mixer.groups[key]
        _check_places(form, group, mixer.copies, folder)
        copies = {path: state[name].detach().clone() for path, name in form.copies.items()}
        row = _row(form, group, state)
        return Packed(config, group, row, copies, self._bank.projections[key])

    def fits(self, packed: Packed) -> bool:
        """Whether the bank still holds the projections that the adapter was trained with."""
        return self._bank.projections._modules.get(packed.projections) is packed.pair

    def _form(self, config: AdapterConfig, folder: Path) -> Form:
        # Before anything of that size is made: the file may come from anyone.
        if config.r not in self._bank.shared.ranks():
            raise self._other_projections(folder)
        with self._lock:  # it is worth making once
            if config not in self._forms:
                if len(self._forms) >= _KINDS:
                    self._forms.clear()
                self._forms[config] = self._new_form(config, folder)
            return self._forms[config]

    def _new_form(self, config: AdapterConfig, folder: Path) -> Form:
        layout = plan_of(self._model, config, folder, autocast=True)
        fresh = dataclasses.replace(layout, config=config.replace(init_weights=True))
        adapter = build_adapter(self._model, fresh, trainable=False)
        named = dict(owned_tensors(adapter))
        keys = {id(tensor): key for key, tensor in named.items()}
        vectors: dict[str, dict[str, str]] = {}
        for path in adapter.vectors.by_path:
            found = adapter.vectors_at(path)
            if found is not None:
                vectors[path] = {name: keys[id(t)] for name, t in found.tensors.items()}
        copies = {
            path: keys[id(tensor)] for path, tensor in adapter.copied.items() if id(tensor) in keys
        }
        return Form(layout, {k: t.to("meta") for k, t in named.items()}, vectors, copies)

    def _projections(
        self, form: Form, state: Mapping[str, Tensor], metadata: Mapping[str, str], folder: Path
    ) -> str:
        """The key of the projections that the adapter was trained with."""
        for key, known in self._bank.shared.items():
            if known.kind is form.layout.kind and self._same(known, form, state, metadata):
                return key
        raise self._other_projections(folder)

    def _other_projections(self, folder: Path) -> CheckpointError:
        return CheckpointError(
            f"the adapter in {folder} was trained with other projections than those of the bank "
            "(another rank, seed, or set of targets); load one adapter of its kind with "
            "load_adapter first, which brings its projections"
        )

    def _same(
        self,
        known: Projections,
        form: Form,
        state: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> bool:
        stored = take_shared(form.layout.kind, state, "the file")
        if stored is not None:
            # A file may hold more of them than the adapter's targets use.
            sizes = {name: tensor.shape for name, tensor in known.tensors.items()}
            return known.equals({n: t[tuple(map(slice, sizes[n]))] for n, t in stored.items()})
        if HASH in metadata:
            return metadata[HASH] == self._hash(known)
        return known.equals(draw(form.layout))


def _check_places(form: Form, group: Group, copies: Container[str], folder: Path) -> None:
    targets = [path for path in form.vectors if path not in group.places]
    others = [path for path in form.copies if path not in copies]
    if targets or others:
        raise CheckpointError(
            f"the adapter in {folder} ({CONFIG_FILE}) has vectors or trained copies for "
            f"{listing([*targets, *others])}, where no adapter of the bank has any; load one "
            "adapter of its kind with load_adapter first"
        )


def _row(form: Form, group: Group, state: Mapping[str, Tensor]) -> Tensor:
    row = torch.zeros(group.width, dtype=group.dtype)
    columns = dict(group.columns())
    for path, keys in form.vectors.items():
        for name, start, end in columns[path]:
            row[start:end] = state[keys[name]]
    return row
