"""What all jobs train, as a few tensors with one row per job: one update serves all of them.

While jobs run their values live here, and `TableNames` hands them to the model; `Tables.write_back`
puts them into the adapters.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vera_fx.bank.adapter import Adapter
from vera_fx.bank.bank import bank_of
from vera_fx.bank.packed import Group
from vera_fx.mixing.check import mixer_of
from vera_fx.mixing.gather import Tables as MixTables
from vera_fx.mixing.gather import row_of

PARTS = ("values", "first", "second")
"""What a table holds of each job: the values, and AdamW's two averages of their gradients."""

Row = dict[str, Tensor]
"""One job's part of a table, by `PARTS`."""


@dataclass(slots=True)
class Table:
    """One row per job.

    Attributes:
        names: of the jobs, in the order of the rows.
        values: ``(jobs, ...)``, with gradients.
        first: AdamW's average of the gradients.
        second: AdamW's average of their squares.
        copies: whether it holds a trained head or bias and no vectors.
    """

    names: list[str]
    values: Tensor
    first: Tensor
    second: Tensor
    copies: bool

    def row(self, name: str) -> Row:
        """A copy of one job's part."""
        at = self.names.index(name)
        return {part: getattr(self, part)[at].detach().clone() for part in PARTS}


@dataclass
class Tables:
    """The tables of the jobs that run, by `Group.table` and by the path of a copied tensor.

    Attributes:
        by_key: the tables.
    """

    by_key: dict[str, Table] = field(default_factory=dict[str, Table])

    def for_mixing(self) -> MixTables:
        """As mixtures read them."""
        return {
            key: (table.values, {name: at for at, name in enumerate(table.names)})
            for key, table in self.by_key.items()
        }

    def rows(self, name: str) -> dict[str, Row]:
        """A copy of all that one job has."""
        return {key: table.row(name) for key, table in self.by_key.items() if name in table.names}

    def write_back(self, model: nn.Module, names: Iterable[str]) -> None:
        """Put the values of some jobs into their adapters' own parameters."""
        for name in names:
            fill(model, name, {key: row["values"] for key, row in self.rows(name).items()})


def fill(model: nn.Module, name: str, values: Mapping[str, Tensor]) -> None:
    """Put values, by the keys of tables, into an adapter's parameters."""
    bank, adapter = bank_of(model), bank_of(model).adapter(name)
    copied = adapter.copied
    with torch.no_grad():
        for group in bank.structure.groups.values():
            if group.table in values and adapter.projections == group.key:
                _fill_vectors(adapter, group, values[group.table])
        for key in values.keys() & copied.keys():
            copied[key].copy_(values[key])


def _fill_vectors(adapter: Adapter, group: Group, row: Tensor) -> None:
    for path, columns in group.columns():
        vectors = adapter.vectors_at(path)
        for name, start, end in columns if vectors is not None else ():
            if end <= len(row):
                vectors.tensors[name].copy_(row[start:end])  # type: ignore[union-attr]


def tables_for(model: nn.Module, known: Mapping[str, Mapping[str, Row] | None]) -> Tables:
    """Lay out the tables of the jobs ``known``, in this order.

    Args:
        model: the adapted model, which has the jobs' adapters.
        known: for each job its rows so far, or None to begin with the adapter's values.
    """
    bank, mixer = bank_of(model), mixer_of(model)
    adapters = {name: bank.adapter(name) for name in known}
    made = Tables()
    for group in mixer.groups.values():
        own = {n: row_of(group, a) for n, a in adapters.items() if a.projections == group.key}
        _add(made, group.table, own, known, copies=False)
    for key, _ in mixer.bases():
        trained = {n: a.copied[key] for n, a in adapters.items() if key in trained_copies(a)}
        _add(made, key, trained, known, copies=True)
    return made


def trained_copies(adapter: Adapter) -> set[str]:
    """Paths of the tensors that an adapter has copies of that train."""
    return {
        f"{path}.{name}"
        for path, name, tensor in adapter.copied_tensors()
        if isinstance(tensor, nn.Parameter) and path not in adapter.frozen
    }


def _add(
    made: Tables,
    key: str,
    own: Mapping[str, Tensor],
    known: Mapping[str, Mapping[str, Row] | None],
    *,
    copies: bool,
) -> None:
    if not own:
        return
    rows = [_row(value.detach(), (known[name] or {}).get(key)) for name, value in own.items()]
    values, first, second = (torch.stack([row[part] for row in rows]) for part in PARTS)
    made.by_key[key] = Table(list(own), values.requires_grad_(), first, second, copies)


def _row(own: Tensor, known: Row | None) -> Row:
    """A job's part: as known, longer by zeros where adapters with further targets came since."""
    if known is None:
        return {
            "values": own.clone(),
            "first": torch.zeros_like(own),
            "second": torch.zeros_like(own),
        }
    found: Row = {}
    for part in PARTS:
        value = known[part].to(own.device, own.dtype)
        missing = own.shape[0] - value.shape[0] if own.ndim else 0
        found[part] = (
            torch.cat([value, own.new_zeros(missing, *own.shape[1:])]) if missing else value
        )
    return found


def column(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Numbers, one per row, shaped to multiply ``like (rows, ...)``."""
    made = torch.tensor(numbers, dtype=like.dtype, device=like.device)
    return made.view(-1, *[1] * (like.ndim - 1))
