"""Compute a site with one product by a merged weight, instead of base and branch apart."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from vera_fx.passes.engine.emit import Put
from vera_fx.passes.engine.graph import replace_uses, tag_of
from vera_fx.passes.engine.memo import Memo
from vera_fx.passes.engine.protocol import Numerics
from vera_fx.passes.engine.reports import Action, PassReport, Reason, Rewrite, Skip
from vera_fx.passes.sites.inserted import InsertedBranch, erase_unused, inserted_branches
from vera_fx.passes.sites.products import linear_call

_ME = "MergeWeight"


@dataclass(frozen=True, slots=True)
class MergeWeight:
    """Replace ``x @ W.T + branch(x)`` by ``x @ (W + diag(b) B diag(d) A).T`` at chosen sites.

    Merging costs O*I*R once; the branch costs T*R*(I + O) forward and again for the input's
    gradient. So merging pays where the tokens T exceed about I*O/(I + O), whatever the rank. The
    vectors' gradients take one product, ``G.T @ z``, or by way of ``G.T @ x`` where R is large.

    Before::

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

    After::

        %lin_weight: f32[5, 3] = lin.weight
        %lin_bias: f32[5] = lin.bias
        %x: f32[s0, 3] = input
        %slot_vera_a: f32[2, 4] = slot.vera_A
        %slot_vera_b: f32[7, 2] = slot.vera_B
        %slot_lambda_d: f32[2] = slot.lambda_d
        %slot_lambda_b: f32[5] = slot.lambda_b
        %cut_A: f32[2, 3] = slice(%slot_vera_a, 1, 0, 3)
        %z: f32[s0, 2] = linear(%x, %cut_A)
        %cut_B: f32[5, 2] = slice(%slot_vera_b, 0, 0, 5)
        %merged_weight: f32[5, 3] = merged_weight(%lin_weight, %cut_A, %cut_B, %slot_lambda_d, %slot_lambda_b)
        %merged: f32[s0, 5] = merged_linear(%x, %z, %merged_weight, %lin_weight, %lin_bias, %cut_A, %cut_B, %slot_lambda_d, %slot_lambda_b)
        return [%merged]

    Needs: branches inserted by `InsertBranches`, alone at their site.
    Keeps: values and gradients to rounding; differentiable once.
    Skips: a site with several branches or with dropout on its branch.
    """  # noqa: E501

    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    through_z: frozenset[str] = frozenset()
    through_x: frozenset[str] = frozenset()

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Merge the sites named by ``through_z`` and ``through_x``."""
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        memo = Memo()
        for branch in inserted_branches(gm):
            if branch.site not in self.through_z | self.through_x:
                continue
            if (reason := cannot_merge(branch)) is not None:
                skips.append(Skip(branch.site, reason))
                continue
            through_z = branch.site in self.through_z
            put = Put(gm, _ME, branch.site, branch.total, memo)
            _merge(put, branch, through_z=through_z)
            way = Action.MERGED_THROUGH_Z if through_z else Action.MERGED_THROUGH_X
            rewrites.append(Rewrite(branch.site, way))
        return PassReport(tuple(rewrites), tuple(skips))


def cannot_merge(branch: InsertedBranch) -> Reason | None:
    """Why a branch cannot be merged into its weight; None if it can."""
    if linear_call(branch.total) is None and tag_of(branch.total) is None:
        return Reason.CALLED
    if branch.has_dropout:
        return Reason.DROPS_INPUT
    if not branch.is_alone:
        return Reason.SEVERAL_HERE
    return None


def _merge(put: Put, branch: InsertedBranch, *, through_z: bool) -> None:
    gm, base = put.gm, branch.total
    call = linear_call(base)
    if call is None:
        raise TypeError(f"{base.name} is no linear call")
    with gm.graph.inserting_before(branch.end):
        merged = branch.kind.merge(put, branch, call, through_z=through_z)
    last = branch.output
    replace_uses(last, merged)
    erase_unused(gm, last)
    if not base.users:
        gm.graph.erase_node(base)
