"""Gates: which part of a step's displacement Δ a direction moves into the quarantine.

    gate         moved
    coordinate   Δ_j where t_j Δ_j < 0 and |t_j| > τ, with t the direction's effect sizes      (default)
    one_sided    −c V,  c = relu(−V Δ)                   the hack-ward part along the direction

A gradient step moves along −g, so Δ is hack-ward where −V Δ > 0, or t_j Δ_j < 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from antipasto.names import THRESHOLD, GateName
from antipasto.routing.directions import Direction, cosine

GATES: tuple[GateName, ...] = get_args(GateName)


@dataclass(frozen=True)
class Control:
    """Another direction, gate or threshold, with its own book in the same run. The fields are as in `Router`."""

    direction: Direction
    gate: GateName = "coordinate"
    threshold: float | None = None


class Gate:
    """A gate over all layers at once: the knobs as one vector (R,), V as (K, R), zero where a layer has fewer rows."""

    def __init__(self, control: Control, sizes: Mapping[str, int], device: torch.device) -> None:
        v = control.direction
        _check(control)
        rows = max(len(V) for V in v.values())
        self.kind = control.gate
        self.threshold = THRESHOLD if control.threshold is None else control.threshold
        self.layers = len(sizes)
        self.segment = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes.values()))).to(device)
        blocks = [
            F.pad(v[name], (0, 0, 0, rows - len(v[name]))) if name in v else torch.zeros(rows, r, dtype=torch.float32)
            for name, r in sizes.items()
        ]
        self.V = torch.cat(blocks, 1).to(device)  # (K, R)
        self.rows = sum(len(V) for V in v.values())
        effect = [(v.effect or {}).get(name, torch.zeros(r, dtype=torch.float32)) for name, r in sizes.items()]
        self.effect = torch.cat(effect).to(device)  # (R,)
        self.guarded = self.effect.abs() > self.threshold

    def to(self, device: torch.device) -> None:
        self.segment, self.V = self.segment.to(device), self.V.to(device)
        self.effect, self.guarded = self.effect.to(device), self.guarded.to(device)

    def along(self, u: Tensor) -> Tensor:
        """V u of every layer; (R,) to (K, L)."""
        products = self.V * u  # (K, R)
        return products.new_zeros(len(self.V), self.layers).index_add_(1, self.segment, products)

    def hackward(self, u: Tensor) -> Tensor:
        """‖relu(V u)‖ / ‖u‖, a scalar, for a u that points like a gradient; 0 for u = 0."""
        return self.along(u).relu().norm() / u.norm().clamp_min(torch.finfo(u.dtype).tiny)

    def alignment(self, gradients: Tensor) -> Tensor:
        """Cosine between V and each gradient, (b, R) to (b,), in [-1, 1]; 0 for a zero gradient.

        It is positive where a step against that gradient is hack-ward. For random gradients it is within about 1 / √R of 0.
        """
        return cosine(gradients, self.V.sum(0))

    def moved(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The part of a displacement to move into the quarantine (R,), and the share of coordinates or rows that fired."""
        if self.kind == "coordinate":
            mask = self.guarded & (self.effect * delta < 0)
            moved, fired = torch.where(mask, delta, 0), mask.float().mean()
        else:
            c = (-self.along(delta)).relu()  # (K, L)
            moved = -(c[:, self.segment] * self.V).sum(0)
            fired = (c != 0).sum() / self.rows
        return moved, fired


def _check(control: Control) -> None:
    if control.gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, got {control.gate!r}.")
    if control.gate == "coordinate" and control.direction.effect is None:
        raise ValueError(
            f"gate={control.gate!r} needs a direction with effect sizes, but this one has rows only: use 'one_sided'."
        )
    if control.gate != "coordinate" and control.threshold is not None:
        raise ValueError(f"threshold={control.threshold} needs gate='coordinate'; the gate {control.gate!r} has none.")
    if control.threshold is not None and not (math.isfinite(control.threshold) and control.threshold >= 0):
        raise ValueError(f"threshold must be an effect size of at least 0, got {control.threshold}.")
