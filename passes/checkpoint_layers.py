"""Recompute a layer's activations in backward instead of keeping them."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar, cast

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import checkpoint

from ._graph import META_KEY, Tag, is_call
from ._protocol import Numerics, PassReport, Rewrite

_ME = "CheckpointLayers"


@dataclass(slots=True, eq=False)
class Segment:
    """A part of a graph as a module of its own, held by the graph but no submodule of it."""

    body: GraphModule
    number: int

    def __str__(self) -> str:
        return f"segment{self.number}"


def run_segment(segment: Segment, *inputs: Any) -> tuple[Any, ...]:
    """Run a segment; in backward it runs again, with the same random numbers."""
    # Called by its full name: torch.compile knows it by that, and not through a `typing.cast`.
    return checkpoint.checkpoint(segment.body, *inputs, use_reentrant=False)  # pyright: ignore


@dataclass(frozen=True, slots=True)
class CheckpointLayers:
    """Put every call of the given layers into a segment that `torch.utils.checkpoint` runs.

    This is what a model's own gradient checkpointing does, for layers that capture has flattened.
    Parameters stay reads of the outer graph, so a segment never holds one that was replaced since.

    Before::

        %lin_weight: f32[5, 3] = lin.weight
        %lin_bias: f32[5] = lin.bias
        %x: f32[s0, 3] = input
        %slot_vera_a: f32[2, 4] = slot.vera_A
        %slot_vera_b: f32[7, 2] = slot.vera_B
        %slot_lambda_d: f32[2] = slot.lambda_d
        %slot_lambda_b: f32[5] = slot.lambda_b
        %linear: f32[s0, 5] = linear(%x, %lin_weight, %lin_bias)
        %cut_A: f32[2, 3] = slice(%slot_vera_a, 1, 0, 3)
        %z: f32[s0, 2] = linear(%x, %cut_A)
        %h: f32[s0, 2] = mul(%z, %slot_lambda_d)
        %cut_B: f32[5, 2] = slice(%slot_vera_b, 0, 0, 5)
        %u: f32[s0, 5] = linear(%h, %cut_B)
        %update: f32[s0, 5] = mul(%u, %slot_lambda_b)
        %add: f32[s0, 5] = add(%linear, %update)
        return [%add]

    After::

        %lin_weight: f32[5, 3] = lin.weight
        %lin_bias: f32[5] = lin.bias
        %x: f32[s0, 3] = input
        %slot_vera_a: f32[2, 4] = slot.vera_A
        %slot_vera_b: f32[7, 2] = slot.vera_B
        %slot_lambda_d: f32[2] = slot.lambda_d
        %slot_lambda_b: f32[5] = slot.lambda_b
        %_segment_0 = _segment_0
        %run_segment: tuple = run_segment(%_segment_0, %x, %lin_weight, %lin_bias, %slot_vera_a, %slot_lambda_d, %slot_vera_b, %slot_lambda_b)
        %getitem: f32[s0, 5] = getitem(%run_segment, 0)
        return [%getitem]

    Needs: ``nn_module_stack`` on captured nodes. Runs last: other passes do not look into segments.
    Keeps: every value and gradient; dropout draws the same numbers again.
    Skips: nothing.
    """  # noqa: E501

    layers: frozenset[str] = frozenset()
    """Paths of the layers."""

    numerics: ClassVar[Numerics] = Numerics.BITWISE

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Move the calls of the layers into segments."""
        if any(is_call(node, run_segment) for node in gm.graph.nodes):
            return PassReport(())
        rewrites = [
            _outline(gm, nodes, path, number)
            for number, (path, nodes) in enumerate(self._calls(gm.graph))
        ]
        return PassReport(tuple(rewrites))

    def _calls(self, graph: Graph) -> list[tuple[str, list[Node]]]:
        """Every call of a layer: its path and a run of nodes without gaps, none in two runs."""
        body = [n for n in graph.nodes if n.op not in {"placeholder", "get_attr", "output"}]
        spans: dict[str, tuple[str, int, int]] = {}
        for index, node in enumerate(body):
            for key, path in self._stack(node):
                first = spans.get(key, (path, index, index))[1]
                spans[key] = (path, first, index)
        calls: list[tuple[str, list[Node]]] = []
        free = 0
        for path, first, last in sorted(spans.values(), key=lambda span: span[1:]):
            nodes = body[max(first, free) : last + 1]
            if nodes:
                calls.append((path, nodes))
            free = max(free, last + 1)
        return calls

    def _stack(self, node: Node) -> list[tuple[str, str]]:
        """The layers that ``node`` runs in; the key tells the calls of one layer apart."""
        stack = cast("dict[str, tuple[str, object]]", node.meta.get("nn_module_stack") or {})
        return [(key, path) for key, (path, _) in stack.items() if path in self.layers]


def _outline(gm: GraphModule, nodes: Sequence[Node], path: str, number: int) -> Rewrite:
    inside = set(nodes)
    inputs = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes))
    inputs = [node for node in inputs if node not in inside]
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    segment = Segment(_body(nodes, inputs, results), number)
    name = f"_segment_{number}"
    gm.__dict__[name] = segment
    tag = Tag(_ME, path)
    with gm.graph.inserting_before(nodes[0]):
        held = gm.graph.create_node("get_attr", name)
    with gm.graph.inserting_after(nodes[-1]):
        call = gm.graph.call_function(run_segment, (held, *inputs))
    call.meta |= {"val": tuple(node.meta.get("val") for node in results), META_KEY: tag}
    held.meta[META_KEY] = tag
    last = call
    for index, node in enumerate(results):
        with gm.graph.inserting_after(last):
            last = gm.graph.call_function(getitem, (call, index))
        last.meta.update(node.meta)
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        gm.graph.erase_node(node)
    return Rewrite(path, f"{len(nodes)} nodes recomputed in backward")


def _body(nodes: Sequence[Node], inputs: Sequence[Node], results: Sequence[Node]) -> GraphModule:
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta.update(node.meta)
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in results))
    return GraphModule(nn.Module(), graph)
