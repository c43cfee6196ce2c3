"""Parts of a graph as functions of their own: how passes outline what a module's call does."""

import operator
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from vera_fx.passes.engine.graph import META_KEY, Tag, module_stack
from vera_fx.passes.engine.text import renamed, type_text


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring nodes of a graph: what one call of a module does, and what stands between.

    Attributes:
        path: the module's path.
        nodes: the nodes, in order.
    """

    path: str
    nodes: tuple[Node, ...]


def body_nodes(graph: Graph) -> list[Node]:
    """The nodes that compute, in order: neither inputs, attribute reads nor the output."""
    return [n for n in graph.nodes if n.op not in {"placeholder", "get_attr", "output"}]


def module_runs(nodes: Sequence[Node], wanted: Callable[[str], bool]) -> list[Run]:
    """Every call of the modules with a wanted path, outer ones before the inner ones they make.

    The key of a module in ``nn_module_stack`` tells the calls of one module apart.
    """
    spans: dict[str, tuple[str, int, int]] = {}
    for index, node in enumerate(nodes):
        for key, path in module_stack(node):
            if wanted(path):
                spans[key] = (path, spans.get(key, (path, index, index))[1], index)
    ordered = sorted(spans.values(), key=lambda span: (span[1], -span[2]))
    return [Run(path, tuple(nodes[first : last + 1])) for path, first, last in ordered]


def apart(runs: Sequence[Run]) -> Iterator[Run]:
    """The runs in order, each without the nodes of those before it; empty ones left out."""
    taken: set[Node] = set()
    for run in runs:
        nodes = tuple(node for node in run.nodes if node not in taken)
        taken.update(nodes)
        if nodes:
            yield Run(run.path, nodes)


def inputs_of(nodes: Sequence[Node]) -> list[Node]:
    """What the nodes read of the rest of the graph, in order of first use."""
    inside = set(nodes)
    found = dict.fromkeys(n for node in nodes for n in node.all_input_nodes)
    return [node for node in found if node not in inside]


def results_of(nodes: Sequence[Node]) -> list[Node]:
    """Those of the nodes that the rest of the graph reads."""
    inside = set(nodes)
    return [node for node in nodes if any(user not in inside for user in node.users)]


def fingerprint(nodes: Sequence[Node]) -> str:
    """Text that is equal for parts of a graph that compute the same from what they read.

    Operators, operands, constants, dtypes and sizes count; names of nodes and of open sizes do not.
    """
    inputs = inputs_of(nodes)
    numbers = {node: f"%{n}" for n, node in enumerate((*inputs, *nodes))}
    symbols: dict[str, str] = {}
    # A body may read a size off another input, so how sizes are related counts as well.
    sizes = [v if isinstance(v := node.meta.get("val"), torch.SymInt) else "" for node in inputs]
    lines = [type_text(node.meta.get("val"), symbols) for node in inputs]
    lines += [renamed(str(size), symbols) for size in sizes]
    for node in nodes:
        args, kwargs = map_arg((node.args, node.kwargs), numbers.__getitem__)
        head = type_text(node.meta.get("val"), symbols)
        lines.append(f"{node.target}{args}{kwargs}{head}")
    lines.append(str([numbers[node] for node in results_of(nodes)]))
    return "\n".join(lines)


class Outliner:
    """Moves runs of one graph into bodies; runs that compute the same share one body.

    A body is a `GraphModule` without attributes of its own: parameters stay reads of the outer
    graph, so that none that was replaced since is ever held. It is kept in the outer graph's
    ``__dict__``, no submodule of it.

    Args:
        gm: the graph.
        name: what to call the bodies.
        hold: what to keep of a body, and pass as the first argument of ``call``.
        call: the function that runs a body.
    """

    def __init__(
        self,
        gm: GraphModule,
        name: str,
        hold: Callable[[GraphModule, int], Any],
        call: Callable[..., Any],
    ) -> None:
        self._gm, self._name, self._hold, self._call = gm, name, hold, call
        self._bodies: dict[str, str] = {}

    def outline(self, run: Run, tag: Tag) -> str:
        """Replace the nodes of a run by a call of its body; gives the body's name."""
        inputs, results = inputs_of(run.nodes), results_of(run.nodes)
        name = self._body(run.nodes, inputs, results)
        graph, inside = self._gm.graph, set(run.nodes)
        with graph.inserting_before(run.nodes[0]):
            held = graph.create_node("get_attr", name)
        with graph.inserting_after(run.nodes[-1]):
            call = graph.call_function(self._call, (held, *inputs))
        held.meta[META_KEY] = tag
        call.meta |= {"val": tuple(node.meta.get("val") for node in results), META_KEY: tag}
        if "nn_module_stack" in run.nodes[0].meta:
            call.meta["nn_module_stack"] = run.nodes[0].meta["nn_module_stack"]
        last = call
        for index, node in enumerate(results):
            with graph.inserting_after(last):
                last = graph.call_function(getitem, (call, index))
            last.meta.update(node.meta)
            node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in inside)
        for node in reversed(run.nodes):
            graph.erase_node(node)
        return name

    def _body(self, nodes: Sequence[Node], inputs: Sequence[Node], results: Sequence[Node]) -> str:
        key = fingerprint(nodes)
        if key not in self._bodies:
            number = len(self._bodies)
            body = GraphModule(nn.Module(), _copied(nodes, inputs, results))
            self._bodies[key] = f"_{self._name}_{number}"
            self._gm.__dict__[self._bodies[key]] = self._hold(body, number)
        return self._bodies[key]


def outline_whole(gm: GraphModule, bodies: MutableMapping[str, GraphModule]) -> GraphModule | None:
    """Let a graph do nothing but call one body, which all graphs that compute the same share.

    Args:
        gm: the graph.
        bodies: the bodies that there are, by what they compute.

    Returns:
        The body; None, with nothing changed, if the graph reads more than tensors: modules are other
        code for every graph.
    """
    run = Run("", tuple(body_nodes(gm.graph)))
    read = [node for node in inputs_of(run.nodes) if node.op == "get_attr"]
    if not (run.nodes and all(isinstance(node.meta.get("val"), Tensor) for node in read)):
        return None
    key = fingerprint(run.nodes)

    def hold(body: GraphModule, _: int) -> Any:
        return bodies.setdefault(key, body).forward

    Outliner(gm, "body", hold, operator.call).outline(run, Tag("outline_whole"))
    return bodies[key]


def _copied(nodes: Sequence[Node], inputs: Sequence[Node], results: Sequence[Node]) -> Graph:
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta.update(node.meta)
    _read_sizes(graph, inputs, copies)
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in results))
    return graph


def _read_sizes(graph: Graph, inputs: Sequence[Node], copies: dict[Node, Node]) -> None:
    """Let a body read open sizes off its own tensors where it can: compilers relate them then."""
    tensors = [node for node in inputs if isinstance(node.meta.get("val"), Tensor)]
    places = {
        str(size): (node, dim)
        for node in reversed(tensors)
        for dim, size in enumerate(cast("Tensor", node.meta["val"]).shape)
        if isinstance(size, torch.SymInt)
    }
    for node in inputs:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and str(value) in places:
            tensor, dim = places[str(value)]
            read = graph.call_function(torch.ops.aten.sym_size.int, (copies[tensor], dim))
            read.meta.update(node.meta)
            copies[node] = read
