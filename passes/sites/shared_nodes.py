"""Nodes that passes made for several layers at once, which stand in the way of equal layers."""

from collections.abc import Sequence

from torch.fx import Graph, Node

from vera_fx.passes.engine.graph import module_stack, tag_of
from vera_fx.passes.engine.outlining import body_nodes


def shared_by_layers(graph: Graph) -> list[Node]:
    """What passes made of attributes alone and several layers read, such as cuts of A.

    The first layer, where such a node stands, would be another function than the rest.
    """
    found: dict[Node, None] = {}
    for node in body_nodes(graph):
        sources = node.all_input_nodes
        fixed = tag_of(node) is not None and all(s.op == "get_attr" or s in found for s in sources)
        if fixed and len({_numbered(user) for user in node.users}) > 1:
            found[node] = None
    return list(found)


def _numbered(node: Node) -> tuple[str, ...]:
    """The calls of numbered modules that ``node`` is part of."""
    return tuple(key for key, path in module_stack(node) if is_numbered(path))


def is_numbered(path: str) -> bool:
    """True for paths such as those of the members of ``ModuleList`` and ``Sequential``."""
    return path.rpartition(".")[2].isdecimal()


def lift(shared: Sequence[Node], first: Node) -> None:
    """Move nodes, and the attributes that they read, in front of the first that computes."""
    sources = dict.fromkeys(source for node in shared for source in node.all_input_nodes)
    for node in (*(source for source in sources if source.op == "get_attr"), *shared):
        first.prepend(node)
