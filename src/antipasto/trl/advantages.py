"""Advantages within groups.

    A_b = (R_b − mean R) / (std R + 1e-4)      mean over the group of rollout b; std as ``scale`` says, unbiased as in TRL

A group consists of the rollouts of one prompt that come from the same policy. Rollouts of the deployed policy and rollouts of
the policy with the quarantine form separate groups, since the two policies have different mean rewards.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
_EPSILON = 1e-4  # TRL's


def deployed_positions(num_generations: int, deploy_fraction: float) -> Tensor:
    """Which of a prompt's rollouts to sample from the deployed policy: (num_generations,) bool, evenly spread.

    Raises:
        ValueError: the fraction does not give a whole number of rollouts, or leaves a group of one.

    Example:
        >>> deployed_positions(4, 0.5)
        tensor([False,  True, False,  True])
    """
    if not 0 <= deploy_fraction <= 1:
        raise ValueError(f"deploy_fraction must be a share of the rollouts, from 0 to 1, got {deploy_fraction}.")
    k = round(deploy_fraction * num_generations)
    if abs(k - deploy_fraction * num_generations) > 1e-6 or 1 in (k, num_generations - k):
        raise ValueError(
            f"deploy_fraction={deploy_fraction} of num_generations={num_generations} rollouts is "
            f"{deploy_fraction * num_generations:g}: both shares must be whole numbers, and not 1, since advantages are "
            "computed within each. Change num_generations or deploy_fraction (0 turns deployed sampling off)."
        )
    positions = torch.arange(num_generations + 1) * k // num_generations
    return positions.diff() > 0


def group_advantages(rewards: Tensor, deployed: Tensor, scale: Scale) -> Tensor:
    """Compute advantages within each prompt's two groups.

    Args:
        rewards: (prompts, num_generations); NaN where a rollout has no reward.
        deployed: (num_generations,) bool: whether a rollout belongs to the deployed policy's group.
        scale: divide by the std of the group (``"group"``), of all rewards (``"batch"``), or not at all (``"none"``).

    Returns:
        (prompts, num_generations); 0 where a rollout has no reward, or is the only one with a reward in its group.
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
    """Unbiased standard deviation, ignoring NaN; 0 for a single number."""
    count = (~x.isnan()).sum(dim, keepdim=True)
    squares = (x - x.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (count - 1).clamp_min(1)).sqrt()
