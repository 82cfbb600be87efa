"""Read rollouts.jsonl: shares by step and sampling policy, and a selection of rollouts to read.

    highest, lowest   by hackward score: the cosine of the hack direction with the gradient of the rollout's own loss
    sample            drawn at random from all

In the first two, equal texts to the same prompt in the same step are listed once. The file is read twice, once for the numbers
and once for the selected lines, so a long run's texts are never all in memory.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from antipasto.evaluation.rollout_log import Rollout, read

EACH = 200  # of the highest, of the lowest, and of the sample
LONGEST = 2000
"""Maximum characters of a text to show; the middle of a longer text is cut out."""
MARKUP = 400
"""Approximate size of the HTML around a text."""

T = TypeVar("T")


@dataclass
class Shown(Rollout):
    """One rollout of the page.

    Attributes:
        line: its line in rollouts.jsonl, from 1.
        times: number of rollouts of this step with the same prompt and text.
    """

    line: int = 0
    times: int = 1


Shares = dict[tuple[int, str], dict[str, list[float]]]
"""Step and policy → measure → its values of the rollouts."""


@dataclass(frozen=True)
class Rollouts:
    """A run's rollouts.

    Attributes:
        total: number of rollouts.
        scored: number of rollouts with a hackward score.
        exploits: step, from 1 → number of exploits, number of rollouts; empty without an oracle.
        curves: measure → policy → (step, mean over the step's rollouts of that policy), step from 1 as in metrics.jsonl.
        highest: by hackward score, highest first.
        lowest: lowest first.
        sample: at random, in the order of the run.
    """

    total: int
    scored: int
    exploits: dict[float, tuple[float, float]]
    curves: dict[str, dict[str, list[tuple[float, float]]]]
    highest: list[Shown]
    lowest: list[Shown]
    sample: list[Shown]

    @property
    def shown(self) -> int:
        """How many are on the page."""
        return len(self.highest) + len(self.lowest) + len(self.sample)


def read_rollouts(path: Path, notes: list[str], *, budget: int) -> Rollouts:
    """Read the log.

    Args:
        notes: gets a sentence if the last line is cut off.
        budget: maximum characters of text; each list gets a third.

    Raises:
        ValueError: a line is damaged; names the line.
    """
    shares: Shares = {}
    scores: list[float] = []
    keys: list[int] = []
    for rollout in read(path, notes):
        share = shares.setdefault((rollout.step, rollout.view), {})
        for measure, value in _measures(rollout).items():
            share.setdefault(measure, []).append(value)
        scores.append(math.nan if rollout.hackward is None else rollout.hackward)
        keys.append(_key(rollout))
    ranked = sorted((i for i, score in enumerate(scores) if math.isfinite(score)), key=lambda i: scores[i])
    times = Counter(keys)
    highest = _distinct(reversed(ranked), keys, EACH)
    # so that the two lists do not overlap in a short run
    lowest = _distinct(ranked[: len(ranked) // 2], keys, EACH)
    highest = [i for i in highest if scores[i] >= scores[ranked[len(ranked) // 2]]]
    rest = range(len(keys))
    sample = sorted(random.Random(0).sample(rest, min(EACH if ranked else 2 * EACH, len(rest))))
    wanted = {*highest, *lowest, *sample}
    texts = {
        i: Shown(**vars(rollout), line=i + 1, times=times[keys[i]])
        for i, rollout in enumerate(read(path, []))
        if i in wanted
    }
    lists = [within([texts[i] for i in numbers], _texts, budget // 3) for numbers in (highest, lowest, sample)]
    return Rollouts(len(keys), len(ranked), _exploits(shares), _curves(shares), *lists)


def _key(rollout: Rollout) -> int:
    return hash(json.dumps([rollout.step, rollout.prompt, rollout.completion]))


def _texts(rollout: Rollout) -> Sequence[Any]:
    return rollout.prompt, rollout.completion


def _measures(rollout: Rollout) -> dict[str, float]:
    found = {"reward": rollout.reward}
    if rollout.oracle is not None:
        found |= {"solved": float(rollout.solved), "exploited": float(rollout.exploits)}
    if rollout.flagged is not None:
        found["flagged"] = float(rollout.flagged)
    return found


def _exploits(shares: Shares) -> dict[float, tuple[float, float]]:
    found: dict[float, tuple[float, float]] = {}
    for (step, _), share in shares.items():
        if values := share.get("exploited"):
            hits, total = found.get(step + 1.0, (0.0, 0.0))
            found[step + 1.0] = hits + sum(values), total + len(values)
    return found


def _curves(shares: Shares) -> dict[str, dict[str, list[tuple[float, float]]]]:
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (step, view), share in sorted(shares.items()):
        for measure, values in share.items():  # rollouts on which the oracle abstained are not in these
            curves.setdefault(measure, {}).setdefault(view, []).append((step + 1.0, sum(values) / len(values)))
    return curves


def _distinct(order: Iterator[int] | Sequence[int], keys: Sequence[int], number: int) -> list[int]:
    found: dict[int, int] = {}
    for i in order:
        found.setdefault(keys[i], i)
        if len(found) == number:
            break
    return list(found.values())


def within(items: Iterable[T], said: Callable[[T], Sequence[Any]], budget: int) -> list[T]:
    """The first items, and at least one, whose texts fit on the page.

    Args:
        said: the texts of an item, of which the page shows at most `LONGEST` characters each.
        budget: maximum characters of all of them.
    """
    kept: list[T] = []
    for item in items:
        budget -= sum(MARKUP + min(LONGEST, len(json.dumps(text, default=str))) for text in said(item))
        if budget < 0 and kept:
            break
        kept.append(item)
    return kept
