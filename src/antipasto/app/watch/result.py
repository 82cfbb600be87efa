"""The result of `antipasto watch`."""

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
    """A window of consecutive steps.

    Attributes:
        first: first step.
        last: last step.
        above: share of its scored rollouts above the threshold.
    """

    first: int
    last: int
    above: Rate


@dataclass(frozen=True)
class Watched:
    """The result of `watch`.

    Attributes:
        out: the folder.
        files: paths of the files.
        index: of the scored rollouts.
        scores: by name of `SCORES`, (n,) each; NaN if there is no probe.
        monitor: the monitor that scored them.
        above: share of all rollouts above the threshold.
        windows: the same by window of steps.
        onset: where the share begins to rise; None if no clear rise was found.
        comparison: None unless it was asked for.
        facts: the contents of `watch.json`.
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
    facts: dict[str, Any]

    @property
    def page(self) -> Path:
        return self.out / PAGE

    @property
    def flagged(self) -> np.ndarray:
        """Which rollouts are above the threshold, (n,) bool."""
        return self.scores["score"] > self.monitor.threshold
