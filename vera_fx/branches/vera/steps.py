"""VeRA's plans as eager code, to be timed.

Shape letters: T tokens, I in_features, O out_features, R rank.
"""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vera_fx.branches.vera.functions import merged_linear, merged_weight


def vera_steps(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    trains: bool,
) -> Mapping[str, Callable[[], object]]:
    """One step of each plan for ``sharing`` sites that read one input (`TimedSteps`)."""
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

    def merged(d: Tensor, b: Tensor, z: Tensor | None) -> Tensor:
        fold = merged_weight(W, A, B, d, b)
        return merged_linear(x, None if z is None else z.detach(), fold, W, None, A, B, d, b)

    return {
        "base": lambda: step(lambda *_: F.linear(x, W), z=False),
        "factored": lambda: step(functools.partial(_factored, x, W, A, B), z=True),
        "scaled": lambda: step(functools.partial(_scaled, x, W, A, B), z=True),
        "merged": lambda: step(merged, z=trains),
        "dense": lambda: step(merged, z=False),
    }


def _factored(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, z: Tensor | None
) -> Tensor:
    return F.linear(x, W) + F.linear((F.linear(x, A) if z is None else z) * d, B) * b


def _scaled(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, z: Tensor | None
) -> Tensor:
    E_OR = B * b.unsqueeze(1) * d
    return torch.addmm(F.linear(x, W), F.linear(x, A) if z is None else z, E_OR.t())
