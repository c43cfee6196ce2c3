"""Rules of row tracking for operators that move, pick, join and repeat elements."""

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch.fx import Node

from vera_fx.passes.engine.graph import tensor_of
from vera_fx.passes.rows.support import broadcast, lost, of_self, rows_of, wrapped
from vera_fx.passes.rows.vocabulary import Fact, RowFacts, Rows, divided, operands, same, shape_of

_FOREVER = 2**62


def arange(node: Node, facts: RowFacts) -> Fact:
    """Numbers of the rows, if it counts exactly them."""
    values = operands(node)
    plain = values.get("start", 0) in {0, None} and values.get("step", 1) == 1
    size = shape_of(node)[0]
    is_rows = plain and any(same(size, batch) and not same(size, 1) for batch in facts.batches)
    return Rows(0, size, numbers=True) if is_rows else None


def reshape(node: Node, facts: RowFacts) -> Fact:
    """The rows are one digit of the flat index; find the output dimension that holds it."""
    source, found = node.args[0], facts.of(node.args[0])
    if not isinstance(source, Node) or not isinstance(found, Rows):
        return lost(node, "takes its shape from the rows")
    shape, sizes = shape_of(source), shape_of(node)
    # The digit is known by what counts slower and by what counts faster; open sizes may prove one.
    above = found.outer * math.prod(shape[: found.dim])
    below = found.inner * math.prod(shape[found.dim + 1 :])
    for dim, size in enumerate(sizes):
        outer = divided(above, math.prod(sizes[:dim]))
        inner = divided(below, math.prod(sizes[dim + 1 :]))
        if inner is not None:
            outer = divided(size, found.batch * inner)
        elif outer is not None:
            inner = divided(size, outer * found.batch)
        if outer is not None and inner is not None:
            return replace(found, dim=dim, outer=outer, inner=inner)
    return lost(node, "cuts through the rows")


@of_self
def expand(node: Node, rows: Rows, values: dict[str, Any]) -> Fact:
    """New leading dimensions, or larger ones where the size was 1."""
    return rows.at(rows.dim + len(shape_of(node)) - len(shape_of(values["self"])))


@of_self
def transpose(node: Node, rows: Rows, values: dict[str, Any]) -> Fact:
    """Dimensions in another order."""
    ndim = len(shape_of(node))
    if "dims" in values:
        order = [wrapped(d, ndim) for d in values["dims"]]
        return rows.at(order.index(rows.dim))
    pair = [wrapped(values.get(f"dim{i}", i - 2), ndim) for i in (0, 1)]
    return rows.at(pair[1 - pair.index(rows.dim)]) if rows.dim in pair else rows


@of_self
def unsqueeze(node: Node, rows: Rows, values: dict[str, Any]) -> Fact:
    """A new dimension of size 1."""
    return rows.at(rows.dim + (wrapped(values["dim"], len(shape_of(node))) <= rows.dim))


def squeeze(node: Node, facts: RowFacts) -> Fact:
    """Named dimensions of size 1 removed."""
    found = rows_of(node, facts, "self")
    if found is None or "dim" not in found[1]:
        return lost(node, "removes dimensions that are not named")
    rows, values = found
    ndim = len(shape_of(values["self"]))
    dims = values["dim"]
    gone = {
        wrapped(d, ndim) for d in ([dims] if isinstance(dims, int) else cast("list[int]", dims))
    }
    before = shape_of(values["self"])
    return rows.at(rows.dim - sum(d < rows.dim and same(before[d], 1) for d in gone))


@of_self
def select(node: Node, rows: Rows, values: dict[str, Any]) -> Fact:
    """One index of a dimension, or each (unbind); not of the rows."""
    dim = wrapped(values.get("dim", 0), len(shape_of(values["self"])))
    return rows.at(rows.dim - (dim < rows.dim)) if dim != rows.dim else lost(node, "picks a row")


@of_self
def cut(node: Node, rows: Rows, values: dict[str, Any]) -> Fact:
    """Part of a dimension; of the rows only the whole."""
    if wrapped(values.get("dim", 0), len(shape_of(node))) != rows.dim:
        return rows
    end, step = values.get("end"), values.get("step", 1)
    whole = values.get("start") in {0, None} and step == 1
    size = shape_of(values["self"])[rows.dim]
    is_all = (
        end is None
        or (isinstance(end, int) and end > _FOREVER)
        or same(shape_of(node)[rows.dim], size)
    )
    return rows if whole and is_all else lost(node, "picks some rows")


@of_self
def split(node: Node, rows: Rows, values: dict[str, Any]) -> Fact:
    """Several parts of a dimension; not of the rows."""
    is_rows = wrapped(values.get("dim", 0), len(shape_of(values["self"]))) == rows.dim
    return lost(node, "splits the rows") if is_rows else rows


