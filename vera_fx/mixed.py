"""Batches that mix adapters: one name per row, one graph for every mixture.

The graph multiplies the whole batch by A and B once; what differs from row to row is one tensor of
vectors, gathered before the call and handed to the graph as an input. So neither which adapters are
in a batch nor how many a bank holds is part of any graph.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vera_fx.adapter import Adapter
from vera_fx.bank import AdapterBank, Slot, bank_of
from vera_fx.build import attribute_of
from vera_fx.errors import AdapterError, listing, nearest
from vera_fx.hf import tokenwise
from vera_fx.packed import Group, Packed
from vera_fx.passes import AdaptationPlan, Branch, Redirect, RowSource, RowVectors
from vera_fx.targets import BANK

BASE = "__base__"
"""The name, in ``adapter_names``, of a row that no adapter serves."""

_HOLDER = "rows"
STORE = "store"
"""Where a bank keeps the `vera_fx.store.AdapterStore` that serves further names."""


def group_of(bank: AdapterBank, key: str) -> Group:
    """Lay out the vectors of every adapter that uses the projections ``key``."""
    members = [a for a in map(bank.adapter, bank.adapters) if a.projections == key]
    rank, start = members[0].config.r, 0
    places: dict[str, tuple[int, int]] = {}
    for path, target in bank.targets.items():
        if any(path in member.vectors.by_path for member in members):
            places[path] = (start, start + rank)
            start += rank + target.out_features
    return Group(key, rank, next(members[0].vectors.parameters()).dtype, places, start)


def row_of(bank: AdapterBank, group: Group, adapter: Adapter | Packed) -> Tensor:
    """An adapter's vectors as one row ``(width,)``; zeros, which add nothing, where it has none."""
    if isinstance(adapter, Packed):
        return adapter.row_for(group)
    parts: list[Tensor] = []
    for path in group.places:
        vectors = adapter.vectors_at(path)
        if vectors is None:
            width = group.rank + bank.targets[path].out_features
            parts.append(bank.projections_of(adapter).vera_A.new_zeros(width, dtype=group.dtype))
        else:
            parts += [vectors.vera_lambda_d.detach(), vectors.vera_lambda_b.detach()]
    return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class Mix:
    """One mixture, ready to be handed to a graph.

    Attributes:
        keys: the projections that its adapters use.
        structure: what of it shapes the graph.
        rows: how many names there are.
        tensors: the graph's further inputs, each with one entry per row.
        dropout: some adapter in it drops elements of its input in train mode.
    """

    mixer: "Mixer"
    keys: tuple[str, ...]
    structure: tuple[Hashable, ...]
    rows: int
    tensors: list[Tensor]
    dropout: bool = False

    def plan(self, batched: frozenset[int]) -> AdaptationPlan:
        """What the adapting passes need to know."""
        return self.mixer.plan(self.keys, batched)


