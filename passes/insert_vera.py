"""Insert the VeRA branch at every site.

Shape letters: L leading dims, I in_features, O out_features, R rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.graph import Tag, attribute, emit, replace_uses, tag_of, tensor_of
from vera_fx.passes.engine.protocol import Numerics
from vera_fx.passes.engine.reports import Action, PassReport, Reason, Rewrite, Skip
from vera_fx.passes.sites.find import Site, Target, find_sites

aten = torch.ops.aten

_ME = "InsertVera"


@dataclass(frozen=True, slots=True)
class Branch:
    """The attribute paths of one adapter's tensors for one target.

    Attributes:
        vera_A: ``(R, max_in)``, shared by all targets.
        vera_B: ``(max_out, R)``, shared by all targets.
        lambda_d: ``(R,)``, this target's.
        lambda_b: ``(O,)``, this target's.
        dropout: probability of dropping an element of the branch's input; 0 in eval mode.
    """

    vera_A: str
    vera_B: str
    lambda_d: str
    lambda_b: str
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class InsertVera:
    """Add ``b * ((d * (x @ A.T)) @ B.T)`` to the output of every site (paper, equation 2).

    One branch per active adapter, in the order of operations of PEFT's ``VeraLayer.forward``, so
    that eager results agree with PEFT's bit for bit: the input is cast to the vectors' dtype, A is
    cut to its first I columns and B to its first O rows, and the sum is cast back to the dtype of
    the base output.

    Before::

        %lin_weight: f32[5, 3] = lin.weight
        %lin_bias: f32[5] = lin.bias
        %x: f32[s0, 3] = input
        %linear: f32[s0, 5] = linear(%x, %lin_weight, %lin_bias)
        return [%linear]

    After::

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

    Needs: targets whose branches exist as attributes of the graph's owner.
    Keeps: the base call itself, untouched.
    Skips: a target that this graph never calls.
    """

    numerics: ClassVar[Numerics] = Numerics.INTENDED
    targets: tuple[Target, ...]
    branches: tuple[tuple[Branch, ...], ...]

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Insert the branches of every site.

        Raises:
            SiteError: a target is used in a way that cannot be adapted.
        """
        search = find_sites(gm, self.targets)
        branches = dict(zip((target.path for target in self.targets), self.branches, strict=True))
        todo = [site for site in search.sites if branches[site.target.path] and not _is_done(site)]
        for site in todo:
            _adapt(gm, site, branches[site.target.path])
        return PassReport(
            tuple(Rewrite(site.name, Action.BRANCH_ADDED, site.node.name) for site in todo),
            tuple(Skip(path, Reason.NEVER_CALLED) for path in search.uncalled),
        )


def _is_done(site: Site) -> bool:
    tags = [tag_of(user) for user in site.node.users]
    return any(tag is not None and tag.made_by == _ME for tag in tags)


def _adapt(gm: GraphModule, site: Site, branches: tuple[Branch, ...]) -> None:
    base = site.node
    dtype = tensor_of(base).dtype
    total = base
    with gm.graph.inserting_after(base):
        anchor = gm.graph.create_node("call_function", aten.alias.default, (base,))
    with gm.graph.inserting_before(anchor):
        for branch in branches:
            update = _emit_branch(gm, site, branch)
            total = _emit_sum(gm, site, total, update)
        if tensor_of(total).dtype != dtype:
            total = emit(gm, aten.to.dtype, (total, dtype), like=base, tag=_tag(site, "cast_out"))
    gm.graph.erase_node(anchor)
    sums = [user for user in base.users if (tag := tag_of(user)) and tag.role == "add"]
    replace_uses(base, total, keep=sums)


def _emit_branch(gm: GraphModule, site: Site, branch: Branch) -> Node:
    """``b * linear(d * linear(dropout(x), A[:, :I]), B[:O])``, shape (*L, O)."""
    like = site.node
    A, B, d, b = (
        attribute(gm, path, like=like, tag=_tag(site, path.rpartition(".")[2]))
        for path in (branch.vera_A, branch.vera_B, branch.lambda_d, branch.lambda_b)
    )
    x_LI = _cast(gm, site, tensor_of(d).dtype)
    if branch.dropout:
        args = (x_LI, branch.dropout, True)
        x_LI = emit(gm, aten.dropout.default, args, like=like, tag=_tag(site, "dropout"))
    A_RI = _cut(gm, site, A, dim=1, size=site.target.in_features)

    def put(target: Callable[..., Any], operands: tuple[Node, Node], size: int, role: str) -> Node:
        shape = (*tensor_of(x_LI).shape[:-1], size)
        return emit(gm, target, operands, like=like, tag=_tag(site, role), shape=shape)

    rank, out = tensor_of(d).shape[0], site.target.out_features
    z_LR = put(aten.linear.default, (x_LI, A_RI), rank, "z")
    h_LR = put(aten.mul.Tensor, (z_LR, d), rank, "h")
    B_OR = _cut(gm, site, B, dim=0, size=site.target.out_features)
    u_LO = put(aten.linear.default, (h_LR, B_OR), out, "u")
    return put(aten.mul.Tensor, (u_LO, b), out, "update")


def _emit_sum(gm: GraphModule, site: Site, total: Node, update: Node) -> Node:
    values = tensor_of(total), tensor_of(update)
    dtype = torch.promote_types(values[0].dtype, values[1].dtype)
    tag, shape = _tag(site, "add"), values[0].shape
    args = (total, update)
    return emit(gm, aten.add.Tensor, args, like=site.node, tag=tag, shape=shape, dtype=dtype)


def _cast(gm: GraphModule, site: Site, dtype: torch.dtype) -> Node:
    if tensor_of(site.x).dtype == dtype:
        return site.x
    return emit(gm, aten.to.dtype, (site.x, dtype), like=site.node, tag=_tag(site, "cast_in"))


def _cut(gm: GraphModule, site: Site, projection: Node, *, dim: int, size: int) -> Node:
    """The part of a projection that this target uses; the whole of it needs no cut."""
    value: Tensor = tensor_of(projection)
    if value.shape[dim] == size:
        return projection
    tag = _tag(site, f"cut_{'B' if dim == 0 else 'A'}")
    return emit(gm, aten.slice.Tensor, (projection, dim, 0, size), like=site.node, tag=tag)


def _tag(site: Site, role: str) -> Tag:
    return Tag(_ME, site.name, role)
