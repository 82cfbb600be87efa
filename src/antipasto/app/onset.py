"""Find the step where a share begins to rise: the change point of a segmented logistic regression, with an interval.

    hits_i ~ Binomial(total_i, p_i),    logit p_i = a + b · relu(step_i − τ)

Only steps up to the peak of the smoothed share are used. ℓ(τ) is the log-likelihood at the best a and b for that τ, on a grid
of steps (segmented regression: Muggeo 2003, Statistics in Medicine 22:3055).

    τ̂ = argmax ℓ,    95% interval {τ : 2 (ℓ(τ̂) − ℓ(τ)) ≤ χ²₁(.95) = 3.84}
    no onset if b ≤ 0, or if a constant share fits as well: 2 (ℓ(τ̂) − ℓ₀) ≤ `REJECTS`

The interval covers τ in .91 to .93 of simulated runs. It treats rollouts as independent. Rollouts of one prompt are not quite
independent, so it is somewhat too narrow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, xlogy
from scipy.stats import chi2

from antipasto.evaluation.records import CONFIDENCE

COVERS = float(chi2.ppf(CONFIDENCE, df=1))  # 3.84
REJECTS = 13.0
"""Critical value of the likelihood ratio against a constant share, 1% level, simulated (tests/test_watch_numbers.py).
The χ² value would be too low: τ is not identified under a constant share (Davies 1987), and the data are cut at their peak."""
MOST = 400  # steps on the grid; more steps are binned
_ROUNDS, _HALVINGS = 60, 30
_RIDGE = 1e-6  # keeps `a` finite if there is no hit before τ


@dataclass(frozen=True)
class Onset:
    """The step where a share begins to rise.

    Attributes:
        step: τ̂.
        low: lower end of its 95% interval.
        high: upper end.
        slope: b, the rise of the log-odds per step.
    """

    step: float
    low: float
    high: float
    slope: float

    def __str__(self) -> str:
        return f"step {self.step:.0f} [{self.low:.0f}, {self.high:.0f}]"


def find_onset(steps: np.ndarray, hits: np.ndarray, totals: np.ndarray) -> Onset | None:
    """Find the onset of a share; None if there is none.

    Args:
        steps: (n,), increasing.
        hits: (n,), hits at each step.
        totals: (n,), rollouts at each step.

    Example:
        >>> steps = np.arange(60)
        >>> hits = np.round(64 * expit(-3 + 0.2 * np.maximum(steps - 30, 0)))
        >>> print(find_onset(steps, hits, np.full(60, 64)))
        step 30 [29, 31]
    """
    x, k, n = _binned(*(np.asarray(values, dtype=float) for values in (steps, hits, totals)))
    peak = int(np.argmax(running_mean(k / n, smoothing(len(x))))) + 1
    x, k, n = x[:peak], k[:peak], n[:peak]
    if len(x) < 3:
        return None
    grid = x[:-1]
    likelihood, slope = _fit(np.maximum(x - grid[:, None], 0.0), k, n)
    best = int(np.argmax(likelihood))
    constant = float((xlogy(k, k.sum() / n.sum()) + xlogy(n - k, 1 - k.sum() / n.sum())).sum())
    if slope[best] <= 0 or 2 * (likelihood[best] - constant) <= REJECTS:
        return None
    inside = grid[2 * (likelihood[best] - likelihood) <= COVERS]
    return Onset(float(grid[best]), float(inside.min()), float(inside.max()), float(slope[best]))


def _binned(x: np.ndarray, k: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge neighbouring steps if there are more than `MOST`."""
    if len(x) <= MOST:
        return x, k, n
    starts = np.unique(np.linspace(0, len(x), MOST, endpoint=False).astype(int))
    sizes = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(k, starts), np.add.reduceat(n, starts)


def _fit(z: np.ndarray, k: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ℓ (g,) and b (g,) of the best fit for each row of z (g, i), by Newton's method with step halving."""
    scale = np.maximum(z.max(1, keepdims=True), 1e-12)  # for conditioning; undone at the end
    z = z / scale
    share = (k.sum() + 0.5) / (n.sum() + 1.0)
    a = np.full(len(z), np.log(share / (1 - share)))
    b = np.zeros(len(z))

    def objective(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        eta = a[:, None] + b[:, None] * z
        return (k * eta - n * np.logaddexp(0.0, eta)).sum(1) - _RIDGE * (a**2 + b**2) / 2

    now = objective(a, b)
    for _ in range(_ROUNDS):
        p = expit(a[:, None] + b[:, None] * z)
        r, w = k - n * p, n * p * (1 - p)
        ga, gb = r.sum(1) - _RIDGE * a, (r * z).sum(1) - _RIDGE * b
        haa, hab, hbb = w.sum(1) + _RIDGE, (w * z).sum(1), (w * z**2).sum(1) + _RIDGE
        det = haa * hbb - hab**2
        da, db = (hbb * ga - hab * gb) / det, (haa * gb - hab * ga) / det
        size = np.ones(len(z))
        for _ in range(_HALVINGS):
            worse = objective(a + size * da, b + size * db) < now
            if not worse.any():
                break
            size = np.where(worse, size / 2, size)
        else:
            size = np.where(worse, 0.0, size)
        a, b, before = a + size * da, b + size * db, now
        now = objective(a, b)
        if (now - before).max() < 1e-8:
            break
    return now, b / scale[:, 0]


# ── smoothing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def smoothing(number: int) -> int:
    """The window of the running mean of a curve: a twentieth of its steps."""
    return max(1, round(number / 20))


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean; the window, of at most all values, is cut off at the ends.

    Example:
        >>> running_mean(np.array([0.0, 3.0, 6.0, 0.0]), 3).tolist()
        [1.5, 3.0, 3.0, 3.0]
    """
    kernel = np.ones(window)
    sums, number = (np.convolve(x, kernel, mode="same") for x in (values, np.ones(len(values))))
    return sums / number
