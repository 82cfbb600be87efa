"""The maths of one adapted layer: a plain reference formula, and the two autograd functions that are used.

    θ        = δS + δS_hack                                     (r,)
    y        = W x + b + U (θ ⊙ (Vh x))                         W (o, i), U (o, r), Vh (r, i), x (..., i), y (..., o)
             = W_θ x + b,   W_θ = W + U diag(θ) Vh              the same function
    ∂L/∂x    = W_θᵀ ∂L/∂y  = Wᵀ ∂L/∂y + Vhᵀ (θ ⊙ (Uᵀ ∂L/∂y))
    ∂L/∂θ    = Σ_tokens (Uᵀ ∂L/∂y) ⊙ (Vh x)                     (r,), and ∂L/∂δS = ∂L/∂δS_hack = ∂L/∂θ

W_θ is a sum onto the untouched W, which is never rebuilt from its SVD: θ = 0 gives W exactly.

**Factored**, ``spectral_delta``: computes the added term only. The base layer computes ``W x + b`` and its gradient, with its
own hooks, dtype and kernel.

**Merged**, ``merged_linear``: one matmul with W_θ forward and one backward, and ∂L/∂θ by one of several `Route`s. W_θ has the
singular vectors of W and the singular values σ = S + θ. At full rank, each factor of ∂L/∂θ follows from the other side:

    Vh ∂L/∂x = σ ⊙ (Uᵀ ∂L/∂y)          Uᵀ (y − b) = σ ⊙ (Vh x)

So both factors can be computed on the smaller side. Only their sum over tokens is needed, so a Gram-like matrix will do:

    factored       Σ (Uᵀ ∂L/∂y) ⊙ (Vh x)                  weight         diag(Uᵀ (∂L/∂yᵀ x) Vhᵀ)
    input side     Σ (Vh ∂L/∂x) ⊙ (Vh x) / σ              input Gram     diag(Vh (∂L/∂xᵀ x) Vhᵀ) / σ
    output side    Σ (Uᵀ ∂L/∂y) ⊙ (Uᵀ (y − b)) / σ        output Gram    diag(Uᵀ (∂L/∂yᵀ (y − b)) U) / σ

Division by σ amplifies the rounding error of the other factor by up to σ_max / σ_min. `plans` allows it where that is small.

**Merged for others**, ``with_gradient``: a W_θ that somebody else multiplies with. What comes back is G = ∂L/∂W_θ, and
∂L/∂θ = diag(Uᵀ G Vhᵀ), as by the weight route. It takes a stack of weights (E, o, i) with θ (E, r), as of experts.

Prior work: AntiPaSTO (github.com/wassname/AntiPaSTO); SVF in Transformer² (arXiv:2501.06252), which rescales S.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def delta_weight(U: Tensor, Vh: Tensor, theta: Tensor) -> Tensor:
    """Compute the weight change ``ΔW = U diag(θ) Vh``.

    Args:
        U: (o, r), or a stack (E, o, r).
        Vh: (r, i), or (E, r, i).
        theta: (r,), or (E, r).

    Returns:
        (o, i) or (E, o, i), in the widest dtype of the three.

    Example:
        >>> delta_weight(torch.eye(2), torch.eye(2), torch.tensor([1.0, 2.0]))
        tensor([[1., 0.],
                [0., 2.]])
    """
    dtype = torch.promote_types(torch.promote_types(U.dtype, Vh.dtype), theta.dtype)
    with _no_autocast(U.device):
        return (U.to(dtype) * theta.to(dtype).unsqueeze(-2)) @ Vh.to(dtype)


def spectral_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, Vh: Tensor, theta: Tensor
) -> Tensor:
    """``y = (W + U diag(θ) Vh) x + b``, written as the formula reads: the slow reference for tests.

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
    """Sum (..., r) over the dimensions along which θ was broadcast, in θ's dtype: the gradient of that broadcast."""
    missing = terms.ndim - theta.ndim
    dims = [d for d in range(terms.ndim - 1) if d < missing or theta.shape[d - missing] == 1]
    return terms.sum(dims, dtype=theta.dtype).reshape(theta.shape) if dims else terms.to(theta.dtype)


