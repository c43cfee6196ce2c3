"""``nn.Linear`` and its subclasses: ``x @ W.T + bias`` by a weight of its own, ``(out, in)``."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from vera_fx.passes import BaseProduct, ReadWeight
from vera_fx.products.protocol import plain_refusal


@dataclass(frozen=True, slots=True)
class Linear:
    """Graphs read the weight, wherever it is used: in the module's call, or by a function elsewhere."""

    @property
    def name(self) -> str:
        """Torch's name."""
        return "nn.Linear"

    def owns(self, module: nn.Module) -> bool:
        """``nn.Linear`` and its subclasses."""
        return isinstance(module, nn.Linear)

    def refusal(self, module: nn.Module) -> str | None:
        """Weights that are no plain matrices, and those that accelerate moves around."""
        weight = module.weight
        if isinstance(weight, Tensor) and weight.is_meta and hasattr(module, "_hf_hook"):
            return (
                "is offloaded by accelerate, which moves weights around during each call; load the "
                "model onto one device"
            )
        return plain_refusal(weight)

    def features(self, module: nn.Module) -> tuple[int, int]:
        """The weight's sizes."""
        out_features, in_features = self.weight(module).shape
        return in_features, out_features

    def product(self, module: nn.Module) -> BaseProduct:
        """A product by a tensor that the graph reads."""
        del module
        return ReadWeight("out_in")

    def weight(self, module: nn.Module) -> Tensor:
        """As it is."""
        return cast("Tensor", module.weight)

    def place(self, module: nn.Module) -> tuple[torch.dtype, torch.device]:
        """The weight's."""
        weight = self.weight(module)
        return weight.dtype, weight.device

    def merge_refusal(self, module: nn.Module) -> str | None:
        """None: what is computed (parametrised) or tied is for `vera_fx.merge` to see."""
        del module
        return None
