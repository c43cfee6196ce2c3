"""Reads inserted branches back from a graph, so that later passes can compute them another way."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from vera_fx.passes.engine.graph import tag_of, tensor_of


@dataclass(frozen=True, slots=True)
class InsertedBranch:
    """One branch as `InsertVera` wrote it: ``add(base, mul(linear(mul(z, d), B), b))``.

    Attributes:
        site: name of the site.
        add: the node that adds the branch to ``total``.
        total: the site's output so far: the base call, or the sum with earlier branches.
        update: ``b * u``, ``(*L, O)``.
        z: ``x @ A.T``, ``(*L, R)``.
        A: ``(R, I)``.
        B: ``(O, R)``.
        d: ``lambda_d``.
        b: ``lambda_b``.
    """

    site: str
    add: Node
    total: Node
    update: Node
    z: Node
    A: Node
    B: Node
    d: Node
    b: Node

    @property
    def x(self) -> Node:
        """The branch's input, cast and dropped out if it is."""
        return input_of(self.z)

    @property
    def is_alone(self) -> bool:
        """True if this is the only branch of its site, added straight to the base call."""
        others = [user for user in self.add.users if (tag := tag_of(user)) and tag.role == "add"]
        own = [user for user in others if user.args[0] is self.add and self._same_site(user)]
        return tag_of(self.total) is None and not own

    def _same_site(self, node: Node) -> bool:
        tag = tag_of(node)
        return tag is not None and tag.site == self.site

    @property
    def has_dropout(self) -> bool:
        """True if elements of the input are dropped for the branch alone."""
        tag = tag_of(self.x)
        return tag is not None and tag.role == "dropout"

    @property
    def is_mixed(self) -> bool:
        """True if the branch's products and the base's are in different dtypes."""
        return tensor_of(self.z).dtype != tensor_of(self.total).dtype

    @property
    def output(self) -> Node:
        """The sum with this branch: ``add``, or the cast back to the base's dtype behind it."""
        users = list(self.add.users)
        tag = tag_of(users[0]) if len(users) == 1 else None
        return users[0] if tag is not None and tag.role == "cast_out" else self.add


def inserted_branches(gm: GraphModule) -> Iterator[InsertedBranch]:
    """All branches in factored form, in the graph's order."""
    for add in list(gm.graph.nodes):
        tag = tag_of(add)
        if tag is None or tag.made_by != "InsertVera" or tag.role != "add":
            continue
        update = input_of(add, 1)
        u, b = input_of(update, 0), input_of(update, 1)
        h, B = _past_cast(input_of(u, 0)), _past_cast(input_of(u, 1))
        z, d = input_of(h, 0), input_of(h, 1)
        yield InsertedBranch(
            tag.site, add, input_of(add, 0), update, z, A=_past_cast(input_of(z, 1)), B=B, d=d, b=b
        )


def input_of(node: Node, index: int = 0) -> Node:
    """Argument ``index`` of a node that a pass made, which must be a node itself."""
    value = node.args[index]
    if not isinstance(value, Node):
        raise TypeError(f"argument {index} of {node.name} is no node: the branch was changed")
    return value


def _past_cast(node: Node) -> Node:
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
