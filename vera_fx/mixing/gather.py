"""One entry per row of a batch, out of what each adapter has; gradients go back to whoever trains.

The gradient of an adapter's tensor is the sum over its rows, which `torch.Tensor.index_select` gives
in backward by one ``index_add`` for all adapters. Rows of others take no part in that sum, whatever
they hold: a product by a matrix of ones and zeros would let one adapter's NaN into all others.
"""

from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import AdapterBank
from vera_fx.bank.packed import Group, Packed

Table = tuple[Tensor, Mapping[str, int]]
"""Values of several adapters, ``(adapters, ...)``, and the place of each adapter in it by name."""

Tables = Mapping[str, Table]
"""By `Group.table` for vectors, by the path of the base's tensor for copies."""


class TableNames(Sequence[str]):
    """``adapter_names`` whose values are read from tables, not from the adapters' own parameters.

    Attributes:
        names: one per row.
        tables: the values; a name without a place in a table has nothing there.
    """

    def __init__(self, names: Sequence[str], tables: Tables) -> None:
        self.names, self.tables = list(names), tables

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self.names[index]

    def __len__(self) -> int:
        return len(self.names)


def gathered(
    names: Sequence[str], own: Mapping[str, Tensor], nothing: Tensor, table: Table | None = None
) -> Tensor:
    """``(rows, ...)``: for each row what its adapter has.

    Args:
        names: one per row.
        own: what adapters have, by name, all of one shape.
        nothing: what rows of other names get.
        table: the same as ``own``, stacked already.
    """
    if table is None:
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in own.values()):
            return torch.stack([own.get(name, nothing) for name in names]).detach()
        table = torch.stack(list(own.values())), {name: at for at, name in enumerate(own)}
    values, places = table
    numbers = [places.get(name, len(values)) for name in names]
    every = torch.cat([values, nothing.to(values.dtype).expand(values.shape[1:]).unsqueeze(0)])
    return every.index_select(0, torch.tensor(numbers, device=values.device))


def row_of(group: Group, adapter: Adapter | Packed) -> Tensor:
    """An adapter's vectors as one row ``(width,)``; zeros, which add nothing, where it has none."""
    if isinstance(adapter, Packed):
        return adapter.row_for(group)
    parts, like = list[Tensor](), next(adapter.vectors.parameters())
    for path, columns in group.columns():
        vectors = adapter.vectors_at(path)
        if vectors is None:
            parts.append(like.new_zeros(columns[-1][2] - columns[0][1]))
        else:
            parts += [vectors.tensors[name] for name, _, _ in columns]
    return torch.cat(parts)


def is_learning(bank: AdapterBank) -> bool:
    """True if gradients are on and some adapter trains: mixtures get a graph with gradients then."""
    learners = (*bank.together, *bank.active) if bank.enabled and torch.is_grad_enabled() else ()
    return any(bank.adapter(name).learning for name in learners)


def ready_to_learn(
    bank: AdapterBank, tensors: list[Tensor], *, always: bool = False
) -> list[Tensor]:
    """Let all inputs of a mixture's graph require gradients, if some adapter trains, or ``always``.

    Compiled code is made for inputs that require gradients, or for inputs that do not: so one graph
    serves every mixture, also one of ``"__base__"`` alone.
    """
    if is_learning(bank) or (always and torch.is_grad_enabled()):
        for tensor in tensors:
            if tensor.is_floating_point() and not tensor.requires_grad:
                tensor.requires_grad_()
    return tensors
