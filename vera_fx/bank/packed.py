"""An adapter as plain data: one tensor of vectors, and copies of what else it trained.

A bank's own adapters are modules, which can train. Thousands that only serve need no modules: one
row each, in the order in which mixtures lay vectors out, immutable once it is made.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vera_fx.config import VeraConfig
from vera_fx.errors import AdapterError
from vera_fx.passes import Target


@dataclass(frozen=True, slots=True)
class Group:
    """The adapters that share one pair of projections, as columns of one row of vectors.

    Attributes:
        key: the projections' key in the bank.
        rank: their rank.
        dtype: the vectors' dtype.
        places: for each target that some of them has or had, by path, the first column of
            ``lambda_d`` and of ``lambda_b``.
        width: columns in all.
    """

    key: str
    rank: int
    dtype: torch.dtype
    places: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    width: int = 0

    def reaching(self, targets: Mapping[str, Target]) -> "Group":
        """The layout with places for these targets too, behind those that it has."""
        places, width = dict(self.places), self.width
        for path, target in targets.items():
            if path not in places:
                places[path] = (width, width + self.rank)
                width += self.rank + target.out_features
        return self if width == self.width else replace(self, places=places, width=width)

    @property
    def table(self) -> str:
        """Name of the graph input that holds the rows."""
        return f"rows_{self.key}"

    def columns(self) -> Iterator[tuple[str, int, int, int]]:
        """Each target's path, and where its ``lambda_d`` and ``lambda_b`` begin and the latter ends."""
        ends = [*(start for start, _ in self.places.values()), self.width][1:]
        for (path, (d, b)), end in zip(self.places.items(), ends, strict=True):
            yield path, d, b, end


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

    config: VeraConfig
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
        if path not in self.group.places:
            return path in self.copied
        return any(
            bool(self.row[d:end].any()) for at, d, _, end in self.group.columns() if at == path
        )

    def row_for(self, group: Group) -> Tensor:
        """The row in another layout, that of a bank whose adapters have come or gone since.

        Raises:
            AdapterError: the bank has no place left for one of its targets.
        """
        if group is self.group or group.places == self.group.places:
            return self.row
        row = self.row.new_zeros(group.width)
        for path, start, _, end in self.group.columns():
            values = self.row[start:end]
            if path in group.places:
                at = group.places[path][0]
                row[at : at + len(values)] = values
            elif values.any():
                raise AdapterError(
                    f"an adapter of the store has vectors for {path!r}, and the bank's adapters "
                    "that had some too were deleted; load one of its kind with load_adapter"
                )
        return row
