"""What VeRA's plans cost: a model of products and memory traffic.

Shape letters: T tokens, I in_features, O out_features, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vera_fx.passes import PLANS, Target, Workload

_BALANCE = 12.0
"""Floating-point operations that take as long as moving one float32 element to or from memory."""

_LAUNCH = 2e5
"""What one more operator costs in the same unit: about a microsecond."""

_FOLDS = 8, 32
"""Tokens per rank from which a second fold costs at most a sixteenth, and a 64th, of the base's own
products: see `VeraCosts.folds_again`."""


@dataclass(frozen=True, slots=True)
class VeraCosts:
    """In floating-point operations beyond the base's own products."""

    def folds_again(self, T: int, target: Target, work: Workload, sharing: int) -> bool:
        """True if backward is to fold the merged weight once more rather than keep its O*I elements.

        That is where a second fold costs next to nothing, or little while the weight is more than a
        quarter of what PEFT keeps for the site: ``x @ A.T`` and the branch's output, in float32.
        """
        cheap, cheaper = _FOLDS
        tokens_per_rank = T / max(work.ranks)
        kept_by_peft = 4 * T * (max(work.ranks) / sharing + target.out_features)
        weight = work.itemsize * target.in_features * target.out_features
        cheap_enough = tokens_per_rank >= (cheap if 4 * weight > kept_by_peft else cheaper)
        return work.trains and cheap_enough

    def __call__(self, T: int, target: Target, work: Workload, sharing: int) -> Mapping[str, float]:
        """Cost of each plan, and of the base itself under ``"base"``.

        ``x @ A.T`` is divided among the ``sharing`` sites that read the input. In training the
        gradient of the input is counted in full: only the first sites of a model do without.
        """
        I, O = target.in_features, target.out_features  # noqa: E741
        costs: dict[str, float] = dict.fromkeys(PLANS, 0.0)
        costs["base"] = (4.0 if work.trains else 2.0) * T * I * O
        folds = 2 if self.folds_again(T, target, work, sharing) else 1
        for R in work.ranks:
            project, expand, fold = 2.0 * T * I * R / sharing, 2.0 * T * R * O, 2.0 * O * I * R
            rows, passes, scales = T * O * _BALANCE, T * R * _BALANCE, O * R * _BALANCE
            weight = O * I * _BALANCE
            costs["factored"] += project + expand + 2 * passes + 3 * rows + 6 * _LAUNCH
            costs["scaled"] += project + expand + 3 * scales + 2 * rows + 6 * _LAUNCH
            costs["merged"] += (
                folds * fold + project * (not work.trains) + 2 * scales + 2 * weight + 4 * _LAUNCH
            )
            costs["dense"] += folds * fold + 2 * scales + 2 * weight + 4 * _LAUNCH
            if work.trains:
                costs["factored"] += expand + project + 3 * rows + 4 * passes
                costs["scaled"] += 2 * expand + project + 4 * scales
                costs["merged"] += project + expand + 3 * scales
                costs["dense"] += 2.0 * T * I * O + fold + 3 * scales
        return costs
