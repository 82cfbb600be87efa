"""Experts that a model keeps in one parameter: a basis and a row of knobs for each expert.

    W_θ[e]   = W[e] + U[e] diag(θ[e]) Vh[e]        W (E, o, i), U (E, o, r), S (E, r), Vh (E, r, i), θ (E, r)
    ∂L/∂θ[e] = diag(U[e]ᵀ G[e] Vh[e]ᵀ)             G = ∂L/∂W_θ (E, o, i), which exists during the backward only

transformers keeps the experts of a layer in ``gate_up_proj`` and ``down_proj``, parameters of one module. Its forward takes
tokens (T, d), the experts of each and their weights; whether it loops over experts or multiplies them in groups, it reads
these two attributes. So they are where the knobs act: a module with the knobs takes the parameter's place (`mount`), and while
the experts' forward runs, W_θ takes the module's. Every experts implementation then computes what it would with W_θ as
its parameter, and at θ = 0, where W_θ is W itself, the base model, bit for bit. (PEFT's LoRA does so by a parametrisation:
``target_parameters``.) W_θ is always merged, in W's dtype: autograd keeps it from forward to backward.

Sequences. G is a sum over tokens. Where each sequence needs its own gradient (`rollouts`) or rows see different knobs
(`rows`), the experts' forward runs once for the tokens of each, which see a W_θ of their own. That is exact with every
implementation. It costs the projection of G on the basis, E o i r multiplications, once per sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from antipasto.adapter.functional import by_group, merged_weight, with_gradient

from .layer import AntiPastoLinear, is_transposed


class Stack(nn.Module):
    """A parameter of a module of experts, as a base layer.

    Args:
        experts: the module.
        name: the parameter's name in it.

    Attributes:
        weight: W, (E, o, i), or (E, i, o) if ``is_transposed``.
        refused: why it cannot be adapted, as a clause; None if it can.
    """

    weight: nn.Parameter

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__()
        self._parameters["weight"] = getattr(experts, name)  # assigned, PEFT's low_cpu_mem_usage would take its numbers
        self.is_transposed = bool(getattr(experts, "is_transposed", False))
        self.refused = self._why_refused(experts)

    def _why_refused(self, experts: nn.Module) -> str | None:
        is_dispatched = hasattr(experts, "is_transposed") and hasattr(experts, "has_gate")
        if not is_dispatched or self.weight.ndim != 3:
            return (
                f"it is a parameter of shape {tuple(self.weight.shape)} of a {type(experts).__name__}, which is not a module "
                "of experts that follows transformers' experts interface"
            )
        if getattr(experts, "_is_expert_parallel", False):
            return "its experts are spread over processes"
        if self.weight.dtype == torch.float16:
            return "its experts are in float16, where the gradient of a weight may overflow: load the model in bfloat16"
        return None


class AntiPastoExperts(AntiPastoLinear):
    """A stack of experts with knobs on the singular directions of each. It has no forward; its module reads `weights`.

    Attributes:
        spread_theta: where set, called with θ and tokens for `rollouts.RolloutGrads.by_sequence`.
    """

    def weights(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """What the experts' forward sees in the parameter's place.

        Args:
            x: the tokens, (T, d).

        Returns:
            Weights in the parameter's layout; and for each token, the index of its own, (T,), or None if there is one.
        """
        theta = self.present_theta()
        if theta is None:
            weight = self.get_base_layer().weight
            assert isinstance(weight, Tensor)
            return [weight], None
        if self.spread_theta is not None and torch.is_grad_enabled():
            rows, which = self.spread_theta(theta, x)
            return [self._weight(row) for row in rows.unbind()], which
        if theta.ndim == 2:
            return [self._weight(theta)], None
        assert self.rows is not None
        kinds = self.rows.examples
        return [self._weight(theta[row]) for row in kinds], self.rows.index(x) if len(kinds) > 1 else None

    def _weight(self, theta: Tensor) -> Tensor:
        """W_θ, differentiable in θ; W itself where θ is zero."""
        W, (U, _, Vh) = self.matrix().detach(), self.basis
        value, differentiable = theta.detach(), torch.is_grad_enabled() and theta.requires_grad
        weight = W
        if value.any():
            hold = self.may_hold and not differentiable
            weight = self.choice.held.get(value, W, W.dtype, lambda: merged_weight(W, U, Vh, value), hold=hold)
        if differentiable:
            weight = with_gradient(weight, theta, U, Vh)
        return weight.mT if is_transposed(self.get_base_layer()) else weight

    def why_not_mergeable(self) -> str | None:
        """Always None: the experts' forward uses a merged weight as it uses W_θ."""
        return None


def mount(experts: nn.Module, name: str, stack: Stack) -> None:
    """Put a stack into its parameter's place, and let the experts' forward see its weights."""
    if not _stacks(experts):
        experts.forward = functools.partial(_forward, experts, experts.forward)
    delattr(experts, name)
    setattr(experts, name, stack)


def unmount(experts: nn.Module, name: str, stack: Stack) -> None:
    """Put a stack's parameter back into its place."""
    delattr(experts, name)
    setattr(experts, name, stack.weight)
    ours = vars(experts)["forward"]
    # around ours there may be others by now, such as accelerate's hooks; without stacks, ours only calls what it is around
    if not _stacks(experts) and getattr(ours, "func", None) is _forward:
        forward = vars(experts).pop("forward").args[1]
        if getattr(forward, "__func__", None) is not type(experts).forward:  # it was there before
            experts.forward = forward


def _stacks(experts: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in experts.named_children() if isinstance(module, (Stack, AntiPastoExperts))}


def _forward(experts: nn.Module, forward: Callable[..., Tensor], *tokens: Tensor) -> Tensor:
    """Run the experts' forward with W_θ in place of its parameters.

    Args:
        experts: the module.
        forward: its own forward.
        *tokens: its arguments, which all have tokens first: x (T, d), the experts of each token, and their weights.
    """
    seen: dict[str, list[Tensor]] = {}
    which: Tensor | None = None
    for name, layer in _stacks(experts).items():
        assert isinstance(layer, AntiPastoExperts)
        seen[name], index = layer.weights(tokens[0])
        which = which if index is None else index

    def run(group: int, *rows: Tensor) -> Tensor:
        # in __dict__, attributes are found before the modules of these names, which are in _modules
        vars(experts).update({name: weights[group % len(weights)] for name, weights in seen.items()})
        try:
            return forward(*rows)
        finally:
            for name in seen:
                del vars(experts)[name]

    return by_group(which, max(map(len, seen.values()), default=0), run, *tokens)
