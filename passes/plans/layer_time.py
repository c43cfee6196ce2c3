"""How long a part of a graph takes in a training step: an estimate from products and traffic."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from vera_fx.passes.engine.graph import value_of
from vera_fx.passes.plans.devices import CPU, Device

aten = torch.ops.aten

_STEP = 2.0
"""Forward, and gradients of inputs alone: the base's weights are frozen."""

_INNER: Mapping[Any, tuple[int, int]] = {
    aten.linear.default: (0, -1),
    aten.mm.default: (0, -1),
    aten.bmm.default: (0, -1),
    aten.matmul.default: (0, -1),
    aten.addmm.default: (1, -1),
    aten.baddbmm.default: (1, -1),
}
"""For products, the argument and its dimension that are summed over."""


def concrete(size: int | torch.SymInt, sizes: Mapping[Any, int]) -> int:
    """A size as it is now; one that depends on tensor values as in the example."""
    if not isinstance(size, torch.SymInt):
        return size
    node: Any = cast("Any", size).node
    value = sizes.get(node.expr)
    if value is None:
        found: Any = node.expr.subs(sizes)
        value = int(found) if found.is_number else int(node.hint or 1)
    return value


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Estimates seconds of a training step.

    Attributes:
        device: where it runs.
        sizes: open sizes as they are now, by symbol.
    """

    device: Device = CPU
    sizes: Mapping[Any, int] = field(default_factory=dict[Any, int])

    def __call__(self, nodes: Iterable[Node]) -> float:
        """Seconds that the nodes take, forward and backward."""
        return _STEP * sum(map(self._seconds, nodes))

    def _seconds(self, node: Node) -> float:
        """The longer of a product's arithmetic and the traffic of its result."""
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor):
            return 0.0
        elements = self._count(value)
        moved = self.device.traffic(2 * elements, value.element_size())
        return max(moved, self._operations(node, elements) / self.device.rate(value.element_size()))

    def _operations(self, node: Node, elements: int) -> float:
        if node.target in _INNER:
            argument, dim = _INNER[node.target]
            return 2.0 * elements * self._inner(node, argument, dim)
        if node.target is aten.scaled_dot_product_attention.default:
            return 4.0 * elements * self._inner(node, 1, -2)
        if node.target is aten.convolution.default:
            weight = value_of(cast("Node", node.args[1]))
            return 2.0 * elements * prod(weight.shape[1:])
        if isinstance(node.target, OpOverload):
            return 0.0
        # Functions of ours are products by a weight.
        return 2.0 * elements * self._inner(node, 0, -1)

    def _inner(self, node: Node, argument: int, dim: int) -> int:
        operand = node.args[argument] if argument < len(node.args) else None
        value = operand.meta.get("val") if isinstance(operand, Node) else None
        return concrete(value.shape[dim], self.sizes) if isinstance(value, Tensor) else 1

    def _count(self, value: Tensor) -> int:
        return prod(concrete(size, self.sizes) for size in value.shape)
