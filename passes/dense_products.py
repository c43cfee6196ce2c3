"""Multiply by dense weights that the graph reads, in the place of modules that it calls."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.emit import Put, attribute
from vera_fx.passes.engine.graph import Tag, node_arg, replace_uses, tensor_of
from vera_fx.passes.engine.protocol import Numerics
from vera_fx.passes.engine.reports import Action, PassReport, Reason, Rewrite, Skip
from vera_fx.passes.sites.called_module import called_modules

aten = torch.ops.aten

_ME = "DenseProducts"


@dataclass(frozen=True, slots=True)
class DenseProducts:
    """Replace calls of quantised modules by plain products, for graphs that leave the library.

    Before::

        %first_weight: f32[3, 3] = first.weight
        %x: f32[s0, 3] = input
        %linear: f32[s0, 3] = linear(%x, %first_weight)
        %lin = lin
        %call_module: f32[s0, 5] = call_module(%lin, %linear)
        return [%call_module]

    After::

        %first_weight: f32[3, 3] = first.weight
        %x: f32[s0, 3] = input
        %dense_weight: f32[5, 3] = dense.weight
        %dense_bias: f32[5] = dense.bias
        %linear: f32[s0, 3] = linear(%x, %first_weight)
        %dense: f32[s0, 5] = linear(%linear, %dense_weight, %dense_bias)
        return [%dense]

    Needs: the weights, and biases where there are any, as attributes of the graph's owner.
    Keeps: values to the rounding of the module's own product; layers that round their input no longer do.
    Skips: a module that this graph never calls.
    """

    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    products: tuple[tuple[str, str, str | None], ...]
    """Path of each module, and the attribute paths of its dense weight, ``(out, in)``, and bias."""

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Replace every call of the modules."""
        known = {path: (weight, bias) for path, weight, bias in self.products}
        calls = [(node, path) for node, path in called_modules(gm) if path in known]
        for node, path in calls:
            _compute(gm, node, path, *known[path])
        called = {path for _, path in calls}
        return PassReport(
            tuple(Rewrite(path, Action.REDIRECTED, known[path][0]) for _, path in calls),
            tuple(Skip(path, Reason.NEVER_CALLED) for path in known if path not in called),
        )


def _compute(gm: GraphModule, node: Node, path: str, weight: str, bias: str | None) -> None:
    module, x = node_arg(node, 0), node_arg(node, 1)
    reads = [
        attribute(gm, read, like=node, tag=Tag(_ME, path, f"dense_{name}"))
        for name, read in (("weight", weight), ("bias", bias))
        if read is not None
    ]
    with gm.graph.inserting_before(node):
        put = Put(gm, _ME, path, node)
        dense = put(aten.linear.default, x, *reads, role="dense")
        dense = put.cast(dense, tensor_of(node).dtype, role="dense_out")
    replace_uses(node, dense)
    gm.graph.erase_node(node)
    if module is not None and not module.users:
        gm.graph.erase_node(module)
