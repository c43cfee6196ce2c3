"""What can be known about the rows of the batch in a tensor: the vocabulary of row tracking."""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from vera_fx.passes.engine.graph import schema_of, value_of

Size = int | torch.SymInt


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A tensor whose positions along one dimension belong to rows of the batch.

    Attributes:
        dim: the dimension; its size is ``outer * batch * inner``, and what it holds at index ``i``
            depends on row ``(i // inner) % batch`` of the batch alone.
        batch: the number of rows.
        outer: how often all rows repeat.
        inner: how many neighbours belong to one row.
        numbers: the value at each position is the number of its row.
    """

    dim: int
    batch: Size
    outer: Size = 1
    inner: Size = 1
    numbers: bool = False

    def at(self, dim: int) -> "Rows":
        """The same rows, and values, along another dimension."""
        return replace(self, dim=dim)

    def under(self, dim: int) -> "Rows":
        """The same rows along another dimension, with other values."""
        return replace(self, dim=dim, numbers=False)

    def agrees(self, other: "Rows") -> bool:
        """True if both have the same rows at the same positions."""
        return (
            self.dim == other.dim
            and same(self.outer, other.outer)
            and same(self.inner, other.inner)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Lost:
    """A tensor whose positions cannot be told apart by row, and why."""

    reason: str


Fact = Rows | Lost | None
"""What is known of a tensor; None for one that does not depend on the rows."""


def same(a: Size, b: Size) -> bool:
    """True if two sizes are equal whatever the open sizes are; adds no guard."""
    return statically_known_true(a == b)


def divided(a: Size, b: Size) -> Size | None:
    """``a / b`` if it is a whole number whatever the open sizes are."""
    if same(b, 0):
        return None
    quotient = cast("Size", a // b)  # pyright: ignore[reportUnknownVariableType]
    return quotient if same(quotient * b, a) else None


def shape_of(node: Node) -> tuple[Size, ...]:
    """The sizes of the tensor that ``node`` holds."""
    return tuple(cast("Tensor", value_of(node)).shape)


def operands(node: Node) -> dict[str, Any]:
    """The arguments of an operator call by the names of its schema, defaults filled in."""
    values: dict[str, Any] = {}
    for number, argument in enumerate(schema_of(node).arguments):
        if number < len(node.args):
            values[argument.name] = node.args[number]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            values[argument.name] = argument.default_value
    return values


class RowFacts:
    """What is known of the nodes of a graph.

    Attributes:
        batches: the number of rows, as each of the inputs has it: tracing need not have found
            that these are one and the same.
    """

    def __init__(self, batches: tuple[Size, ...]) -> None:
        self.batches = batches
        self._facts: dict[Node, Fact] = {}

    def learn(self, node: Node, fact: Fact) -> None:
        """Note what is known of a node."""
        self._facts[node] = fact

    def of(self, value: object) -> Fact:
        """What is known of a node; None for anything else."""
        return self._facts.get(value) if isinstance(value, Node) else None

    def all_of(self, *values: object) -> list[tuple[Node, Fact]]:
        """The nodes in some arguments, which may be lists, and what is known of them."""
        found: list[tuple[Node, Fact]] = []
        for value in values:
            parts = cast("list[object]", value) if isinstance(value, list | tuple) else [value]
            found += [(part, self.of(part)) for part in parts if isinstance(part, Node)]
        return found

    def nodes(self) -> list[Node]:
        """Every node that something is known of."""
        return list(self._facts)