def cat(node: Node, facts: RowFacts) -> Fact:
    """Joined along a dimension other than the rows."""
    values = operands(node)
    merged = broadcast(node, facts, values["tensors"])
    dim = wrapped(values.get("dim", 0), len(shape_of(node)))
    if isinstance(merged, Rows) and merged.dim == dim:
        return lost(node, "joins along the rows")
    return merged


def stack(node: Node, facts: RowFacts) -> Fact:
    """Joined along a new dimension."""
    values = operands(node)
    parts = facts.all_of(values["tensors"])
    first = next(fact for _, fact in parts if isinstance(fact, Rows))
    if any(isinstance(fact, Rows) and not fact.agrees(first) for _, fact in parts):
        return lost(node, "combines rows that lie along different dimensions")
    return first.under(
        first.dim + (wrapped(values.get("dim", 0), len(shape_of(node))) <= first.dim)
    )


def index(node: Node, facts: RowFacts) -> Fact:
    """``x[i, j, ...]`` with tensors for the first dimensions, in which row numbers find their row."""
    values = operands(node)
    indices = cast("list[Node | None]", values["indices"])
    if any(index is None for index in indices):
        return _index_of_one_dimension(node, facts, values["self"], indices)
    picked = cast("list[Node]", indices)
    ndim = max(len(shape_of(index)) for index in picked)
    rows, source = None, facts.of(values["self"])
    for number, index in enumerate(picked):
        fact = facts.of(index)
        placed = fact.at(fact.dim + ndim - len(shape_of(index))) if isinstance(fact, Rows) else None
        at_rows = isinstance(source, Rows) and number == source.dim
        if at_rows and not (placed is not None and placed.numbers and _is_plain(source)):
            return lost(node, "picks rows by numbers that are not the rows' own")
        if placed is not None and rows is not None and not rows.agrees(placed):
            return lost(node, "combines rows that lie along different dimensions")
        rows = placed or rows
    if isinstance(source, Rows) and source.dim >= len(picked):
        return lost(node, "mixes the rows") if rows else source.at(source.dim - len(picked) + ndim)
    return rows.under(rows.dim) if rows else lost(node, "mixes the rows")


def _index_of_one_dimension(
    node: Node, facts: RowFacts, source: Node, indices: list[Node | None]
) -> Fact:
    """``x[..., i, :]`` with the same numbers for every row, along another dimension."""
    rows, places = facts.of(source), [n for n, index in enumerate(indices) if index is not None]
    numbers = cast("Node", indices[places[0]])
    is_mask = tensor_of(numbers).dtype in {torch.bool, torch.uint8}
    if len(places) > 1 or is_mask or not isinstance(rows, Rows) or facts.of(numbers) is not None:
        return lost(node, "mixes indices and whole dimensions")
    if rows.dim == places[0]:
        return lost(node, "picks rows by numbers that are not the rows' own")
    return rows.at(rows.dim + (places[0] < rows.dim) * (len(shape_of(numbers)) - 1))


def _is_plain(rows: Fact) -> bool:
    return isinstance(rows, Rows) and same(rows.outer, 1) and same(rows.inner, 1)


def gather(node: Node, facts: RowFacts) -> Fact:
    """Picked by an index tensor along a dimension other than the rows."""
    values = operands(node)
    dim = wrapped(values["dim"], len(shape_of(node)))
    source = facts.of(values["self"])
    if isinstance(source, Rows) and source.dim == dim:
        return lost(node, "picks rows by number")
    return broadcast(node, facts, values["self"], values["index"])


@of_self
def pad(node: Node, rows: Rows, values: dict[str, Any]) -> Fact:
    """Padded at the last dimensions; not at the rows."""
    padded = len(values["pad"]) // 2
    is_padded = rows.dim >= len(shape_of(node)) - padded
    return lost(node, "pads the rows") if is_padded else rows.under(rows.dim)


@of_self
def repeat(node: Node, rows: Rows, values: dict[str, Any]) -> Fact:
    """Tiled; all rows may come over and over."""
    dim = rows.dim + len(shape_of(node)) - len(shape_of(values["self"]))
    times = values["repeats"][dim]
    factor = times.meta["val"] if isinstance(times, Node) else times
    return replace(rows, dim=dim, outer=rows.outer * factor)


def repeat_interleave(node: Node, facts: RowFacts) -> Fact:
    """Every element several times in place."""
    found = rows_of(node, facts, "self")
    if found is None or "repeats" not in found[1] or facts.of(found[1]["repeats"]) is not None:
        return lost(node, "mixes the rows")
    rows, values = found
    if values.get("dim") is None or (
        isinstance(values["repeats"], Node) and len(shape_of(values["repeats"]))
    ):
        return lost(node, "flattens the rows")
    if wrapped(values["dim"], len(shape_of(node))) != rows.dim:
        return rows
    factor = divided(shape_of(node)[rows.dim], shape_of(values["self"])[rows.dim])
    return (
        lost(node, "repeats rows unevenly")
        if factor is None
        else replace(rows, inner=rows.inner * factor)
    )
