"""Small tools that every pass uses: reading nodes, emitting nodes, printing graphs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import getitem
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

META_KEY = "vera_fx"
"""Nodes made by a pass carry a `Tag` under this key of ``node.meta``."""


@dataclass(frozen=True, slots=True)
class Tag:
    """Where a node comes from, and what later passes must know of it.

    Attributes:
        made_by: the pass that made it.
        site: the site that it serves.
        role: what it is there.
        shared: it depends on its operands alone, so that equal ones may be computed once.
        ends: the kind of branch that ends here (`vera_fx.passes.sites.kinds.BranchGraph`).
        again: the function that compiled code computes again in backward rather than keep its result.
        keeps: the number of the argument that is kept for backward for this node's sake alone.
    """

    made_by: str
    site: str = ""
    role: str = ""
    shared: bool = False
    ends: Any = None
    again: Callable[..., Any] | None = None
    keeps: int | None = None


def tag_of(node: Node) -> Tag | None:
    """The tag of a node made by a pass, or None for a node of the captured model."""
    return cast("Tag | None", node.meta.get(META_KEY))


def is_call(node: Node, *targets: object) -> bool:
    """True if ``node`` calls one of ``targets`` (torch operator overloads)."""
    return node.op == "call_function" and node.target in targets


def node_arg(node: Node, index: int) -> Node | None:
    """Positional argument ``index`` of ``node`` if it is a node."""
    value = node.args[index] if index < len(node.args) else None
    return value if isinstance(value, Node) else None


def value_of(node: Node) -> Any:
    """The fake value of ``node``: what it has in shape, dtype and device."""
    return node.meta["val"]


def tensor_of(node: Node) -> Tensor:
    """The fake tensor of ``node``; only for nodes that hold a tensor."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        raise TypeError(f"node {node.name} holds a {type(value).__name__}, not a tensor")
    return value


def module_stack(node: Node) -> list[tuple[str, str]]:
    """``(key of the call, path)`` of the modules whose forward made this call, outermost first.

    torch.export records them in ``meta["nn_module_stack"]`` as ``{key: (path, class)}``.
    """
    stack = cast("dict[str, tuple[str, object]]", node.meta.get("nn_module_stack") or {})
    return [(key, path) for key, (path, _) in stack.items()]


def owner_path(node: Node) -> str:
    """Path of the module whose forward made this call; ``""`` for the model itself."""
    stack = module_stack(node)
    return stack[-1][1] if stack else ""


def module_paths(graph: Graph) -> frozenset[str]:
    """Paths of all modules whose forward ran while ``graph`` was captured."""
    return frozenset(path for node in graph.nodes for _, path in module_stack(node))


def resolve(root: object, target: str) -> Any:
    """The object that the dotted path ``target``, as of a ``get_attr`` node, names on ``root``."""
    for atom in target.split("."):
        root = getattr(root, atom)
    return root


def first_body_node(graph: Graph) -> Node:
    """The first node that is neither a placeholder nor an attribute read."""
    return next(node for node in graph.nodes if node.op not in {"placeholder", "get_attr"})


def replace_uses(old: Node, new: Node, *, keep: Iterable[Node] = ()) -> None:
    """Let every user of ``old`` read ``new``, but for ``new`` itself and the nodes in ``keep``."""
    spared = {new, *keep}
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in spared)


def written_between(first: Node, last: Node) -> bool:
    """True if an operator between the two nodes may write to a tensor that they read.

    Conservative: any in-place operator counts, but for those that write to attributes of the
    model (a batch norm's running statistics), which are no site's input.
    """
    node = first.next
    while node is not last:
        if any(storage_root(written).op != "get_attr" for written in _written(node)):
            return True
        node = node.next
    return False


def written_inputs(graph: Graph) -> tuple[int, ...]:
    """The numbers of the inputs that operators of the graph write to, be it through views."""
    roots = {storage_root(written) for node in graph.nodes for written in _written(node)}
    inputs = (node for node in graph.nodes if node.op == "placeholder")
    return tuple(index for index, node in enumerate(inputs) if node in roots)


def written_attributes(graph: Graph) -> set[str]:
    """The attributes that operators write to; not by what is the same however often it is done."""
    nodes = (n for n in graph.nodes if n.target is not torch.ops.aten.embedding_renorm_.default)
    roots = (storage_root(written) for node in nodes for written in _written(node))
    return {str(root.target) for root in roots if root.op == "get_attr"}


def _written(node: Node) -> list[Node]:
    """The arguments that the operator of ``node`` writes to."""
    schema = schema_of(node)
    if schema is None:
        return []
    arguments = zip(schema.arguments, node.args, strict=False)
    return [
        value
        for argument, value in arguments
        if isinstance(value, Node)
        and argument.alias_info is not None
        and argument.alias_info.is_write
    ]


def storage_root(node: Node) -> Node:
    """The node whose storage ``node`` may be a view of, through operators that return views."""
    while (source := node_arg(node, 0)) is not None and _may_alias(node, source):
        node = source
    return node


def _may_alias(node: Node, source: Node) -> bool:
    """True if ``node`` may share the storage of its first operand, or is a part of such a result."""
    maker = source if node.target is getitem else node
    schema = schema_of(maker)
    returns = schema.returns if schema is not None else ()
    if node.target is getitem and len(returns) > 1:  # topk: each result is a tensor of its own
        returns = (returns[cast("int", node.args[1])],)
    unknown = node.target is getitem and schema is None
    return unknown or any(result.alias_info for result in returns)


def schema_of(node: Node) -> Any:
    """The schema of the operator that ``node`` calls; torch has no public way to it."""
    target = cast("object", node.target)
    return getattr(target, "_schema", None)
