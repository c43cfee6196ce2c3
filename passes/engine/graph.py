"""Small tools that every pass uses: reading nodes, emitting nodes, printing graphs."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, cast

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from vera_fx.passes.engine.protocol import EmitError

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


def emit(  # noqa: PLR0913 - what a node is takes that many words
    gm: GraphModule,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    like: Node,
    tag: Tag,
    shape: Sequence[Any] | None = None,
    dtype: torch.dtype | None = None,
    kwargs: dict[str, Any] | None = None,
) -> Node:
    """Insert a call at the graph's current insertion point, with true metadata.

    The metadata comes from running the operator on fake tensors, which takes milliseconds where
    sizes are open. A caller who knows what the operator returns says it by ``shape``.

    Args:
        gm: the graph's owner.
        target: the operator to call.
        args: its arguments; nodes, constants or nested sequences of them.
        like: node whose provenance (module stack, source line) the new node inherits.
        tag: which pass made the node, for which site, in which role.
        shape: the result's sizes, if they are known.
        dtype: the result's dtype, with ``shape``; None for that of the first argument.
        kwargs: keyword arguments of the operator; no nodes.
    """
    node = gm.graph.create_node("call_function", target, args, kwargs, name=tag.role or None)
    with on_fakes(like, tag.site, target):
        if shape is None:
            node.meta["val"] = target(*map_arg(args, value_of), **(kwargs or {}))
        else:
            node.meta["val"] = tensor_of(args[0]).new_empty(tuple(shape), dtype=dtype)
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    node.meta[META_KEY] = tag
    return node


@dataclass(frozen=True, slots=True)
class Put:
    """Inserts the nodes that a pass makes for one site, at the graph's insertion point.

    Attributes:
        gm: the graph's owner.
        made_by: the pass.
        site: the site's name.
        like: the site's own node, whose provenance the new nodes inherit.
    """

    gm: GraphModule
    made_by: str
    site: str
    like: Node

    def __call__(
        self,
        target: Callable[..., Any],
        *args: Any,
        role: str,
        shape: Sequence[Any] | None = None,
        dtype: torch.dtype | None = None,
        **facts: Any,
    ) -> Node:
        """Insert a call; ``shape`` and ``dtype`` as for `emit`, ``facts`` are further ones of `Tag`."""
        tag = Tag(self.made_by, self.site, role, **facts)
        return emit(self.gm, target, args, like=self.like, tag=tag, shape=shape, dtype=dtype)

    def attribute(self, path: str) -> Node:
        """The node that reads the attribute at ``path``."""
        tag = Tag(self.made_by, self.site, path.rpartition(".")[2])
        return attribute(self.gm, path, like=self.like, tag=tag)

    def cut(self, node: Node, *, dim: int, size: int, role: str) -> Node:
        """The first ``size`` entries along a dimension; the whole of it needs no cut."""
        if tensor_of(node).shape[dim] == size:
            return node
        return self(torch.ops.aten.slice.Tensor, node, dim, 0, size, role=role, shared=True)

    def cast(self, node: Node, dtype: torch.dtype, *, role: str, shared: bool = False) -> Node:
        """The node in another dtype; itself if it has it."""
        if tensor_of(node).dtype == dtype:
            return node
        return self(torch.ops.aten.to.dtype, node, dtype, role=role, shared=shared)


@contextlib.contextmanager
def on_fakes(like: Node, site: str, target: object) -> Generator[None]:
    """Inside the block operators run on the fake tensors of the graph that ``like`` is of.

    Raises:
        EmitError: ``target``, which is wanted for ``site``, cannot be run on them.
    """
    try:
        # Open sizes need Python's kernels: without them float16 and bfloat16 fail on torch 2.11.
        with torch.no_grad(), enable_python_dispatcher(), fake_mode_of(like):
            yield
    except Exception as error:
        raise EmitError(f"{target} cannot be inserted: {error}", site) from error


def fake_mode_of(node: Node) -> FakeTensorMode:
    """The fake-tensor mode that the graph was captured in, read off one of its tensors."""
    value = tensor_of(node)
    return cast("FakeTensorMode", value.fake_mode)  # type: ignore[attr-defined]


def attribute(gm: GraphModule, target: str, *, like: Node, tag: Tag) -> Node:
    """The ``get_attr`` node for ``target``, made at the top of the graph on first use."""
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target == target:
            return node
    with gm.graph.inserting_before(first_body_node(gm.graph)):
        # Not graph.get_attr: it warns about holders that are no submodules, as slots are.
        node = gm.graph.create_node("get_attr", target)
    real = resolve(gm, target)
    node.meta["val"] = fake_mode_of(like).from_tensor(real.detach(), static_shapes=True)
    node.meta[META_KEY] = tag
    return node


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
