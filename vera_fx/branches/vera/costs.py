"""What VeRA's plans cost: a model of products and memory traffic.

Shape letters: T tokens, I in_features, O out_features, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vera_fx.passes import PLANS, Device, Target, Workload

_FOLDS = 8, 32
"""Tokens per rank from which a second fold costs at most a sixteenth, and a 64th, of the base's own
products: see `VeraCosts.folds_again`."""


@dataclass(frozen=True, slots=True)
class VeraCosts:
    """In seconds of the workload's device, beyond the base's own products."""

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
        device, itemsize = work.device, work.itemsize
        costs: dict[str, float] = dict.fromkeys(PLANS, 0.0)
        costs["base"] = (2 if work.trains else 1) * device.product(T, I, O, itemsize)
        folds = 2 if self.folds_again(T, target, work, sharing) else 1
        for R in work.ranks:
            site = _Site(device, itemsize, T, I, O, R, sharing)
            site.forward(costs, folds, trains=work.trains)
            if work.trains:
                site.backward(costs)
        return costs

    def kept(self, T: int, target: Target, work: Workload, sharing: int) -> Mapping[str, float]:
        """Bytes that a training step keeps for the site's sake under each plan.

        ``z`` is shared as the input is. A folded weight counts also where backward folds it again:
        there it is alive while it is used, and compilers make several at a time.
        """
        I, O = target.in_features, target.out_features  # noqa: E741
        kept: dict[str, float] = dict.fromkeys(PLANS, 0.0)
        for R in work.ranks:
            z, weight = T * R / sharing, O * I
            kept["factored"] += z + T * O + T * R
            kept["scaled"] += z + O * R * bool(target.product.layout)  # E; made again beside a call
            kept["merged"] += z + weight
            kept["dense"] += T * I / sharing + weight
        return {plan: work.itemsize * elements for plan, elements in kept.items()}


@dataclass(frozen=True, slots=True)
class _Site:
    """One site's sizes on one device: seconds of its products and passes."""

    device: Device
    itemsize: int
    T: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    R: int
    sharing: int

    def forward(self, costs: dict[str, float], folds: int, *, trains: bool) -> None:
        """Add what forward takes under each plan, and every fold of a weight."""
        T, I, O, R = self.T, self.I, self.O, self.R  # noqa: E741
        project, expand, fold = (
            self._of(T, I, R) / self.sharing,
            self._of(T, R, O),
            self._of(O, R, I),
        )
        rows, passes, scales, weight = map(self._pass, (T * O, T * R, O * R, O * I))
        launch = self.device.launch
        costs["factored"] += project + expand + 2 * passes + 3 * rows + 6 * launch
        costs["scaled"] += project + expand + 3 * scales + 2 * rows + 6 * launch
        merged = folds * fold + 2 * scales + 2 * weight + 4 * launch
        costs["merged"] += merged + project * (not trains)
        costs["dense"] += merged

    def backward(self, costs: dict[str, float]) -> None:
        """Add what the gradients take; under ``merged``, forward makes ``z`` for them."""
        T, I, O, R = self.T, self.I, self.O, self.R  # noqa: E741
        project = self._of(T, R, I) / self.sharing
        expand, through_z = self._of(T, O, R), self._of(O, T, R)
        rows, passes, scales = map(self._pass, (T * O, T * R, O * R))
        one, shared = self.device.launch, self.device.launch / self.sharing  # of products
        costs["factored"] += expand + project + 3 * rows + 4 * passes + one + shared
        costs["scaled"] += expand + through_z + project + 4 * scales + 2 * one + shared
        z = self._of(T, I, R) / self.sharing
        costs["merged"] += z + through_z + 3 * scales + one + shared
        costs["dense"] += self._of(O, T, I) + self._of(O, I, R) + 3 * scales + 2 * one

    def _of(self, rows: int, inner: int, columns: int) -> float:
        return self.device.product(rows, inner, columns, self.itemsize)

    def _pass(self, elements: int) -> float:
        return self.device.traffic(elements, self.itemsize)
