"""The maths of one adapted layer: once as the plain formula, once as the autograd function that runs.

    θ        = δS + δS_hack                                     (r,)
    y        = W x + b + U (θ ⊙ (Vh x))                         W (o, i), U (o, r), Vh (r, i), x (..., i), y (..., o)
             = W_θ x + b,   W_θ = W + U diag(θ) Vh              the same function
    ∂L/∂x    = W_θᵀ ∂L/∂y  = Wᵀ ∂L/∂y + Vhᵀ (θ ⊙ (Uᵀ ∂L/∂y))
    ∂L/∂θ    = Σ_tokens (Uᵀ ∂L/∂y) ⊙ (Vh x)                     (r,), and ∂L/∂δS = ∂L/∂δS_hack = ∂L/∂θ

W is only ever added to, never rebuilt from its SVD: θ = 0 gives W exactly. This module computes the added term,
``spectral_delta``; the base layer computes ``W x + b`` itself, with its own hooks, dtype and kernel.

Nothing derived from θ outlives the call, so no write to a knob, by whatever route, can meet a stale weight.

Prior work: AntiPaSTO (github.com/wassname/AntiPaSTO); SVF in Transformer² (arXiv:2501.06252), which rescales S.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def delta_weight(U: Tensor, Vh: Tensor, theta: Tensor) -> Tensor:
    """The weight change ``ΔW = U diag(θ) Vh``.

    Args:
        U: (o, r).
        Vh: (r, i).
        theta: (r,).

    Returns:
        (o, i), in the widest dtype of the three.

    Example:
        >>> delta_weight(torch.eye(2), torch.eye(2), torch.tensor([1.0, 2.0]))
        tensor([[1., 0.],
                [0., 2.]])
    """
    dtype = torch.promote_types(torch.promote_types(U.dtype, Vh.dtype), theta.dtype)
    return (U.to(dtype) * theta.to(dtype)) @ Vh.to(dtype)


def spectral_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, Vh: Tensor, theta: Tensor
) -> Tensor:
    """``y = (W + U diag(θ) Vh) x + b``, written as the formula reads. Slow, and what every faster route is tested against.

    Args:
        x: (..., i).
        weight: W, (o, i).
        bias: b, (o,) or None.
        U: (o, r).
        Vh: (r, i).
        theta: θ, (r,).

    Returns:
        y, (..., o).
    """
    y = x @ (weight + U @ torch.diag(theta) @ Vh).T
    return y if bias is None else y + bias


class _SpectralDelta(torch.autograd.Function):
    """``U (θ ⊙ (Vh x))``; x, U, Vh of one dtype, θ at least as wide; sums over tokens run in θ's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, U: Tensor, Vh: Tensor, theta: Tensor) -> Tensor:
        h = x @ Vh.T  # (..., i) @ (i, r) -> (..., r)
        ctx.save_for_backward(U, Vh, theta, h)
        return (h * theta).to(x.dtype) @ U.T  # (..., r) @ (r, o) -> (..., o)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        (grad_y,) = grad_outputs
        U, Vh, theta, h = ctx.saved_tensors
        needs_x, _, _, needs_theta = ctx.needs_input_grad
        p = grad_y @ U  # (..., o) @ (o, r) -> (..., r)
        grad_x = grad_theta = None
        if needs_x:
            grad_x = (p * theta).to(grad_y.dtype) @ Vh  # (..., r) @ (r, i) -> (..., i)
        if needs_theta:
            grad_theta = (p * h).flatten(0, -2).sum(0, dtype=theta.dtype) if p.ndim > 1 else (p * h).to(theta.dtype)
        return grad_x, None, None, grad_theta


def spectral_delta(x: Tensor, U: Tensor, Vh: Tensor, theta: Tensor, dtype: torch.dtype) -> Tensor:
    """The term that the knobs add to a layer's output, ``U (θ ⊙ (Vh x))``.

    Args:
        x: (..., i), any float dtype.
        U: (o, r), frozen.
        Vh: (r, i), frozen.
        theta: (r,); a gradient flows to it, summed over tokens in its own dtype.
        dtype: the dtype to compute in: that of the base layer's output, which under autocast is not that of x.

    Returns:
        (..., o) of ``dtype``.

    Example:
        >>> x, U, Vh, theta = torch.ones(1, 2), torch.eye(2), torch.eye(2), torch.tensor([1.0, 2.0])
        >>> spectral_delta(x, U, Vh, theta, torch.float32)
        tensor([[1., 2.]])
    """
    # autocast would cast the operands a second time; here they are already what they should be
    with torch.autocast(x.device.type, enabled=False):
        return _SpectralDelta.apply(x.to(dtype), U.to(dtype), Vh.to(dtype), theta)
