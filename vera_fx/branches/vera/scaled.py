"""The scaled branch beside a module that graphs call, with gradients derived by hand.

Shape letters: L leading dims, T their product, O out_features, R rank.
"""

from typing import Any

import torch
from torch import Tensor


def scaled_sum(total: Tensor, z: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """``total + z @ E.T`` with ``E = diag(b) B diag(d)``, of which only ``z`` is kept for backward.

    Autograd would keep E, and B with its rows scaled in float32: more than ``z`` where there are fewer
    tokens than output features. With ``G`` the output's gradient and ``M = G.T @ z``, ``grad_b =
    (B * M) @ d`` and ``grad_d = b @ (B * M)``; E is made again.

    Args:
        total: the base's product, ``(*L, O)``.
        z: ``x @ A.T``, ``(*L, R)``.
        B: ``(O, R)``, frozen.
        d: ``lambda_d``, ``(R,)``.
        b: ``lambda_b``, ``(O,)``.

    Returns:
        ``(*L, O)`` in the dtype of ``total``. Differentiable as often as one likes.
    """
    if torch.compiler.is_exporting() or not torch.is_grad_enabled():
        return _sum(total, z, B, d, b)
    return _ScaledSum.apply(total, z, B, d, b)  # type: ignore[no-any-return]


def _scales(z: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """E, made in the vectors' dtype and rounded once."""
    return (b[:, None] * B * d).to(z.dtype)


def _sum(total: Tensor, z: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    E_RO = _scales(z, B, d, b).t()
    flat = torch.addmm(total.reshape(-1, total.shape[-1]), z.reshape(-1, z.shape[-1]), E_RO)
    # Not a view, which no model could change in place behind an autograd function.
    return torch.ops.aten._unsafe_view.default(flat, total.shape)


class _ScaledSum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(total: Tensor, z: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sum(total, z, B, d, b)

    # Apart from forward, as torch.func asks for.
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        del output
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        z, B, d, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        G_TO, z_TR = grad.reshape(-1, grad.shape[-1]), z.reshape(-1, z.shape[-1])
        grad_z = (G_TO @ _scales(z, B, d, b)).reshape(z.shape) if needs[1] else None
        grad_d = grad_b = None
        if needs[3] or needs[4]:
            BM_OR = B * (G_TO.T @ z_TR).to(B.dtype)
            grad_d, grad_b = b @ BM_OR, BM_OR @ d
        return grad, grad_z, None, grad_d, grad_b
