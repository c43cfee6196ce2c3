"""Arguments that a call changes in place, key-value caches above all.

A graph has no side effects on Python objects. So the state in which a call leaves such an object is
made part of the graph's outputs, and written back into the caller's object afterwards: the caller
sees the same object, updated, also where the call returns it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vera_fx._context import holding, now
from vera_fx._torch import (
    TreeSpec,
    register_pytree_node,
    tree_flatten,
    tree_map,
    tree_unflatten,
)
from vera_fx.base.hf import mark_static
from vera_fx.capturing.signature import CONSTANTS


@dataclass(frozen=True, slots=True)
class Stateful:
    """The names of a call's arguments that are objects with a state of their own."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Stateful":
        """Pick the arguments that are neither tensors, constants nor built-in containers."""
        return cls(tuple(name for name, value in arguments.items() if is_stateful(value)))

    def pick(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The objects themselves, by name."""
        return {name: arguments[name] for name in self.names}


def is_stateful(value: Any) -> bool:
    """True for a registered object whose attributes a call may change, such as a cache."""
    plain = (*CONSTANTS, tuple, list, dict)
    return (
        not isinstance(value, plain)
        and type(value).__module__.partition(".")[0] != "torch"
        and (hasattr(value, "__dict__"))
    )


class Returned:
    """Stands in a call's result for an argument object that it returns or has changed."""

    def __init__(self, value: Any, name: str) -> None:
        self.value = value
        self.name = name


def _flatten(marker: Returned) -> tuple[list[Any], tuple[str, TreeSpec]]:
    leaves, spec = tree_flatten(marker.value)
    return leaves, (marker.name, spec)


def _unflatten(leaves: Any, context: tuple[str, TreeSpec]) -> Any:
    name, spec = context
    new = tree_unflatten(list(leaves), spec)
    original = now("returned", {}).get(name)
    if original is None:
        return new
    original.__dict__.clear()
    original.__dict__.update(new.__dict__)
    mark_static(original)
    return original


register_pytree_node(Returned, _flatten, _unflatten)


def mark_returned(result: Any, objects: Mapping[str, Any]) -> tuple[Any, list[Returned]]:
    """Replace the objects where ``result`` holds them; append those it does not hold."""
    if not objects:
        return result, []
    by_id = {id(value): Returned(value, name) for name, value in objects.items()}
    seen: set[int] = set()

    def replace(value: Any) -> Any:
        if id(value) in by_id:
            seen.add(id(value))
        return by_id.get(id(value), value)

    marked = tree_map(replace, result, is_leaf=lambda value: id(value) in by_id)
    return marked, [marker for key, marker in by_id.items() if key not in seen]


def restore(outputs: list[Any], spec: TreeSpec, objects: Mapping[str, Any] | None) -> Any:
    """Rebuild a call's result from the graph's outputs, updating the caller's objects."""
    if not objects:
        return tree_unflatten(outputs, spec)[0]
    with holding("returned", objects):
        return tree_unflatten(outputs, spec)[0]
