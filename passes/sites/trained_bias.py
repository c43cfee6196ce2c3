"""A trained bias beside a call: the module adds its own bias, and the graph what the adapter's differs by."""

from typing import Any

import torch
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.emit import attribute, emit
from vera_fx.passes.engine.graph import Tag, owner_path, replace_uses, tag_of, tensor_of
from vera_fx.passes.sites.called_module import called_modules
from vera_fx.passes.sites.inserted import input_of

aten = torch.ops.aten

CHANGE, BIASED = "bias_change", "biased"
"""Roles of ``copy - base`` and of the sum with it."""


def add_changes(gm: GraphModule, bases: tuple[str, ...], copy: str, module: str, by: str) -> bool:
    """Add ``copy - base`` behind every call of a module whose bias is at one of ``bases``.

    Zero to the bit while the copy is what it was copied from. It is added last, so that nothing that
    reads branches back from the graph sees it.

    Args:
        gm: the graph.
        bases: every path of the bias; more than one if it is tied.
        copy: path of the copy.
        module: where calls must stand if it is tied; nothing for everywhere.
        by: the pass.

    Returns:
        Whether any was added.
    """
    calls = [(node, f"{path}.bias") for node, path in called_modules(gm) if f"{path}.bias" in bases]
    if len(bases) > 1 and module:
        calls = [call for call in calls if f"{owner_path(call[0])}.".startswith(f"{module}.")]
    todo = [(last, base) for node, base in calls if not _is_done(last := _last(node))]
    for last, base in todo:
        _add(gm, last, base, copy, Tag(by, last.name))
    return bool(todo)


def is_change(node: Node) -> bool:
    """True for ``copy - base``, which reads the base's own bias on purpose."""
    tag = tag_of(node)
    return tag is not None and tag.role == CHANGE


def total_of_change(change: Node) -> Node:
    """What the change is added to."""
    (user,) = change.users
    return input_of(user) if user.target is aten.add.Tensor else total_of_change(user)


def _last(node: Node) -> Node:
    """The end of what branches have been added to ``node``."""
    while (after := next((u for u in node.users if _goes_on(u, node)), None)) is not None:
        node = after
    return node


def _goes_on(user: Node, node: Node) -> bool:
    tag = tag_of(user)
    ends = tag is not None and (tag.ends is not None or tag.role == "cast_out")
    return ends and user.args[0] is node


def _is_done(last: Node) -> bool:
    tags = (tag_of(user) for user in last.users)
    return any(tag is not None and tag.role == BIASED for tag in tags)


def _add(gm: GraphModule, last: Node, base: str, copy: str, tag: Tag) -> None:
    def put(target: Any, args: tuple[Any, ...], role: str) -> Node:
        return emit(gm, target, args, like=last, tag=Tag(tag.made_by, tag.site, role))

    ends = [attribute(gm, path, like=last, tag=tag) for path in (copy, base)]
    with gm.graph.inserting_after(last):
        anchor = gm.graph.create_node("call_function", aten.alias.default, (last,))
    with gm.graph.inserting_before(anchor):
        change = put(aten.sub.Tensor, (ends[0], ends[1]), CHANGE)
        if tensor_of(change).dtype != tensor_of(last).dtype:
            change = put(aten.to.dtype, (change, tensor_of(last).dtype), CHANGE)
        total = put(aten.add.Tensor, (last, change), BIASED)
    gm.graph.erase_node(anchor)
    replace_uses(last, total)
