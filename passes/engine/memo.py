"""What a pass finds out once for all sites at which it inserts the same."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from vera_fx.passes.engine.graph import first_body_node, tensor_of, value_of


class Memo:
    """What a pass that inserts the same for many sites need not find out for each of them.

    Operators run on fake tensors once for operands that look alike; nodes that look alike share the
    fake tensor, which nobody writes to. Valid while one pass works on one graph.
    """

    def __init__(self) -> None:
        self._values: dict[Hashable, Any] = {}
        self._operands: dict[int, Any] = {}
        self._attributes: dict[str, Node] | None = None
        self._top: Node | None = None

    def key(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        shape: Sequence[Any] | None,
        dtype: torch.dtype | None,
        kwargs: dict[str, Any] | None,
    ) -> Hashable:
        """What decides the result's looks; None if that is not known."""
        if shape is not None:
            first = tensor_of(args[0])
            return ("shape", *map(_size, shape), dtype or first.dtype, first.device)
        if kwargs or not all(isinstance(arg, _PLAIN) for arg in args):
            return None
        return (target, *(self._operand(arg) for arg in args))

    def value(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value for a key, made once; made anew without a key."""
        if key is None:
            return make()
        if key not in self._values:
            self._values[key] = make()
        return self._values[key]

    def attributes(self, graph: Graph) -> dict[str, Node]:
        """The nodes of the graph that read attributes, by path: the first for each."""
        if self._attributes is None:
            self._attributes = {}
            for node in graph.find_nodes(op="get_attr"):
                self._attributes.setdefault(str(node.target), node)
        return self._attributes

    def top(self, graph: Graph) -> Node:
        """Where attributes are read: before this node."""
        if self._top is None or self._top._erased:
            self._top = first_body_node(graph)
        return self._top

    def _operand(self, arg: Any) -> Hashable:
        if not isinstance(arg, Node):
            return cast("Hashable", (type(arg).__name__, arg))
        value = value_of(arg)
        self._operands[id(value)] = value  # for as long as its number is part of a key
        return "value", id(value)


_PLAIN = (Node, int, float, bool, str, type(None), torch.dtype)


def _size(size: Any) -> Hashable:
    return cast("Any", size).node.expr if isinstance(size, torch.SymInt) else size
