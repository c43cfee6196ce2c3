"""What the rules of row tracking share."""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import Node

from vera_fx.passes.engine.graph import schema_of
from vera_fx.passes.rows.vocabulary import Fact, Lost, RowFacts, Rows, operands, shape_of

REDUCING = ("sum", "mean", "amax", "amin", "max", "min", "any", "all", "argmax", "argmin")
"""Operators that remove the dimensions they work along, unless ``keepdim``."""


def is_pointwise(node: Node) -> bool:
    """True if the operator works element by element, with broadcasting."""
    tags = cast("tuple[torch.Tag, ...]", getattr(node.target, "tags", ()))
    return torch.Tag.pointwise in tags


def op_name(node: Node) -> str:
    """The operator's name without namespace and overload; nothing for other functions."""
    schema = schema_of(node)
    namespace, _, name = str(schema.name).partition("::") if schema is not None else ("", "", "")
    return name if namespace == "aten" else ""


def lost(node: Node, why: str) -> Lost:
    """The rows are lost at ``node``."""
    return Lost(f"{node.name} ({node.target}) {why}")


def rows_of(node: Node, facts: RowFacts, name: str) -> tuple[Rows, dict[str, Any]] | None:
    """The rows of operand ``name``, and all operands; None if it has no rows."""
    values = operands(node)
    fact = facts.of(values[name])
    return (fact, values) if isinstance(fact, Rows) else None


def of_self(
    rule: Callable[[Node, Rows, dict[str, Any]], Fact],
) -> Callable[[Node, RowFacts], Fact]:
    """A rule for operators of which only the operand ``self`` may have rows."""

    @functools.wraps(rule)
    def checked(node: Node, facts: RowFacts) -> Fact:
        found = rows_of(node, facts, "self")
        return lost(node, "mixes the rows") if found is None else rule(node, *found)

    return checked


def wrapped(value: int, ndim: int) -> int:
    """A dimension counted from the front."""
    return value % ndim if ndim else 0


def broadcast(node: Node, facts: RowFacts, *values: object, skip: int = 0) -> Fact:
    """Operands aligned at their last dimensions, of which ``skip`` must not hold the rows."""
    ndim = len(shape_of(node)) if not isinstance(node.meta["val"], tuple | list) else 0
    found: Rows | None = None
    for operand, fact in facts.all_of(*values):
        if not isinstance(fact, Rows):
            continue
        own = len(shape_of(operand))
        if fact.dim >= own - skip:
            return lost(node, "mixes the rows")
        placed = fact.under(fact.dim + ndim - own)
        if found is not None and not found.agrees(placed):
            return lost(node, "combines rows that lie along different dimensions")
        found = placed
    return found
