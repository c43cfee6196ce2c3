"""Add a branch by one scaled product, without a pass over its output."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from vera_fx.passes.engine.emit import Put
from vera_fx.passes.engine.graph import replace_uses
from vera_fx.passes.engine.memo import Memo
from vera_fx.passes.engine.protocol import Numerics
from vera_fx.passes.engine.reports import Action, PassReport, Reason, Rewrite, Skip
from vera_fx.passes.sites.inserted import InsertedBranch, erase_unused, inserted_branches

_ME = "ScaleBranch"


@dataclass(frozen=True, slots=True)
class ScaleBranch:
    """Replace ``y + b * ((d * z) @ B.T)`` by ``addmm(y, z, E.T)`` with ``E = diag(b) B diag(d)``.

    ``E (O, R)`` does not depend on the tokens. Scaling it saves two passes over (T, O) and one
    over (T, R), which counts in eager mode and where T is much larger than R. In training it
    keeps only ``z``, but pays one more product (``G.T @ z``) for the vectors' gradients. Over a
    half-precision base E is made in float32 and rounded once, where the factored branch rounds
    ``d * z`` and ``u`` instead.

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
        %linear: f32[s0, 5] = linear(%x, %lin_weight, %lin_bias)
        %cut_A: f32[2, 3] = slice(%slot_vera_a, 1, 0, 3)
        %z: f32[s0, 2] = linear(%x, %cut_A)
        %cut_B: f32[5, 2] = slice(%slot_vera_b, 0, 0, 5)
        %b_column: f32[5, 1] = unsqueeze(%slot_lambda_b, 1)
        %b_rows: f32[5, 2] = mul(%cut_B, %b_column)
        %E: f32[5, 2] = mul(%b_rows, %slot_lambda_d)
        %E_t: f32[2, 5] = t(%E)
        %scaled: f32[s0, 5] = addmm(%linear, %z, %E_t)
        return [%scaled]

    Needs: branches inserted by `InsertBranches`.
    Keeps: values and gradients to rounding.
    Skips: a branch whose products are in another dtype than its base's.
    """

    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    sites: frozenset[str] = frozenset()

    def __call__(self, gm: GraphModule, /) -> PassReport:
        """Scale every branch of the named sites."""
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        memo = Memo()
        for branch in inserted_branches(gm):
            if branch.site not in self.sites:
                continue
            if branch.is_mixed:
                skips.append(Skip(branch.site, Reason.OTHER_DTYPES))
                continue
            _scale(Put(gm, _ME, branch.site, branch.end, memo), branch)
            rewrites.append(Rewrite(branch.site, Action.BRANCH_SCALED))
        return PassReport(tuple(rewrites), tuple(skips))


def _scale(put: Put, branch: InsertedBranch) -> None:
    with put.gm.graph.inserting_before(branch.end):
        scaled = branch.kind.scale(put, branch)
    last = branch.output
    replace_uses(last, scaled)
    erase_unused(put.gm, last)
