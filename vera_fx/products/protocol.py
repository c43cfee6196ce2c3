"""What a kind of base product says of its modules: the seam for linear layers of every make."""

from typing import Protocol

import torch
from torch import Tensor, nn

from vera_fx.passes import BaseProduct


class ProductKind(Protocol):
    """A kind of module that multiplies its input by a weight."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    def owns(self, module: nn.Module) -> bool:
        """True for modules of this kind."""
        ...

    def refusal(self, module: nn.Module) -> str | None:
        """Why a module of this kind cannot be adapted, with the remedy; None if it can."""
        ...

    def features(self, module: nn.Module) -> tuple[int, int]:
        """``(in_features, out_features)``."""
        ...

    def product(self, module: nn.Module) -> BaseProduct:
        """How its calls show in graphs."""
        ...

    def weight(self, module: nn.Module) -> Tensor:
        """Its weight, ``(out, in)``: a view of what the module holds if ``can_merge``, else computed."""
        ...

    def place(self, module: nn.Module) -> tuple[torch.dtype, torch.device]:
        """The dtype that vectors beside it have (before PEFT's rule for half precision), and its device."""
        ...

    def merge_refusal(self, module: nn.Module) -> str | None:
        """Why nothing can be added to its weight in place; None if it can."""
        ...


PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that every operator computes in."""


def plain_refusal(weight: object) -> str | None:
    """Why a weight is no plain matrix of floating-point numbers; None if it is."""
    if not isinstance(weight, Tensor):
        return f"has no weight but a {type(weight).__name__}"
    if torch.nn.parameter.is_lazy(weight):
        return "is lazy; call the model once before adapting it"
    # A DTensor is gathered before it is used, or `vera_fx.base.sharding` refuses it.
    is_plain = type(weight) in {Tensor, nn.Parameter} and is_plain_data(weight)
    if not is_plain and type(weight).__name__ != "DTensor":
        return (
            f"has a weight of type {type(weight.data).__name__}, whose values only its own library "
            "can read; leave it out of target_modules"
        )
    if weight.dtype not in PLAIN or weight.ndim != 2:  # noqa: PLR2004
        return (
            f"has a weight of dtype {weight.dtype} and shape {tuple(weight.shape)}; quantised and packed "
            "weights are not supported, leave it out of target_modules"
        )
    return None


def is_plain_data(weight: Tensor) -> bool:
    """True if the memory of a tensor is its values: no wrapper subclass behind a parameter."""
    return type(weight.data) is Tensor and weight.layout is torch.strided
