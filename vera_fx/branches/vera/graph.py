"""VeRA's branch in graphs: written in factored form, read back, and written by the other plans.

Shape letters: L leading dims, I in_features, O out_features, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from vera_fx.branches.vera.cuts import parted
from vera_fx.branches.vera.functions import merged_linear, merged_weight, merged_weight_again
from vera_fx.branches.vera.parameters import B_VECTOR, D_VECTOR, A, B
from vera_fx.branches.vera.scaled import scaled_sum
from vera_fx.passes import (
    PLANS,
    BaseCall,
    InsertedBranch,
    Put,
    Site,
    Target,
    call_module,
    input_of,
    is_call,
    past_cast,
    tag_of,
    tensor_of,
)

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class VeraGraph:
    """``add(total, mul(linear(mul(linear(x, A), d), B), b))``: PEFT's order of operations."""

    @property
    def plans(self) -> tuple[str, ...]:
        """All of them."""
        return PLANS

    def dtype(self, tensors: Mapping[str, Node]) -> torch.dtype:
        """The vectors' dtype."""
        return tensor_of(tensors[D_VECTOR]).dtype

    def insert(
        self, put: Put, site: Site, x: Node, total: Node, tensors: Mapping[str, Node]
    ) -> Node:
        """``total + b * linear(d * linear(x, A[:, :I]), B[:O])``."""
        update = vera_update(put, site.target, x, tensors)
        values = tensor_of(total), tensor_of(update)
        dtype = torch.promote_types(values[0].dtype, values[1].dtype)
        return put(
            aten.add.Tensor,
            total,
            update,
            role="add",
            shape=values[0].shape,
            dtype=dtype,
            ends=self,
        )

    def inserted(self, end: Node) -> InsertedBranch:
        """Walk back from the sum."""
        return read_update(end, input_of(end), input_of(end, 1), self)

    def scale(self, put: Put, branch: InsertedBranch) -> Node:
        """``addmm(total, z, E.T)`` with ``E = diag(b) B diag(d)``; one function beside a called module."""
        parts, total = branch.parts, branch.total
        z = branch.products[0][0]
        if is_call(total, call_module):
            vera = tuple(parts[name] for name in ("B", "d", "b"))
            shape = tensor_of(total).shape
            return put(scaled_sum, total, z, *vera, role="scaled", shape=shape)
        column = put(aten.unsqueeze.default, parts["b"], 1, role="b_column")
        rows = put(aten.mul.Tensor, parts["B"], column, role="b_rows")
        E_OR = put(aten.mul.Tensor, rows, parts["d"], role="E")
        E_RO = put(aten.t.default, put.cast(E_OR, tensor_of(z).dtype, role="E_half"), role="E_t")
        if tensor_of(z).ndim == 2:  # noqa: PLR2004
            return put(aten.addmm.default, total, z, E_RO, role="scaled")
        flat_y, flat_z = _flat(put, total, "flat_y"), _flat(put, z, "flat_z")
        scaled = put(aten.addmm.default, flat_y, flat_z, E_RO, role="scaled")
        return put(aten.view_as.default, scaled, total, role="unflat")

    def merge(self, put: Put, branch: InsertedBranch, call: BaseCall, *, through_z: bool) -> Node:
        """``merged_linear`` by ``W + E A``, with gradients derived by hand."""
        weight = call.weight_out_in(put)
        vera = tuple(branch.parts[name] for name in ("A", "B", "d", "b"))
        fold = put(
            merged_weight,
            weight,
            *vera,
            role="merged_weight",
            shape=tensor_of(weight).shape,
            again=merged_weight_again,
        )
        z = branch.products[0][0] if through_z else None
        return put(
            merged_linear,
            *(call.x, z, fold, weight, call.bias, *vera),
            role="merged",
            shape=tensor_of(call.node).shape,
            keeps=None if through_z else 0,
        )


def _flat(put: Put, node: Node, role: str) -> Node:
    """``(*L, n)`` as ``(T, n)``. Says no size: adapters of every rank run through one graph."""
    if tensor_of(node).ndim == 1:
        return put(aten.unsqueeze.default, node, 0, role=role)
    return put(aten.flatten.using_ints, node, 0, -2, role=role)


def vera_update(put: Put, target: Target, x: Node, tensors: Mapping[str, Node]) -> Node:
    """``b * linear(d * linear(x, A[:, :I]), B[:O])``, shape ``(*L, O)``; this process's part of it."""
    d, b = tensors[D_VECTOR], tensors[B_VECTOR]
    lead, rows = tensor_of(x).shape[:-1], target.columns_out
    narrow = (*lead, tensor_of(d).shape[0])
    wide = (*lead, rows.stop - rows.start)
    A_RI = put.cut(tensors[A], dim=1, entries=target.columns_in, role="cut_A")
    z_LR = put(aten.linear.default, x, A_RI, role="z", shape=narrow, shared=True)
    d, b = parted(put, target, d, b)
    h_LR = put(aten.mul.Tensor, z_LR, d, role="h", shape=narrow)
    B_OR = put.cut(tensors[B], dim=0, entries=rows, role="cut_B")
    u_LO = put(aten.linear.default, h_LR, B_OR, role="u", shape=wide)
    return put(aten.mul.Tensor, u_LO, b, role="update", shape=wide)


def read_update(end: Node, total: Node, update: Node, kind: object) -> InsertedBranch:
    """The branch that ends at ``end``, of which `vera_update` wrote ``update``."""
    u, b = input_of(update, 0), input_of(update, 1)
    h, vera_B = past_cast(input_of(u, 0)), past_cast(input_of(u, 1))
    z, d = input_of(h, 0), input_of(h, 1)
    vera_A = past_cast(input_of(z, 1))
    tag = tag_of(end)
    parts = {"A": vera_A, "B": vera_B, "d": d, "b": b, "update": update}
    site = "" if tag is None else tag.site
    return InsertedBranch(site, kind, end, total, ((z, "A"), (u, "B")), parts)
