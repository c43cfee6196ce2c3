"""Marks notice every change of what they watch, by words in memory and one by one."""

import collections
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from vera_fx.base import marks as words
from vera_fx.base.marks import Marks


class Plain:
    """An object with attributes."""


class Other(Plain):
    """Another class of the same layout."""


@pytest.fixture(params=["words", "one by one"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "words" and not words.READABLE:
        pytest.skip("this Python keeps its words elsewhere")
    monkeypatch.setattr(words, "READABLE", request.param == "words")


CHANGES: dict[str, Callable[[dict[Any, Any]], object]] = {
    "set": lambda d: d.__setitem__("a", 9),
    "new": lambda d: d.__setitem__("c", 1),
    "delete": lambda d: d.__delitem__("a"),
    "pop": lambda d: d.pop("b"),
    "popitem": lambda d: d.popitem(),
    "clear": lambda d: d.clear(),
    "update": lambda d: d.update(a=7),
    "or": lambda d: d.__ior__({"b": 5}),
    "setdefault": lambda d: d.setdefault("z", 0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_change_among_a_thousand_dictionaries(
    change: Callable[[dict[Any, Any]], object], kind: type, place: int
) -> None:
    dicts = [kind(a=1, b=2) for _ in range(1000)]
    marks = Marks(dicts)
    assert marks.hold()
    change(dicts[place])
    assert not marks.hold()


def test_attributes_of_objects_and_modules() -> None:
    plain, module = Plain(), nn.Linear(2, 3)
    for held, name in ((plain, "x"), (module, "in_features")):
        setattr(held, name, 1)
        marks = Marks([held.__dict__])
        assert marks.hold()
        setattr(held, name, 2)
        assert not marks.hold()
        marks = Marks([held.__dict__])
        delattr(held, name)
        assert not marks.hold()


@pytest.mark.parametrize(
    ("kind", "put"),
    [
        (dict, lambda d: d.update(a=1)),
        (collections.OrderedDict, lambda d: d.update(a=1)),
        (list, lambda values: values.append(None)),
        (set, lambda values: values.add(0)),
        (collections.deque, lambda values: values.append(0)),
    ],
    ids=["dict", "ordered", "list", "set", "deque"],
)
def test_something_is_put_into_an_empty_container(kind: Any, put: Callable[[Any], object]) -> None:
    empty = kind()
    marks = Marks([], [{}, [], empty, set()])
    assert marks.hold()
    put(empty)
    assert not marks.hold()


def test_another_class() -> None:
    objects = [Plain(), Plain(), nn.ReLU()]
    marks = Marks([], (), objects)
    assert marks.hold()
    objects[1].__class__ = Other
    assert not marks.hold()
    objects[1].__class__ = Plain
    assert marks.hold()


class Slotted:
    """An object with slots and attributes beside them, whose dictionary stands elsewhere."""

    __slots__ = ("__dict__", "y")


@pytest.mark.parametrize("kind", [Plain, Slotted, nn.ReLU, collections.UserDict])
def test_other_attributes(kind: type) -> None:
    owners = [Plain(), kind(), Plain()]
    pairs = [(owner, owner.__dict__) for owner in owners]
    marks = Marks([], (), (), pairs)
    assert marks.hold()
    owners[1].__dict__ = dict(owners[1].__dict__)
    assert not marks.hold()


def test_a_class_that_took_the_place_of_a_dead_one_is_another() -> None:
    """The watched class is held, so no new one can get its address."""
    found = Plain()
    for _ in range(50):
        found.__class__ = type("Made", (Plain,), {})
        marks = Marks([], (), [found])
        found.__class__ = type("Made", (Plain,), {})
        assert not marks.hold()


def test_reading_is_no_change() -> None:
    held, values = {"a": 1}, []
    marks = Marks([held], [values], [held])
    assert held.get("a") == 1
    assert list(held.items())
    assert not values
    assert marks.hold()


def test_nothing_to_watch() -> None:
    assert Marks([]).hold()
