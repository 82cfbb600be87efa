"""Choose how each call of an adapted layer is computed (`plans`), and build the W_θ that merged execution needs.

The choice depends only on the call and on the knobs, never on which W_θ are already in memory: the same call gives the same
bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from antipasto.adapter.basis import Basis
from antipasto.adapter.functional import Route, is_low, merged_weight, rounds_products
from antipasto.adapter.held import HeldWeights, source
from antipasto.adapter.plans import Call, Execution, cheapest, is_well_conditioned
from antipasto.adapter.rows import RowViews
from antipasto.names import PlanName


class Asked(NamedTuple):
    """Options of one call.

    Attributes:
        plan: the layer's plan.
        hold_weights: whether W_θ of a forward without gradient may be kept for the next.
        by_sequence: whether each sequence needs its own gradient.
        sharded: whether FSDP2 gathers W for each call, so that its address says nothing.
    """

    plan: PlanName
    hold_weights: bool
    by_sequence: bool
    sharded: bool = False


class Merged(NamedTuple):
    """Inputs of merged execution: each W_θ (o, i), its index for each row of x if there are several, the route of ∂L/∂θ."""

    weights: list[Tensor]
    which: Tensor | None
    route: Route


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a Linear multiplies x: autocast's where it is on, which leaves fp64 alone."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype is not torch.float64
    return torch.get_autocast_dtype(device) if casts else x.dtype


def matmul_dtype(base: nn.Module, x: Tensor, theta: Tensor, basis: Basis) -> torch.dtype | None:
    """The dtype in which the base layer multiplies, if a matmul is all that it does and one with W_θ can stand in for it.

    None where it does more than that, or in fp16: W_θ x may overflow where U (θ ⊙ (Vh x)), in fp32, does not.
    """
    if type(base) is not nn.Linear or "forward" in vars(base):  # offloading puts a forward of its own there
        return None
    weight, bias, device = base.weight, base.bias, x.device.type
    if weight.is_meta:
        return None
    dtype = product_dtype(x)
    possible = (
        dtype in (torch.float64, torch.float32, torch.bfloat16)
        and (weight.dtype is dtype or torch.is_autocast_enabled(device))
        and basis.U.dtype in (weight.dtype, theta.dtype)  # a carried basis is of the knobs' dtype
        and theta.dtype is torch.promote_types(weight.dtype, torch.float32)
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        and not (weight.requires_grad or (bias is not None and bias.requires_grad))
        and type(weight.data) is Tensor
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined]
        and not (is_functorch_wrapped_tensor(x) or is_functorch_wrapped_tensor(theta))
    )
    return dtype if possible else None


class Choice:
    """How one layer computes its calls, with the state that this needs. Copies and pickles start without that state.

    Attributes:
        held: the W_θ kept in memory.
    """

    def __init__(self) -> None:
        self.held = HeldWeights()
        self._of_basis: tuple[tuple[int, int], bool] | None = None  # a weight's `source`, and whether the basis fits it

    def trust(self, weight: Tensor) -> None:
        """Record that the basis belongs to this weight as it is now."""
        self._of_basis = source(weight), True

    def forget(self) -> None:
        """Drop all state, after tensors were moved, cast or loaded."""
        self.held.clear()
        self._of_basis = None

    def make(
        self,
        asked: Asked,
        x: Tensor,
        theta: Tensor,
        weight: Tensor,
        basis: Basis,
        rows: RowViews | None,
        dtype: torch.dtype,
        *,
        has_bias: bool = False,
    ) -> tuple[Execution, Merged | None]:
        """Choose the execution of a call; for merged execution, also return its inputs.

        Args:
            asked: options of the call.
            x: (…, i).
            theta: (r,), or (b, r) where rows see different knobs.
            weight: W (o, i).
            basis: of W, or of what W was.
            rows: which rows see what, if they differ.
            dtype: of the matmul.
            has_bias: whether the layer has one.
        """
        W = weight.detach()
        thetas = [theta.detach()] if theta.ndim == 1 else _distinct(theta.detach(), rows)
        differ = len(thetas) > 1
        with_grad = torch.is_grad_enabled()
        needs_x = with_grad and x.requires_grad
        needs_theta = with_grad and (theta.requires_grad or asked.by_sequence)
        if asked.hold_weights and not differ and asked.plan != "spectral" and not (needs_x or needs_theta):
            # as in a decoding loop: it will be asked again; where rows differ, two W_θ would be too much to build for that
            return Execution.MERGED, Merged([self._weight(thetas[0], W, basis, dtype, hold=True)], None, Route.FACTORED)
        zero = not all(t.any() for t in thetas)
        if zero and differ:  # rows with θ = 0 must equal the base model, bit for bit
            return Execution.FACTORED, None
        (o, i), full_rank, low = W.shape, basis.rank == min(W.shape), is_low(dtype)
        is_basis = full_rank and not low and self._is_basis_of(W, basis, asked.sharded)
        call = Call(
            tokens=x.shape[:-1].numel(),
            o=o,
            i=i,
            r=basis.rank,
            needs_x=needs_x,
            needs_theta=needs_theta,
            by_token=theta.ndim > 1 or asked.by_sequence,
            # one-sided routes and spectral execution both assume that W_θ = U diag(σ) Vh
            well_conditioned=needs_theta
            and is_basis
            and o != i
            and not rounds_products(dtype, W.device)
            and is_well_conditioned(basis.S, thetas),
            is_basis=is_basis and not zero,
            weights=0 if zero else len(thetas),
            bias=has_bias,
            low=low,
        )
        keeps = low and asked.hold_weights
        execution, route = cheapest(call, "factored" if low and not keeps else asked.plan)
        if execution is not Execution.MERGED:
            return execution, None
        weights = [self._weight(t, W, basis, dtype, hold=keeps) for t in thetas]
        return execution, Merged(weights, rows.index(x) if differ and rows else None, route)

    def _weight(self, theta: Tensor, W: Tensor, basis: Basis, dtype: torch.dtype, *, hold: bool) -> Tensor:
        """W_θ; W itself where θ is zero, which takes nobody's place among the held ones."""
        if not theta.any():
            return W.to(dtype)
        return self.held.get(theta, W, dtype, lambda: merged_weight(W, basis.U, basis.Vh, theta, dtype), hold=hold)

    def _is_basis_of(self, W: Tensor, basis: Basis, sharded: bool) -> bool:
        """Whether W equals U diag(S) Vh up to rounding; computed again only if W was replaced or written to."""
        if self._of_basis is None or not (sharded or self._of_basis[0] == source(W)):
            error = merged_weight(W, basis.U, basis.Vh, -basis.S)
            # in fp64: squares of fp32 numbers may overflow or underflow
            error_norm, norm = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in (error, W))
            self._of_basis = source(W), bool(error_norm <= 1e-5 * norm)
        return self._of_basis[1]

    def __deepcopy__(self, memo: Any) -> Choice:
        return Choice()

    def __reduce__(self) -> tuple[type[Choice], tuple[()]]:
        return Choice, ()


def _distinct(theta: Tensor, rows: RowViews | None) -> list[Tensor]:
    """The distinct rows of θ (b, r): at most one of the deployed policy, and one of the policy as trained."""
    assert rows is not None
    thetas = [theta[row] for row in rows.examples]
    return thetas[:1] if len(thetas) == 1 or torch.equal(*thetas) else thetas
