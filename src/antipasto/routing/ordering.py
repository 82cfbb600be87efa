"""AUC: how well a number separates two groups.

    AUC = P(x > y) + P(x = y) / 2     over all x of one group and y of the other; .5 is chance

This equals Mann and Whitney's U divided by the number of pairs (x, y).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def auc(these: Sequence[float] | torch.Tensor, others: Sequence[float] | torch.Tensor) -> float:
    """Probability that a number of one group is higher than one of the other; ties count half.

    Args:
        these: numbers (n,).
        others: numbers (m,).

    Raises:
        ValueError: one side is empty.

    Example:
        >>> auc([2.0, 3.0], [1.0, 2.0])
        0.875
    """
    x, y = (torch.as_tensor(side, dtype=torch.float64) for side in (these, others))
    if not len(x) or not len(y):
        raise ValueError(f"An AUC needs numbers on both sides, got {len(x)} and {len(y)}.")
    y = y.sort().values
    below, up_to = torch.searchsorted(y, x), torch.searchsorted(y, x, right=True)
    return float((below + up_to).double().mean() / (2 * len(y)))
