"""Reads a call: which tensors it passes, and everything else that decides which graph fits.

A signature is the tree of arguments with the dtype, rank, device and size-0 and size-1 dimensions
of every tensor, and the value of every constant. Two calls of one signature differ at most in
sizes; whether a captured graph admits those is the graph's to say.
"""

import enum
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vera_fx._torch import (
    SUPPORTED_NODES,
    MappingKey,
    TreeSpec,
    register_pytree_node,
    tree_flatten,
    tree_unflatten,
)
from vera_fx.capturing.open_integers import integers_as_sizes
from vera_fx.errors import CaptureError

CONSTANTS = (
    bool, int, float, complex, str, bytes, type(None), enum.Enum, slice,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
"""Argument values that a graph may bake in, each value a signature of its own."""


@dataclass(slots=True)
class Call:
    """One call, taken apart.

    Attributes:
        arguments: the arguments by name; extra positional ones as ``*0``, ``*1``...
        inputs: the same as a graph takes them: open integers in objects are sizes of tensors.
        leaves: all tensors in the inputs, contiguous, in order.
        key: the tree, the constants, and every tensor's dtype, device and sizes.
    """

    arguments: dict[str, Any]
    inputs: dict[str, Any]
    leaves: list[Tensor]
    key: tuple[Hashable, ...]

    def structure(self) -> tuple[Hashable, ...]:
        """The key with every size above 1 left open: the call's signature."""
        return tuple(_open(part) if isinstance(part, torch.Size) else part for part in self.key)

    def write_back(self, written: Sequence[int]) -> None:
        """Give the caller's tensors what a graph wrote to copies of them, which `leaves` may be."""
        if written:
            given: list[Tensor] = []
            for value in self.inputs.values():
                parts = (value,) if isinstance(value, Tensor) else tree_flatten(value)[0]
                given += (part for part in parts if isinstance(part, Tensor))
            for index in written:
                if given[index].data_ptr() != self.leaves[index].data_ptr():
                    given[index].copy_(self.leaves[index])

    def tensor_names(self) -> tuple[str, ...]:
        """For each leaf, the name of the argument that holds it."""
        return tuple(
            name for name, value in self.inputs.items() for _ in range(_tensor_count(value))
        )


def _tensor_count(value: Any) -> int:
    if isinstance(value, Tensor):
        return 1
    if isinstance(value, CONSTANTS):
        return 0
    return sum(isinstance(part, Tensor) for part in tree_flatten(value)[0])


def _open(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(min(size, 2) for size in sizes)


class CallReader:
    """Takes apart the calls of one forward method, whichever way the arguments are passed."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._signature = inspect.signature(forward)
        parameters = list(self._signature.parameters.values())
        kinds = inspect.Parameter
        self._positional = [
            p.name
            for p in parameters
            if p.kind in {kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD}
        ]
        self._positional_only = [p.name for p in parameters if p.kind is kinds.POSITIONAL_ONLY]
        self._takes_more = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
        self._defaults = {p.name: p.default for p in parameters if p.default is not kinds.empty}

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Name the arguments, find the tensors and make the key.

        Raises:
            TypeError: the call does not fit the forward's signature, as Python would raise it.
            CaptureError: an argument is neither tensor, constant nor a tree of them.
        """
        arguments = self._named(args, kwargs)
        inputs = {name: integers_as_sizes(value) for name, value in arguments.items()}
        leaves: list[Tensor] = []
        key: list[Hashable] = []
        for name, value in inputs.items():
            key.append(name)
            if isinstance(value, Tensor):
                _add_tensor(value, leaves, key)
            elif isinstance(value, CONSTANTS):
                key += (type(value), _hashable(value))
            else:
                _add_tree(name, value, leaves, key)
        return Call(arguments, inputs, leaves, tuple(key))

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = self._positional
        if args and (len(args) > len(names) or any(name in kwargs for name in names[: len(args)])):
            self._signature.bind(*args, **kwargs)  # raises the TypeError that the forward would
        arguments = dict(zip(names, args, strict=False))
        arguments.update((f"*{i}", value) for i, value in enumerate(args[len(names) :]))
        arguments.update(kwargs)
        defaults = self._defaults
        return {
            name: _read(value)
            for name, value in arguments.items()
            if not (value is None and defaults.get(name, inspect) is None)
        }

    def split(self, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The positional and keyword arguments with which to call the forward again."""
        extra = [value for name, value in arguments.items() if name.startswith("*")]
        by_position = self._positional if extra else self._positional_only
        positional = [arguments.get(name, self._defaults.get(name)) for name in by_position]
        keywords = {
            name: value
            for name, value in arguments.items()
            if name not in by_position and not name.startswith("*")
        }
        return [*positional, *extra], keywords


class Items(dict[str, Any]):
    """What a mapping held when a model was called with it, as a pytree.

    Reads attributes as keys, like ``transformers.BatchEncoding``.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _with_keys(items: Any) -> tuple[list[tuple[Any, Any]], Any]:
    return [(MappingKey(name), value) for name, value in items.items()], list(items)


register_pytree_node(
    Items,
    lambda items: (list(items.values()), list(items)),
    lambda values, names: Items(zip(names, values, strict=True)),
    flatten_with_keys_fn=_with_keys,
)


def _read(value: Any) -> Any:
    """A mapping that torch knows no tree of (BatchEncoding, UserDict) as `Items`; all else as it is."""
    if isinstance(value, (Tensor, *CONSTANTS)) or not isinstance(value, Mapping):
        return value
    return value if type(value) in SUPPORTED_NODES else Items(value)


def _add_tensor(value: Tensor, leaves: list[Tensor], key: list[Hashable]) -> None:
    leaves.append(_plain(value))
    key += (value.shape, value.dtype, value.device)


def _plain(value: Tensor) -> Tensor:
    """``value``, contiguous, with the strides of a fresh tensor, which graphs may be guarded by."""
    if not value.is_contiguous():
        return value.contiguous()
    if 1 not in value.shape:
        return value
    # Contiguous with any stride where the size is 1: a part of a larger cache, say.
    step = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if stride != step:
            return value.flatten().view(value.shape)
        step *= max(size, 1)
    return value


def _add_tree(name: str, value: Any, leaves: list[Tensor], key: list[Hashable]) -> None:
    parts, spec = tree_flatten(value)
    key += tuple(freeze_spec(spec))
    for part in parts:
        if isinstance(part, Tensor):
            _add_tensor(part, leaves, key)
        elif isinstance(part, CONSTANTS):
            key += (type(part), _hashable(part))
        else:
            raise CaptureError(
                f"argument {name!r} holds a {type(part).__name__}, which is neither a tensor nor a "
                "constant nor a tree of them; pass tensors, or register the type with "
                "torch.utils._pytree.register_pytree_node"
            )


def _hashable(value: Any) -> Hashable:
    return repr(value) if isinstance(value, slice) else value


def freeze_spec(spec: TreeSpec) -> Iterator[Hashable]:
    """A tree's structure as hashable parts."""
    yield spec.type
    yield _freeze(spec.context)
    for child in spec.children():
        yield from freeze_spec(child)


def _freeze(context: Any) -> Hashable:
    """A pytree context as a hashable value."""
    if isinstance(context, dict):
        return tuple((name, _freeze(value)) for name, value in context.items())
    if isinstance(context, list | tuple):
        return tuple(map(_freeze, context))
    try:
        hash(context)
    except TypeError:
        return repr(context)
    return context


def map_tensors(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A copy of the tree ``value`` with ``fn`` applied to every tensor."""
    leaves, spec = tree_flatten(value)
    return tree_unflatten([fn(x) if isinstance(x, Tensor) else x for x in leaves], spec)
