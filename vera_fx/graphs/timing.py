"""Times the plans on this machine, for sites of one shape, where a model of their cost is not enough.

Shape letters: T tokens, I in_features, O out_features, R rank.
"""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vera_fx._context import cached
from vera_fx.passes import PLANS, Costs, Target, Workload, allowed
from vera_fx.passes.engine.functions import merged_linear, merged_weight

_REPEATS = 3


def timed_costs(weight: Tensor) -> Costs:
    """Costs of the plans in seconds, for a base in the dtype and on the device of ``weight``.

    Each shape is timed once in a process, eagerly: compiled code differs by its pointwise steps,
    not by the products that decide. Tokens are rounded up to a power of two.
    """

    def costs(T: int, target: Target, work: Workload, sharing: int) -> Mapping[str, float]:
        if len(work.ranks) != 1 or len(allowed(work)) == 1:  # nothing to choose
            return dict.fromkeys((*PLANS, "base"), 0.0)
        rows = 1 << max(T - 1, 0).bit_length()
        shape = (rows, target.in_features, target.out_features, work.ranks[0], sharing)
        return _times(shape, weight.dtype, weight.device, work.trains)

    return costs


@cached(1024)
def _times(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, trains: bool
) -> Mapping[str, float]:
    """Seconds of every plan beyond the base, and of the base, per site."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.set_grad_enabled(trains),
    ):
        steps = _steps(shape, dtype, device, trains=trains)
        seconds = {name: _seconds(step, device) for name, step in steps.items()}
    base = seconds.pop("base")
    sharing = shape[-1]
    return {"base": base / sharing} | {n: (s - base) / sharing for n, s in seconds.items()}


def _steps(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, trains: bool
) -> dict[str, Callable[[], object]]:
    """One step of each plan for ``sharing`` sites that read one input."""
    T, I, O, R, sharing = shape  # noqa: E741

    def random(*sizes: int, grad: bool = False) -> Tensor:
        return torch.randn(sizes, dtype=dtype, device=device).requires_grad_(grad and trains)

    x, G = random(T, I, grad=True), random(T, O)
    W, A, B = random(O, I), random(R, I), random(O, R)
    pairs = [(random(R, grad=True), random(O, grad=True)) for _ in range(sharing)]

    def step(site: Callable[[Tensor, Tensor, Tensor | None], Tensor], *, z: bool) -> object:
        shared = F.linear(x, A) if z else None
        outputs = [site(d, b, shared) for d, b in pairs]
        if not trains:
            return outputs
        wanted = [x, *(vector for pair in pairs for vector in pair)]
        return torch.autograd.grad(outputs, wanted, [G] * sharing, allow_unused=True)

    def factored(d: Tensor, b: Tensor, z: Tensor | None) -> Tensor:
        return F.linear(x, W) + F.linear((F.linear(x, A) if z is None else z) * d, B) * b

    def scaled(d: Tensor, b: Tensor, z: Tensor | None) -> Tensor:
        E_OR = B * b.unsqueeze(1) * d
        return torch.addmm(F.linear(x, W), F.linear(x, A) if z is None else z, E_OR.t())

    def merged(d: Tensor, b: Tensor, z: Tensor | None) -> Tensor:
        fold = merged_weight(W, A, B, d, b)
        return merged_linear(x, None if z is None else z.detach(), fold, W, None, A, B, d, b)

    return {
        "base": lambda: step(lambda *_: F.linear(x, W), z=False),
        "factored": lambda: step(factored, z=True),
        "scaled": lambda: step(scaled, z=True),
        "merged": lambda: step(merged, z=trains),
        "dense": lambda: step(merged, z=False),
    }


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
