"""The nearest product of two matrices of smaller rank, and how near it is."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vera_fx.errors import ConfigError


def check_rank(rank: int, r: int) -> None:
    """Refuse a rank that is none, or not below that of the adapter.

    Raises:
        ConfigError: with the range.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= r:
        raise ConfigError(
            f"rank must be a whole number from 1 to the adapter's {r}, got {rank!r}; "
            "None keeps the rank, and is exact"
        )


def reduced(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of ``B A`` by matrices of ``rank`` (Eckart and Young).

    Args:
        A: ``(r, in)``.
        B: ``(out, r)``.
        rank: the new rank, at most r.

    Returns:
        ``A (rank, in)``, ``B (out, rank)``, and the norm of what is lost over the norm of ``B A``
        (Frobenius).
    """
    # The product itself is never formed: its singular values are those of two small triangles.
    Q_in, R_in = torch.linalg.qr(A.double().T)
    Q_out, R_out = torch.linalg.qr(B.double())
    U, S, Vt = torch.linalg.svd(R_out @ R_in.T, full_matrices=False)
    root, kept = S[:rank].sqrt(), min(rank, S.numel())
    new_A = root[:, None] * (Vt[:kept] @ Q_in.T)
    new_B = (Q_out @ U[:, :kept]) * root
    missing = rank - kept  # a target narrower than the rank: the rest is zero
    total = S.norm().item()
    error = S[rank:].norm().item() / total if total else 0.0
    return (
        F.pad(new_A, (0, 0, 0, missing)).to(A.dtype),
        F.pad(new_B, (0, missing)).to(B.dtype),
        error,
    )
