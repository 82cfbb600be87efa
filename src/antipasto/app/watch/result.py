"""What comes of watching rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from antipasto.app.onset import Onset
from antipasto.app.watch.compare import Comparison
from antipasto.app.watch.sources import Index
from antipasto.evaluation.records import Rate
from antipasto.routing.monitor import Monitor

PAGE = "watch.html"


@dataclass(frozen=True)
class Window:
    """Some steps, one after the other.

    Attributes:
        first: step.
        last: step.
        above: share of its scored rollouts above the threshold.
    """

    first: int
    last: int
    above: Rate


@dataclass(frozen=True)
class Watched:
    """What came of it.

    Attributes:
        out: the folder.
        files: names of the files.
        index: of the rollouts that were scored.
        scores: by name of `SCORES`, (n,) each; NaN for a probe that there is none of.
        monitor: what scored them.
        above: share above the threshold, of all.
        windows: the same by window of steps.
        onset: where it begins to rise; None: it does not, or too little to tell.
        comparison: None unless it was asked for.
        by_oracle: whether a label is what reward and oracle say together.
        facts: as `watch.json` has them.
    """

    out: Path
    files: list[Path]
    index: Index
    scores: dict[str, np.ndarray]
    monitor: Monitor
    above: Rate
    windows: list[Window]
    onset: Onset | None
    comparison: Comparison | None
    by_oracle: bool
    facts: dict[str, Any]

    @property
    def page(self) -> Path:
        """The page."""
        return self.out / PAGE

    @property
    def flagged(self) -> np.ndarray:
        """Which are above the threshold, (n,) bool."""
        return self.scores["score"] > self.monitor.threshold
