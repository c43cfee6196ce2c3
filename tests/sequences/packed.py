"""Linear layers over a weight that only their own code reads, as quantisation libraries make them.

Theirs is stored as the bits of its numbers, so that a merge into it rounds nothing and the world need not know.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vera_fx.products.backends import Backend
from vera_fx.products.writing.rewriting import Rewriting


class Packed(nn.Module):
    """No parameter but a bias, and the weight's bits in a buffer."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inside, outside
        linear = nn.Linear(inside, outside)
        self.packed = nn.Buffer(linear.weight.detach().view(torch.int32).clone())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed.view(torch.float32).to(x.dtype), self.bias)


def _write(module: Any, weight: Tensor) -> None:
    module.packed = weight.detach().float().contiguous().view(torch.int32).clone()


def _restore(module: Any, held: dict[str, Any]) -> None:
    module.packed = held["packed"]


STAND_IN = Backend(
    "packed",
    ("tests.Packed",),
    lambda _: "32 bit",
    Rewriting(
        _write,
        stored=lambda module: {"packed": module.packed},
        restore=_restore,
        is_coarse=lambda _: True,
    ),
)
"""As coarse as any, so that a merge has to be asked for."""


def weight_in(layer: Any) -> Tensor:
    """The weight that a layer multiplies by, ``(out, in)``."""
    packed = getattr(layer, "packed", None)
    return layer.weight.detach() if packed is None else packed.view(torch.float32)


def scale_weight(layer: Any, factor: float) -> None:
    """Change the weight in place."""
    weight_in(layer).mul_(factor)
