"""DVoRA's plans as eager code, to be timed.

Shape letters: T tokens, I in_features, O out_features, R rank.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vera_fx.branches.dvora.functions import dvora_scale, dvora_weight


def dvora_steps(
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
    vectors = [
        (random(R, grad=True), random(O, grad=True), random(O, grad=True)) for _ in range(sharing)
    ]

    def step(site: Callable[..., Tensor]) -> object:
        outputs = [site(*own) for own in vectors]
        if not trains:
            return outputs
        wanted = [x, *(vector for own in vectors for vector in own)]
        return torch.autograd.grad(outputs, wanted, [G] * sharing, allow_unused=True)

    def factored(d: Tensor, b: Tensor, m: Tensor) -> Tensor:
        base, scale = F.linear(x, W), dvora_scale(W, A, B, d, b, m)
        update = F.linear(F.linear(x, A) * d, B) * b
        return base + (scale - 1) * base + scale * update

    def dense(d: Tensor, b: Tensor, m: Tensor) -> Tensor:
        return F.linear(x, dvora_weight(W, A, B, d, b, m))

    return {
        "base": lambda: step(lambda *_: F.linear(x, W)),
        "factored": lambda: step(factored),
        "dense": lambda: step(dense),
    }
