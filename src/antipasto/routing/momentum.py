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

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class GradientParts:
    """g_D and g_Q of the gradient that the parameters hold: they grow with it, and go when it goes.

    A gradient is gone where it was set to None, or to zero when the next one begins, or where others stand in its place. A
    step does not use it up: a second one on the same gradient is split as the first.

    Args:
        parameters: 1-D each.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._parts: Tensor | None = None  # (2, R)
        self._of: list[Tensor | None] = []  # the gradients that they are of
        self._stepped = False

    def watch(self) -> list[RemovableHandle]:
        """Hooks that see a gradient begin: they run before it is accumulated."""
        return [p.register_hook(self._before_accumulation) for p in self._parameters if p.requires_grad]

    def _before_accumulation(self, _: Tensor) -> None:
        if self._parts is not None and not any(p.grad is not None and p.grad.any() for p in self._parameters):
            self.drop()

    def drop(self) -> None:
        """Forget them."""
        self._parts, self._of, self._stepped = None, [], False

    def add(self, g_D: Tensor, g_Q: Tensor) -> None:
        """What one backward has added to both, (R,) each.

        Raises:
            ValueError: there is no gradient yet.
        """
        grads = [p.grad for p in self._parameters]
        if all(grad is None for grad in grads):
            raise ValueError("add_gradients belongs after the backward, and the knobs have no gradient yet.")
        if self._is_gone():
            self.drop()
        parts = torch.stack([g_D, g_Q])
        self._parts = parts if self._parts is None else self._parts + parts
        self._of, self._stepped = grads, False

    def _is_gone(self) -> bool:
        grads = [p.grad for p in self._parameters]
        return not any(grad is not None and grad is of for grad, of in zip(grads, self._of, strict=False))

    def there(self) -> bool:
        """Whether there are any, of the gradient that the next step will see."""
        if all(p.grad is None for p in self._parameters) or (self._stepped and self._is_gone()):
            self.drop()
        return self._parts is not None

    def scaled_to(self, g: Tensor, reduce: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
        """Both at the scale of the gradient that the optimizer will see, after clipping and unscaling; all g_D if none.

        Args:
            g: that gradient, (R,), finite.
            reduce: makes the mean over processes of (2, R).

        Raises:
            ValueError: they do not add up to it, also not at another scale.
        """
        parts = self._parts if self.there() else torch.stack([g, torch.zeros_like(g)])
        assert parts is not None
        if reduce is not None:
            parts = reduce(parts)
        whole = parts.sum(0)
        scale = (g @ whole) / (whole @ whole).clamp_min(torch.finfo(g.dtype).tiny)
        error = (g - scale * whole).norm()
        if not bool((error <= 0.01 * g.norm()) & (scale >= 0)):  # so that a NaN does not pass
            raise ValueError(
                "The parts given to add_gradients do not add up to the gradient of the knobs, also not at another scale: "
                f"lengths {float(whole.norm()):.3g} and {float(g.norm()):.3g}. Call it once for every backward."
            )
        parts = scale * parts
        if self._parts is not None:
            self._parts, self._stepped, self._of = parts, True, [p.grad for p in self._parameters]
        return parts[0], parts[1]


class MomentumSplit:
    """Runs the momentum of both parts beside an optimizer.

    Args:
        optimizer: a torch ``Adam``, ``AdamW`` or ``SGD``, fused or not, with all of the parameters.
        parameters: those whose displacement is split, 1-D each.

    Attributes:
        deployed: m_D, the parameters' one after the other, (R,).
        quarantined: m_Q, (R,).

    Raises:
        ValueError: another optimizer, a subclass with a step of its own, or an option that this does not know how to split.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        known = isinstance(optimizer, (torch.optim.Adam, torch.optim.SGD))  # AdamW is an Adam
        if not known or not inspect.unwrap(type(optimizer).step).__module__.startswith("torch.optim."):
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

    @property
    def is_fresh(self) -> bool:
        """Whether the optimizer remembers nothing of the parameters."""
        return not any(self._optimizer.state.get(p) for p in self._parameters)

    def continue_from(self, deployed: Tensor, quarantined: Tensor) -> bool:
        """Take both momenta over from an earlier split, if they are of this optimizer: they add up to its own.

        Not looked at under an L2 penalty, which is in the optimizer's momentum and in neither of the two.
        """
        penalty = any(g.get("weight_decay") and not g.get("decoupled_weight_decay") for g in self._groups)
        tolerance = 3 * torch.finfo(deployed.dtype).eps ** 0.5
        error = (deployed + quarantined - self.deployed).norm()
        if self.is_fresh or not (penalty or bool(error <= tolerance * (deployed.norm() + quarantined.norm()))):
            return False
        self.deployed, self.quarantined = deployed, quarantined
        return True

    def begin(self) -> None:
        """Before ``optimizer.step()``: see which parameters it moves, and which for the first time."""
        self._first = [self._optimizer.state.get(p, {}).get("momentum_buffer") is None for p in self._parameters]
        self._idle = [p.grad is None for p in self._parameters]

    @torch.no_grad()
    def end(self, g_D: Tensor, g_Q: Tensor, delta: Tensor, *, whole: bool = True) -> Tensor:
        """After ``optimizer.step()``: Δ_Q (R,), what of the displacement the quarantine's part of the gradient has done.

        Args:
            g_D: the deployed part of the gradient that the optimizer saw, (R,).
            g_Q: the other part, (R,).
            delta: Δ, by which the optimizer moved the parameters, (R,).
            whole: False where the step ended in an exception: a parameter that it had not moved by then is passed over.
        """
        sizes = [p.numel() for p in self._parameters]
        moved = []
        split = zip(*(t.split(sizes) for t in (g_D, g_Q, self.deployed, self.quarantined, delta)), strict=True)
        for index, (gradient_D, gradient_Q, m_D, m_Q, step) in enumerate(split):
            if self._idle[index] or not (whole or step.any()):  # passed over: its momentum stays as it is
                moved.append(torch.zeros_like(gradient_Q))
                continue
            group = self._groups[index]
            keep, new = self._weights(index)
            m_D.mul_(keep).add_(gradient_D, alpha=new)  # views: written into the whole
            m_Q.mul_(keep).add_(gradient_Q, alpha=new)
            lr = float(group["lr"])
            moved.append(self._within(-lr * self._direction(index, gradient_Q, m_Q), step, lr))
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
