"""The adapter bank: the module that owns the projections and all adapters of a model.

It hangs on the model as ``model.vera``. Graphs read the active adapters through `vera_fx.bank.slots`,
which `AdapterBank.bind` puts in place.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from vera_fx._torch import stamp
from vera_fx.bank.adapter import Adapter, everywhere, is_everywhere
from vera_fx.bank.packed import Group
from vera_fx.bank.projections import Projections
from vera_fx.bank.slots import Binding, Slot, SlotNames, open_ranks
from vera_fx.base.targets import BANK
from vera_fx.passes import Redirect, Target, resolve

_BINDINGS = 4096
"""Sets of adapters whose slots are kept."""


class AdapterBank(nn.Module):
    """Owns projections and adapters, and tells graphs which of them are active.

    Attributes:
        projections: `Projections` by key.
        groups: for each of them, how mixtures lay out what their adapters have or had.
        retired: projections that no adapter uses any more, in graphs of mixtures until the next
            graph is made, so that none is made for a deletion.
        adapters: `Adapter` by name.
        targets: the union of all targets that adapters have or had, by path.
        base_paths: ``(module path, tensor name)`` of every tensor that some adapter has or had a
            copy of -> the paths under which the base's own is read.
        homes: the base's modules that these tensors belong to, by path.
        active: names of the active adapters, in order; their branches add up.
        merged: names of the adapters that are folded into the base.
        enabled: False inside ``disable_adapters``.
        exact: some adapter asks or asked for the plan ``"factored"``, PEFT's order of operations.
        kept_bases: base weights as they were before a merge that keeps them, by adapter.
        thawed: paths of the base parameters that trained before the model was adapted.
        names: of the slots' attributes.
        binding: the slots in place, and what of them shapes graphs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleDict()
        self.groups: dict[str, Group] = {}
        self.retired: dict[str, Projections] = {}
        self.adapters = nn.ModuleDict()
        self.targets: dict[str, Target] = {}
        self.base_paths: dict[tuple[str, str], tuple[str, ...]] = {}
        self.homes: dict[str, nn.Module] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.enabled = True
        self.exact = False
        self.kept_bases: dict[str, dict[int, Tensor]] = {}
        self.thawed: tuple[str, ...] = ()
        self.names = SlotNames()
        self._bindings: dict[tuple[str, ...], Binding] = {}
        self._padded: dict[str, tuple[int, tuple[Tensor, Tensor]]] = {}
        self._numbers: dict[Hashable, int] = {}
        self.binding = Binding()
        self.register_load_state_dict_post_hook(_rebind)

    def adapter(self, name: str) -> Adapter:
        """The adapter called ``name``, which must exist."""
        return cast("Adapter", self.adapters[name])

    def projections_of(self, adapter: Adapter) -> Projections:
        """The projections that ``adapter`` was trained with."""
        return cast("Projections", self.projections[adapter.projections])

    def share_projections(self, vera_A: Tensor, vera_B: Tensor, *, persistent: bool) -> str:
        """Keep the projections once: the key of bit-equal ones, or of these, newly added."""
        known = {**self.projections._modules, **self.retired}
        pairs = ((key, cast("Projections", pair)) for key, pair in known.items())
        new = str(max(map(int, known), default=-1) + 1)
        key = next((key for key, pair in pairs if pair.equals(vera_A, vera_B)), new)
        if key not in self.projections:
            self.retired.pop(key, None)
            self.projections[key] = Projections(vera_A, vera_B, persistent=persistent)
        self.pair(key).keep(persistent=persistent)
        return key

    def insert(
        self,
        name: str,
        adapter: Adapter,
        targets: Mapping[str, Target],
        bases: Mapping[tuple[str, str], tuple[tuple[str, ...], nn.Module]],
    ) -> None:
        """Add an adapter, inactive. Its targets join the union of targets.

        Args:
            name: its name.
            adapter: the adapter.
            targets: its targets by path.
            bases: for each ``(module path, tensor name)`` that it has a copy of, the paths under
                which the base's tensor is read and the base's module.
        """
        self.adapters._modules[name] = adapter
        key, sizes = adapter.projections, (len(self.targets), len(self.base_paths))
        self.targets.update(targets)
        paths = self.base_paths | {place: paths for place, (paths, _) in bases.items()}
        # Reads inside of a copy's module first: what stands for every read takes the rest.
        self.base_paths = dict(sorted(paths.items(), key=lambda item: is_everywhere(item[0][0])))
        self.homes.update((path, home) for (path, _), (_, home) in bases.items())
        self.exact |= adapter.config.plan == "factored"
        if sizes != (len(self.targets), len(self.base_paths)):
            self._forget_slots()
        group = self.groups.get(key) or Group(key, adapter.config.r, _dtype(adapter))
        if group.reaching(targets) is not self.groups.get(key):
            self.groups[key] = group.reaching(targets)
            self._drop_retired()
        self._forget_mixtures()
        adapter.requires_grad_(False).train(self.training)

    def remove(self, name: str) -> None:
        """Drop an adapter, and its projections if no other adapter uses them."""
        self._forget_mixtures()
        for names in [names for names in self._bindings if name in names]:
            for index in range(len(self._bindings.pop(names).slots)):
                self.__dict__.pop(f"slot{index}", None)
                self.__dict__.pop(f"served{index}", None)
        del self.adapters[name]
        used = {cast("Adapter", adapter).projections for adapter in self.adapters.values()}
        for key in [key for key in self.projections if key not in used]:
            self.retired[key] = cast("Projections", self.projections[key])
            del self.projections[key]
            self._padded.pop(key, None)
        self.activate(kept for kept in self.active if kept != name)

    def activate(self, names: Iterable[str]) -> None:
        """Make exactly these adapters active: they compute, and train if they are trainable."""
        before, self.active = self.active, tuple(names)
        # All others are frozen already: a switch costs the same however many there are.
        for name in dict.fromkeys((*before, *self.active)):
            if name in self.adapters:
                self.adapter(name).let_train(allowed=name in self.active)
        self.bind()

    def adapted_paths(self) -> set[str]:
        """Paths, aliases included, of every module with vectors or trained copies in some adapter."""
        copies = {p for name in self.adapters for p in self.adapter(name).copies.by_path}
        return {path for target in self.targets.values() for path in target.paths} | copies

    def computing(self) -> tuple[str, ...]:
        """Names of the adapters whose branches graphs compute now."""
        if not self.enabled:
            return ()
        return tuple(name for name in self.active if name not in self.merged)

    def bind(self) -> None:
        """Put the slots of the computing adapters in place."""
        names = self.computing()
        binding = self._bindings.get(names)
        if binding is None:
            if len(self._bindings) >= _BINDINGS:
                self._forget_slots()
            # What is made in inference mode differs from all else to compiled code.
            with torch.inference_mode(mode=False), torch.no_grad():
                binding = self._bindings[names] = self._bound(names)
        self.binding = binding
        # Kept in __dict__, not as submodules: slots are views and must not reach state_dict.
        for index, (slot, served) in enumerate(zip(binding.slots, binding.served, strict=True)):
            self.__dict__[f"slot{index}"], self.__dict__[f"served{index}"] = slot, served

    def rebind(self) -> None:
        """Make all slots anew, from what the modules hold now."""
        self._forget_slots()
        self._forget_mixtures()
        for adapter in map(self.adapter, self.adapters):
            group = self.groups[adapter.projections]
            self.groups[group.key] = replace(group, dtype=_dtype(adapter))
        self.bind()

    def _forget_slots(self) -> None:
        # Those in place stay there until others are: another thread may be reading them.
        self._bindings.clear()
        self._padded.clear()

    def follow(self) -> None:
        """Rebind if a module was given another tensor since the slots were made."""
        if not self.binding.is_current():
            self.rebind()

    def _bound(self, names: Sequence[str]) -> Binding:
        if not names:
            return Binding()
        adapters = [self.adapter(name) for name in names]
        if len({cast("Projections", pair).r for pair in self.projections.values()}) > 1:
            open_ranks(self, "slot")
        slots = tuple(Slot(self._values(adapter)) for adapter in adapters)
        # Whoever brings a copy: all are read off the first slot, so that one graph serves all.
        slots[0].tensors().update(self._copies(adapters))
        structure = self.number((len(self.targets), *self.base_paths, *map(_layout, adapters)))
        dropout = tuple(adapter.config.vera_dropout for adapter in adapters)
        return Binding(slots, structure, dropout, tuple(self._sources(adapters)))

    def _sources(self, adapters: Sequence[Adapter]) -> Iterator[dict[str, Any]]:
        for adapter in adapters:
            yield self.projections_of(adapter)._buffers
            yield from (vectors._parameters for vectors in adapter.vectors.by_path.values())
        copies = [adapter.copies.by_path for adapter in adapters]
        for home in [module for by_path in (self.homes, *copies) for module in by_path.values()]:
            for module in home.modules():
                yield from (module._parameters, module._buffers)

    def number(self, structure: Hashable) -> int:
        """A small number for what shapes graphs, the same for the same: cheap as part of a key."""
        return self._numbers.setdefault(structure, len(self._numbers) + 1)

    def padded(self, key: str) -> tuple[Tensor, Tensor]:
        """Projections as graphs read them: large enough for every target of the bank."""
        pair = self.pair(key)
        version, found = stamp([pair._buffers]), self._padded.get(key)
        if found is None or found[0] != version:
            max_in = max(target.in_features for target in self.targets.values())
            max_out = max(target.out_features for target in self.targets.values())
            found = self._padded[key] = version, pair.padded(max_in, max_out)
        return found[1]

    def pair(self, key: str) -> Projections:
        """The projections ``key``, in use or retired."""
        return self.retired.get(key) or cast("Projections", self.projections[key])

    def _values(self, adapter: Adapter) -> dict[str, Tensor]:
        """Projections, and vectors for every target; zeros, which add nothing, if it has none."""
        vera_A, vera_B = self.padded(adapter.projections)
        values: dict[str, Tensor] = {"vera_A": vera_A, "vera_B": vera_B}
        nothing = vera_A.new_zeros(max(vera_B.shape))
        for path, target in self.targets.items():
            own = adapter.vectors_at(path)
            # A parameter each, although they share memory: compiled code tells them apart.
            d, b = (
                (own.vera_lambda_d, own.vera_lambda_b)
                if own is not None
                else (
                    nn.Parameter(nothing[:size], requires_grad=False)
                    for size in (vera_A.shape[0], target.out_features)
                )
            )
            values[self.names.of(path, "lambda_d")] = d
            values[self.names.of(path, "lambda_b")] = b
        return values

    def _copies(self, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
        """Every tensor that some adapter of the bank replaces: one of these adapters' or the base's."""
        found: dict[str, Tensor] = {}
        own = {path: tensor for adapter in adapters for path, tensor in adapter.copied.items()}
        for path, name in self.base_paths:
            base: Tensor = resolve(self.homes[path], name)
            found[self.names.of(path, name)] = own.get(f"{path}.{name}", base)
        return found

    def slot_tensors(self, adapter: Adapter) -> Iterator[tuple[str, str, str, Tensor]]:
        """``(slot attribute, module path, name, tensor)`` of all that ``adapter`` itself owns."""
        for path in adapter.vectors.by_path:
            vectors = adapter.vectors_at(path)
            if vectors is not None:
                yield self.names.of(path, "lambda_d"), path, "lambda_d", vectors.vera_lambda_d
                yield self.names.of(path, "lambda_b"), path, "lambda_b", vectors.vera_lambda_b
        for path, name, tensor in adapter.copied_tensors():
            yield self.names.of(path, name), path, name, tensor
            place = everywhere(path), name
            if path in adapter.frozen and place in self.base_paths:
                yield self.names.of(*place), path, name, tensor

    def redirect(self, place: tuple[str, str], copy: str) -> Redirect:
        """Let graphs read ``copy`` for the base's tensor at ``place``, a key of `base_paths`."""
        path = place[0]
        return Redirect("" if is_everywhere(path) else path, self.base_paths[place], copy)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterBank":
        """Move or cast, as ``model.to(...)`` does, and point the slots at the new tensors."""
        super()._apply(fn, recurse)
        self._drop_retired()
        self.rebind()
        return self

    def _forget_mixtures(self) -> None:
        """Let the next batch that mixes adapters lay them out anew (`vera_fx.mixing.check.Mixer`)."""
        self.__dict__.pop("mixer", None)

    def _drop_retired(self) -> None:
        for key in self.retired:
            del self.groups[key]
        self.retired.clear()

    def extra_repr(self) -> str:
        """State for ``print(model)``."""
        state = f", merged={list(self.merged)}" if self.merged else ""
        state += "" if self.enabled else ", disabled"
        return f"active={list(self.active)}, targets={len(self.targets)}{state}"


def _rebind(bank: nn.Module, _incompatible: object) -> None:
    """After ``load_state_dict``, which may have replaced tensors (``assign=True``)."""
    cast("AdapterBank", bank).rebind()


def _layout(adapter: Adapter) -> tuple[str, ...]:
    """What of an adapter shapes graphs, beside its dropout."""
    dtypes = sorted({str(p.dtype) for p in adapter.vectors.parameters()})
    return (adapter.config.plan, *dtypes)


def _dtype(adapter: Adapter) -> torch.dtype:
    return next(adapter.vectors.parameters()).dtype


def bank_of(model: nn.Module) -> AdapterBank:
    """The bank of an adapted model."""
    return cast("AdapterBank", model._modules[BANK])
