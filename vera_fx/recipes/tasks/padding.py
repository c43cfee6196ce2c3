"""Texts as batches of few different lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_STEP, _LENGTHS = 8, 64


@dataclass(frozen=True)
class Padding:
    """Pads batches to lengths of which there are at most 64.

    Every other length is planned anew and compiled once more, so few are better.

    Attributes:
        tokenizer: the tokeniser.
        length: the longest row.
    """

    tokenizer: Any
    length: int

    def padded(self, length: int) -> int:
        """The length of a batch whose longest row has so many tokens."""
        step = max(_STEP, -(-self.length // _LENGTHS))
        return min(-(-length // step) * step, self.length)

    def __call__(
        self, texts: Sequence[str], second: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Token ids, mask, and whatever else the tokeniser gives, ``(rows, length)``."""
        pairs = (texts,) if second is None else (texts, second)
        found = self.tokenizer(*map(list, pairs), truncation=True, max_length=self.length)
        width = self.padded(max(map(len, found["input_ids"])))
        return dict(
            self.tokenizer.pad(found, padding="max_length", max_length=width, return_tensors="pt")
        )

    def ids(
        self, rows: Sequence[Sequence[int]], fill: int, *, left: bool = False, width: int = 0
    ) -> Tensor:
        """Rows of numbers as one tensor, ``(rows, length)``."""
        width = width or self.padded(max(map(len, rows)))
        whole = [
            [*[fill] * (width - len(row)), *row] if left else [*row, *[fill] * (width - len(row))]
            for row in rows
        ]
        return torch.tensor(whole)
