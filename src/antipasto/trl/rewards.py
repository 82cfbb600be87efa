"""What a flagged rollout is still paid. Rewards (b, functions), NaN where a function gave none; weights (functions,).

    paid       where Σ_f w_f r_f > 0: what is less than nothing is not a reward, and stays as it is
    penalty    r = 0                 of the flagged ones that are paid
    discount   r ← (1 − depth) r     of all that are paid, by how deep their score is among hacks (`Monitor.depth`)

Discount: as Wu and Tang 2026 (arXiv:2604.01476) do with the score of a concept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def penalised(rewards: Tensor, flags: Tensor, weights: Tensor) -> Tensor:
    """Nothing for the flagged, (b,) bool.

    Example:
        >>> penalised(torch.tensor([[1.0], [-1.0], [1.0]]), torch.tensor([True, True, False]), torch.ones(1))
        tensor([[ 0.],
                [-1.],
                [ 1.]])
    """
    return torch.where((flags & _paid(rewards, weights))[:, None] & ~rewards.isnan(), 0.0, rewards)


def discounted(rewards: Tensor, depth: Tensor, weights: Tensor) -> Tensor:
    """Less for the deep, (b,) in [0, 1].

    Example:
        >>> discounted(torch.tensor([[1.0], [-1.0]]), torch.tensor([0.25, 0.25]), torch.ones(1))
        tensor([[ 0.7500],
                [-1.0000]])
    """
    return rewards * (1 - depth * _paid(rewards, weights))[:, None]


def _paid(rewards: Tensor, weights: Tensor) -> Tensor:
    return (rewards * weights).nansum(1) > 0
