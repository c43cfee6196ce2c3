"""The tree of a call's results, written down; types are those that torch's pytrees know already."""

from typing import Any

from vera_fx._torch import SUPPORTED_NODES, TreeSpec, tree_flatten
from vera_fx.caching.content import Unreadable

_PLAIN = (bool, int, float, str, type(None))


def write_tree(spec: TreeSpec) -> Any:
    """A tree as plain containers.

    Raises:
        Unreadable: what a type keeps of itself is no plain value.
    """
    if spec.is_leaf():
        return None
    children = [write_tree(child) for child in spec.children()]
    return {"type": _name(spec.type), "context": _write(spec.context), "children": children}


def _name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _write(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, TreeSpec):
        return {"tree": write_tree(value)}
    if isinstance(value, list):
        return [_write(part) for part in value]
    if isinstance(value, tuple) and type(value) is tuple:
        return {"tuple": [_write(part) for part in value]}
    if type(value) is dict:
        return {"dict": [[_write(key), _write(part)] for key, part in value.items()]}
    if isinstance(value, type) and value in SUPPORTED_NODES:
        return {"type": _name(value)}
    raise Unreadable(f"a result that holds a {type(value).__name__}")


def read_tree(written: Any) -> TreeSpec:
    """The tree that was written.

    Raises:
        ValueError: it has a type that no pytree is known for.
    """
    if written is None:
        return tree_flatten(0)[1]
    children = [read_tree(child) for child in written["children"]]
    return TreeSpec(_type(written["type"]), _read(written["context"]), children)


def _type(name: str) -> type:
    found = [kind for kind in SUPPORTED_NODES if _name(kind) == name]
    if len(found) != 1:
        raise ValueError(f"{name!r} is no type of results that is known in this process")
    return found[0]


def _read(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, list):
        return [_read(part) for part in value]
    ((kind, held),) = value.items()
    if kind == "tree":
        return read_tree(held)
    if kind == "tuple":
        return tuple(map(_read, held))
    if kind == "dict":
        return {_read(key): _read(part) for key, part in held}
    if kind == "type":
        return _type(held)
    raise ValueError(f"{kind!r} is no kind of value")
