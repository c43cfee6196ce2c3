"""What DVoRA's plans cost: VeRA's, and the norm of every row of the weight, whichever the plan.

Shape letters: T tokens, I in_features, O out_features, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vera_fx.branches.vera.costs import VeraCosts
from vera_fx.passes import Target, Workload

_VERA = VeraCosts()


@dataclass(frozen=True, slots=True)
class DVoraCosts:
    """In seconds of the workload's device, beyond the base's own products."""

    def folds_again(self, T: int, target: Target, work: Workload, sharing: int) -> bool:
        """As for VeRA."""
        return _VERA.folds_again(T, target, work, sharing)

    def __call__(self, T: int, target: Target, work: Workload, sharing: int) -> Mapping[str, float]:
        """Cost of each plan, and of the base itself under ``"base"``."""
        I, O = target.in_features, target.out_features  # noqa: E741
        vera = _VERA(T, target, work, sharing)
        weight, rows = (work.device.traffic(n, work.itemsize) for n in (O * I, T * O))
        folds = sum(work.device.product(O, R, I, work.itemsize) for R in work.ranks)
        passes = 8 if work.trains else 4
        return {
            "base": vera["base"],
            "factored": vera["factored"] + folds + 3 * weight + passes * rows,
            "dense": vera["dense"] + (4 if work.trains else 2) * weight,
        }

    def kept(self, T: int, target: Target, work: Workload, sharing: int) -> Mapping[str, float]:
        """VeRA's, and under ``factored`` the folded weight that the norm is taken of."""
        vera = _VERA.kept(T, target, work, sharing)
        weight = work.itemsize * target.in_features * target.out_features
        return {"factored": vera["factored"] + weight, "dense": vera["dense"]}
