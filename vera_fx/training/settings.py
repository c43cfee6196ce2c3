"""How one adapter of many is trained."""

import math
from dataclasses import dataclass
from typing import Any

from vera_fx.config import check_choice, check_finite, check_flag, check_int, check_share
from vera_fx.errors import ConfigError, shown

SCHEDULES = ("linear", "cosine", "constant")
_MANY = range(1, 2**31)
_COUNT = range(2**31)


@dataclass(frozen=True)
class TrainSettings:
    """How one job of `train_many` is trained: AdamW, with a schedule of its own.

    Attributes:
        steps: optimiser steps.
        batch_size: rows of each step.
        lr: learning rate of the vectors.
        copies_lr: of trained heads (``modules_to_save``) and biases; None for the same.
        weight_decay: AdamW's, decoupled.
        betas: AdamW's.
        eps: AdamW's.
        warmup: steps in which the rate rises from 0, as in transformers' schedules.
        schedule: ``"linear"`` or ``"cosine"`` to 0 at the last step, or ``"constant"``.
        max_norm: largest norm of the job's gradient; None for no bound.
        seed: of the order of its examples.
        shuffle: False to take them as they stand.
        evaluate_every: steps between evaluations on held-out examples; 0 for one at the end.
        patience: evaluations in a row without a lower loss after which the job stops, with its best
            vectors; 0 for never.

    Raises:
        ConfigError: a value that cannot be used.
    """

    steps: int
    batch_size: int = 8
    lr: float = 1e-2
    copies_lr: float | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: int = 0
    schedule: str = "linear"
    max_norm: float | None = None
    seed: int = 0
    shuffle: bool = True
    evaluate_every: int = 0
    patience: int = 0

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size"):
            check_int(field, getattr(self, field), _MANY, "a positive integer")
        for field in ("warmup", "seed", "evaluate_every", "patience"):
            check_int(field, getattr(self, field), _COUNT, "an integer of at least 0")
        for field in ("lr", "weight_decay", "eps", "copies_lr", "max_norm"):
            self._check_amount(field, getattr(self, field))
        for beta in self.betas:
            check_share("betas", beta)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_flag("shuffle", self.shuffle)
        if self.patience and not self.evaluate_every:
            raise ConfigError("patience counts evaluations: give evaluate_every as well")

    def _check_amount(self, field: str, value: Any) -> None:
        if value is None and field in {"copies_lr", "max_norm"}:
            return
        check_finite(field, value)
        if float(value or 0) < 0 or (field == "max_norm" and not value):
            raise ConfigError(f"{field} must not be negative, got {shown(value)}")

    def rate(self, step: int, *, copies: bool = False) -> float:
        """The learning rate of step ``step``, counted from 0.

        As ``transformers.get_linear_schedule_with_warmup`` and its likes have it.
        """
        peak = self.lr if not copies or self.copies_lr is None else self.copies_lr
        if step < self.warmup:
            return peak * step / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.schedule == "cosine":
            return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
        return peak * max(0.0, 1 - done) if self.schedule == "linear" else peak
