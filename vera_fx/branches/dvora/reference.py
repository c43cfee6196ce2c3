"""DVoRA in ten eager lines: the oracle of the tests and the definition for readers."""

from torch import Tensor
from torch.nn import functional as F

from vera_fx.branches.vera.reference import vera_delta


def dvora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, vera: tuple[Tensor, ...], m: Tensor
) -> Tensor:
    """``x @ (m * V / |V|).T + bias`` with ``V = W + diag(b) B diag(d) A`` (arXiv 2402.09353, eq. 5, 11).

    Args:
        x: input, ``(..., in)``.
        W: base weight, ``(out, in)``.
        bias: base bias, ``(out,)``, or None.
        vera: A ``(r, max_in)``, B ``(max_out, r)``, d ``(r,)`` and b ``(out,)``.
        m: the magnitude, ``(out,)``.
    """
    A, B, d, b = vera
    V = W + vera_delta(A, B, d, b, W.shape[1])
    norm = V.detach().norm(dim=1)  # no gradient through the norm (section 4.3)
    return F.linear(x, (m / norm)[:, None] * V, bias)
