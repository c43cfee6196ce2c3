"""Rules of row tracking for operators that compute."""

from typing import Any, cast

from torch.fx import Node

from vera_fx.passes.rows.support import REDUCING, broadcast, lost, op_name, rows_of, wrapped
from vera_fx.passes.rows.vocabulary import Fact, Lost, RowFacts, Rows, operands, shape_of


def pointwise(node: Node, facts: RowFacts) -> Fact:
    """Element by element, with broadcasting."""
    return broadcast(node, facts, *node.args, *node.kwargs.values())


def unchanged(node: Node, facts: RowFacts) -> Fact:
    """Shape and order of the first operand are kept; no other operand has rows."""
    fact, others = facts.of(node.args[0]), facts.all_of(*node.args[1:], *node.kwargs.values())
    if any(other is not None for _, other in others):
        return lost(node, "takes a parameter that depends on the rows")
    return fact


def independent(_node: Node, _facts: RowFacts) -> Fact:
    """Only the shape of the operands matters."""
    return None


def along(node: Node, facts: RowFacts) -> Fact:
    """Works along the dimensions ``dim`` or ``dims``; keeps them, or removes them (no keepdim)."""
    found = rows_of(node, facts, "self")
    if found is None or len(facts.all_of(*node.args)) != 1:
        return lost(node, "mixes the rows")
    rows, values = found
    ndim = len(shape_of(values["self"]))
    given = values.get("dim", values.get("dims"))
    dims = range(ndim) if given is None or given == [] else given
    used = {wrapped(d, ndim) for d in ([dims] if isinstance(dims, int) else cast("Any", dims))}
    if rows.dim in used:
        return lost(node, "works across the rows")
    gone = op_name(node) in REDUCING and not values.get("keepdim", False)
    return rows.under(rows.dim - gone * sum(d < rows.dim for d in used))


def normalised(node: Node, facts: RowFacts) -> Fact:
    """layer_norm and rms_norm: over the last dimensions."""
    values = operands(node)
    name = "input"
    rows = facts.of(values[name])
    others = facts.all_of(values.get("weight"), values.get("bias"))
    if not isinstance(rows, Rows) or any(fact is not None for _, fact in others):
        return lost(node, "takes a parameter that depends on the rows")
    if rows.dim >= len(shape_of(values[name])) - len(values["normalized_shape"]):
        return lost(node, "works across the rows")
    return rows.under(rows.dim)


def per_sample(node: Node, facts: RowFacts) -> Fact:
    """Convolutions, pools and group_norm: the first dimension holds independent samples."""
    # Convolutions and pools take a single sample, too, without that dimension.
    least = 2 if op_name(node) == "group_norm" else 3
    rows = facts.of(node.args[0])
    others = facts.all_of(*node.args[1:])
    if not isinstance(rows, Rows) or any(fact is not None for _, fact in others):
        return lost(node, "takes a parameter that depends on the rows")
    if rows.dim != 0 or len(shape_of(cast("Node", node.args[0]))) < least:
        return lost(node, "works across the rows")
    return rows.under(0)


def linear(node: Node, facts: RowFacts) -> Fact:
    """``x @ W.T + b``; the weight is the same for every row."""
    others = facts.all_of(*node.args[1:])
    if not isinstance(facts.of(node.args[0]), Rows) or any(fact is not None for _, fact in others):
        return lost(node, "takes a weight that depends on the rows")
    return _product_of(node, node.args[0], facts)


def called(node: Node, facts: RowFacts) -> Fact:
    """A linear module that the graph calls: ``(module, x)``."""
    return _product_of(node, node.args[1], facts)


def _product_of(node: Node, x: Any, facts: RowFacts) -> Fact:
    rows = facts.of(x)
    if not isinstance(rows, Rows):
        return lost(node, "takes no rows")
    is_last = rows.dim == len(shape_of(cast("Node", x))) - 1
    return lost(node, "works across the rows") if is_last else rows.under(rows.dim)


def matmul(node: Node, facts: RowFacts) -> Fact:
    """A product, with a summand before it in addmm and baddbmm."""
    values = list(operands(node).values())
    start = 1 if op_name(node) in {"addmm", "baddbmm"} else 0
    left, right = values[start : start + 2]
    product = _product(node, facts, left, right)
    if not start or isinstance(product, Lost) or facts.of(values[0]) is None:
        return product
    added, ndim = facts.of(values[0]), len(shape_of(node))
    shifted = (
        added.at(added.dim + ndim - len(shape_of(values[0]))) if isinstance(added, Rows) else None
    )
    agrees = isinstance(product, Rows) and shifted is not None and product.agrees(shifted)
    return product if agrees else lost(node, "combines rows that lie along different dimensions")


def _product(node: Node, facts: RowFacts, left: Node, right: Node) -> Fact:
    a, b = facts.of(left), facts.of(right)
    sizes = [len(shape_of(operand)) for operand in (left, right)]
    ndim = len(shape_of(node))
    if min(sizes) < 2:  # noqa: PLR2004
        return lost(node, "multiplies by a vector")
    if isinstance(a, Rows) and b is None and a.dim == sizes[0] - 2:
        return a.under(ndim - 2)
    if isinstance(b, Rows) and a is None and b.dim == sizes[1] - 1:
        return b.under(ndim - 1)
    return broadcast(node, facts, left, right, skip=2)


def attention(node: Node, facts: RowFacts) -> Fact:
    """Scaled dot-product attention: rows are among the leading dimensions."""
    values = operands(node)
    names = ("query", "key", "value", "attn_mask")
    return broadcast(node, facts, *(values.get(name) for name in names), skip=2)


def embedding(node: Node, facts: RowFacts) -> Fact:
    """One vector per index, from a table that is the same for every row."""
    values = operands(node)
    rows = facts.of(values["indices"])
    if facts.of(values["weight"]) is not None or not isinstance(rows, Rows):
        return lost(node, "takes a weight that depends on the rows")
    return rows.under(rows.dim)


def copied(node: Node, facts: RowFacts) -> Fact:
    """``copy_(target, source)``: what the source has, broadcast."""
    return broadcast(node, facts, operands(node)["src"])
