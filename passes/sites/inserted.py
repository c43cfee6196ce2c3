"""Reads inserted branches back from a graph, so that later passes can compute them another way."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from vera_fx.passes.engine.graph import tag_of, tensor_of


@dataclass(frozen=True, slots=True)
class InsertedBranch:
    """One branch in factored form, as its kind wrote it and reads it back.

    Attributes:
        site: name of the site.
        kind: its kind (`vera_fx.passes.sites.kinds.BranchGraph`).
        end: the node that adds the branch to ``total``.
        total: the site's output so far: the base call, or the sum with earlier branches.
        products: its linear calls in order, each with a name for what it multiplies by; the first
            reads the branch's input.
        parts: its nodes by names that its kind knows.
    """

    site: str
    kind: Any
    end: Node
    total: Node
    products: tuple[tuple[Node, str], ...]
    parts: Mapping[str, Node] = field(default_factory=dict[str, Node])

    @property
    def x(self) -> Node:
        """The branch's input, cast and dropped out if it is."""
        return input_of(self.products[0][0])

    @property
    def is_alone(self) -> bool:
        """True if this is the only branch of its site, added straight to the base call."""
        own = [user for user in self.end.users if user.args[0] is self.end and self._ends(user)]
        return tag_of(self.total) is None and not own

    def _ends(self, node: Node) -> bool:
        tag = tag_of(node)
        return tag is not None and tag.ends is not None and tag.site == self.site

    @property
    def has_dropout(self) -> bool:
        """True if elements of the input are dropped for the branch alone."""
        tag = tag_of(self.x)
        return tag is not None and tag.role == "dropout"

    @property
    def is_mixed(self) -> bool:
        """True if the branch's products and the base's are in different dtypes."""
        return tensor_of(self.products[0][0]).dtype != tensor_of(self.total).dtype

    @property
    def output(self) -> Node:
        """The sum with this branch: ``end``, or the cast back to the base's dtype behind it."""
        users = list(self.end.users)
        tag = tag_of(users[0]) if len(users) == 1 else None
        return users[0] if tag is not None and tag.role == "cast_out" else self.end


def inserted_branches(gm: GraphModule) -> Iterator[InsertedBranch]:
    """All branches in factored form, in the graph's order."""
    for node in list(gm.graph.nodes):
        tag = tag_of(node)
        if tag is not None and tag.ends is not None:
            yield tag.ends.inserted(node)


def input_of(node: Node, index: int = 0) -> Node:
    """Argument ``index`` of a node that a pass made, which must be a node itself."""
    value = node.args[index]
    if not isinstance(value, Node):
        raise TypeError(f"argument {index} of {node.name} is no node: the branch was changed")
    return value


def past_cast(node: Node) -> Node:
    """What `LowerBranch` cast to half precision, if it did."""
    tag = tag_of(node)
    return input_of(node) if tag is not None and tag.role.endswith("_half") else node


def erase_unused(gm: GraphModule, *nodes: Node) -> None:
    """Erase the nodes that nothing uses, and then what only they used, as far as passes made it."""
    todo, erased = list(nodes), set[Node]()
    while todo:
        node = todo.pop()
        if node.users or node.op == "placeholder" or node in erased:
            continue
        todo += [operand for operand in node.all_input_nodes if tag_of(operand) is not None]
        gm.graph.erase_node(node)
        erased.add(node)
