"""Keep a layer's W_θ from one forward to the next, for as long as the knobs do not change.

The key is the knobs' values, all r of them. `Tensor._version` would not do: it does not change under a fused optimizer or a
write through ``.data``, and a stale W_θ would silently stop training. W itself is identified by its storage and version: as
everywhere in this library, weights are loaded first and wrapped afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_VIEWS = 2  # a training step may alternate between the model as trained and as deployed


def source(weight: Tensor) -> tuple[int, int]:
    """Cheap identity of a weight: two equal values mean the same weight, as far as can be told without reading it."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


@dataclass
class _Entry:
    theta: Tensor
    source: tuple[int, int]
    strong: Tensor | None
    weak: weakref.ref[Tensor]


class HeldWeights:
    """The W_θ of the most recent θ."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def get(
        self, theta: Tensor, weight: Tensor, dtype: torch.dtype, build: Callable[[], Tensor], *, hold: bool
    ) -> Tensor:
        """Return W_θ, kept or newly built.

        Args:
            theta: (r,).
            weight: W.
            dtype: of W_θ.
            build: builds W_θ.
            hold: keep W_θ until newer θ replace it. If False, keep only a weak reference: after a forward with gradient the
                graph owns W_θ, and the backward frees it.
        """
        where = source(weight)
        for entry in self._entries:
            if entry.source == where and entry.theta.device == theta.device and torch.equal(entry.theta, theta):
                merged = entry.weak()
                if merged is not None and merged.dtype is dtype:
                    entry.strong = merged if hold else None
                    return merged
        # a tensor built in inference mode could not be used with gradient later
        with torch.inference_mode(False), torch.no_grad():
            merged, seen = build(), theta.clone()
        entry = _Entry(seen, where, merged if hold else None, weakref.ref(merged))
        self._entries = [*[e for e in self._entries if e.weak() is not None][1 - _VIEWS :], entry]
        return merged

    def clear(self) -> None:
        self._entries = []
