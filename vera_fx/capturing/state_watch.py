"""Notices that a model's Python state changed, so that no stale graph ever runs.

A captured graph bakes in what its Python code read: train or eval mode, dropout rates, flags of
the configuration, dtypes and devices of the weights. The watch gives every such state a small
number, which is part of the key under which graphs are kept: a changed state leads to another
capture, a restored one back to its graph.
"""

import enum
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vera_fx._torch import stamp

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_Held = Mapping[str, Tensor | None]
_UNREAD = {"_previous_max_cache_length"}  # what transformers' generate notes for itself
_IGNORED = (frozenset(nn.Module().__dict__) - {"training"}) | _UNREAD


class StateWatch:
    """Numbers the Python states of a model's modules and of their configuration objects."""

    def __init__(self, modules: list[nn.Module], ignored_hook: type) -> None:
        self._modules = modules
        self._ignored_hook = ignored_hook
        configs = {id(c): c for m in modules if (c := m.__dict__.get("config")) is not None}
        self._configs = [config for config in configs.values() if hasattr(config, "__dict__")]
        self._attributes: list[dict[Any, Any]] = [
            obj.__dict__ for obj in (*modules, *self._configs)
        ]
        self._hooks: list[dict[Any, Any]] = []
        self._tensors: list[_Held] = [d for m in modules for d in (m._parameters, m._buffers)]
        self._probes = _probes(self._tensors)
        self._seen: Hashable = None
        self._states: dict[Hashable, int] = {}
        self._current = -1

    def state(self) -> int:
        """The number of the present state; cheap while nothing changes."""
        if self._now() != self._seen:
            fingerprint = tuple(self._facts())
            self._current = self._states.setdefault(fingerprint, len(self._states))
            self._seen = self._now()
        return self._current

    def _now(self) -> Hashable:
        """What is cheap to look at and differs whenever a fact does.

        A new hook anywhere moves next_id; a removed one changes a dictionary that is watched. Casts
        and moves of a model leave no mark on it, but reach its first weight and its last.
        """
        changes = stamp(self._attributes) + stamp(self._hooks)
        return changes, RemovableHandle.next_id, *map(_place, self._probes)

    def _facts(self) -> Iterator[Hashable]:
        for attributes in self._attributes:
            yield tuple(_facts_of(attributes))
        self._hooks = [
            hooks
            for module in self._modules
            for hooks in (module.__dict__[name] for name in _HOOKS)
            if any(not isinstance(hook, self._ignored_hook) for hook in hooks.values())
        ]
        yield tuple(id(hook) for hooks in self._hooks for hook in hooks.values())
        yield tuple(_place((tensors, name)) for tensors in self._tensors for name in tensors)


def _probes(tensors: Sequence[_Held]) -> list[tuple[_Held, str]]:
    """Where the first and the last floating-point tensor are kept."""
    found = [
        (held, name)
        for held in tensors
        for name, tensor in held.items()
        if tensor is not None and tensor.is_floating_point()
    ]
    return [*found[:1], *found[1:][-1:]]


def _place(at: tuple[_Held, str]) -> Hashable:
    """Dtype and device of the tensor that is there now."""
    tensor = at[0].get(at[1])
    return None if tensor is None else (tensor.dtype, tensor.device)


def _facts_of(attributes: dict[str, Any]) -> Iterator[tuple[str, Hashable]]:
    for name, value in attributes.items():
        if name not in _IGNORED and (fact := _fact(value)) is not None:
            yield name, fact


def _fact(value: Any) -> Hashable:
    """What about an attribute can change the code's path; None for what cannot, or is read live."""
    if isinstance(value, _PLAIN):
        return type(value).__name__, value
    if isinstance(value, list | tuple | set | frozenset):
        return _container_fact(value, value)
    if isinstance(value, dict):
        return _container_fact(value, value.values())
    if callable(value) and not isinstance(value, nn.Module):
        return "callable", id(value)
    return None


def _container_fact(container: Any, values: Iterable[Any]) -> Hashable:
    if all(isinstance(value, (*_PLAIN, list, tuple, dict)) for value in values):
        return type(container).__name__, repr(container)
    return None
