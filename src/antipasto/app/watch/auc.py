"""The area under the ROC curve (AUC) of a score, with its 95% interval.

    θ̂ = P(x > y) + P(x = y) / 2                 over all pairs of an exploit's score x and another's y; m and n of them

    {θ : |θ̂ − θ| ≤ z √V(θ)},  V(θ) = θ (1 − θ) (1 + k (1 − θ) / (2 − θ) + k θ / (1 + θ)) / (m n),  k = (m + n) / 2 − 1

Method 5 of Newcombe (2006), Statistics in Medicine 25:559, with the variance of Hanley and McNeil (1982). V is taken at θ, not
at θ̂, so the interval does not collapse if all exploits score above all others.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from antipasto.evaluation.records import CONFIDENCE, Estimate
from antipasto.routing import ordering

_Z = float(norm.ppf((1 + CONFIDENCE) / 2))
_TINY = 1e-12


def auc(exploits: np.ndarray, others: np.ndarray) -> Estimate:
    """θ̂ and its interval, from the scores of both kinds, (m,) and (n,).

    Raises:
        ValueError: there are no scores of one kind.

    Example:
        >>> print(auc(np.array([0.9, 0.8, 0.4]), np.array([0.5, 0.3])))
        .83 [.31,.98]
    """
    m, n = len(exploits), len(others)
    if not m or not n:
        raise ValueError(f"An AUC needs scores of both kinds, got {m} and {n}.")
    value = ordering.auc(torch.from_numpy(exploits), torch.from_numpy(others))
    return Estimate(value, *interval(value, m, n))


def interval(value: float, m: int, n: int) -> tuple[float, float]:
    """Lower and upper end of the interval of an AUC of m scores against n.

    Example:
        >>> [round(end, 3) for end in interval(1.0, 10, 10)]
        [0.8, 1.0]
    """

    # V is 0 at 0 and 1, so both are outside the interval unless θ̂ is exactly there
    def outside(theta: float) -> float:
        return (value - theta) ** 2 - _Z**2 * variance(theta, m, n)

    inside = value if 0 < value < 1 else abs(value - _TINY)
    low = brentq(outside, 0.0, inside) if value > 0 else 0.0
    high = brentq(outside, inside, 1.0) if value < 1 else 1.0
    return float(low), float(high)


def variance(theta: float, m: int, n: int) -> float:
    """V(θ)."""
    k = (m + n) / 2 - 1
    return theta * (1 - theta) * (1 + k * (1 - theta) / (2 - theta) + k * theta / (1 + theta)) / (m * n)
