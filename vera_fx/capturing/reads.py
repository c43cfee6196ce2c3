"""Finds what a model's forward may read: everything that a graph captured from it may depend on.

Starting at the modules, their classes and configuration objects, the walk follows what can be reached
from them: plain objects and containers, methods that are mentioned, the module globals that these
name, and the cells that they close over. Libraries below the model (torch, Python's own) are taken as
they are.
"""

import argparse
import functools
import gc
import types
from collections import UserDict, UserList, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vera_fx.base.hf import HOOKED
from vera_fx.base.modules import original_class
from vera_fx.capturing.facts import CONSTANTS, fact, is_library, slot_value, slots_of
from vera_fx.products.opaque import is_opaque

_HOLDERS = (types.SimpleNamespace, argparse.Namespace, UserDict, UserList)
"""Classes of Python's own that are there to hold what users put into them."""

_NOTES = {"_previous_max_cache_length", HOOKED}  # of transformers, for itself
_ATTRIBUTES = (frozenset(nn.Module().__dict__) - {"training"}) | _NOTES
_LIMIT = 50_000
"""Objects that are looked at; a model with more is watched as far as that."""


@dataclass(slots=True)
class Reader:
    """One dictionary that may be read, and which of its entries count.

    Attributes:
        where: the dictionary.
        names: the entries that count; None for all but `ignored`.
        ignored: entries that never count.
    """

    where: dict[Any, Any]
    names: set[str] | None = None
    ignored: frozenset[str] = frozenset()

    def facts(self) -> Hashable:
        """What it holds now."""
        if self.names is None:
            items = self.where.items()
            return tuple((k, fact(v)) for k, v in items if k not in self.ignored)
        return tuple((n, fact(self.where[n])) for n in sorted(self.names) if n in self.where)


@dataclass(slots=True)
class Reads:
    """What may be read, in the forms in which it is watched.

    Attributes:
        readers: dictionaries.
        empties: dictionaries of modules, and containers, that hold nothing now.
        modules: the modules.
        owners: objects, and the dictionaries of their attributes.
        lists: containers whose changes leave no mark; compared entry by entry.
        cells: cells of closures.
        slotted: objects with slots, and these.
        tensors: parameters and buffers, and the first of each module.
        others: modules that were reached and are none of these; nothing was looked for in them.
    """

    readers: list[Reader] = field(default_factory=list[Reader])
    empties: list[Any] = field(default_factory=list[Any])
    modules: tuple[nn.Module, ...] = ()
    owners: list[tuple[Any, dict[str, Any]]] = field(
        default_factory=list[tuple[Any, dict[str, Any]]]
    )
    lists: list[Any] = field(default_factory=list[Any])
    cells: list[types.CellType] = field(default_factory=list[types.CellType])
    slotted: list[tuple[Any, types.MemberDescriptorType]] = field(default_factory=list)
    tensors: tuple[Tensor, ...] = ()
    first: tuple[Tensor, ...] = ()
    others: list[nn.Module] = field(default_factory=list[nn.Module])

    def reach(self, modules: Iterable[nn.Module]) -> bool:
        """True if one of ``modules``, which are not all that was looked through, is among the others."""
        wanted = {id(module) for module in modules} if self.others else set[int]()
        return any(id(inner) in wanted for other in self.others for inner in other.modules())


def reads_of(modules: Iterable[nn.Module]) -> Reads:
    """Everything that the forward of these modules may read."""
    return _Walk(tuple(modules)).done()


