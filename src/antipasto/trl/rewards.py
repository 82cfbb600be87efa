"""Reduce the rewards of flagged rollouts. Rewards are (b, functions), NaN if a function gave none; weights (functions,).

    paid       rollouts with Σ_f w_f r_f > 0; rewards of others are not changed
    penalty    r = 0                 for flagged rollouts that are paid
    discount   r ← (1 − depth) r     for all rollouts that are paid, with depth in [0, 1] from their score (`Monitor.depth`)

The discount follows Wu and Tang 2026 (arXiv:2604.01476), who use the score of a concept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def penalised(rewards: Tensor, flags: Tensor, weights: Tensor) -> Tensor:
    """Set the rewards of flagged (b,) bool rollouts to 0, if they are paid.

    Example:
        >>> penalised(torch.tensor([[1.0], [-1.0], [1.0]]), torch.tensor([True, True, False]), torch.ones(1))
        tensor([[ 0.],
                [-1.],
                [ 1.]])
    """
    return torch.where((flags & _paid(rewards, weights))[:, None] & ~rewards.isnan(), 0.0, rewards)


def discounted(rewards: Tensor, depth: Tensor, weights: Tensor) -> Tensor:
    """Multiply the rewards of paid rollouts by 1 − depth, with depth (b,) in [0, 1].

    Example:
        >>> discounted(torch.tensor([[1.0], [-1.0]]), torch.tensor([0.25, 0.25]), torch.ones(1))
        tensor([[ 0.7500],
                [-1.0000]])
    """
    return rewards * (1 - depth * _paid(rewards, weights))[:, None]


def _paid(rewards: Tensor, weights: Tensor) -> Tensor:
    return (rewards * weights).nansum(1) > 0
