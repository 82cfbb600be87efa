"""Advantages within groups.

    A_b = (R_b − mean R) / (std R + 1e-4)      mean and, where rewards are scaled, std over those that b is compared with

One prompt's rollouts are compared among each other: those of the deployed policy apart from those of the policy that sees the
quarantine, since the two have different means. As TRL has it, std is the unbiased one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
_EPSILON = 1e-4  # TRL's


def deployed_positions(num_generations: int, deploy_fraction: float) -> Tensor:
    """Which of one prompt's rollouts are sampled from the deployed policy, (num_generations,) bool, spread evenly.

    Raises:
        ValueError: the fraction does not divide the rollouts, or leaves a single one with nothing to be compared with.

    Example:
        >>> deployed_positions(4, 0.5)
        tensor([False,  True, False,  True])
    """
    if not 0 <= deploy_fraction <= 1:
        raise ValueError(f"deploy_fraction is a share of the rollouts, from 0 to 1, got {deploy_fraction}.")
    k = round(deploy_fraction * num_generations)
    if abs(k - deploy_fraction * num_generations) > 1e-6 or 1 in (k, num_generations - k):
        raise ValueError(
            f"deploy_fraction={deploy_fraction} of num_generations={num_generations} rollouts is "
            f"{deploy_fraction * num_generations:g}: both shares must be whole numbers, and not 1, since advantages are taken "
            "within each. Change num_generations, or deploy_fraction (0: none)."
        )
    positions = torch.arange(num_generations + 1) * k // num_generations
    return positions.diff() > 0


def group_advantages(rewards: Tensor, deployed: Tensor, scale: Scale) -> Tensor:
    """Advantages within each prompt's two shares.

    Args:
        rewards: (prompts, num_generations); NaN where a rollout has none.
        deployed: (num_generations,) bool: which share a rollout is of.
        scale: divide by the std of the share (``"group"``), of all rewards (``"batch"``), or by nothing.

    Returns:
        (prompts, num_generations); 0 where a rollout has no reward, or none to be compared with.
    """
    advantages = torch.empty_like(rewards)
    for share in (deployed, ~deployed):
        group = rewards[:, share]
        centred = group - group.nanmean(1, keepdim=True)
        if scale == "group":
            centred = centred / (_nanstd(group, 1) + _EPSILON)
        elif scale == "batch":
            centred = centred / (_nanstd(rewards.view(1, -1), 1) + _EPSILON)
        advantages[:, share] = centred
    return advantages.nan_to_num(0.0)


def _nanstd(x: Tensor, dim: int) -> Tensor:
    """Unbiased standard deviation of what is not NaN; 0 of a single number."""
    count = (~x.isnan()).sum(dim, keepdim=True)
    squares = (x - x.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (count - 1).clamp_min(1)).sqrt()
