"""What a value holds, as a hash that is the same in every process: code by its bytes, objects by theirs.

Where `vera_fx.capturing.facts` compares by identity, this looks inside. A hash that differs without
need costs a capture; one that does not differ where it must would be a stale graph. So whatever cannot
be looked into is refused.
"""

import functools
import hashlib
import re
import types
import weakref
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vera_fx.capturing.facts import CONSTANTS, is_library, slot_value, slots_of

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_LIMIT = 1_000_000
_OURS = "_vera"
_BIG = 1 << 28


class Unreadable(Exception):  # noqa: N818
    """What was read holds something that no hash can stand for; with what it is."""


@dataclass(slots=True)
class Contents:
    """Hashes of values; an object that was looked into is not looked into again.

    Attributes:
        paths: what modules of the model are called, by identity.
        libraries: packages that were taken as they are: their versions count.
        read: identities of the dictionaries that the model's code may read: objects with others are
            not looked into. None for all.
    """

    paths: Mapping[int, str] = field(default_factory=dict[int, str])
    libraries: set[str] = field(default_factory=set[str])
    read: frozenset[int] | None = None
    _known: dict[int, str] = field(default_factory=dict[int, str])
    _held: list[Any] = field(default_factory=list[Any])  # identities must not be used again

    def of(self, value: Any) -> str:
        """The hash of a value.

        Raises:
            Unreadable: it holds a fake tensor or a tensor without values, or too much.
        """
        if type(value) is float:
            return f"float {value.hex()}"
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, CONSTANTS):
            return f"{type(value).__qualname__} {value!r}"
        key = id(value)
        if key not in self._known:
            if len(self._held) > _LIMIT:
                raise Unreadable("more objects than can be looked at")
            self._held.append(value)
            self._known[key] = f"again {type(value).__qualname__}"  # what is met inside of itself
            self._known[key] = _hash(self._parts(value))
        return self._known[key]

    def _parts(self, value: Any) -> Iterable[str]:
        for kinds, parts in _PARTS:
            if isinstance(value, kinds):
                return parts(self, value)
        return self._object(value)

    def items(self, where: Mapping[Any, Any], names: Iterable[Any] | None = None) -> list[str]:
        """The entries of a dictionary, in an order of their own."""
        picked = where if names is None else [name for name in names if name in where]
        return sorted(f"{self.of(n)}={self.of(where[n])}" for n in list(picked) if not _is_ours(n))

    def _class(self, value: type) -> str:
        # What its methods do is read with the dictionaries of classes.
        self._library(value.__module__)
        return f"class {value.__module__}.{value.__qualname__}"

    def _mapping(self, value: Mapping[Any, Any]) -> Iterable[str]:
        yield self._class(type(value))
        # Their order counts: forward may loop over them.
        yield from (f"{self.of(k)}={self.of(v)}" for k, v in list(value.items()))

    def _sequence(self, value: Iterable[Any]) -> Iterable[str]:
        yield self._class(type(value))
        yield from map(self.of, list(value))

    def _set(self, value: Iterable[Any]) -> Iterable[str]:
        yield self._class(type(value))
        yield from sorted(map(self.of, list(value)))

    def _module(self, value: nn.Module) -> Iterable[str]:
        yield "module"
        if id(value) in self.paths:
            yield self.paths[id(value)]
        else:  # of no model: all of it
            yield from self._object(value)

    def _tensor(self, value: Tensor) -> Iterable[str]:
        yield f"tensor {value.dtype} {tuple(value.shape)} {value.device} {value.requires_grad}"
        if type(value) not in {Tensor, nn.Parameter} or value.is_meta:
            raise Unreadable(f"a {type(value).__name__} on {value.device}")
        if value.nbytes > _BIG:
            raise Unreadable(f"a tensor of {value.nbytes:,} bytes outside of the model's own")
        data: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield hashlib.sha256(memoryview(data)).hexdigest()

    def _function(self, value: types.FunctionType) -> Iterable[str]:
        yield f"function {value.__module__}.{value.__qualname__}"
        self._library(value.__module__ or "")
        if not is_library(value.__module__ or ""):
            yield _hash(self._code(value.__code__))
        yield from map(self.of, value.__defaults__ or ())
        yield from self.items(value.__kwdefaults__ or {})
        yield from map(self.of, value.__closure__ or ())

    def _code(self, code: types.CodeType) -> Iterable[str]:
        yield f"{code.co_flags} {code.co_argcount} {code.co_kwonlyargcount} {code.co_posonlyargcount}"
        yield code.co_code.hex()
        yield code.co_exceptiontable.hex()
        for names in (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars):
            yield repr(names)
        for constant in code.co_consts:
            is_code = isinstance(constant, types.CodeType)
            yield _hash(self._code(constant)) if is_code else self.of(constant)

    def _cell(self, value: types.CellType) -> Iterable[str]:
        try:
            yield f"cell {self.of(value.cell_contents)}"
        except ValueError:
            yield "an empty cell"

    def _wrapping(self, value: Any) -> Iterable[str]:
        yield self._class(type(value))
        held = [getattr(value, name, None) for name in ("__func__", "fget", "func", "__wrapped__")]
        yield from map(self.of, held)
        yield from map(self.of, (getattr(value, "args", ()), getattr(value, "keywords", {})))
        if isinstance(value, types.MethodType):
            yield self.of(value.__self__)

    def _space(self, value: types.ModuleType) -> Iterable[str]:
        # Its globals are read by their names.
        self._library(value.__name__)
        yield f"module {value.__name__}"

    def _reference(self, value: Callable[[], Any]) -> Iterable[str]:
        yield f"reference {self._class(type(value()))}"

    def _object(self, value: Any) -> Iterable[str]:
        cls = type(value)
        yield self._class(cls)
        library = is_library(cls.__module__)
        # Users' objects are never asked: they may answer every name, or fail.
        if library and hasattr(value, "tobytes"):  # NumPy's arrays, whose text is cut short
            yield f"{value.dtype} {getattr(value, 'shape', None)}"
            yield hashlib.sha256(value.tobytes()).hexdigest()
            return
        text = cls.__repr__
        if library and text is not object.__repr__:
            yield _ADDRESS.sub("", repr(value))
            return
        held: Any = object.__getattribute__(value, "__dict__") if cls.__dictoffset__ else {}
        if library:  # such as a lock: what it is, and what it says in plain values
            held = {k: v for k, v in held.items() if isinstance(v, (*CONSTANTS, float))}
        elif held and self.read is not None and id(held) not in self.read:
            return
        yield from self.items(held)
        yield from (f"{s.__name__}={self.of(slot_value(value, s))}" for s in slots_of(cls))

    def _library(self, module: str) -> None:
        self.libraries.add(module.partition(".")[0])


_PARTS: tuple[tuple[Any, Callable[[Any, Any], Iterable[str]]], ...] = (
    (nn.Module, Contents._module),
    (Tensor, Contents._tensor),
    (types.FunctionType, Contents._function),
    (types.CellType, Contents._cell),
    (
        types.MethodType | property | staticmethod | classmethod | functools.partial,
        Contents._wrapping,
    ),
    (types.ModuleType, Contents._space),
    (weakref.ref, Contents._reference),
    (dict | UserDict | types.MappingProxyType, Contents._mapping),
    (set | frozenset, Contents._set),
    (list | tuple | deque | UserList, Contents._sequence),
)


def _is_ours(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(_OURS)


def _hash(parts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for part in parts:
        text = part.encode("utf-8", "surrogatepass")
        found.update(b"%d:" % len(text))
        found.update(text)
    return found.hexdigest()
