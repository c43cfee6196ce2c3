"""VeRA in ten eager lines: the oracle of the tests and the definition for readers."""

from torch import Tensor
from torch.nn import functional as F


def vera_branch(x: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """``b * ((d * (x @ A.T)) @ B.T)``, what VeRA adds to a linear's output (paper, equation 2).

    Args:
        x: input of the linear, ``(..., in)``.
        A: shared projection ``(r, max_in)``, of which the first ``in`` columns count.
        B: shared projection ``(max_out, r)``, of which the first ``len(b)`` rows count.
        d: the target's ``lambda_d``, ``(r,)``.
        b: the target's ``lambda_b``, ``(out,)``.
    """
    z = F.linear(x.to(d.dtype), A[:, : x.shape[-1]])
    return b * F.linear(d * z, B[: b.shape[0]])


def vera_delta(A: Tensor, B: Tensor, d: Tensor, b: Tensor, in_features: int) -> Tensor:
    """``diag(b) B diag(d) A`` of shape ``(out, in)``: the branch as a change of the weight."""
    return (b[:, None] * B[: b.shape[0]]) @ (d[:, None] * A[:, :in_features])
