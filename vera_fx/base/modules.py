"""The model's own modules and tensors by path, without the bank that hangs on it."""

from types import CodeType
from typing import Any

from torch import nn

BANK = "vera"
"""Name under which the adapter bank hangs on the model."""


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own modules by path (a module's first), without the model and the bank."""
    return {path: module for path, module in model.named_modules() if path and not in_bank(path)}


def in_bank(path: str) -> bool:
    """True for the bank's own path and all below it."""
    return path == BANK or path.startswith(f"{BANK}.")


def module_paths(model: nn.Module) -> dict[int, list[str]]:
    """All paths of each module of the model, by the module's identity."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not in_bank(path):
            paths.setdefault(id(module), []).append(path)
    return paths


def tensor_paths(model: nn.Module) -> dict[int, list[str]]:
    """All attribute paths of each tensor of the model, by the tensor's identity."""
    paths: dict[int, list[str]] = {}
    for named in (model.named_parameters, model.named_buffers):
        for path, tensor in named(remove_duplicate=False):
            if not in_bank(path):
                paths.setdefault(id(tensor), []).append(path)
    return paths


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before the library extended it."""
    return getattr(type(module), "_vera_base", type(module))


def asks_for_gradients(hook: Any) -> bool:
    """True for the hook that gradient checkpointing puts on embeddings, in all its versions.

    All that it does is ``output.requires_grad_(True)``, so that re-entrant checkpoints keep the
    gradients of what is inside; checkpoints in graphs are never re-entrant.
    """
    code = getattr(hook, "__code__", None)
    return isinstance(code, CodeType) and code.co_names == ("requires_grad_",)
