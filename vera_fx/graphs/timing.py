"""Times the plans on this machine, for sites of one shape, where a model of their cost is not enough.

Shape letters: T tokens, I in_features, O out_features, R rank.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from vera_fx._context import cached
from vera_fx._torch import generators_kept
from vera_fx.branches.kinds import kind_named
from vera_fx.branches.protocol import BranchKind
from vera_fx.passes import PLANS, Target, Workload, allowed

_REPEATS = 3


@dataclass(frozen=True, slots=True)
class TimedCosts:
    """Costs of the plans of a kind in seconds, for bases in one dtype on one device.

    Each shape is timed once in a process, eagerly: compiled code differs by its pointwise steps,
    not by the products that decide. Tokens are rounded up to a power of two.
    """

    kind: BranchKind
    dtype: torch.dtype
    device: torch.device

    def __call__(self, T: int, target: Target, work: Workload, sharing: int) -> Mapping[str, float]:
        """Seconds of every plan beyond the base, and of the base under ``"base"``."""
        if len(work.ranks) != 1 or len(allowed(work)) == 1:  # nothing to choose
            return dict.fromkeys((*PLANS, "base"), 0.0)
        rows = 1 << max(T - 1, 0).bit_length()
        shape = (rows, target.in_features, target.out_features, work.ranks[0], sharing)
        return _times(self.kind.name, shape, self.dtype, self.device, work.trains)

    def kept(self, T: int, target: Target, work: Workload, sharing: int) -> Mapping[str, float]:
        """By the model."""
        return self.kind.costs.kept(T, target, work, sharing)

    def folds_again(self, T: int, target: Target, work: Workload, sharing: int) -> bool:
        """By the model."""
        return self.kind.costs.folds_again(T, target, work, sharing)


@cached(1024)
def _times(
    kind: str,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    trains: bool,
) -> Mapping[str, float]:
    """Seconds of every plan beyond the base, and of the base, per site."""
    with (
        generators_kept(device),
        torch.inference_mode(False),
        torch.set_grad_enabled(trains),
    ):
        steps = kind_named(kind).steps(shape, dtype, device, trains=trains)
        seconds = {name: _seconds(step, device) for name, step in steps.items()}
    base = seconds.pop("base")
    sharing = shape[-1]
    return {"base": base / sharing} | {n: (s - base) / sharing for n, s in seconds.items()}


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """The best of some runs, the first of which does not count."""
    best = float("inf")
    for _ in range(1 + _REPEATS):
        start = time.perf_counter()
        step()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