class Mixer:
    """Prepares the mixtures of one bank. Made anew whenever adapters come or go.

    Attributes:
        groups: the bank's adapters by the projections that they use.
    """

    def __init__(self, model: nn.Module, bank: AdapterBank) -> None:
        self._model, self._bank = model, bank
        keys = dict.fromkeys(bank.adapter(name).projections for name in bank.adapters)
        self.groups = {key: group_of(bank, key) for key in keys}
        self._copies = list(_copies(bank))
        self._fill_holder()
        self._layouts = {key: self._layout(group) for key, group in self.groups.items()}

    def mix(self, names: Sequence[str], stored: Mapping[str, Packed]) -> Mix:
        """Gather the rows of ``names``; ``stored`` are those that no module of the bank holds."""
        adapters: dict[str, Adapter | Packed] = {}
        for name in dict.fromkeys(names):
            if name != BASE:
                adapters[name] = stored.get(name) or self._bank.adapter(name)
        used = {adapter.projections for adapter in adapters.values()}
        keys = tuple(key for key in self.groups if key in used) or tuple(self.groups)[:1]
        tensors = [self._gather(self.groups[key], names, adapters) for key in keys]
        tensors += [self._stack(path, name, names, adapters) for path, name in self._copies]
        layout = tuple(self._layouts[key] for key in keys)
        copies = tuple(
            (*at, t.shape) for at, t in zip(self._copies, tensors[len(keys) :], strict=True)
        )
        dropout = any(adapter.config.vera_dropout for adapter in adapters.values())
        return Mix(self, keys, ("rows", keys, layout, copies), len(names), tensors, dropout)

    def _layout(self, group: Group) -> Hashable:
        """What of a group shapes graphs."""
        holder = self._bank.__dict__[_HOLDER]
        shapes = (getattr(holder, f"{name}_{group.key}").shape for name in ("vera_A", "vera_B"))
        return (group.rank, group.dtype, tuple(group.places.items()), *shapes)

    def _gather(
        self, group: Group, names: Sequence[str], adapters: Mapping[str, Adapter | Packed]
    ) -> Tensor:
        like = cast("Tensor", self._bank.projections[group.key].vera_A)
        nothing = like.new_zeros(1, dtype=group.dtype).expand(group.width)
        own = {
            name: row_of(self._bank, group, adapter).to(like.device, group.dtype)
            for name, adapter in adapters.items()
            if adapter.projections == group.key
        }
        return torch.stack([own.get(name, nothing) for name in names])

    def _stack(
        self,
        path: str,
        name: str,
        names: Sequence[str],
        adapters: Mapping[str, Adapter | Packed],
    ) -> Tensor:
        base = attribute_of(self._model.get_submodule(path), name)
        own = {n: _copy_at(a, path, name, base) for n, a in adapters.items()}
        return torch.stack([own.get(n, base) for n in names]).detach()

    @property
    def copies(self) -> frozenset[tuple[str, str]]:
        """``(module path, tensor name)`` of every tensor that may differ from row to row."""
        return frozenset(self._copies)

    def _fill_holder(self) -> None:
        """Put what graphs read, and stand-ins for what becomes an input, where passes find it."""
        bank, values = self._bank, dict[str, Tensor]()
        for key, group in self.groups.items():
            A, B = bank.padded(key)
            values |= {f"vera_A_{key}": A, f"vera_B_{key}": B}
            zero = A.new_zeros((), dtype=group.dtype)
            for number, path in enumerate(group.places):
                values[f"d_{key}_{number}"] = zero.expand(group.rank)
                values[f"b_{key}_{number}"] = zero.expand(bank.targets[path].out_features)
        for number, (path, name) in enumerate(self._copies):
            values[f"copy_{number}"] = attribute_of(self._model.get_submodule(path), name)
        holder = bank.__dict__.setdefault(_HOLDER, Slot())
        holder.__dict__.update(values)

    def plan(self, keys: Sequence[str], batched: frozenset[int]) -> AdaptationPlan:
        """What the adapting passes need to know of a mixture over some projections."""
        bank = self._bank
        groups = [self.groups[key] for key in keys]
        targets = tuple(bank.targets.values())
        branches = tuple(
            tuple(_branch(group, path) for group in groups if path in group.places)
            for path in (target.path for target in targets)
        )
        redirects = tuple(
            Redirect(path, bank.base_paths[path, name], _held(f"copy_{number}"))
            for number, (path, name) in enumerate(self._copies)
        )
        sources = [source for group in groups for source in self._sources(group)]
        widths: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        widths += [(group.table, (group.width,), group.dtype) for group in groups]
        for number, (path, name) in enumerate(self._copies):
            value = attribute_of(self._model.get_submodule(path), name)
            shape = tuple(value.shape)
            sources.append(RowSource(_held(f"copy_{number}"), f"copies_{number}", 0, shape))
            widths.append((f"copies_{number}", shape, value.dtype))
        rows = RowVectors(tuple(sources), batched, tuple(widths), tokenwise(self._model))
        return AdaptationPlan(targets, branches, redirects, rows)

    def _sources(self, group: Group) -> Iterator[RowSource]:
        for number, (path, (d, b)) in enumerate(group.places.items()):
            out = self._bank.targets[path].out_features
            yield RowSource(_held(f"d_{group.key}_{number}"), group.table, d, (group.rank,))
            yield RowSource(_held(f"b_{group.key}_{number}"), group.table, b, (out,))