class _SpectralDelta(torch.autograd.Function):
    """``U (θ ⊙ h)`` and ``h = Vh x``. x, U, Vh have one dtype, θ is at least as wide; sums over tokens run in θ's dtype.

    h is an output although only the backward uses it: a saved tensor must be an input or an output, or a second derivative
    would silently treat it as a constant.
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
        grad_y, grad_h = grads  # grad_h is None except in a second derivative
        U, Vh, theta, h = ctx.saved_tensors
        needs_x, _, _, needs_theta = ctx.needs_input_grad
        grad_x = grad_theta = None
        if grad_y is not None:
            p = grad_y @ U  # (..., o) @ (o, r) -> (..., r)
            if needs_theta:
                grad_theta = _sum_to(p * h, theta)
            # in place, unless this backward is itself differentiated
            through_y = (p * theta if torch.is_grad_enabled() or theta.dtype != p.dtype else p.mul_(theta)).to(p.dtype)
            grad_h = through_y if grad_h is None else grad_h + through_y
        if needs_x and grad_h is not None:
            grad_x = grad_h @ Vh  # (..., r) @ (r, i) -> (..., i)
        return grad_x, None, None, grad_theta


def spectral_delta(x: Tensor, U: Tensor, Vh: Tensor, theta: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the term that the knobs add to a layer's output, ``U (θ ⊙ (Vh x))``.

    Args:
        x: (..., i), any float dtype.
        U: (o, r), frozen.
        Vh: (r, i), frozen.
        theta: (r,); or, for one θ per token, any shape that broadcasts to (..., r) with x's leading shape. Its gradient is
            summed over the broadcast dimensions, in its own dtype.
        dtype: dtype of the result: that of the base layer's output, which under autocast differs from that of x. The
            computation uses the same dtype, except that fp16 is computed in fp32.

    Returns:
        (..., o) of ``dtype``.

    Example:
        >>> x, U, Vh, theta = torch.ones(1, 2), torch.eye(2), torch.eye(2), torch.tensor([1.0, 2.0])
        >>> spectral_delta(x, U, Vh, theta, torch.float32)
        tensor([[1., 2.]])
    """
    # in fp16, h can overflow where W x does not (|h| goes up to the length of x), 0 · inf would no longer give the base model,
    # and products in the gradient underflow
    inner = torch.float32 if dtype == torch.float16 else dtype
    with _no_autocast(x.device):
        y, _ = _SpectralDelta.apply(x.to(inner), U.to(inner), Vh.to(inner), theta)
    return y.to(dtype)


class Route(enum.Enum):
    """How ``merged_linear`` computes ∂L/∂θ; the module docstring has the formulas."""

    FACTORED = "factored"
    INPUT = "input side"
    OUTPUT = "output side"
    WEIGHT = "weight"
    INPUT_GRAM = "input Gram"
    OUTPUT_GRAM = "output Gram"

    @property
    def by_token(self) -> bool:
        """Whether the route computes the sum's terms token by token, so that each sequence can have its own gradient or θ."""
        return self in (Route.FACTORED, Route.INPUT, Route.OUTPUT)


def is_low(dtype: torch.dtype) -> bool:
    """Whether a dtype has fewer digits than fp32."""
    return torch.promote_types(dtype, torch.float32) is not dtype


def rounds_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch was told to round the operands of fp32 products on this device, as by TF32: 3 digits instead of 7."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return dtype is torch.float32 and backend.matmul.fp32_precision in ("tf32", "bf16")


