"""Hugging Face's ``Conv1D``: ``x @ W + bias`` by a weight that lies the other way round, ``(in, out)``."""

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from vera_fx.passes import BaseProduct, ReadWeight
from vera_fx.products.linear import Linear


@dataclass(frozen=True, slots=True)
class Conv1D(Linear):
    """As `Linear`, flipped."""

    @property
    def name(self) -> str:
        """Transformers' name."""
        return "Conv1D"

    def owns(self, module: nn.Module) -> bool:
        """Told by name, so that transformers stays optional."""
        return any(
            cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
            for cls in type(module).__mro__
        )

    def product(self, module: nn.Module) -> BaseProduct:
        """A product by a tensor that the graph reads."""
        del module
        return ReadWeight("in_out")

    def weight(self, module: nn.Module) -> Tensor:
        """Transposed: a view of the same memory."""
        return cast("Tensor", module.weight).T
