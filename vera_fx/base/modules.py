"""The model's own modules and tensors by path, without the bank that hangs on it."""

import types
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

BANK = "vera"
"""Name under which the adapter bank hangs on the model."""

HOOKS = tuple(name for name in nn.Module().__dict__ if "hooks" in name)
"""Names of the dictionaries in which a module keeps hooks."""

ADAPTED = "adapted"
"""Purpose of the classes of adapted models."""

PART = "part"
"""Purpose of the classes of modules that run graphs of their own in a model that runs in Python."""


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


def extended_class(
    base: type[nn.Module], purpose: str, methods: Mapping[str, Any]
) -> type[nn.Module]:
    """A subclass of ``base`` with other methods, which a module of that class can be given in place.

    ``base`` stands first and alone, as in Python only that has the same layout of memory for every
    class: one with ``abc.ABC`` or ``__slots__`` in front differs from all that come before it.
    """
    # The name stays: transformers looks models up by the name of their class.
    names: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    names |= {"_vera_base": base, "_vera_purpose": purpose, **methods}
    kind = types.new_class(base.__name__, (base,), exec_body=lambda ns: ns.update(names))
    return cast("type[nn.Module]", kind)


def is_extended(module: nn.Module, purpose: str) -> bool:
    """True if the module's class was extended for that purpose."""
    return getattr(type(module), "_vera_purpose", None) == purpose


def set_child(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Give a container another child, or take one away (None).

    By a dictionary of its own: another thread may be walking the present one. A child that takes the
    place of another stands where that stood: ``nn.Sequential`` runs its children in order.
    """
    children = {**parent._modules, name: child}
    if child is None:
        del children[name]
    parent.__dict__["_modules"] = children


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before the library extended it."""
    return getattr(type(module), "_vera_base", type(module))


def asks_for_gradients(hook: Any) -> bool:
    """True for the hook that gradient checkpointing puts on embeddings, in all its versions.

    All that it does is ``output.requires_grad_(True)``, so that re-entrant checkpoints keep the
    gradients of what is inside; checkpoints in graphs are never re-entrant.
    """
    code = getattr(hook, "__code__", None)
    return isinstance(code, types.CodeType) and code.co_names == ("requires_grad_",)
