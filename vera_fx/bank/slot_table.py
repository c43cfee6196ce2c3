"""Puts the slots of the computing adapters in place, and keeps those of earlier sets."""

import functools
import math
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from vera_fx.bank.adapter import Adapter, everywhere
from vera_fx.bank.slots import Binding, Slot, SlotNames, Work
from vera_fx.branches.kinds import KINDS

if TYPE_CHECKING:
    from vera_fx.bank.bank import AdapterBank

P = ParamSpec("P")
R = TypeVar("R")

SHARED = frozenset(name for kind in KINDS for name in kind.parameters.shared)
"""Attributes of a slot that hold projections."""

_KEPT = 4096
"""Sets of adapters whose slots are kept."""


def alone(
    method: "Callable[Concatenate[AdapterBank, P], R]",
) -> "Callable[Concatenate[AdapterBank, P], R]":
    """Let a method of the bank change what graphs read while no other thread does, or makes graphs."""

    @functools.wraps(method)
    def locked(bank: "AdapterBank", *args: P.args, **kwargs: P.kwargs) -> R:
        with bank.slots.lock:
            return method(bank, *args, **kwargs)

    return locked


class SlotTable:
    """The slots of one bank.

    Attributes:
        names: of the slots' attributes.
        binding: the slots in place, and what of them shapes graphs.
        work: what decides how the adapters in place are computed; read with every call.
        switches: how often other tensors were put in place. Calls compare it, to notice that another
            thread switched while they ran.
        lock: held while slots are put in place, and by whoever needs them to stay as they are.
    """

    def __init__(
        self, bank: "AdapterBank", names: SlotNames | None = None, *, stale: bool = False
    ) -> None:
        """Args: the bank; names that are known; and whether to bind before the first use."""
        self._bank = bank
        self.names = names or SlotNames()
        self.binding = Binding()
        self.work = Work()
        self._kept: dict[tuple[str, ...], Binding] = {}
        self._stale = stale
        self.switches = 0
        self.lock = threading.RLock()

    def bind(self) -> None:
        """Put the slots of the computing adapters in place."""
        with self.lock:
            self._bind()

    def _bind(self) -> None:
        names = self._bank.computing()
        binding = self._kept.get(names)
        if binding is None:
            if len(self._kept) >= _KEPT:
                self.forget()
            # What is made in inference mode differs from all else to compiled code.
            with torch.inference_mode(mode=False), torch.no_grad():
                binding = self._kept[names] = self._made(names)
        if self._bank.shared.alike:
            _open_shared(binding)
        self.switches += not _reads_alike(self.binding, binding)
        self.binding, self._stale = binding, False
        self.work = self._work(names)
        # Kept in __dict__, not as submodules: slots are views and must not reach state_dict.
        for index, (slot, served) in enumerate(zip(binding.slots, binding.served, strict=True)):
            place = self._bank.__dict__
            place[f"slot{index}"], place[f"served{index}"] = slot, served

    def follow(self) -> None:
        """Make the slots anew if a module was given another tensor since they were made."""
        if self._stale or not self.binding.is_current():
            with self.lock:  # another thread may have made them by now
                if self._stale or not self.binding.is_current():
                    self._bank.rebind()

    def forget(self) -> None:
        """Keep no slots but those in place: another thread may be reading them."""
        self._kept.clear()
        self._bank.shared.forget_padded()

    def forget_adapter(self, name: str) -> None:
        """Keep no slots of an adapter, not even those in place."""
        with self.lock:
            for names in [names for names in self._kept if name in names]:
                self._kept.pop(names)
            if name in self.binding.names:
                self.switches += 1
                for index in range(len(self.binding.slots)):
                    self._bank.__dict__.pop(f"slot{index}", None)
                    self._bank.__dict__.pop(f"served{index}", None)

    def tensors_of(self, adapter: Adapter) -> Iterator[tuple[str, str, str, Tensor]]:
        """``(slot attribute, module path, name, tensor)`` of all that ``adapter`` itself owns."""
        for path in adapter.vectors.by_path:
            vectors = adapter.vectors_at(path)
            for name, tensor in vectors.tensors.items() if vectors is not None else ():
                yield self.names.of(path, name), path, name, tensor
        for path, name, tensor in adapter.copied_tensors():
            yield self.names.of(path, name), path, name, tensor
            place = everywhere(path), name
            if path in adapter.frozen and place in self._bank.structure.base_paths:
                yield self.names.of(*place), path, name, tensor

    def _made(self, names: Sequence[str]) -> Binding:
        if not names:
            return Binding()
        bank = self._bank
        adapters = [bank.adapter(name) for name in names]
        slots = tuple(Slot(self._values(adapter)) for adapter in adapters)
        # Whoever brings a copy: all are read off the first slot, so that one graph serves all.
        own = {path: tensor for adapter in adapters for path, tensor in adapter.copied.items()}
        slots[0].tensors().update(self._copies(own))
        union = bank.structure
        layouts = map(_layout, adapters)
        structure = union.number((len(union.targets), *union.base_paths, *layouts))
        dropout = tuple(adapter.config.dropout for adapter in adapters)
        sources = tuple(self._sources(adapters))
        borrowed = frozenset(self.names.of(*p) for p in union.base_paths if ".".join(p) not in own)
        binding = Binding(slots, structure, dropout, sources, tuple(names), borrowed)
        _open_addresses(binding, borrowed)
        return binding

    def _work(self, names: Sequence[str]) -> Work:
        adapters = [self._bank.adapter(name) for name in names]
        return Work(
            ranks=tuple(adapter.config.r for adapter in adapters),
            trains=any(adapter.trainable for adapter in adapters),
            requests=tuple(adapter.config.plan for adapter in adapters),
        )

    def _values(self, adapter: Adapter) -> dict[str, Tensor]:
        """Projections, and vectors for every target; zeros, which add nothing, if it has none."""
        targets = self._bank.structure.targets
        dtype = next(adapter.vectors.parameters()).dtype
        values = dict(self._bank.shared.padded(adapter.projections, targets, dtype))
        wanted = {path: adapter.kind.own_sizes(adapter.config.r, t) for path, t in targets.items()}
        most = max(math.prod(size) for sizes in wanted.values() for size in sizes.values())
        nothing = next(adapter.vectors.parameters()).detach().new_zeros(most)
        for path, sizes in wanted.items():
            vectors = adapter.vectors_at(path)
            for name, size in sizes.items():
                own = None if vectors is None else vectors.tensors[name]
                values[self.names.of(path, name)] = _zeros(nothing, size) if own is None else own
        return values

    def _copies(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor that some adapter of the bank replaces: one of these adapters' or the base's."""
        return {
            self.names.of(path, name): own.get(f"{path}.{name}", base)
            for (path, name), base in self._bank.structure.bases()
        }

    def _sources(self, adapters: Sequence[Adapter]) -> Iterator[dict[str, Any]]:
        for adapter in adapters:
            yield self._bank.projections_of(adapter)._buffers
            yield from (vectors._parameters for vectors in adapter.vectors.by_path.values())
        copies = [adapter.copies.by_path for adapter in adapters]
        homes = self._bank.structure.homes
        for home in [module for by_path in (homes, *copies) for module in by_path.values()]:
            for module in home.modules():
                yield from (module._parameters, module._buffers)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make slots of their own, of what else they hold.
        fresh = SlotTable(self._bank, self.names, stale=True)
        return {key: value for key, value in fresh.__dict__.items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.RLock())


def _open_addresses(binding: Binding, borrowed: Container[str]) -> None:
    """Mark what differs from one adapter to the next: all but projections and the base's tensors."""
    for slot in binding.slots:
        slot.open_addresses(n for n in slot.tensors() if n not in borrowed and n not in SHARED)
    for slot in binding.served:
        slot.open_addresses(n for n in slot.tensors() if n not in SHARED)


def _open_shared(binding: Binding) -> None:
    """Mark the projections too, where another adapter has others of the same size."""
    for slot in (*binding.slots, *binding.served):
        slot.open_addresses(SHARED.intersection(slot.tensors()))


def _reads_alike(old: Binding, new: Binding) -> bool:
    """True if a graph that reads ``old`` may find ``new`` in its place while it runs."""
    if old is new:
        return True
    return old.names == new.names and all(
        after.tensors().get(name) is tensor
        for before, after in zip(old.slots, new.slots, strict=True)
        for name, tensor in before.tensors().items()
    )


def _zeros(nothing: Tensor, size: Sequence[int]) -> nn.Parameter:
    """A parameter of its own, although all share memory: compiled code tells them apart."""
    return nn.Parameter(nothing[: math.prod(size)].view(tuple(size)), requires_grad=False)


def _layout(adapter: Adapter) -> tuple[object, ...]:
    """What of an adapter shapes graphs, beside its dropout."""
    dtypes = sorted({str(p.dtype) for p in adapter.vectors.parameters()})
    # Where zeros would not add nothing, graphs have branches for its own targets alone.
    paths = () if adapter.kind.idle_at_zero else tuple(adapter.vectors.by_path)
    return (adapter.kind.name, adapter.config.plan, *dtypes, *paths)
