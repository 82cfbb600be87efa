"""One θ per sequence of a batch: which sequences see which knobs, and how θ (b, r) is broadcast to a layer's tokens.

    θ_b = δS + q_b δS_hack,   q_b = 0 for a sequence that sees the deployed policy, else 1               (b, r)

Sequences of both kinds run in one batch at no extra cost: the products with U and Vh are the same for all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def batch_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """(batch, sequence) of a model call, from ``input_ids``, ``inputs_embeds`` or its first tensor; () if there is none."""
    candidates = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
    first = next((value for value in candidates if isinstance(value, Tensor)), None)
    return () if first is None else tuple(first.shape[:2])


def per_token(theta: Tensor, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshape θ (b, r), one row per sequence, so that it broadcasts to x's tokens.

    Args:
        theta: (b, r).
        x: (b, ..., i), or (b·s, i) if the model flattened its tokens before this layer.
        shape: (b, s) of the model call; () if unknown.

    Raises:
        ValueError: the shapes do not tell which token belongs to which sequence.

    Example:
        >>> per_token(torch.zeros(2, 5), torch.zeros(2, 3, 7), (2, 3)).shape
        torch.Size([2, 1, 5])
    """
    leading = tuple(x.shape[:-1])
    b = theta.shape[0]
    if len(leading) == 1 and len(shape) == 2 and shape[0] == b and leading[0] == b * shape[1]:
        return theta.repeat_interleave(shape[1], 0)
    if not leading or leading[0] != b or (shape and leading[0] != shape[0]):
        raise ValueError(
            f"inputs of shape {tuple(x.shape)} in a model call of shape {shape}, which does not tell which token belongs to "
            "which sequence. Pass sequence_index, one entry per token."
        )
    return theta.view(b, *[1] * (len(leading) - 1), theta.shape[1])


def in_backward() -> bool:
    """Whether autograd is running a backward: gradient checkpointing runs layers again there."""
    return torch._C._current_graph_task_id() != -1


class RowViews:
    """Which sequences of a batch see the quarantine; created by `antipasto.adapter.views.mixed`.

    The mask covers a whole batch. If the model is called on consecutive parts of the batch, each call uses the next part of
    the mask; after the last part it starts again.

    Gradient checkpointing runs layers again in the backward, with the mask of the present call. That is an error if it is
    not the mask of every call whose backward is to come, since nothing tells which of them is run again.
    """

    def __init__(self) -> None:
        self._deployed: Tensor | None = None
        self._next = 0  # first row of the next call
        self.shape: tuple[int, ...] = ()  # of the present call
        self.quarantine: Tensor | None = None  # q of the present call, (b, 1)
        # of the present call: one row that sees delta_s alone and one that sees both knobs, where there are any
        self.examples: list[int] = []
        self._mask: list[bool] | None = None  # of the present call: which rows see delta_s alone, where some may
        self._calls = 0
        self._needs_backward = False  # the present call
        self._waiting: dict[int, list[bool] | None] = {}  # calls whose backward is to come, and their masks
        self._begun: set[int] = set()  # those whose backward has begun

    @property
    def are_alike(self) -> bool:
        """Whether all rows see both knobs."""
        return self._deployed is None

    def set(self, deployed: Tensor | None) -> None:
        """Let the rows where ``deployed`` (n,) is true see ``delta_s`` alone; if None, all rows see both knobs."""
        self._deployed, self._next, self.quarantine = deployed, 0, None
        self._mask = None if deployed is None else []

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: select this call's part of the mask."""
        self._calls += 1
        self._needs_backward = torch.is_grad_enabled()
        while self._begun:
            self._waiting.pop(self._begun.pop(), None)
        if self._deployed is None:
            return
        self.shape = batch_shape(args, kwargs)
        b, n = (self.shape[0] if self.shape else 0), len(self._deployed)
        if b == 0 or self._next + b > n:
            raise ValueError(
                f"The model was called on a batch of {b} rows, with {n - self._next} of the mask's {n} rows left: "
                "call the model on those rows in order, all together or part by part."
            )
        deployed = self._deployed[self._next : self._next + b]
        self.quarantine = (~deployed).unsqueeze(1)
        self._mask = mask = deployed.tolist()
        self.examples = [mask.index(kind) for kind in (True, False) if kind in mask]
        self._next = (self._next + b) % n

    def theta(self, delta_s: Tensor, hack: Tensor) -> Tensor:
        """θ of the present call: in the knobs' shape, (r,) or (E, r), if all rows see both, else one for each row, (b, …)."""
        if self._deployed is None:
            theta = delta_s + hack
        elif self.quarantine is None:
            raise ValueError("A layer was called directly while rows see different knobs: call the model.")
        else:
            sees = self.quarantine.view(-1, *[1] * hack.ndim)
            theta = delta_s + torch.where(sees, hack, 0)
        if not torch.compiler.is_compiling():
            self._follow(theta)
        return theta

    def _follow(self, theta: Tensor) -> None:
        """Remember what a layer saw until its backward has begun, and check that there it sees the same again."""
        call, again = self._calls, in_backward()
        if self._needs_backward and not again:
            self._waiting[call] = self._mask
        if theta.requires_grad:
            theta.register_hook(lambda _: self._begun.add(call))
        if again and any(mask != self._mask for mask in self._waiting.values()):
            raise ValueError(
                "Gradient checkpointing runs a forward again, but its rows may see other knobs now: since then the mask was "
                "set, or the model was called on other rows. Call backward after each forward, before either."
            )

    def index(self, x: Tensor) -> Tensor:
        """For each row of x (n, …), its kind: its number in ``examples`` if there are two."""
        assert self.quarantine is not None
        return per_token(self.quarantine.long(), x, self.shape).reshape(x.shape[0])
