"""Gathers what differs from row to row of a batch, for one state of a bank.

The graph multiplies the whole batch by A and B once; the rest is one tensor of vectors per pair of
projections, gathered before the call and handed to the graph as an input. So neither which adapters
are in a batch nor how many there are is part of any graph.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vera_fx._torch import stamp
from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.names import BASE
from vera_fx.bank.packed import Group, Packed
from vera_fx.bank.slots import Slot
from vera_fx.base.modules import BANK
from vera_fx.errors import TargetError
from vera_fx.mixing.gather import Tables, gathered, ready_to_learn, row_of
from vera_fx.passes import AdaptationPlan, Branch, RowSource, RowVectors, resolve

HOLDER = "rows"
"""Where a bank keeps what the graphs of mixtures read."""


@dataclass(frozen=True, slots=True)
class Mix:
    """One mixture, ready to be handed to a graph.

    Attributes:
        mixer: what made it.
        names: one per row.
        adapters: those that are named.
        tensors: the graph's further inputs, each with one entry per row.
    """

    mixer: "Mixer"
    names: Sequence[str]
    adapters: Mapping[str, Adapter | Packed]
    tensors: list[Tensor]

    @property
    def dropout(self) -> tuple[float | None, ...]:
        """For each group what its branches drop in train mode; None if adapters in it differ there."""
        return tuple(
            self.mixer.dropout(group, self.adapters) for group in self.mixer.groups.values()
        )

    def check(self, refused: Mapping[str, str]) -> None:
        """Refuse the mixture if it needs what cannot differ from row to row in a graph.

        Args:
            refused: paths of targets and of tensors, and the reasons.

        Raises:
            TargetError: an adapter in it has vectors or a copy there.
        """
        for row, name in enumerate(self.names):
            adapter = self.adapters.get(name)
            own = (path for path in refused if adapter is not None and adapter.has(path))
            for path in own:
                raise TargetError(
                    f"adapter_names[{row}] is {name!r}, whose {path!r} cannot differ from row to row: "
                    f"{refused[path]}; call the model for this adapter alone"
                )


class Mixer:
    """Prepares the mixtures of one bank. Made anew whenever adapters come or go.

    Attributes:
        groups: for each pair of projections, what its adapters have or had.
        copies: path of every tensor that some adapter has or had a copy of -> its place in the
            bank, ``(module path, tensor name)``.
        structure: a number for what of all this shapes graphs: the same for every mixture.
    """

    def __init__(self, bank: AdapterBank, tokenwise: frozenset[str] = frozenset()) -> None:
        """Args: the bank; and paths of mixtures of experts (`RowVectors.tokenwise`)."""
        self._bank, self._tokenwise = bank, tokenwise
        structure = bank.structure
        self.groups = {k: g for k, g in structure.groups.items() if not g.kind.not_mixed}
        self.copies: dict[str, tuple[str, str]] = {}
        for path, name in structure.base_paths:
            self.copies.setdefault(f"{path}.{name}", (path, name))
        self._fill_holder()
        layouts = tuple(map(self._layout, self.groups.values()))
        self._read = [bank.shared.pair(key)._buffers for key in self.groups]
        self._version = stamp(self._read)
        bases = ((path, base.shape, base.dtype) for path, base in self.bases())
        self.structure = structure.number(("rows", structure.exact, layouts, *bases))

    def is_current(self) -> bool:
        """False once projections hold other tensors than they did; all else is read anew."""
        return stamp(self._read) == self._version

    def bases(self) -> Iterator[tuple[str, Tensor]]:
        """Path and tensor of the base for everything that adapters have copies of."""
        for full, (path, name) in self.copies.items():
            yield full, resolve(self._bank.structure.homes[path], name)

    def mix(
        self, names: Sequence[str], stored: Mapping[str, Packed], tables: Tables | None = None
    ) -> Mix:
        """Gather the rows of ``names``, so that gradients reach the adapters that train.

        Args:
            names: one per row.
            stored: those that no module of the bank holds.
            tables: values to take in the place of the adapters' own, by `Group.table` and by the
                path of the tensor of which adapters have copies.
        """
        tables = tables or {}
        adapters: dict[str, Adapter | Packed] = {
            name: stored.get(name) or self._bank.adapter(name)
            for name in dict.fromkeys(names)
            if name != BASE
        }
        tensors = [
            self._gather(group, names, adapters, tables.get(group.table))
            for group in self.groups.values()
        ]
        copied = {name: adapter.copied for name, adapter in adapters.items()}
        for path, base in self.bases():
            own = {
                name: found[path].to(base.device) for name, found in copied.items() if path in found
            }
            tensors.append(gathered(names, own, base.detach(), tables.get(path)))
        return Mix(self, names, adapters, ready_to_learn(self._bank, tensors, always=bool(tables)))

    def dropout(self, group: Group, adapters: Mapping[str, Adapter | Packed]) -> float | None:
        """What the group's branches drop in train mode: the bank's adapters say, or else those named."""
        bank = self._bank
        every = {name: bank.adapter(name) for name in bank.adapters} | dict(adapters)
        for among in (every, adapters):
            own = {a.config.dropout for a in among.values() if a.projections == group.key}
            if len(own) <= 1:
                return own.pop() if own else 0.0
        return None

    def _layout(self, group: Group) -> tuple[object, ...]:
        """What of a group shapes graphs."""
        shared = self._shared(group)
        sizes = ((name, tensor.shape) for name, tensor in shared.items())
        return (group.key, group.rank, group.dtype, *group.places.items(), *sizes)

    def _shared(self, group: Group) -> dict[str, Tensor]:
        """A group's projections as graphs read them."""
        return self._bank.shared.padded(group.key, self._bank.structure.targets)

    def _gather(
        self,
        group: Group,
        names: Sequence[str],
        adapters: Mapping[str, Adapter | Packed],
        table: Any,
    ) -> Tensor:
        like = next(iter(self._shared(group).values()))
        nothing = like.new_zeros(1, dtype=group.dtype).expand(group.width)
        own = {
            name: row_of(group, adapter).to(like.device, group.dtype)
            for name, adapter in adapters.items()
            if adapter.projections == group.key and table is None
        }
        return gathered(names, own, nothing, table)

    def _fill_holder(self) -> None:
        """Put what graphs read, and stand-ins for what becomes an input, where passes find it."""
        values: dict[str, Tensor] = {}
        for key, group in self.groups.items():
            shared = self._shared(group)
            values |= {f"{name}_{key}": tensor for name, tensor in shared.items()}
            zero = next(iter(shared.values())).new_zeros((), dtype=group.dtype)
            for number, (_, columns) in enumerate(group.columns()):
                for name, start, end in columns:
                    values[f"{name}_{key}_{number}"] = zero.expand(end - start)
        values.update((f"copy_{number}", base) for number, (_, base) in enumerate(self.bases()))
        self._bank.__dict__.setdefault(HOLDER, Slot()).tensors().update(values)

    def plan(
        self,
        batched: frozenset[int],
        refused: Container[str] = (),
        dropout: Callable[[str], Sequence[float]] | None = None,
    ) -> AdaptationPlan:
        """What the adapting passes need to know.

        Args:
            batched: numbers of the graph's inputs that hold one row per index.
            refused: paths of the targets and tensors that the graph is to do without.
            dropout: for the path of a target, what each group's branch drops there; None for nothing.
        """
        bank, groups = self._bank, self.groups.values()
        branches = tuple(
            tuple(
                _branch(group, path, share)
                for group, share in zip(
                    groups, dropout(path) if dropout else [0.0] * len(groups), strict=True
                )
                if path in group.places
            )
            if path not in refused
            else ()
            for path in bank.structure.targets
        )
        redirects = tuple(
            bank.structure.redirect(place, _held(f"copy_{number}"))
            for number, (full, place) in enumerate(self.copies.items())
            if full not in refused
        )
        sources = tuple(source for path, source in self._sources() if path not in refused)
        rows = RowVectors(sources, batched, tuple(self._tables()), self._tokenwise)
        return AdaptationPlan(tuple(bank.structure.targets.values()), branches, redirects, rows)

    def refused(self, lost: Mapping[str, str]) -> dict[str, str]:
        """What cannot differ from row to row: the reasons by path of a target or a tensor.

        Args:
            lost: the reasons by the path under which graphs read it (`RowError`).
        """
        return {path: lost[source.path] for path, source in self._sources() if source.path in lost}

    def _sources(self) -> Iterator[tuple[str, RowSource]]:
        """Everything that differs from row to row, with the path of the target or the tensor."""
        for group in self.groups.values():
            for number, (path, columns) in enumerate(group.columns()):
                for name, start, end in columns:
                    read = _held(f"{name}_{group.key}_{number}")
                    yield path, RowSource(read, group.table, start, (end - start,))
        for number, (path, base) in enumerate(self.bases()):
            read = _held(f"copy_{number}")
            yield path, RowSource(read, f"copies_{number}", 0, tuple(base.shape))

    def _tables(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """The graph's further inputs, as `mix` gathers them: name, sizes of a row, dtype."""
        for group in self.groups.values():
            yield group.table, (group.width,), group.dtype
        for number, (_, base) in enumerate(self.bases()):
            yield f"copies_{number}", tuple(base.shape), base.dtype


def _branch(group: Group, path: str, dropout: float) -> Branch:
    number = list(group.places).index(path)
    parameters = group.kind.parameters
    shared = {name: _held(f"{name}_{group.key}") for name in parameters.shared}
    own = {name: _held(f"{name}_{group.key}_{number}") for name in parameters.own}
    return Branch(group.kind.graph, shared | own, dropout)


def _held(attribute: str) -> str:
    return f"{BANK}.{HOLDER}.{attribute}"
