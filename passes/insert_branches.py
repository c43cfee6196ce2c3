"""Insert the active adapters' branches at every site.

Shape letters: L leading dims, I in_features, O out_features, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from vera_fx.passes.engine.emit import Put
from vera_fx.passes.engine.graph import replace_uses, tag_of, tensor_of
from vera_fx.passes.engine.memo import Memo
from vera_fx.passes.engine.protocol import Numerics
from vera_fx.passes.engine.reports import Action, PassReport, Reason, Rewrite, Skip
from vera_fx.passes.sites.find import Site, find_sites
from vera_fx.passes.sites.kinds import Branch
from vera_fx.passes.sites.target import Target

aten = torch.ops.aten

_ME = "InsertBranches"


@dataclass(frozen=True, slots=True)
class InsertBranches:
    """Add the branch of every active adapter to the output of every site.

    What a branch is its kind says (`vera_fx.passes.sites.kinds.BranchGraph`). Here it is VeRA's,
    ``b * ((d * (x @ A.T)) @ B.T)`` (arXiv 2310.11454, equation 2), in the order of operations of
    PEFT's ``VeraLayer.forward``, so that eager results agree with PEFT's bit for bit: the input is
    cast to the vectors' dtype, A is cut to its first I columns and B to its first O rows, and the sum
    is cast back to the dtype of the base output.

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
        memo = Memo()
        for site in todo:
            put = Put(gm, _ME, site.name, site.node, memo)
            _adapt(put, site, branches[site.target.path])
        return PassReport(
            tuple(Rewrite(site.name, Action.BRANCH_ADDED, site.node.name) for site in todo),
            tuple(Skip(path, Reason.NEVER_CALLED) for path in search.uncalled),
        )


def _is_done(site: Site) -> bool:
    return any(_is_ours(user) for user in site.node.users)


def _is_ours(node: Node) -> bool:
    tag = tag_of(node)
    return tag is not None and tag.made_by == _ME


def _adapt(put: Put, site: Site, branches: Sequence[Branch]) -> None:
    graph = put.gm.graph
    base = total = site.node
    dtype = tensor_of(base).dtype
    with graph.inserting_after(base):
        anchor = graph.create_node("call_function", aten.alias.default, (base,))
    with graph.inserting_before(anchor):
        for branch in branches:
            total = _add_branch(put, site, branch, total)
        total = put.cast(total, dtype, role="cast_out")
    graph.erase_node(anchor)
    replace_uses(base, total, keep=[user for user in base.users if _is_ours(user)])


def _add_branch(put: Put, site: Site, branch: Branch, total: Node) -> Node:
    tensors = {name: put.attribute(path) for name, path in branch.tensors.items()}
    x_LI = put.cast(site.x, branch.kind.dtype(tensors), role="cast_in", shared=True)
    if branch.dropout:
        x_LI = put(aten.dropout.default, x_LI, branch.dropout, True, role="dropout")
    return branch.kind.insert(put, site, x_LI, total, tensors)
