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

from contextlib import AbstractContextManager, nullcontext
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
    with _no_autocast(U.device):
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


def _sum_to(terms: Tensor, theta: Tensor) -> Tensor:
    """Sum (..., r) over the dimensions along which θ was broadcast, in θ's dtype: what a broadcast's gradient is."""
    missing = terms.ndim - theta.ndim
    dims = [d for d in range(terms.ndim - 1) if d < missing or theta.shape[d - missing] == 1]
    return terms.sum(dims, dtype=theta.dtype).reshape(theta.shape) if dims else terms.to(theta.dtype)


class _SpectralDelta(torch.autograd.Function):
    """``U (θ ⊙ h)`` and ``h = Vh x``; x, U, Vh of one dtype, θ at least as wide; sums over tokens run in θ's dtype.

    h is an output, although nobody but the backward wants it: what is saved must be an input or an output, or a second
    derivative would silently take it for a constant.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, U: Tensor, Vh: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        h = x @ Vh.T  # (..., i) @ (i, r) -> (..., r)
        return (h * theta).to(x.dtype) @ U.T, h  # (..., r) @ (r, o) -> (..., o)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        _, U, Vh, theta = inputs
        ctx.save_for_backward(U, Vh, theta, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, Tensor | None]:
        grad_y, grad_h = grads  # grad_h is None but in a second derivative
        U, Vh, theta, h = ctx.saved_tensors
        needs_x, _, _, needs_theta = ctx.needs_input_grad
        grad_x = grad_theta = None
        if grad_y is not None:
            p = grad_y @ U  # (..., o) @ (o, r) -> (..., r)
            if needs_theta:
                grad_theta = _sum_to(p * h, theta)
            through_y = (p * theta).to(p.dtype)
            grad_h = through_y if grad_h is None else grad_h + through_y
        if needs_x and grad_h is not None:
            grad_x = grad_h @ Vh  # (..., r) @ (r, i) -> (..., i)
        return grad_x, None, None, grad_theta


def spectral_delta(x: Tensor, U: Tensor, Vh: Tensor, theta: Tensor, dtype: torch.dtype) -> Tensor:
    """The term that the knobs add to a layer's output, ``U (θ ⊙ (Vh x))``.

    Args:
        x: (..., i), any float dtype.
        U: (o, r), frozen.
        Vh: (r, i), frozen.
        theta: (r,), or (..., r) to give tokens a θ each, as far as it broadcasts to (..., r) of x's leading shape. A gradient
            flows to it, summed over what it was broadcast along, in its own dtype.
        dtype: of the result: that of the base layer's output, which under autocast is not that of x. It is also the dtype
            computed in, but for fp16, which is computed in fp32.

    Returns:
        (..., o) of ``dtype``.

    Example:
        >>> x, U, Vh, theta = torch.ones(1, 2), torch.eye(2), torch.eye(2), torch.tensor([1.0, 2.0])
        >>> spectral_delta(x, U, Vh, theta, torch.float32)
        tensor([[1., 2.]])
    """
    # in fp16, h can overflow where W x does not (|h| goes up to the length of x), 0 times inf is no longer the base model, and
    # the products of the gradient underflow
    inner = torch.float32 if dtype == torch.float16 else dtype
    with _no_autocast(x.device):
        y, _ = _SpectralDelta.apply(x.to(inner), U.to(inner), Vh.to(inner), theta)
    return y.to(dtype)


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Operands here are already of the dtype that they should have: autocast would cast them again."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