class _Walk:
    """One search. Names that some method mentions are looked up in classes until no more turn up."""

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        self._found = Reads(modules=modules)
        self._seen: set[int] = {id(module) for module in modules}
        self._kept: list[Any] = []  # identities must not be used again during the walk
        self._classes: dict[type, Reader] = {}
        self._spaces: dict[int, Reader] = {}
        self._modules: dict[int, dict[str, Any]] = {}
        self._functions: set[types.CodeType] = set()
        self._mentioned: set[str] = {"forward"}
        self._objects: list[dict[Any, Any]] = []
        self._todo: list[Callable[[], None]] = []

    def done(self) -> Reads:
        # The state of a called module is its own business.
        read = [module for module in self._found.modules if not is_opaque(module)]
        for module in read:
            self._module(module)
        held = [[*m._parameters.values()] for m in read] + [[*m._buffers.values()] for m in read]
        own = [[tensor for tensor in tensors if tensor is not None] for tensors in held]
        self._found.tensors = _distinct(tensor for tensors in own for tensor in tensors)
        # A module that is cast or moved takes all of its tensors along.
        self._found.first = _distinct(tensors[0] for tensors in own if tensors)
        before = -1
        while self._todo or len(self._mentioned) != before:
            before = len(self._mentioned)
            while self._todo:
                self._todo.pop()()
            for cls in list(self._classes):
                self._methods(cls)
            for space in list(self._modules.values()):
                self._globals(space, self._mentioned)
            for where in self._objects:
                self._values(value for name, value in where.items() if name in self._mentioned)
        return self._found

    def _module(self, module: nn.Module) -> None:
        self._attributes(module, module.__dict__, ignored=_ATTRIBUTES)
        for held in (module._modules, module._parameters, module._buffers):
            if not held:
                self._found.empties.append(held)
            elif held is module._modules:
                self._found.readers.append(Reader(held))
            else:
                self._found.readers.append(Reader(held, set()))
        self._class(original_class(module), of_module=True)

    def _attributes(
        self, owner: Any, where: dict[str, Any], *, ignored: frozenset[str] = frozenset()
    ) -> None:
        """Attributes count whatever they are called.

        What they hold is looked into if some method mentions them: a trainer that a model knows is
        not read by its forward.
        """
        self._found.readers.append(Reader(where, ignored=ignored))
        self._found.owners.append((owner, where))  # which another may take the place of
        self._objects.append(where)

    def _read(self, where: dict[Any, Any]) -> None:
        self._found.readers.append(Reader(where))
        self._values(where.values())

    def _value(self, value: Any) -> None:
        """Look into what is reached."""
        if isinstance(value, (*CONSTANTS, float, Tensor)) or id(value) in self._seen:
            return
        if isinstance(value, nn.Module):
            self._found.others.append(value)
        if isinstance(value, nn.Module) or len(self._seen) > _LIMIT:
            return
        self._seen.add(id(value))
        self._kept.append(value)
        if isinstance(value, dict):
            self._todo.append(lambda: self._read(value))
        elif isinstance(value, list | tuple | set | frozenset | deque):
            if not isinstance(value, tuple | frozenset):
                (self._found.lists if value else self._found.empties).append(value)
            self._todo.append(lambda: self._values(value))
        elif isinstance(value, type):
            self._class(value)
        elif callable(value) and not hasattr(type(value), "__dict__"):
            pass
        else:
            self._todo.append(lambda: self._object(value))

    def _values(self, values: Iterable[Any]) -> None:
        for value in values:
            self._value(value)

    def _object(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._value(value.__func__)
            self._value(value.__self__)
        elif isinstance(value, types.ModuleType):
            if not is_library(value.__name__):
                self._modules[id(value)] = value.__dict__
        elif isinstance(value, property | staticmethod | classmethod):
            self._wrapped(value)
        elif isinstance(value, functools.partial):
            self._values((value.func, *value.args, *value.keywords.values()))
        elif isinstance(value, _HOLDERS) or not is_library(type(value).__module__):
            self._instance(value)

    def _instance(self, value: Any) -> None:
        self._class(type(value))
        # Never by getattr: a class may answer names that it does not have, or fail.
        if type(value).__dictoffset__:
            self._attributes(value, object.__getattribute__(value, "__dict__"))
        for slot in slots_of(type(value)):
            self._found.slotted.append((value, slot))
            self._value(slot_value(value, slot))

    def _class(self, cls: type, *, of_module: bool = False) -> None:
        for base in cls.__mro__:
            library = is_library(base.__module__) and not of_module
            if base is object or base in self._classes or library:
                continue
            reader = Reader(_dict_of(base), self._mentioned)
            self._classes[base] = reader
            self._found.readers.append(reader)

    def _methods(self, cls: type) -> None:
        if is_library(cls.__module__):
            return
        for name in self._mentioned & self._classes[cls].where.keys():
            self._value(self._classes[cls].where[name])

    def _wrapped(self, value: Any) -> None:
        if isinstance(value, property):
            self._values(f for f in (value.fget,) if f is not None)
        else:
            self._value(value.__func__)

    def _function(self, function: types.FunctionType) -> None:
        if function.__code__ in self._functions and not function.__closure__:
            return
        self._functions.add(function.__code__)
        if is_library(function.__module__ or "") and not function.__closure__:
            return
        names = set(_names(function.__code__))
        # A decorator's wrapper takes the name of the module that it was used in, not its globals:
        # those of torch.compiler.disable change with every call of a compiled model.
        home = str(function.__globals__.get("__name__", ""))
        if not is_library(function.__module__ or "") and not is_library(home):
            self._mentioned |= names
            self._globals(function.__globals__, names)
        for cell in function.__closure__ or ():
            self._cell(cell)
        self._values((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()))

    def _cell(self, cell: types.CellType) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            return
        if id(cell) not in self._seen:
            self._seen.add(id(cell))
            self._kept.append(cell)
            self._found.cells.append(cell)
            self._value(value)

    def _globals(self, space: dict[str, Any], names: set[str]) -> None:
        reader = self._spaces.get(id(space))
        if reader is None:
            reader = self._spaces[id(space)] = Reader(space, set())
            self._found.readers.append(reader)
        new = {n for n in names if n in space and n not in (reader.names or ())}
        if reader.names is not None:
            reader.names |= new
        self._values(space[name] for name in new)


def _distinct(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple({id(tensor): tensor for tensor in tensors}.values())


def _names(code: types.CodeType) -> Iterator[str]:
    """Every name that code mentions: globals, attributes, and short words that may be either."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def _dict_of(cls: type) -> dict[str, Any]:
    """The dictionary of a class itself, behind the view of it that Python shows."""
    return next(d for d in gc.get_referents(cls.__dict__) if isinstance(d, dict))
