"""The gradient of every sequence by itself, for the price of one backward.

    ∂L/∂θ = Σ_tokens (Uᵀ ∂L/∂y) ⊙ (Vh x) = Σ_b g_b,     g_b: the same sum over the tokens of sequence b alone     (batch, r)

Each layer's θ (r,) is expanded to one row per sequence; the gradient of the expanded θ, which autograd computes on the way to
that of θ, is g. Where L is a sum of one term per sequence, g_b is the gradient of sequence b's own term.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from antipasto.tuner import AntiPastoLinear
from antipasto.tuner.rows import batch_shape, per_token
from antipasto.tuner.views import adapted_layers, unwrap


class RolloutGrads(Mapping[str, Tensor]):
    """Layer name → (batch, r), one row per sequence, as the backwards of a `rollout_grads` context filled it.

    Under gradient accumulation the rows of each micro-batch follow those of the one before. A layer that took no part has no
    entry. r is that of the layer's basis.
    """

    def __init__(self, sequence_index: Tensor | None, *, detach: bool) -> None:
        self.sequence_index = sequence_index
        self.leaves: list[Tensor] = []
        self._detach = detach
        self._rows: dict[str, dict[int, Tensor]] = {}
        self._forward = 0  # how many times the model was called, with gradient
        self._finished = 0  # of these, the last whose backward was seen
        self._tokens: tuple[int, ...] = ()  # (batch, sequence) of the current call

    def clear(self) -> None:
        """Forget all rows, for the next step."""
        self._rows.clear()
        self.leaves.clear()

    def __getitem__(self, name: str) -> Tensor:
        by_forward = self._rows[name]
        return torch.cat([by_forward[forward] for forward in sorted(by_forward)])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: a new micro-batch, of this shape."""
        self._tokens = batch_shape(args, kwargs)
        self._forward += torch.is_grad_enabled()

    def spread(self, name: str, theta: Tensor, x: Tensor) -> Tensor:
        """θ (r,), or (b, r), as one row per sequence, in a shape that broadcasts to x's tokens; its gradient will be kept."""
        if self._forward == 0:
            raise ValueError(f"{name} was called by itself inside rollout_grads: call the model that was given to it.")
        in_backward = torch._C._current_graph_task_id() != -1  # reentrant checkpointing runs the layer again in there
        if in_backward and self._forward - self._finished > 1:
            raise ValueError(
                "Several forwards before one backward, under reentrant gradient checkpointing: which of them is run again is "
                "not known here. Call backward after each, or use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        if self._detach or not theta.requires_grad:
            theta = theta.detach().requires_grad_()
            self.leaves.append(theta)
        leading = tuple(x.shape[:-1])
        if self.sequence_index is not None:
            return self._gather(name, theta, self.sequence_index.to(x.device), leading)
        batch = self._tokens[0] if self._tokens else (*leading, 1)[0]
        rows = theta.expand(batch, -1)
        self._keep(name, rows)
        try:
            return per_token(rows, x, self._tokens)
        except ValueError as error:
            raise ValueError(f"{name} sees {error}") from None

    def _gather(self, name: str, theta: Tensor, index: Tensor, leading: tuple[int, ...]) -> Tensor:
        if index.numel() != torch.Size(leading).numel():
            raise ValueError(
                f"{name} sees {torch.Size(leading).numel()} tokens (inputs of leading shape {leading}), "
                f"but sequence_index has {index.numel()} entries: give one per token."
            )
        rows = theta.expand(int(index.max()) + 1, -1)  # (sequences, r)
        self._keep(name, rows)
        return rows[index.reshape(leading)]  # (…, r)

    def _keep(self, name: str, rows: Tensor) -> None:
        forward = self._forward

        def keep(grad: Tensor) -> None:
            grad = grad.detach().reshape(grad.shape[0], -1)
            self._finished = max(self._finished, forward)
            earlier = self._rows.setdefault(name, {}).get(forward)  # a layer that is used twice in one call adds up
            self._rows[name][forward] = grad.clone() if earlier is None else earlier + grad

        rows.register_hook(keep)


@contextmanager
def rollout_grads(
    model: nn.Module, sequence_index: Tensor | None = None, *, detach: bool = False
) -> Iterator[RolloutGrads]:
    """Context under which a backward also gives each sequence's own gradient of θ.

    The knobs get their gradients as ever; summed over the batch, the rows are exactly what was added to them, up to rounding.

    Args:
        model: an adapted model. Its first tensor argument, or ``input_ids`` or ``inputs_embeds``, has the batch first.
        sequence_index: for packed or flattened inputs: which sequence each token belongs to, one integer per token, counted
            from 0. Set ``grads.sequence_index`` before each micro-batch where it changes.
        detach: keep the gradient from reaching the knobs. ``grads.leaves`` are then what to differentiate by.

    Yields:
        The rows, layer name → (batch, r), in the knobs' dtype; readable after the context too.

    Raises:
        ValueError: the model is not adapted, or a layer cannot tell which token is of which sequence.

    Example:
        >>> from antipasto import AntiPastoConfig, wrap
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> layers = wrap(model, AntiPastoConfig(target_modules=["0"], cache_dir=None))
        >>> with rollout_grads(model) as grads:
        ...     model(torch.randn(5, 4)).sum().backward()
        >>> grads["0"].shape
        torch.Size([5, 3])
    """
    grads = RolloutGrads(sequence_index, detach=detach)
    layers = adapted_layers(model)
    previous = [layer.spread_theta for layer in layers.values()]
    handle = unwrap(model).register_forward_pre_hook(grads.on_forward, with_kwargs=True, prepend=True)
    for name, layer in layers.items():
        layer.spread_theta = _bound(grads, name, layer)
    try:
        yield grads
    finally:
        handle.remove()
        for layer, spread in zip(layers.values(), previous, strict=True):
            layer.spread_theta = spread


def _bound(grads: RolloutGrads, name: str, layer: AntiPastoLinear) -> Any:
    return lambda theta, x: grads.spread(name, theta, x)
