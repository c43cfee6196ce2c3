"""Inserts nodes with true metadata: what every pass that writes to a graph uses."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from vera_fx.passes.engine.graph import META_KEY, Tag, resolve, tensor_of, value_of
from vera_fx.passes.engine.memo import Memo
from vera_fx.passes.engine.protocol import EmitError


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
    memo: Memo | None = None,
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
        memo: of the pass, which inserts the same for many sites.
    """
    node = gm.graph.create_node("call_function", target, args, kwargs, name=tag.role or None)

    def value() -> Any:
        with on_fakes(like, tag.site, target):
            return _result(target, args, shape, dtype, kwargs)

    key = memo and memo.key(target, args, shape, dtype, kwargs)
    node.meta["val"] = value() if memo is None else memo.value(key, value)
    node.meta |= {key: like.meta[key] for key in _PROVENANCE if key in like.meta}
    node.meta[META_KEY] = tag
    return node


_PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack")


def _result(
    target: Callable[..., Any],
    args: tuple[Any, ...],
    shape: Sequence[Any] | None,
    dtype: torch.dtype | None,
    kwargs: dict[str, Any] | None,
) -> Any:
    if shape is None:
        return target(*map_arg(args, value_of), **(kwargs or {}))
    return tensor_of(args[0]).new_empty(tuple(shape), dtype=dtype)


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


def attribute(
    gm: GraphModule, target: str, *, like: Node, tag: Tag, memo: Memo | None = None
) -> Node:
    """The ``get_attr`` node for ``target``, made at the top of the graph on first use."""
    memo = memo or Memo()
    known = memo.attributes(gm.graph)
    if target in known and not known[target]._erased:
        return known[target]
    with gm.graph.inserting_before(memo.top(gm.graph)):
        # Not graph.get_attr: it warns about holders that are no submodules, as slots are.
        node = known[target] = gm.graph.create_node("get_attr", target)
    real, mode = resolve(gm, target), fake_mode_of(like)
    looks = (real.shape, real.stride(), real.dtype, real.device)

    def value() -> Tensor:
        return mode.from_tensor(real.detach(), static_shapes=True)

    node.meta["val"] = memo.value(("attribute", id(mode), *looks), value)
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
        memo: of the pass.
    """

    gm: GraphModule
    made_by: str
    site: str
    like: Node
    memo: Memo = field(default_factory=Memo)

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
        looks: dict[str, Any] = {"shape": shape, "dtype": dtype, "memo": self.memo}
        return emit(self.gm, target, args, like=self.like, tag=tag, **looks)

    def attribute(self, path: str) -> Node:
        """The node that reads the attribute at ``path``."""
        tag = Tag(self.made_by, self.site, path.rpartition(".")[2])
        return attribute(self.gm, path, like=self.like, tag=tag, memo=self.memo)

    def cut(self, node: Node, *, dim: int, entries: slice, role: str) -> Node:
        """Some entries along a dimension; the whole of it needs no cut."""
        if entries == slice(0, tensor_of(node).shape[dim]):
            return node
        start, stop = entries.start, entries.stop
        return self(torch.ops.aten.slice.Tensor, node, dim, start, stop, role=role, shared=True)

    def cast(self, node: Node, dtype: torch.dtype, *, role: str, shared: bool = False) -> Node:
        """The node in another dtype; itself if it has it."""
        if tensor_of(node).dtype == dtype:
            return node
        return self(torch.ops.aten.to.dtype, node, dtype, role=role, shared=shared)
