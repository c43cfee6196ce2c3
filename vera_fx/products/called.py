"""Quantised and vendor layers: modules that graphs call, whose weight only their own code reads."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from vera_fx.errors import first_line
from vera_fx.passes import BaseProduct, CalledModule
from vera_fx.products.backends import backend_of, describe
from vera_fx.products.opaque import (
    Features,
    answer,
    compute_dtype,
    dense_weight,
    features_of,
    is_opaque,
    place_of_module,
    tensors_of,
)
from vera_fx.products.parallel import style_of


@dataclass(frozen=True, slots=True)
class Called:
    """The base's product, its kernels and its gradient stay the module's own business."""

    @property
    def name(self) -> str:
        """As messages call it."""
        return "a quantised linear module"

    def owns(self, module: nn.Module) -> bool:
        """By structure, or because a user has registered its class."""
        return is_opaque(module)

    def refusal(self, module: nn.Module) -> str | None:
        """Weights that no code of the module's own can multiply by."""
        if features_of(module) is None:
            return (
                f"is a {type(module).__name__} without in_features and out_features; say which attributes "
                "hold them: vera_fx.register_base_product(cls, in_features=..., out_features=...)"
            )
        if (style := style_of(module)) is not None:
            return (
                f"is a {type(module).__name__} under tensor parallelism ({style.name}), and only layers "
                "whose weight is not quantised are known to be cut; leave it out of target_modules"
            )
        if any(tensor.is_meta for tensor in tensors_of(module)):
            return None
        try:
            self._ask(module)
        except Exception as error:  # whatever a foreign library raises
            return self._unusable(module, error)
        return None

    def _ask(self, module: nn.Module) -> None:
        """One row through the module; its answer must have the width that it says."""
        inside, outside = cast("Features", features_of(module))
        rows = torch.ones(1, inside, dtype=compute_dtype(module), device=self.place(module)[1])
        shape = tuple(answer(module, rows).shape)
        if shape != (1, outside):
            raise ValueError(
                f"it gave {shape} for (1, {inside}), where (1, {outside}) was expected"
            )

    def _unusable(self, module: nn.Module, error: Exception) -> str:
        weight = module._parameters.get("weight")
        held = "" if weight is None else f" has a weight of type {type(weight.data).__name__},"
        held += "" if weight is None else f" dtype {weight.dtype} and shape {tuple(weight.shape)}"
        return (
            f"{held.strip() or 'is a ' + type(module).__name__}, and the module cannot multiply by it "
            f"({first_line(error)}); let a quantisation library replace the module by one that can, or "
            "leave it out of target_modules"
        )

    def features(self, module: nn.Module) -> tuple[int, int]:
        """As the module says."""
        return cast("Features", features_of(module))

    def product(self, module: nn.Module) -> BaseProduct:
        """A call."""
        return CalledModule(describe(module))

    def weight(self, module: nn.Module) -> Tensor:
        """Computed: as its library dequantises it, or what the module answers to unit vectors."""
        backend = backend_of(module)
        rewriting = None if backend is None else backend.rewriting
        found = None if rewriting is None else rewriting.read(module)
        return dense_weight(module) if found is None else found

    def place(self, module: nn.Module) -> tuple[torch.dtype, torch.device]:
        """PEFT's rule."""
        return place_of_module(module)

    def merge_refusal(self, module: nn.Module) -> str | None:
        """Where no library can quantise the sum again."""
        backend = backend_of(module)
        rewriting = None if backend is None else backend.rewriting
        why = f"({describe(module)}) is not plain, and nothing can be added to it in place"
        if rewriting is not None and (why := rewriting.refusal(module)) is None:
            return None
        return f"{why}; unload(merge=True) gives plain modules with the adapter in them"
