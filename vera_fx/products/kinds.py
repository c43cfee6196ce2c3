"""The kinds of base product that the library knows: a kind is registered here, by one line."""

from typing import cast

import torch
from torch import Tensor, nn

from vera_fx.errors import TargetError
from vera_fx.products import bitsandbytes_layers
from vera_fx.products.attention_output import AttentionOutput
from vera_fx.products.backends import backend_of, describe
from vera_fx.products.called import Called
from vera_fx.products.conv1d import Conv1D
from vera_fx.products.cut_linear import BaseCalls, Call
from vera_fx.products.linear import Linear
from vera_fx.products.opaque import is_opaque
from vera_fx.products.parallel import (
    Parallel,
    base_calls,
    cut_of,
    is_idle,
    is_odd,
    stands_for,
    style_of,
)
from vera_fx.products.protocol import ProductKind
from vera_fx.products.writing.rewriting import Rewriting

__all__ = [
    "BaseCalls",
    "Call",
    "base_calls",
    "cut_of",
    "describe",
    "is_idle",
    "is_odd",
    "stands_for",
    "style_of",
]

KINDS: tuple[ProductKind, ...] = (AttentionOutput(), Called(), Parallel(), Conv1D(), Linear())
"""The first that owns a module counts."""


def known_kind(module: nn.Module) -> ProductKind | None:
    """The kind of a module; None if it multiplies by no weight that the library knows of."""
    return next((kind for kind in KINDS if kind.owns(module)), None)


def kind_of(model: nn.Module, path: str) -> tuple[ProductKind, nn.Module]:
    """The kind of a target, and its module.

    Raises:
        TargetError: the module is of no kind any more.
    """
    module = model.get_submodule(path)
    kind = known_kind(module)
    if kind is None:
        raise TargetError(
            f"target {path!r} is a {type(module).__name__} now, which is no linear module; put back what "
            "was there when the model was adapted, or unload the adapters first"
        )
    return kind, module


def keep_gradients(model: nn.Module) -> tuple[str, ...]:
    """Keep the model's called modules, targets or not, from what would lose gradients.

    Returns:
        The paths of those that were changed, for `allow_packing`.
    """
    named = ((path, module) for path, module in model.named_modules() if is_opaque(module))
    return tuple(path for path, module in named if bitsandbytes_layers.keep_gradients(module))


def allow_packing(model: nn.Module, paths: tuple[str, ...]) -> None:
    """Undo `keep_gradients`."""
    modules = dict(model.named_modules())
    for path in paths:
        if path in modules and is_opaque(modules[path]):
            bitsandbytes_layers.allow_packing(modules[path])


def rewriting_of(model: nn.Module, path: str) -> Rewriting:
    """How the called target at ``path`` takes another weight.

    Raises:
        TargetError: nothing is known of that; `ProductKind.merge_refusal` says so before.
    """
    backend = backend_of(model.get_submodule(path))
    if backend is None or backend.rewriting is None:
        raise TargetError(f"nothing can be added to the weight of {path!r} in place")
    return backend.rewriting


def weight_of(model: nn.Module, path: str) -> Tensor:
    """The weight of the target at ``path``, ``(out, in)``."""
    kind, module = kind_of(model, path)
    return kind.weight(module)


def stored_weight(model: nn.Module, path: str) -> Tensor:
    """The weight of the target at ``path`` as its module holds it."""
    return cast("Tensor", model.get_submodule(path).weight)


def place_of(model: nn.Module, path: str) -> tuple[torch.dtype, torch.device]:
    """The dtype of the target's weight, and its device."""
    kind, module = kind_of(model, path)
    return kind.place(module)


def is_flipped(model: nn.Module, path: str) -> bool:
    """True if the target's weight lies ``(in, out)``, PEFT's ``fan_in_fan_out``."""
    kind, module = kind_of(model, path)
    return kind.product(module).layout == "in_out"
