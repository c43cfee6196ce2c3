"""Whether many Python objects are as they were, by words that CPython keeps in them.

Looking at a thousand dictionaries one by one costs a call longer than many a layer's products take,
as each has to be fetched from memory before the next is asked for. CPython keeps what matters (a dictionary's
version, how much a container holds, an object's class) at fixed places, which one indexed read
gathers at once. Tested with CPython 3.11 (`Include/cpython/dictobject.h`, `Include/object.h`);
everywhere else the objects are asked one by one.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from vera_fx._torch import DictMarks

_T = TypeVar("_T")

_WORD = 8
_ATTRIBUTES, _CLASS, _SIZE, _VERSION = -3 * _WORD, 1 * _WORD, 2 * _WORD, 3 * _WORD
"""Where from an object's address: the managed dictionary of its attributes; ``ob_type``; ``ma_used`` or
``ob_size``; ``ma_version_tag``."""

_MANAGED = 1 << 4
"""``Py_TPFLAGS_MANAGED_DICT``: objects of the class have their attributes' dictionary before them."""


class _Memory:
    """The process's memory from an address on, as an array that nothing is copied into."""

    def __init__(self, start: int, words: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": "<u8",
            "shape": (words,),
            "data": (start, True),
        }


class Words:
    """Notices that words of living objects changed since this was made.

    Args:
        held: the objects; held, so that their addresses stay theirs.
        addresses: of the words; one at least.
    """

    def __init__(self, held: Any, addresses: Sequence[int]) -> None:
        self._held = held
        start, end = min(addresses), max(addresses)
        self._where = (np.array(addresses, dtype=np.int64) - start) // _WORD
        self._memory = np.asarray(_Memory(start, (end - start) // _WORD + 1))
        self._were = self._now()

    def hold(self) -> bool:
        """True while all are what they were."""
        return self._now() == self._were

    def _now(self) -> bytes:
        return self._memory.take(self._where).tobytes()


class Marks:
    """Notices that dictionaries, what is in empty containers, or objects' classes and attributes changed.

    Args:
        dicts: dictionaries; whatever is written to them counts.
        empties: containers that hold nothing now.
        objects: objects whose class counts.
        owners: objects, and the dictionary that holds their attributes.
    """

    def __init__(
        self,
        dicts: Iterable[dict[Any, Any]],
        empties: Iterable[Any] = (),
        objects: Iterable[Any] = (),
        owners: Iterable[tuple[Any, dict[str, Any]]] = (),
    ) -> None:
        dicts, empties, objects, owners = list(dicts), list(empties), list(objects), list(owners)
        self._words: Words | None = None
        if READABLE:
            sized, empties = _parted(empties, lambda held: isinstance(held, dict | list))
            managed, owners = _parted(owners, lambda pair: type(pair[0]).__flags__ & _MANAGED)
            addresses = [id(held) + _VERSION for held in dicts]
            addresses += [id(held) + _SIZE for held in sized]
            addresses += [id(held) + _CLASS for held in objects]
            addresses += [id(owner) + _ATTRIBUTES for owner, _ in managed]
            # The classes as well, so that no other gets the address of one.
            held = dicts, sized, objects, list(map(type, objects)), managed
            self._words = Words(held, addresses) if addresses else None
            dicts = objects = []
        self._dicts, self._empties, self._owners = DictMarks(dicts), empties, owners
        self._objects, self._types = objects, list(map(type, objects))

    def hold(self) -> bool:
        """True while nothing of that happened."""
        if self._words is not None and not self._words.hold():
            return False
        return (
            self._dicts.hold()
            and not any(self._empties)
            and list(map(type, self._objects)) == self._types
            and all(_attributes(owner) is held for owner, held in self._owners)
        )


def _parted(values: Iterable[_T], has_words: Callable[[_T], Any]) -> tuple[list[_T], list[_T]]:
    """The values that words tell of, and the others."""
    found: tuple[list[_T], list[_T]] = [], []
    for value in values:
        found[not has_words(value)].append(value)
    return found


def _attributes(owner: Any) -> Any:
    return object.__getattribute__(owner, "__dict__")


def _readable() -> bool:
    """True if this Python keeps the words where they are looked for."""
    if sys.implementation.name != "cpython" or sys.version_info[:2] != (3, 11):
        return False
    held: dict[str, Any] = {"a": 1, "b": 2}
    class_and_size = [id(held) + _CLASS, id(held) + _SIZE]
    known = np.asarray(_Memory(id(held), 3)).tolist()
    if known[1:] != [id(dict), len(held)]:
        return False
    owner = _Memory(0, 0)
    attributes = owner.__dict__
    if not type(owner).__flags__ & _MANAGED:
        return False
    if np.asarray(_Memory(id(owner) + _ATTRIBUTES, 1)).tolist() != [id(attributes)]:
        return False
    fixed, version = Words(held, class_and_size), Words(held, [id(held) + _VERSION])
    held["a"] = None
    return fixed.hold() and not version.hold()


READABLE = _readable()
