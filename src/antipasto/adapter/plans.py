"""Choose the cheapest way to compute one call of an adapted layer, counted in multiplications, without losing precision.

For T tokens, W (o, i) and rank r, each plan adds this to the base layer's T·o·i forward and T·o·i backward:

    factored    T r (o + i) forward, T r (o + i) backward, ∂L/∂θ included                      (`spectral_delta`)
    spectral    T r (o + i) − T o i forward and backward, ∂L/∂θ included: U ((S + θ) ⊙ (Vh x)) + b replaces W x + b
    merged      o r i for W_θ, or nothing if W_θ is held; with gradient also the cost of ∂L/∂θ, by route:

                factored  T r (o + i)      input side   2 T i²      input Gram   T i² + i³
                weight    T o i + o r i    output side  2 T o²      output Gram  T o² + o³

In bf16, and under autocast to it, every call is merged, with or without gradient, and W_θ is held until the knobs change: it
is built once an optimizer step. Calls are factored where no weight may be held (``hold_weights=False``) or the rows of a
batch see different knobs. What samples and what is differentiated then goes by one rule, so that the importance ratios of an
on-policy step are 1 up to rounding. W_θ is rounded once, which costs no more than the roundings of the factored form
(docs/results.md). The weight route rounds its sum over the tokens once more; its error is that of
the factored route to within half as much again (`tests/test_plans.py`).

Conditions:

* Spectral execution and one-sided routes need W, x and the knobs in one dtype of at least fp32.
* Spectral execution needs full rank and the same W that the basis was computed from. It is not used at θ = 0, where the
  result must be exactly that of W.
* One-sided routes divide by σ = S + θ. They need full rank, the W of the basis, and max(|σ|, S) ≤ 100 min |σ|, which
  costs at most two of the seven digits. Weights that are not square nearly always qualify. S is in the maximum because W_θ is
  rounded at the scale of W, however small σ is. No σ may be 0, or overflow or underflow in products with x and ∂L/∂y. Where
  products are told to have three digits, as in TF32, there are none to spare, and one-sided routes are not used.
* Output routes are not used with a bias: y − b has lost what rounding with b removed, and computing W_θ x again would cost
  more than the factored route.
* One gradient per sequence needs a route by token.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from antipasto.adapter.functional import Route
from antipasto.names import PlanName


class Execution(enum.Enum):
    FACTORED = "factored"
    MERGED = "merged"
    SPECTRAL = "spectral"


MAX_CONDITION = 100.0
"""Largest max(|σ|, S) / min |σ| for which a route may divide by σ."""


def is_well_conditioned(S: Tensor, thetas: Sequence[Tensor]) -> bool:
    """Whether a route may divide by σ = S + θ, for every given θ (r,).

    Example:
        >>> is_well_conditioned(torch.tensor([3.0, 1.0]), [torch.tensor([0.5, 0.0])])
        True
        >>> is_well_conditioned(torch.tensor([3.0, 1.0]), [torch.tensor([-3.0, -1.0])])
        False
    """
    sigma = (S + torch.stack(list(thetas))).abs()
    lowest, highest = sigma.min(), torch.maximum(sigma.max(), S.max())
    room = torch.finfo(sigma.dtype).tiny ** 0.5  # for a product of σ with something as small, or its inverse
    # False if one of them is NaN
    return bool((room <= lowest) & (highest <= MAX_CONDITION * lowest) & (highest <= 1 / room))


@dataclass(frozen=True)
class Call:
    """What determines the cost of a call.

    Attributes:
        tokens: T, the number of rows of x.
        o, i, r: W's shape, and the rank.
        needs_x: whether ∂L/∂x is needed.
        needs_theta: whether ∂L/∂θ is needed.
        by_token: whether each sequence has its own θ or gradient.
        well_conditioned: whether a route may divide by σ.
        is_basis: whether the basis belongs to the present W.
        weights: how many W_θ would have to be built.
        bias: whether the layer has one.
        low: whether it is computed in fewer digits than fp32's.
    """

    tokens: int
    o: int
    i: int
    r: int
    needs_x: bool
    needs_theta: bool
    by_token: bool
    well_conditioned: bool
    is_basis: bool
    weights: int
    bias: bool = False
    low: bool = False


def route_costs(call: Call) -> dict[Route, int]:
    """Multiplications that each available route of ∂L/∂θ takes."""
    T, o, i, r = call.tokens, call.o, call.i, call.r
    costs = {Route.FACTORED: T * r * (o + i), Route.WEIGHT: T * o * i + o * r * i}
    if call.well_conditioned and r == i:
        grad_x = 0 if call.needs_x else T * o * i  # input routes need ∂L/∂x
        costs |= {Route.INPUT: 2 * T * i * i + grad_x, Route.INPUT_GRAM: T * i * i + i**3 + grad_x}
    if call.well_conditioned and r == o and not call.bias:
        costs |= {Route.OUTPUT: 2 * T * o * o, Route.OUTPUT_GRAM: T * o * o + o**3}
    return costs


def execution_costs(call: Call) -> dict[Execution, int]:
    """Multiplications that each available execution adds to the base layer's.

    Merged execution is counted with the cheapest of all routes, so that the choice of forward does not depend on whether
    each sequence needs its own gradient.
    """
    T, o, i, r = call.tokens, call.o, call.i, call.r
    there = T * r * (o + i)
    back = T * r * ((o if call.needs_theta or call.needs_x else 0) + (i if call.needs_x else 0))
    costs = {
        Execution.FACTORED: there + back,
        Execution.MERGED: call.weights * o * r * i + (min(route_costs(call).values()) if call.needs_theta else 0),
    }
    if call.low:
        only = Execution.MERGED if call.weights <= 1 else Execution.FACTORED
        return {only: costs[only]}
    if call.is_basis and r == min(o, i):
        costs[Execution.SPECTRAL] = there + back - T * o * i * (1 + call.needs_x)
    return costs


@lru_cache(maxsize=4096)
def cheapest(call: Call, plan: PlanName = "auto") -> tuple[Execution, Route]:
    """Choose the execution of a call, and the cheapest route of ∂L/∂θ for merged execution.

    Example:
        >>> def call(T: int, o: int, i: int, **other: bool) -> Call:
        ...     asked = {"needs_x": True, "needs_theta": True, "by_token": False, "well_conditioned": True, "is_basis": True}
        ...     return Call(T, o, i, min(o, i), **asked | other, weights=1)
        >>> cheapest(call(1024, 1536, 576))[0]
        <Execution.SPECTRAL: 'spectral'>
        >>> cheapest(call(8192, 1536, 576))
        (<Execution.MERGED: 'merged'>, <Route.INPUT_GRAM: 'input Gram'>)
        >>> cheapest(call(1024, 576, 576, needs_x=False, needs_theta=False))[0]
        <Execution.MERGED: 'merged'>
        >>> cheapest(call(8, 576, 576, is_basis=False))[0]
        <Execution.FACTORED: 'factored'>
    """
    by_route, costs = route_costs(call), execution_costs(call)
    route = min((name for name in by_route if name.by_token or not call.by_token), key=lambda name: by_route[name])
    wanted = {execution.value: execution for execution in costs}.get(plan, Execution.FACTORED)
    return min(costs, key=lambda name: costs[name]) if plan == "auto" else wanted, route