def _branch(group: Group, path: str) -> Branch:
    number = list(group.places).index(path)
    key = group.key
    return Branch(
        vera_A=_held(f"vera_A_{key}"),
        vera_B=_held(f"vera_B_{key}"),
        lambda_d=_held(f"d_{key}_{number}"),
        lambda_b=_held(f"b_{key}_{number}"),
    )


def _held(attribute: str) -> str:
    return f"{BANK}.{_HOLDER}.{attribute}"


def _copies(bank: AdapterBank) -> Iterator[tuple[str, str]]:
    """Every tensor of the base that some adapter has a copy of."""
    adapters = map(bank.adapter, bank.adapters)
    yield from dict.fromkeys((path, name) for a in adapters for path, name, _ in a.copied_tensors())


def _copy_at(adapter: Adapter | Packed, path: str, name: str, base: Tensor) -> Tensor:
    if isinstance(adapter, Packed):
        return adapter.copies.get((path, name), base).to(base.device)
    module = adapter.copies.by_path.get(path)
    return base if module is None else attribute_of(module, name)


def mix_of(model: nn.Module, names: Any) -> Mix:
    """The mixture that ``adapter_names`` asks for.

    Raises:
        AdapterError: as `check_mixture`.
    """
    check_mixture(model, names)
    bank = bank_of(model)
    if not bank.enabled:
        names = [BASE] * len(names)
    return mixer_of(model).mix(names, stored_of(bank, names))


def mixer_of(model: nn.Module) -> Mixer:
    """The mixer for the adapters that the bank has now."""
    bank = bank_of(model)
    mixer = bank.__dict__.get("mixer")
    if mixer is None:
        mixer = bank.__dict__["mixer"] = Mixer(model, bank)
    return mixer


def stored_of(bank: AdapterBank, names: Sequence[str]) -> Mapping[str, Packed]:
    """Those of the names that only a store knows, loaded."""
    store = bank.__dict__.get(STORE)
    away = [n for n in dict.fromkeys(names) if n != BASE and n not in bank.adapters]
    return store.take(away) if store is not None and away else {}


def check_mixture(model: nn.Module, names: Any) -> None:
    """Refuse names that no mixture can be made of.

    Raises:
        AdapterError: the names are no sequence of known names, the model is in train mode, or
            adapters are merged.
    """
    bank = bank_of(model)
    _check_state(model, bank)
    _check_names(bank, names)


def _check_state(model: nn.Module, bank: AdapterBank) -> None:
    if model.training:
        raise AdapterError(
            "adapter_names mixes adapters for inference, and this model is in train mode; call "
            "model.eval(), or train one adapter at a time with set_adapter"
        )
    if bank.merged:
        raise AdapterError(
            f"adapter_names cannot be used while {listing(bank.merged)} is merged into the base; "
            "unmerge the model first"
        )


def _check_names(bank: AdapterBank, names: Any) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise AdapterError(
            f"adapter_names must be a list with one adapter's name per row, got {names!r}"
        )
    store = bank.__dict__.get(STORE)
    for row, name in enumerate(cast("Sequence[Any]", names)):
        if name != BASE and name not in bank.adapters and (store is None or name not in store):
            known = [*bank.adapters, *(store.names() if store is not None else ()), BASE]
            raise AdapterError(
                f"adapter_names[{row}] is {name!r}, which is no adapter"
                f"{nearest(str(name), known) or f'; known: {listing(known)}'}"
            )
