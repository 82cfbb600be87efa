"""A model of two adapted layers, a direction for it, and what routing makes of its knobs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import antipasto as ap

SIZES = (6, 5)  # r of the two layers


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    ap.wrap(model, ap.AntiPastoConfig(target_modules=["0", "2"], cache_dir=None))
    return model


def make_direction(k: int = 1, seed: int = 0) -> ap.Direction:
    generator = torch.Generator().manual_seed(seed)
    rows = {
        name: torch.linalg.qr(torch.randn(r, k, generator=generator)).Q.T for name, r in zip("02", SIZES, strict=True)
    }
    effect = {name: torch.randn(r, generator=generator) for name, r in zip("02", SIZES, strict=True)}
    return ap.Direction(rows, effect=effect)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def losses_of(model: nn.Module, seed: int, parts: int) -> list[Tensor]:
    """Of one batch, in so many micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 8, generator=generator), torch.randn(8, 5, generator=generator)
    return [(model(a) - b).square().sum() / 8 for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True)]


def loss_of(model: nn.Module, seed: int) -> Tensor:
    return losses_of(model, seed, 1)[0]


def step(model: nn.Module, optimizer: Any, seed: int, micro: int = 1, clip: float | None = None) -> None:
    optimizer.zero_grad()
    for loss in losses_of(model, seed, micro):
        loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(trainable(model), clip)
    optimizer.step()


def flat(model: nn.Module, what: str) -> Tensor:
    return torch.cat([getattr(layer, what).detach() for layer in ap.knobs(model).values()])


def theta(model: nn.Module) -> Tensor:
    return flat(model, "delta_s") + flat(model, "delta_s_hack")


def refuses(router: ap.Router, optimizer: Any, match: str) -> None:
    """It does not attach itself to this optimizer."""
    with pytest.raises(ValueError, match=match), router.attach(optimizer):
        pass
