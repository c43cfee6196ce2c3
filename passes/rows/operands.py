"""Emits operands that differ from row to row, shaped to the tensors that they meet.

Shape letters: B rows of the batch, I in_features, O out_features.
"""

import operator
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.emit import emit
from vera_fx.passes.engine.graph import Tag, tensor_of
from vera_fx.passes.engine.protocol import SiteError
from vera_fx.passes.rows.vocabulary import Rows, divided, same, shape_of

aten = torch.ops.aten


def placed(gm: GraphModule, rows: Rows, like: Node, value: Node, tag: Tag) -> Node:
    """``value (B, n)`` so that it broadcasts with ``like (*L, n)``, whose rows are ``rows``.

    Emits at the graph's insertion point.
    """
    if not same(rows.inner, 1) or not same(rows.outer, 1):
        value = _repeated(gm, rows, like, value, tag)
    for _ in range(rows.dim):
        value = emit(gm, aten.unsqueeze.default, (value, 0), like=like, tag=tag)
    for _ in range(len(shape_of(like)) - rows.dim - 2):
        value = emit(gm, aten.unsqueeze.default, (value, -2), like=like, tag=tag)
    return value


def _repeated(gm: GraphModule, rows: Rows, like: Node, value: Node, tag: Tag) -> Node:
    """``(B, n)`` as ``(B * count, n)``: each row's neighbours, or all rows over and over."""
    if not same(rows.inner, 1) and not same(rows.outer, 1):
        raise SiteError(
            f"the rows of the batch lie neither first nor last in dimension {rows.dim} of {like.name}; "
            "a batch that mixes adapters cannot tell them apart there"
        )
    count = _count(gm, rows, like, value, tag)
    neighbours = same(rows.outer, 1)
    sizes: list[Any] = [-1, count, -1] if neighbours else [count, -1, -1]
    value = emit(gm, aten.unsqueeze.default, (value, int(neighbours)), like=like, tag=tag)
    value = emit(gm, aten.expand.default, (value, sizes), like=like, tag=tag)
    return emit(gm, aten.flatten.using_ints, (value, 0, 1), like=like, tag=tag)


def _count(gm: GraphModule, rows: Rows, like: Node, value: Node, tag: Tag) -> Any:
    count = divided(shape_of(like)[rows.dim], shape_of(value)[0])
    if isinstance(count, int):
        return count
    whole = emit(gm, aten.sym_size.int, (like, rows.dim), like=like, tag=tag)
    batch = emit(gm, aten.sym_size.int, (value, 0), like=like, tag=tag)
    return emit(gm, cast("Any", operator).floordiv, (whole, batch), like=like, tag=tag)


def row_product(gm: GraphModule, rows: Rows, x: Node, weight_BOI: Node, tag: Tag) -> Node:
    """``x @ weight[row].T`` for every row.

    Raises:
        SiteError: the rows are not the first dimension of ``x``.
    """
    if rows.dim != 0 or not same(rows.outer, 1):
        raise SiteError(
            f"a trained copy of a weight meets {x.name}, whose rows lie along dimension {rows.dim}; "
            "a batch that mixes adapters can use such copies only where the rows come first"
        )

    def put(target: Any, *args: Any) -> Node:
        return emit(gm, target, args, like=x, tag=tag)

    ndim = len(shape_of(x))
    weight_BIO = put(aten.transpose.int, weight_BOI, 1, 2)
    if ndim > 2:  # noqa: PLR2004
        for _ in range(ndim - 3):
            weight_BIO = put(aten.unsqueeze.default, weight_BIO, 1)
        return put(aten.matmul.default, x, weight_BIO)
    width = tensor_of(x).shape[-1]
    batch = shape_of(weight_BOI)[0]
    batch = batch if isinstance(batch, int) else put(aten.sym_size.int, weight_BOI, 0)
    x_BNI = put(aten.reshape.default, x, [batch, -1, width])
    return put(aten.flatten.using_ints, put(aten.matmul.default, x_BNI, weight_BIO), 0, 1)
