"""DVoRA's branch in graphs: written in factored form, read back, and folded into the weight.

Shape letters: L leading dims, I in_features, O out_features, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from vera_fx.branches.dvora.functions import dvora_scale, dvora_weight, dvora_weight_again
from vera_fx.branches.dvora.parameters import MAGNITUDE
from vera_fx.branches.vera.graph import read_update, vera_update
from vera_fx.branches.vera.parameters import B_VECTOR, D_VECTOR
from vera_fx.passes import BaseCall, InsertedBranch, Put, Site, input_of, tag_of, tensor_of

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class DVoraGraph:
    """``add(total, add(mul(s - 1, base), mul(s, update)))``: PEFT's order for DoRA."""

    @property
    def plans(self) -> tuple[str, ...]:
        """No plan goes through ``z`` alone: the magnitude's gradient needs the whole product."""
        return ("factored", "dense")

    def dtype(self, tensors: Mapping[str, Node]) -> torch.dtype:
        """The vectors' dtype."""
        return tensor_of(tensors[D_VECTOR]).dtype

    def insert(
        self, put: Put, site: Site, x: Node, total: Node, tensors: Mapping[str, Node]
    ) -> Node:
        """``total + ((s - 1) * base + s * update)`` with ``s = m / |V|``."""
        call = site.call
        update = vera_update(put, site.target, x, tensors)
        parts = read_update(update, total, update, self).parts
        vera = (parts["A"], parts["B"], tensors[D_VECTOR], tensors[B_VECTOR])
        weight = call.weight_out_in(put)
        scale = put(dvora_scale, weight, *vera, tensors[MAGNITUDE], role="scale")
        base = put.cast(_base(put, call, x), self.dtype(tensors), role="base_cast")
        less = put(aten.sub.Tensor, scale, 1, role="scale_less")
        moved = put(aten.mul.Tensor, less, base, role="moved")
        grown = put(aten.mul.Tensor, scale, update, role="grown")
        delta = put(aten.add.Tensor, moved, grown, role="delta")
        return put(aten.add.Tensor, total, delta, role="add", ends=self)

    def inserted(self, end: Node) -> InsertedBranch:
        """Walk back from the sum."""
        delta = input_of(end, 1)
        grown = input_of(delta, 1)
        found = read_update(end, input_of(end), input_of(grown, 1), self)
        scale = input_of(grown)
        return replace(found, parts={**found.parts, "m": input_of(scale, 5)})

    def scale(self, put: Put, branch: InsertedBranch) -> Node:
        """DVoRA has no such plan."""
        raise NotImplementedError

    def merge(self, put: Put, branch: InsertedBranch, call: BaseCall, *, through_z: bool) -> Node:
        """``linear(x, m * V / |V|, bias)``; autograd takes the gradients through the input."""
        del through_z
        names = ("A", "B", "d", "b", "m")
        operands = (call.weight_out_in(put), *(branch.parts[name] for name in names))
        fold = put(dvora_weight, *operands, role="merged_weight", again=dvora_weight_again)
        args = (call.x, fold) if call.bias is None else (call.x, fold, call.bias)
        shape = tensor_of(call.node).shape
        return put(aten.linear.default, *args, role="merged", shape=shape, keeps=0)


def _base(put: Put, call: BaseCall, x: Node) -> Node:
    """The base's product without its bias; of the dropped-out input if elements of it are dropped."""
    tag = tag_of(x)
    if tag is not None and tag.role == "dropout":
        weight = call.weight_out_in(put)
        kept = put.cast(x, tensor_of(weight).dtype, role="kept")
        return put(aten.linear.default, kept, weight, role="base_kept")
    if call.bias is None:
        return call.node
    return put(aten.sub.Tensor, call.node, call.bias, role="base")
