"""Functions that adapted graphs call for VeRA's branch, with gradients derived by hand.

They are importable by name, as FX needs. torch.compile traces into them like into any code.

Shape letters: L leading dims, T their product, I in_features, O out_features, R rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vera_fx.passes import recomputed


def merged_weight(weight: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """``W + diag(b) B diag(d) A`` in the dtype of W.

    The product and the sum are in the vectors' dtype and rounded once. Over a bfloat16 base the
    product takes bfloat16 operands, as the base's own do, and accumulates in float32; float16 lacks
    the range for small vectors.

    Args:
        weight: base weight, ``(O, I)``.
        A: ``(R, I)``, frozen.
        B: ``(O, R)``, frozen.
        d: ``lambda_d``, ``(R,)``.
        b: ``lambda_b``, ``(O,)``.

    Returns:
        ``(O, I)``. No gradient flows through it: `merged_linear` derives those of the vectors.
    """
    weight, d, b = weight.detach(), d.detach(), b.detach()
    E_OR = b[:, None] * B * d
    dtype = _fold_dtype(weight.dtype, E_OR.dtype)
    return torch.addmm(weight.to(dtype), E_OR.to(dtype), A.to(dtype)).to(weight.dtype)


def _fold_dtype(base: torch.dtype, vectors: torch.dtype) -> torch.dtype:
    """The dtype of products as large as a weight: bfloat16 over such a base, else the vectors' own."""
    return base if base == torch.bfloat16 else vectors


def merged_weight_again(weight: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """`merged_weight`, `recomputed`."""
    return recomputed(merged_weight, weight, A, B, d, b)


def merged_linear(  # noqa: PLR0913, PLR0917
    x: Tensor,
    z: Tensor | None,
    merged: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    d: Tensor,
    b: Tensor,
) -> Tensor:
    """``x @ (W + diag(b) B diag(d) A).T + bias``: the whole adapted linear as one product.

    With ``G`` the output's gradient, both vectors' gradients come from one product
    ``M = G.T @ z (O, R)``: ``grad_b = (B * M) @ d`` and ``grad_d = b @ (B * M)``. Neither the
    branch's output nor ``d * z`` is ever made, and only ``z`` and the merged weight are kept.

    Args:
        x: input, ``(*L, I)``.
        z: ``x @ A.T``, ``(*L, R)``, no gradient flows into it. None to use ``M = (G.T @ x) @ A.T``
            instead, which is less work where R is larger than about half of I.
        merged: `merged_weight` of the rest, ``(O, I)``.
        weight: base weight, ``(O, I)``.
        bias: base bias, ``(O,)``, or None.
        A: ``(R, I)``, frozen.
        B: ``(O, R)``, frozen.
        d: ``lambda_d``, ``(R,)``.
        b: ``lambda_b``, ``(O,)``.

    Returns:
        ``(*L, O)`` in the dtype of ``x``. Differentiable once.
    """
    return _MergedLinear.apply(x, z, merged, weight, bias, A, B, d, b)  # type: ignore[no-any-return]


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        merged: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        d: Tensor,
        b: Tensor,
    ) -> Tensor:
        del weight  # only its gradient, if the base was unfrozen after capture
        keeps_x = z is None or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if keeps_x else None, z, merged, A, B, d, b)
        if x.ndim == 2:  # noqa: PLR2004
            return F.linear(x, merged, bias)
        # Not F.linear: it returns a view of a flat product, which no model could change in place.
        flat = F.linear(x.reshape(-1, x.shape[-1]), merged, bias)
        return torch.ops.aten._unsafe_view.default(flat, (*x.shape[:-1], flat.shape[-1]))

    @staticmethod
    @once_differentiable  # its wrapper has no names for the type checker
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, z, merged, A, B, d, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        G_TO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ merged if needs[0] else None
        grad_weight = G_TO.T @ x.reshape(-1, x.shape[-1]) if needs[3] else None
        grad_bias = G_TO.sum(0) if needs[4] else None
        grad_d = grad_b = None
        if needs[7] or needs[8]:
            BM_OR = B * _product(G_TO, x, z, A)
            grad_d, grad_b = b @ BM_OR, BM_OR @ d
        return grad_x, None, None, grad_weight, grad_bias, None, None, grad_d, grad_b


def _product(G_TO: Tensor, x: Tensor | None, z: Tensor | None, A: Tensor) -> Tensor:
    """``M = G.T @ x @ A.T``, ``(O, R)``, by whichever operand was kept."""
    if z is not None:
        return (G_TO.T @ z.reshape(-1, z.shape[-1]).to(G_TO.dtype)).to(A.dtype)
    if x is None:
        raise RuntimeError("merged_linear kept neither x nor z; this is a fault of vera_fx")
    D_OI = G_TO.T @ x.reshape(-1, x.shape[-1])
    dtype = _fold_dtype(D_OI.dtype, A.dtype)
    return (D_OI.to(dtype) @ A.T.to(dtype)).to(A.dtype)
