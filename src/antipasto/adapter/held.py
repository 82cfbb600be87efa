"""W_θ of a layer, kept from one forward to the next for as long as the knobs are what they were.

What is compared is the knobs' values, all r of them: `Tensor._version` does not change under a fused optimizer or a write
through ``.data``, and a weight that is taken for fresh because of it would train nothing and say nothing. W itself is known
by its storage and version: as everywhere in this library, weights are loaded first and wrapped after.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_VIEWS = 2  # as trained and deployed take turns in one step


def source(weight: Tensor) -> tuple[int, int]:
    """By which a weight is known to be the same as before, as far as can be seen without reading it."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


@dataclass
class _Entry:
    theta: Tensor
    source: tuple[int, int]
    strong: Tensor | None
    weak: weakref.ref[Tensor]


class HeldWeights:
    """The W_θ of the θ that were seen last."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def get(
        self, theta: Tensor, weight: Tensor, dtype: torch.dtype, build: Callable[[], Tensor], *, hold: bool
    ) -> Tensor:
        """W_θ, at hand or built.

        Args:
            theta: (r,).
            weight: W.
            dtype: of W_θ.
            build: makes it.
            hold: keep it until other θ come; else, only for as long as somebody else does. A forward with gradient leaves W_θ
                to its graph, so that the backward frees it.
        """
        where = source(weight)
        for entry in self._entries:
            if entry.source == where and entry.theta.device == theta.device and torch.equal(entry.theta, theta):
                merged = entry.weak()
                if merged is not None and merged.dtype is dtype:
                    entry.strong = merged if hold else None
                    return merged
        # built in inference mode, it could not be used with gradient afterwards
        with torch.inference_mode(False), torch.no_grad():
            merged, seen = build(), theta.clone()
        entry = _Entry(seen, where, merged if hold else None, weakref.ref(merged))
        self._entries = [*[e for e in self._entries if e.weak() is not None][1 - _VIEWS :], entry]
        return merged

    def clear(self) -> None:
        """Let go of everything."""
        self._entries = []
