"""An adapter as plain data: one tensor of vectors, and copies of what else it trained.

A bank's own adapters are modules, which can train. Thousands that only serve need no modules: one
row each, in the order in which mixtures lay vectors out, immutable once it is made.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from vera_fx.branches.kinds import kind_named
from vera_fx.branches.protocol import BranchKind
from vera_fx.config import AdapterConfig
from vera_fx.errors import AdapterError
from vera_fx.passes import Target


@dataclass(frozen=True, slots=True)
class Group:
    """The adapters that share one set of projections, as columns of one row of vectors.

    Attributes:
        key: the projections' key in the bank.
        rank: their rank.
        dtype: the vectors' dtype.
        places: for each target that some of them has or had, by path, the first column of each of
            its vectors and the column behind the last.
        width: columns in all.
        kind_name: the kind of their branches.
    """

    key: str
    rank: int
    dtype: torch.dtype
    places: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    width: int = 0
    kind_name: str = "VeRA"

    @property
    def kind(self) -> BranchKind:
        """The kind of their branches."""
        return kind_named(self.kind_name)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of a target's vectors, in the order of their columns."""
        return tuple(self.kind.parameters.own)

    def reaching(self, targets: Mapping[str, Target]) -> "Group":
        """The layout with places for these targets too, behind those that it has."""
        places, width = dict(self.places), self.width
        for path, target in targets.items():
            if path not in places:
                sizes = self.kind.own_sizes(self.rank, target)
                starts = accumulate((math.prod(size) for size in sizes.values()), initial=width)
                places[path] = tuple(starts)
                width = places[path][-1]
        return self if width == self.width else replace(self, places=places, width=width)

    @property
    def table(self) -> str:
        """Name of the graph input that holds the rows."""
        return f"rows_{self.key}"

    def columns(self) -> Iterator[tuple[str, tuple[tuple[str, int, int], ...]]]:
        """Each target's path, and the name, first column and end of each of its vectors."""
        for path, starts in self.places.items():
            yield path, tuple(zip(self.names, starts, starts[1:], strict=False))


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """One adapter that only serves. Nobody writes to its tensors.

    Attributes:
        config: what it was made from.
        group: the layout of ``row``.
        row: ``(group.width,)``.
        copied: path of a tensor of the base -> its own value of that tensor.
        pair: the projections it was trained with, as the bank holds them.
    """

    config: AdapterConfig
    group: Group
    row: Tensor
    copied: Mapping[str, Tensor]
    pair: object

    @property
    def projections(self) -> str:
        """The key of its projections in the bank."""
        return self.group.key

    @property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        return self.row.nbytes + sum(tensor.nbytes for tensor in self.copied.values())

    def has(self, path: str) -> bool:
        """Whether it has vectors for the target, or its own value of the tensor, at ``path``."""
        starts = self.group.places.get(path)
        if starts is None:
            return path in self.copied
        return bool(self.row[starts[0] : starts[-1]].any())

    def row_for(self, group: Group) -> Tensor:
        """The row in another layout, that of a bank whose adapters have come or gone since.

        Raises:
            AdapterError: the bank has no place left for one of its targets.
        """
        if group is self.group or group.places == self.group.places:
            return self.row
        row = self.row.new_zeros(group.width)
        for path, starts in self.group.places.items():
            values = self.row[starts[0] : starts[-1]]
            if path in group.places:
                at = group.places[path]
                row[at[0] : at[-1]] = values
            elif values.any():
                raise AdapterError(
                    f"an adapter of the store has vectors for {path!r}, and the bank's adapters "
                    "that had some too were deleted; load one of its kind with load_adapter"
                )
        return row
