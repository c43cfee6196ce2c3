"""Functions that adapted graphs call for DVoRA's branch. Importable by name, as FX needs.

Shape letters: I in_features, O out_features, R rank.
"""

import torch
from torch import Tensor

from vera_fx.passes import recomputed


def _directions(weight: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """``V = W + diag(b) B diag(d) A``, ``(O, I)``, in the vectors' dtype."""
    E_OR = b[:, None] * B * d
    return torch.addmm(weight.to(E_OR.dtype), E_OR, A)


def dvora_scale(weight: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, m: Tensor) -> Tensor:
    """``m / |V|`` by rows, ``(O,)``; differentiable by ``m`` alone, as in DoRA (section 4.3).

    Args:
        weight: base weight, ``(O, I)``.
        A: ``(R, I)``, frozen.
        B: ``(O, R)``, frozen.
        d: ``lambda_d``, ``(R,)``.
        b: ``lambda_b``, ``(O,)``.
        m: the magnitude, ``(O,)``.
    """
    with torch.no_grad():
        norm = _directions(weight, A, B, d, b).norm(dim=1)
    return m / norm


def dvora_weight(weight: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, m: Tensor) -> Tensor:
    """``m * V / |V|`` by rows, ``(O, I)``, in the base weight's dtype, rounded once."""
    V_OI = _directions(weight.detach(), A, B, d, b)
    norm = V_OI.detach().norm(dim=1)
    return ((m / norm)[:, None] * V_OI).to(weight.dtype)


def dvora_weight_again(
    weight: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, m: Tensor
) -> Tensor:
    """`dvora_weight`, recomputed in backward."""
    return recomputed(dvora_weight, weight, A, B, d, b, m)
