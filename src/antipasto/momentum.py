"""One optimizer step's displacement, split between two parts of the gradient.

    g = g_D + g_Q          the part that the deployed knobs may learn from, and the part that the quarantine gets

Adam's step is linear in its first moment, SGD's in its momentum buffer. So both parts run the optimizer's momentum, under the
preconditioner that the whole gradient has built up, and the steps add up to the optimizer's own:

    Adam, AdamW      m_x ← β₁ m_x + (1 − β₁) g_x       Δ_x = −lr / (1 − β₁ᵗ) · m_x / (√(v / (1 − β₂ᵗ)) + ε)        v: of g
    SGD              m_x ← μ m_x + (1 − dampening) g_x  Δ_x = −lr m_x,  or −lr (g_x + μ m_x) with Nesterov

    Δ = Δ_D + Δ_Q

Adam bounds its own step, and not a part's: where g_D and g_Q nearly cancel, v is small and both parts are huge, most of all in
the first steps, when v is little more than g². What ships must not jump, so under Adam |Δ_D| ≤ max(|Δ|, lr), per coordinate,
and what is cut off stays in the quarantine.

An Adam of its own for g_Q would not do: it rescales a tiny gradient to a full-size step. Weight decay belongs to the deployed
part. Where the quarantine's momentum is exactly zero, so is Δ_Q; where the deployed part's is, Δ_Q is Δ, exactly.

Adam: Kingma and Ba 2014 (arXiv:1412.6980); AdamW: Loshchilov and Hutter 2017 (arXiv:1711.05101).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class MomentumSplit:
    """Runs the momentum of both parts beside an optimizer.

    Args:
        optimizer: a torch ``Adam``, ``AdamW`` or ``SGD``, fused or not, with all of the parameters.
        parameters: those whose displacement is split, 1-D each.

    Attributes:
        deployed: m_D, the parameters' one after the other, (R,).
        quarantined: m_Q, (R,).

    Raises:
        ValueError: another optimizer, or an option of it that this does not know how to split.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        if not isinstance(optimizer, (torch.optim.Adam, torch.optim.SGD)):  # AdamW is an Adam
            raise ValueError(
                f"Rollouts cannot be routed under {type(optimizer).__name__}, whose step is not known to be a sum over them. "
                "Use torch's Adam, AdamW (the Trainer's adamw_torch or adamw_torch_fused) or SGD."
            )
        self._optimizer, self._parameters = optimizer, list(parameters)
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._groups = [groups[id(p)] for p in self._parameters]
        if any(group.get("maximize") for group in self._groups):
            raise ValueError("Rollouts cannot be routed under maximize=True: minimise the negative.")
        # what the optimizer has learned before this belongs to the deployed part
        self.deployed = torch.cat([self._momentum(p) for p in self._parameters])
        self.quarantined = torch.zeros_like(self.deployed)

    @property
    def _is_adam(self) -> bool:
        return isinstance(self._optimizer, torch.optim.Adam)

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self._optimizer.state.get(parameter, {})
        value = state.get("exp_avg" if self._is_adam else "momentum_buffer")
        return torch.zeros_like(parameter.detach()) if value is None else value.detach().clone()

    def begin(self) -> None:
        """Before ``optimizer.step()``: see which parameters it moves for the first time."""
        self._first = [self._optimizer.state.get(p, {}).get("momentum_buffer") is None for p in self._parameters]

    @torch.no_grad()
    def end(self, g_D: Tensor, g_Q: Tensor, delta: Tensor) -> Tensor:
        """After ``optimizer.step()``: Δ_Q (R,), what of the displacement the quarantine's part of the gradient has done.

        Args:
            g_D: the deployed part of the gradient that the optimizer saw, (R,).
            g_Q: the other part, (R,).
            delta: Δ, by which the optimizer moved the parameters, (R,).
        """
        sizes = [p.numel() for p in self._parameters]
        moved = []
        split = zip(*(t.split(sizes) for t in (g_D, g_Q, self.deployed, self.quarantined, delta)), strict=True)
        for index, (gradient_D, gradient_Q, m_D, m_Q, whole) in enumerate(split):
            if self._parameters[index].grad is None:  # the optimizer passes it over, and its momentum stays as it is
                moved.append(torch.zeros_like(gradient_Q))
                continue
            group = self._groups[index]
            keep, new = self._weights(index)
            m_D.mul_(keep).add_(gradient_D, alpha=new)  # views: written into the whole
            m_Q.mul_(keep).add_(gradient_Q, alpha=new)
            lr = float(group["lr"])
            moved.append(self._within(-lr * self._direction(index, gradient_Q, m_Q), whole, lr))
        delta_Q = torch.cat(moved)
        if not any(
            group.get("weight_decay") for group in self._groups
        ):  # else the decay is part of Δ, and not the quarantine's
            delta_Q = torch.where(self.deployed == 0, delta, delta_Q)
        return torch.where(self.quarantined == 0, torch.zeros_like(delta_Q), delta_Q)

    def _within(self, delta_Q: Tensor, delta: Tensor, lr: float) -> Tensor:
        """Δ_Q, such that under Adam Δ_D = Δ − Δ_Q stays within max(|Δ|, lr)."""
        if not self._is_adam:
            return delta_Q
        limit = delta.abs().clamp_min(lr)
        return torch.minimum(torch.maximum(delta_Q, delta - limit), delta + limit)

    def _weights(self, index: int) -> tuple[float, float]:
        """Of the old momentum and of the new gradient."""
        group = self._groups[index]
        if self._is_adam:
            beta1 = float(group["betas"][0])
            return beta1, 1 - beta1
        return group["momentum"], 1.0 if self._first[index] else 1 - group["dampening"]

    def _direction(self, index: int, gradient: Tensor, momentum: Tensor) -> Tensor:
        """What the learning rate multiplies."""
        group = self._groups[index]
        if not self._is_adam:
            if group["momentum"] == 0:
                return gradient
            return gradient + group["momentum"] * momentum if group["nesterov"] else momentum
        state: dict[str, Any] = self._optimizer.state[self._parameters[index]]
        t, (beta1, beta2) = float(state["step"]), map(float, group["betas"])
        v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        return momentum / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
