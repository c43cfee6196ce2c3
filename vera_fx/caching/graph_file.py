"""A captured graph, written down as plain containers and read again; nothing in it is code."""

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from vera_fx.caching.content import Unreadable
from vera_fx.caching.values import ValueReader, ValueWriter, dtype_called
from vera_fx.disk.operators import check_operator
from vera_fx.disk.sizes_and_names import check_name
from vera_fx.passes import call_module

_OPS = ("placeholder", "get_attr", "call_function", "output")
_CALL_MODULE = "vera_fx.call_module"
_WORDS: dict[str, tuple[type, Callable[[str], Any]]] = {
    "dtype": (torch.dtype, lambda text: dtype_called(text.removeprefix("torch."))),
    "device": (torch.device, torch.device),
    "layout": (torch.layout, lambda text: _named(text, torch.layout)),
    "memory_format": (torch.memory_format, lambda text: _named(text, torch.memory_format)),
}
_MODULES: dict[str, Any] = {"_operator": operator, "math": math, "torch": torch}
_PATH = re.compile(r"[^\x00-\x1f\"'\\]{1,2000}")


def write_graph(graph: Graph) -> dict[str, Any]:
    """A graph with what its nodes hold.

    Raises:
        Unreadable: something in it cannot be written, such as a graph inside of it.
    """
    values, traces = ValueWriter(), dict[str, int]()
    nodes = [
        {
            "name": node.name,
            "op": node.op,
            "target": _target(node),
            "args": _write(node.args),
            "kwargs": _write(dict(node.kwargs)),
            **({"val": values.write(node.meta["val"])} if "val" in node.meta else {}),
            "stack": _stack(node),
            "trace": traces.setdefault(node.meta.get("stack_trace") or "", len(traces)),
        }
        for node in graph.nodes
    ]
    return {"symbols": values.symbols, "traces": list(traces), "nodes": nodes}


def _target(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = f"torch.ops.{str(target).replace('::', '.')}"
    elif target is call_module:
        return _CALL_MODULE
    elif isinstance(target, str):
        return target
    else:
        name = f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"
    own = {target.namespace} if isinstance(target, torch._ops.OpOverload) else ()
    try:
        check_operator(name, own)
        found = _function(name)
    except ValueError as error:
        raise Unreadable(f"a call of {target}") from error
    if found is not target:
        raise Unreadable(f"a call of {target}")
    return name


def _stack(node: Node) -> list[list[str]]:
    stack = node.meta.get("nn_module_stack") or {}
    return [[str(key), str(path), _class(kind)] for key, (path, kind) in stack.items()]


def _class(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


def _write(value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_write(part) for part in value]}
    if isinstance(value, list):
        return [_write(part) for part in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": [[key, _write(part)] for key, part in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_write(part) for part in (value.start, value.stop, value.step)]}
    for kind, (cls, _) in _WORDS.items():
        if isinstance(value, cls):
            return {kind: str(value)}
    raise Unreadable(f"an argument of type {type(value).__name__}")


def read_graph(written: Mapping[str, Any], namespaces: frozenset[str]) -> Graph:
    """The graph that was written.

    Args:
        written: what `write_graph` gave.
        namespaces: of operators that it may call beside torch's own.

    Raises:
        ValueError: it calls what is no operator, or was not written by `write_graph`.
    """
    reader, graph, known = ValueReader(written["symbols"]), Graph(), dict[str, Node]()
    traces = written["traces"]
    for entry in written["nodes"]:
        check_name(entry["name"])
        if entry["op"] not in _OPS:
            raise ValueError(f"{entry['op']!r} is no kind of node")
        target = _target_of(entry, namespaces)
        args, kwargs = _read(entry["args"], known), _read(entry["kwargs"], known)
        node = graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
        if node.name != entry["name"]:
            raise ValueError(f"the node {entry['name']!r} cannot be called that")
        if "val" in entry:
            node.meta["val"] = reader.read(entry["val"])
        node.meta |= dict(_meta(entry, traces))
        known[node.name] = node
    return graph


def _target_of(entry: Mapping[str, Any], namespaces: frozenset[str]) -> Any:
    target = entry["target"]
    if not isinstance(target, str) or not _PATH.fullmatch(target):
        raise ValueError(f"{target!r} is no target")
    if entry["op"] != "call_function":
        return target
    if target == _CALL_MODULE:
        return call_module
    check_operator(target, namespaces)
    return _function(target)


def _function(name: str) -> Any:
    """An operator or function on numbers by its name, which has been checked."""
    if name.startswith("torch.ops."):
        _, _, namespace, operation, overload = name.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), operation), overload)
    module, _, function = name.rpartition(".")
    found = getattr(_MODULES.get(module), function, None)
    if found is None:
        raise ValueError(f"{name!r} is no function on numbers")
    return found


def _meta(entry: Mapping[str, Any], traces: list[str]) -> Iterator[tuple[str, Any]]:
    if entry["stack"]:
        yield "nn_module_stack", {key: (path, kind) for key, path, kind in entry["stack"]}
    if traces[entry["trace"]]:
        yield "stack_trace", traces[entry["trace"]]


def _read(value: Any, known: Mapping[str, Node]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_read(part, known) for part in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"{value!r} is no argument")
    ((kind, held),) = value.items()
    if kind in _WORDS:
        return _WORDS[kind][1](held)
    if kind not in _ARGUMENTS:
        raise ValueError(f"{kind!r} is no kind of argument")
    return _ARGUMENTS[kind](held, known)


_ARGUMENTS: dict[str, Callable[[Any, Mapping[str, Node]], Any]] = {
    "node": lambda name, known: known[name],
    "tuple": lambda parts, known: tuple(_read(part, known) for part in parts),
    "dict": lambda pairs, known: {key: _read(part, known) for key, part in pairs},
    "slice": lambda parts, known: slice(*(_read(part, known) for part in parts)),
}


def _named(text: str, kind: type) -> Any:
    found = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(found, kind):
        raise ValueError(f"{text!r} is no {kind.__name__}")  # noqa: TRY004
    return found
