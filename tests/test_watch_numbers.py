"""The numbers behind `antipasto watch`: AUCs and onsets with intervals that keep their word."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import binomtest

from antipasto.app import onset
from antipasto.app.onset import find_onset
from antipasto.app.watch.auc import auc, interval, variance

Z = 1.959963984540054


# ── AUC ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_of_one_against_one_the_interval_is_wilsons() -> None:
    """With m = n = 1, V = θ (1 − θ), of which Wilson's interval for one trial is the solution."""
    wilson = binomtest(1, 1).proportion_ci(method="wilson")
    assert interval(1.0, 1, 1) == pytest.approx((wilson.low, wilson.high))
    assert interval(1.0, 1, 1)[0] == pytest.approx(1 / (1 + Z**2))  # by hand


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.data())
def test_its_ends_are_roots_of_newcombes_quartic(m: int, n: int, data: st.DataObject) -> None:
    """(θ̂ − θ)² m n (2 − θ) (1 + θ) = z² θ (1 − θ) ((2 − θ) (1 + θ) + k (1 − θ) (1 + θ) + k θ (2 − θ)); between them, less."""
    value, k = data.draw(st.integers(0, 2 * m * n)) / (2 * m * n), (m + n) / 2 - 1

    def quartic(t: np.ndarray) -> np.ndarray:
        a, b = 2 - t, 1 + t
        return (value - t) ** 2 * a * b - Z**2 * t * (1 - t) * (a * b + k * (1 - t) * b + k * t * a) / (m * n)

    low, high = interval(value, m, n)
    assert 0 <= low <= value <= high <= 1
    assert quartic(np.array([low, high])) == pytest.approx([0, 0], abs=1e-9)
    assert (quartic(np.linspace(low, high, 50)[1:-1]) < 0).all()


def test_the_variance_is_hanley_and_mcneils() -> None:
    """V = (θ(1−θ) + (N−1)(Q₁ − θ²) + (N−1)(Q₂ − θ²)) / mn with Q₁ = θ/(2−θ), Q₂ = 2θ²/(1+θ), N the mean of m and n.

    For their example, θ = .893 of 51 against 58 (Radiology 143:29, 1982), that is a standard error of .032.
    """
    theta, m, n = 0.893, 51, 58
    q1, q2 = theta / (2 - theta), 2 * theta**2 / (1 + theta)
    spread = (theta * (1 - theta) + ((m + n) / 2 - 1) * (q1 + q2 - 2 * theta**2)) / (m * n)
    assert variance(theta, m, n) == pytest.approx(spread)
    assert variance(theta, m, n) ** 0.5 == pytest.approx(0.032, abs=5e-4)
    low, high = interval(theta, m, n)
    assert (low, high) == (pytest.approx(0.811, abs=1e-3), pytest.approx(0.940, abs=1e-3))


def test_it_does_not_collapse_where_all_exploits_are_above() -> None:
    found = auc(np.arange(10) + 100.0, np.arange(10.0))
    assert found.value == found.high == 1
    assert found.low == pytest.approx(0.8002, abs=1e-4)
    mirrored = auc(np.arange(10.0), np.arange(10) + 100.0)
    assert (mirrored.low, mirrored.high) == (0.0, pytest.approx(1 - found.low))


def test_ties_count_half() -> None:
    assert auc(np.array([1.0, 1.0]), np.array([1.0, 0.0])).value == 0.75
    with pytest.raises(ValueError, match="got 2 and 0"):
        auc(np.ones(2), np.ones(0))


# ── onset ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tau", "steps", "start", "slope", "number"), [(60, 160, -4, 0.1, 64), (40, 100, -3, 0.05, 16)]
)
def test_the_interval_covers_the_onset(tau: int, steps: int, start: float, slope: float, number: int) -> None:
    rng = np.random.default_rng(1)
    x = np.arange(steps)
    p = expit(start + slope * np.maximum(x - tau, 0))
    found = [find_onset(x, rng.binomial(number, p), np.full(steps, number)) for _ in range(60)]
    assert None not in found
    covered = sum(one is not None and one.low <= tau <= one.high for one in found)
    assert covered >= 50, "of 60; over 300 runs it is .91 to .93"


def test_a_constant_share_has_no_onset() -> None:
    rng = np.random.default_rng(0)
    x = np.arange(100)
    found = [find_onset(x, rng.binomial(32, 0.05, 100), np.full(100, 32)) for _ in range(100)]
    assert sum(one is not None for one in found) <= 3


@pytest.mark.thorough
def test_the_level_is_one_percent() -> None:
    """Of `REJECTS`, simulated; that of χ² with two degrees of freedom, 9.21, would be 4 to 5%."""
    rng = np.random.default_rng(0)
    x = np.arange(160)
    number = sum(find_onset(x, rng.binomial(64, 0.05, 160), np.full(160, 64)) is not None for _ in range(2000))
    assert binomtest(number, 2000, 0.01, alternative="greater").pvalue > 0.01


def test_a_falling_share_and_a_short_run_have_none() -> None:
    x = np.arange(50)
    assert find_onset(x, 60 - x, np.full(50, 64)) is None
    assert find_onset(np.arange(2), np.array([0, 64]), np.full(2, 64)) is None
    assert find_onset(np.zeros(1), np.zeros(1), np.ones(1)) is None


def test_of_none_and_then_all_any_earlier_onset_explains_as_much() -> None:
    """A steeper line from before fits such counts as well: the interval says so, and the numbers stay finite."""
    x = np.arange(40)
    found = find_onset(x, np.where(x < 20, 0, 64), np.full(40, 64))
    assert found is not None
    assert found.low <= 18 <= found.step <= found.high <= 20
    assert np.isfinite([found.low, found.slope]).all()


def test_a_fall_after_the_peak_does_not_move_it() -> None:
    x = np.arange(120)
    p = expit(-4 + 0.2 * np.maximum(x - 30, 0))
    hits = np.where(x < 80, np.round(64 * p), 2)
    found = find_onset(x, hits, np.full(120, 64))
    assert found is not None
    assert found.low <= 30 <= found.high


def test_many_steps_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onset, "MOST", 100)
    x = np.arange(1000)
    hits = np.round(64 * expit(-4 + 0.02 * np.maximum(x - 500, 0)))
    found = find_onset(x, hits, np.full(1000, 64))
    assert found is not None
    assert found.low - 10 <= 500 <= found.high + 10
