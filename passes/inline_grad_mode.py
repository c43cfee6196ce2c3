"""Inline ``torch.no_grad()`` blocks that capture turned into higher-order calls."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.emit import emit
from vera_fx.passes.engine.graph import Tag, is_call, resolve, value_of
from vera_fx.passes.engine.protocol import Numerics
from vera_fx.passes.engine.reports import Action, PassReport, Rewrite

_WRAP = torch.ops.higher_order.wrap_with_set_grad_enabled


@dataclass(frozen=True, slots=True)
class InlineGradMode:
    """Replace every ``wrap_with_set_grad_enabled`` call by the operators it wraps.

    torch.export wraps a ``no_grad`` block (rotary embeddings, typically) into such a call, which
    Dynamo rejects under dynamic shapes ("unexpected freevars", torch 2.13). What leaves a
    gradient-free block is detached, so that gradients stay what they were.

    Before::

        %x: f32[s0, s1] = input
        %submod_3 = _constant_submod_1
        %cos: tuple = wrap_with_set_grad_enabled(False, %submod_3, %x)
        %getitem: f32[s0, s1] = getitem(%cos, 0)
        %add: f32[s0, s1] = add(%x, %getitem)
        return [%add]

    After::

        %x: f32[s0, s1] = input
        %cos_1: f32[s0, s1] = cos(%x)
        %detach_default: f32[s0, s1] = detach(%cos_1)
        %add: f32[s0, s1] = add(%x, %detach_default)
        return [%add]

    Needs: nothing.
    Keeps: every value and every gradient.
    Skips: nothing.
    """

    numerics: ClassVar[Numerics] = Numerics.BITWISE

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Inline all such calls, nested ones too."""
        rewrites: list[Rewrite] = []
        while (node := next((n for n in gm.graph.nodes if is_call(n, _WRAP)), None)) is not None:
            rewrites.append(Rewrite(node.name, Action.GRADIENTS_INLINED, _mode(node)))
            _inline(gm, node)
        return PassReport(tuple(rewrites))


def _mode(call: Node) -> str:
    return "enabled" if call.args[0] else "detached"


def _inline(gm: GraphModule, call: Node) -> None:
    enabled, body_node, *operands = cast("tuple[Any, ...]", call.args)
    body = cast("GraphModule", resolve(gm, str(body_node.target)))
    copies: dict[Node, Node] = {}
    inputs = iter(operands)
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(inputs)
            elif node.op != "output":
                copies[node] = _copy(gm, body, node, copies)
        results = _results(gm, body, copies, enabled=enabled)
    for user in list(call.users):
        user.replace_all_uses_with(results[cast("int", user.args[1])])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)
    if not body_node.users:
        gm.graph.erase_node(body_node)
        delattr(gm, str(body_node.target))


def _copy(gm: GraphModule, body: GraphModule, node: Node, copies: dict[Node, Node]) -> Node:
    """Copy ``node`` out of ``body``; attributes of ``body`` (nested blocks) move along."""
    copy = gm.graph.node_copy(node, lambda n: copies[n])
    if node.op == "get_attr":
        copy.target = _free_name(gm, str(node.target))
        gm.__dict__[copy.target] = resolve(body, str(node.target))
    return copy


def _free_name(gm: GraphModule, name: str) -> str:
    name = name.replace(".", "_")
    while hasattr(gm, name):
        name += "_"
    return name


def _results(
    gm: GraphModule, body: GraphModule, copies: dict[Node, Node], *, enabled: bool
) -> list[Any]:
    """What the block returns; values computed without gradients are detached."""
    output = next(iter(reversed(body.graph.nodes)))
    results: list[Any] = []
    for value in cast("list[Any]", output.args[0]):
        result = copies[value] if isinstance(value, Node) else value
        if isinstance(value, Node) and value.op != "placeholder" and not enabled:
            result = _detached(gm, result)
        results.append(result)
    return results


def _detached(gm: GraphModule, node: Node) -> Node:
    value = value_of(node)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return node
    return emit(gm, torch.ops.aten.detach.default, (node,), like=node, tag=Tag("InlineGradMode"))
