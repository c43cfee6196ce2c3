"""How the base's own product of a target shows in graphs: the seam for kinds of base product."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.emit import Put
from vera_fx.passes.engine.graph import is_call, node_arg

if TYPE_CHECKING:
    from vera_fx.passes.sites.target import Target

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class BaseCall:
    """One call of a target's own product, taken apart.

    Attributes:
        node: what computes the product.
        x: its input, ``(*L, in)``.
        weight: its weight as the graph reads it; None if no graph reads it.
        bias: its bias, ``(out,)``, if the node adds one.
        layout: ``"out_in"`` or ``"in_out"``, how the weight lies.
    """

    node: Node
    x: Node
    weight: Node | None
    bias: Node | None
    layout: str = "out_in"

    def weight_out_in(self, put: Put) -> Node:
        """The weight as ``(out, in)``; transposed by a new node if it lies the other way round.

        Raises:
            TypeError: no graph reads the weight. Plans that need it are not admitted there.
        """
        if self.weight is None:
            raise TypeError(f"{self.node.name} has no weight that a graph reads")
        if self.layout == "out_in":
            return self.weight
        return put(aten.t.default, self.weight, role="weight_t")


class BaseProduct(Protocol):
    """How targets of one kind compute, as far as passes must know.

    What is not said here is the module's business: its kernels, its state, the gradient of its input,
    which autograd takes through the node as it stands.
    """

    @property
    def plans(self) -> tuple[str, ...]:
        """The plans that it admits, of `vera_fx.passes.PLANS`."""
        ...

    @property
    def layout(self) -> str:
        """How its weight lies, ``"out_in"`` or ``"in_out"``; nothing if no graph reads it."""
        ...

    def calls(
        self, gm: GraphModule, targets: Sequence["Target"], by_path: Mapping[str, "Target"]
    ) -> Mapping[Node, "Target"]:
        """The nodes that compute products of ``targets``, which are of this kind.

        Args:
            gm: the graph.
            targets: the targets of this kind.
            by_path: all targets by every path that they make calls under.

        Raises:
            SiteError: a target is used in a way that cannot be adapted. Nothing is left out in silence.
        """
        ...

    def call(self, node: Node) -> BaseCall | None:
        """A node that `calls` has found, taken apart; None if it is no such node any more."""
        ...


def linear_call(node: Node) -> BaseCall | None:
    """``node`` as a linear call by a weight; None if it is none."""
    if is_call(node, aten.linear.default):
        x, weight, bias, layout = node_arg(node, 0), node_arg(node, 1), node_arg(node, 2), "out_in"
    elif is_call(node, aten.addmm.default):
        x, weight, bias, layout = node_arg(node, 1), node_arg(node, 2), node_arg(node, 0), "in_out"
    elif is_call(node, aten.mm.default, aten.matmul.default):
        x, weight, bias, layout = node_arg(node, 0), node_arg(node, 1), None, "in_out"
    else:
        return None
    # addmm(..., alpha=2) scales the product, and such a call is no linear layer's.
    if x is None or weight is None or node.kwargs:
        return None
    return BaseCall(node, x, weight, bias, layout)