def merged_weight(weight: Tensor, U: Tensor, Vh: Tensor, theta: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``W_θ = W + U diag(θ) Vh`` (o, i), or a stack of them, rounded once to ``dtype``: that of the weight if None.

    In low precision ΔW is a product of that precision, and so has its relative error; the sum is taken in the wider of the
    dtypes of W and ΔW, and an addition of two bf16 numbers rounds once.

    Example:
        >>> merged_weight(torch.ones(2, 2), torch.eye(2), torch.eye(2), torch.tensor([1.0, 2.0]))
        tensor([[2., 1.],
                [1., 3.]])
    """
    dtype = weight.dtype if dtype is None else dtype
    with _no_autocast(weight.device):
        left = U * theta.unsqueeze(-2)
        if not is_low(dtype):
            add = torch.addmm if weight.ndim == 2 else torch.baddbmm
            return add(weight, left, Vh)  # (o, r) @ (r, i) -> (o, i)
        return (weight + left.to(dtype) @ Vh.to(dtype)).to(dtype)


class _WithGradient(torch.autograd.Function):
    """W_θ, given, as a function of θ."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, theta: Tensor, U: Tensor, Vh: Tensor) -> Tensor:
        ctx.save_for_backward(U, Vh)
        ctx.dtype = theta.dtype
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[None, Tensor, None, None]:
        U, Vh = (rotation.to(G.dtype) for rotation in ctx.saved_tensors)
        with _no_autocast(G.device):
            projected = U.mT @ G  # (E, r, o) @ (E, o, i) -> (E, r, i)
            return None, (projected * Vh).sum(-1, dtype=ctx.dtype), None, None


def with_gradient(weight: Tensor, theta: Tensor, U: Tensor, Vh: Tensor) -> Tensor:
    """Make a W_θ from `merged_weight` differentiable, once, with respect to θ. Nothing is copied.

    Args:
        weight: W_θ, (E, o, i), without gradient.
        theta: (E, r).
        U: (E, o, r), of any float dtype: products are taken in W_θ's.
        Vh: (E, r, i), likewise.

    Example:
        >>> eye, theta = torch.eye(2)[None], torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> W_theta = with_gradient(merged_weight(eye, eye, eye, theta.detach()), theta, eye, eye)
        >>> torch.autograd.grad((W_theta**2).sum(), theta)
        (tensor([[4., 6.]]),)
    """
    weight_theta: Tensor = _WithGradient.apply(weight, theta, U, Vh)
    return weight_theta


class _MergedLinear(torch.autograd.Function):
    """``W_θ x + b``, with ∂L/∂θ by a route. It has no second derivative, since it saves more than inputs and outputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        theta: Tensor,
        bias: Tensor | None,
        weights: Sequence[Tensor],
        which: Tensor | None,
        basis: tuple[Tensor, Tensor, Tensor],
        route: Route,
    ) -> Tensor:
        y = _affine(x, weights, which, bias)
        seen = x
        if route in (Route.OUTPUT, Route.OUTPUT_GRAM):  # always a copy: the caller may write to y
            seen = y.clone() if bias is None else y - bias
        ctx.save_for_backward(seen, theta, which, *basis, *weights)
        ctx.route = route
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        seen, theta, which, U, S, Vh, *weights = ctx.saved_tensors
        needs_x, needs_theta, *_ = ctx.needs_input_grad
        route: Route = ctx.route
        grad_x = grad_theta = None
        if needs_x or (needs_theta and route in (Route.INPUT, Route.INPUT_GRAM)):
            # (..., o) @ (o, i) -> (..., i)
            grad_x = by_group(which, len(weights), lambda group, rows: rows @ weights[group], grad_y)
        if needs_theta:
            grad_theta = _theta_gradient(route, seen, grad_x, grad_y, (U, S, Vh), theta)
        return grad_x if needs_x else None, grad_theta, None, None, None, None, None


def by_group(which: Tensor | None, number: int, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Compute each group of rows by itself, and put the results into the rows' order.

    Args:
        which: (n,), the group of each row; None: all rows are of group 0.
        number: of groups.
        compute: called with a group's number and its rows of each input.
        *inputs: (n, …) each.

    Example:
        >>> by_group(torch.tensor([1, 0, 1]), 2, lambda group, rows: 10 * group + rows, torch.tensor([1, 2, 3]))
        tensor([11,  2, 13])
    """
    if which is None:
        return compute(0, *inputs)
    groups = [(which == group).nonzero().squeeze(1) for group in range(number)]
    parts = [compute(group, *(one[rows] for one in inputs)) for group, rows in enumerate(groups)]
    return torch.cat(parts)[torch.argsort(torch.cat(groups))]


def _affine(x: Tensor, weights: Sequence[Tensor], which: Tensor | None, bias: Tensor | None) -> Tensor:
    """``W_θ x + b`` by the same call as nn.Linear: bitwise equal to the base layer if W_θ = W."""
    # (..., i) @ (i, o) -> (..., o)
    return by_group(which, len(weights), lambda group, rows: F.linear(rows, weights[group], bias), x)


def _theta_gradient(
    route: Route,
    seen: Tensor,
    grad_x: Tensor | None,
    grad_y: Tensor,
    basis: tuple[Tensor, Tensor, Tensor],
    theta: Tensor,
) -> Tensor:
    """∂L/∂θ in the shape of θ, by a route; ``seen`` is y − b for the output's routes and x for the others."""
    U, S, Vh = basis[0].to(grad_y.dtype), basis[1], basis[2].to(grad_y.dtype)
    match route:
        case Route.FACTORED:
            return _sum_to((grad_y @ U) * (seen @ Vh.T), theta)
        case Route.WEIGHT:
            gradient = grad_y.flatten(0, -2).T @ seen.flatten(0, -2)  # (o, T) @ (T, i) -> (o, i)
            return ((U.T @ gradient) * Vh).sum(1, dtype=theta.dtype)
        case Route.INPUT | Route.INPUT_GRAM:
            assert grad_x is not None
            left, right, rotation = grad_x, seen, Vh
        case Route.OUTPUT | Route.OUTPUT_GRAM:
            left, right, rotation = grad_y, seen, U.T
    if route.by_token:
        total = _sum_to((left @ rotation.T) * (right @ rotation.T), theta)
    else:
        gram = left.flatten(0, -2).T @ right.flatten(0, -2)  # (m, T) @ (T, m) -> (m, m)
        total = ((rotation @ gram) * rotation).sum(1)
    return total / (S + theta)


def merged_linear(
    x: Tensor,
    bias: Tensor | None,
    theta: Tensor,
    weights: Sequence[Tensor],
    basis: tuple[Tensor, Tensor, Tensor],
    route: Route,
    which: Tensor | None = None,
) -> Tensor:
    """Compute ``W_θ x + b`` for a given W_θ, differentiable once with respect to x and θ.

    Args:
        x: (..., i), which is cast to the dtype of W_θ.
        bias: b, (o,) or None; frozen.
        theta: (r,); or, for a `Route` by token, (..., r) as far as it broadcasts to (..., r) of x's leading shape.
        weights: W_θ (o, i) from `merged_weight`, without gradient; several if rows of x see different ones.
        basis: U (o, r), S (r,), Vh (r, i) of W.
        route: how to compute ∂L/∂θ. Routes that divide by S + θ need full rank: r = i for the input, r = o for the output.
        which: (x.shape[0],), index into ``weights`` for each row; None if there is one weight.

    Returns:
        (..., o).

    Example:
        >>> basis = torch.eye(2), torch.tensor([3.0, 2.0]), torch.eye(2)
        >>> theta = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> W_theta = merged_weight(torch.diag(basis[1]), basis[0], basis[2], theta.detach())
        >>> merged_linear(torch.ones(1, 2), None, theta, [W_theta], basis, Route.WEIGHT)
        tensor([[4., 4.]], grad_fn=<_MergedLinearBackward>)
    """
    dtype = weights[0].dtype
    bias = None if bias is None else bias.to(dtype)
    with _no_autocast(x.device):
        x = x.to(dtype)
        if not torch.is_grad_enabled() or not (x.requires_grad or theta.requires_grad):
            return _affine(x, weights, which, bias)
        return _MergedLinear.apply(x, theta, bias, weights, which, basis, route)


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off: the operands already have the intended dtype."""
    # decided by the device's name, since torch.compile cannot always trace torch.amp.is_autocast_available
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
