"""What about a Python value can change which graph its reader becomes: a fact, which can be compared.

Constants count by value, containers by what they hold, everything else by identity.
"""

import enum
import sys
import types
import weakref
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Any

import torch

CONSTANTS = (
    bool, int, complex, str, bytes, type(None), enum.Enum, slice, range,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip

_LIBRARIES = frozenset(
    {"torch", "torchvision", "vera_fx", "numpy", "scipy", "pandas", "PIL", "safetensors", "tokenizers",
     "accelerate", "deepspeed", "lightning", "lightning_fabric", "pytorch_lightning", "wandb",
     "huggingface_hub", "datasets", "tqdm", "rich", "typing_extensions", "packaging", "regex", "yaml",
     "filelock", "sympy", "pytest", "_pytest", "hypothesis", *sys.stdlib_module_names}
)  # fmt: skip

_DEPTH = 16
_LONG = 10_000
"""Containers of more entries count by identity and length."""


class Same:
    """Equal to what stands for the very same object, as long as that lives; holds it weakly."""

    __slots__ = ("_hash", "_held", "_reference")

    def __init__(self, value: Any) -> None:
        self._hash = id(value)
        self._held = None
        try:
            self._reference: Any = weakref.ref(value)
        except (
            TypeError
        ):  # a class that knows no weak references; identities must not be used again
            self._held = (value,)

    def _value(self) -> Any:
        return self._held if self._held is not None else self._reference()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Same) or self._hash != other._hash:
            return False
        mine, theirs = self._value(), other._value()
        if self._held is not None and other._held is not None:
            return self._held[0] is other._held[0]
        return mine is not None and mine is theirs

    def __hash__(self) -> int:
        return self._hash


def fact(value: Any, depth: int = 0) -> Hashable:
    """The fact of a value."""
    if type(value) is float:
        return float, value.hex()  # one fact for every NaN, two for the two zeros
    if isinstance(value, slice):
        return type(value), repr(value)
    if isinstance(value, CONSTANTS) and type(value).__hash__ is not None:
        return type(value), value
    if isinstance(value, list | tuple | set | frozenset | dict | deque):
        return _of_container(value, depth)
    if type(value) is weakref.ref or isinstance(value, float):
        return type(value), repr(value)
    return Same(value)


def _of_container(value: Any, depth: int) -> Hashable:
    if depth > _DEPTH or len(value) > _LONG:
        return type(value), len(value), id(value)
    if isinstance(value, dict):
        items = ((fact(k, depth + 1), fact(v, depth + 1)) for k, v in value.items())
        return type(value), tuple(items)
    parts = (fact(part, depth + 1) for part in value)
    ordered = isinstance(value, list | tuple | deque)
    return type(value), tuple(parts) if ordered else frozenset(parts)


def slots_of(cls: type) -> Iterator[types.MemberDescriptorType]:
    """The slots of a class and of those above it."""
    for base in cls.__mro__:
        for held in base.__dict__.values():
            if isinstance(held, types.MemberDescriptorType):
                yield held


def slot_value(value: Any, slot: types.MemberDescriptorType) -> Any:
    """What a slot holds; None if nothing."""
    try:
        return slot.__get__(value)
    except AttributeError:
        return None


def is_library(module: str) -> bool:
    """Whether a module is of a library that is taken as it is."""
    return module.partition(".")[0] in _LIBRARIES
