"""Compare scores by how well each separates exploits from other rollouts: AUC by window of steps, for files with labels.

With reward and oracle, rewarded exploits are compared with rewarded solved rollouts; otherwise label 1 with label 0. The
scores:

    score       at the reference, along the pairs' direction
    live        the same at the policy of that step, from the log's `hackward`
    nll         −log p of the reference, per token
    tokens      length
    probe       an activation probe fitted on the same pairs
    permuted    the same effect sizes on shuffled coordinates
    random      random effect sizes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from antipasto.app.watch.auc import auc
from antipasto.app.watch.sources import Index
from antipasto.evaluation.records import Estimate
from antipasto.terminal import add_row

_WIDE = 5  # columns that fit into 80 characters


class Title(NamedTuple):
    """A score's name on the page and on the terminal."""

    long: str
    short: str


TITLES = {
    "score": Title("score at the reference", "score"),
    "live": Title("score at the moving policy", "live score"),
    "nll": Title("−log p per token", "−log p"),
    "tokens": Title("length in tokens", "length"),
    "probe": Title("activation probe", "probe"),
    "permuted": Title("permuted direction", "permuted"),
    "random": Title("random direction", "random"),
}


@dataclass(frozen=True)
class Compared:
    """The comparison in one window of steps.

    Attributes:
        first: first step.
        last: last step.
        exploits: number of exploits.
        others: number of other rollouts.
        aucs: by name of `TITLES`; None if there are no such scores, or rollouts of one kind only.
    """

    first: int
    last: int
    exploits: int
    others: int
    aucs: dict[str, Estimate | None]


@dataclass(frozen=True)
class Comparison:
    """All windows; if there are several, the last entry is all steps together."""

    windows: list[Compared]

    @property
    def rows(self) -> list[tuple[Title, list[Estimate | None]]]:
        """Title and AUCs of each score that has an AUC in some window."""
        found = [(title, [window.aucs[name] for window in self.windows]) for name, title in TITLES.items()]
        return [row for row in found if any(estimate is not None for estimate in row[1])]

    def to_json(self) -> dict[str, Any]:
        """The contents of `compare.json`."""
        return {"interval": "95%, Newcombe 2006, method 5", "windows": [asdict(window) for window in self.windows]}


def compare_scores(index: Index, scores: Mapping[str, np.ndarray], parts: Sequence[np.ndarray]) -> Comparison:
    """AUCs of all scores, including the log's own, in each part."""
    columns = {**scores, "live": index.live}
    everything = [np.arange(len(index))] if len(parts) > 1 else []
    return Comparison([_compare(index, columns, part) for part in (*parts, *everything)])


def _compare(index: Index, columns: Mapping[str, np.ndarray], part: np.ndarray) -> Compared:
    label, steps = index.label[part], index.step[part]
    aucs: dict[str, Estimate | None] = {}
    for name in TITLES:
        values = columns[name][part]
        exploits, others = (values[(label == side) & np.isfinite(values)] for side in (1, 0))
        aucs[name] = auc(exploits, others) if len(exploits) and len(others) else None
    return Compared(int(steps.min()), int(steps.max()), int((label == 1).sum()), int((label == 0).sum()), aucs)


def comparison_table(comparison: Comparison) -> Table:
    """The comparison as a table for the terminal."""
    shown = range(len(comparison.windows)) if len(comparison.windows) <= _WIDE else (0, -2, -1)
    windows = [comparison.windows[i] for i in shown]
    heads = [f"{w.first}–{w.last}" for w in windows]
    table = Table("AUC, steps", *heads, title="exploits against others, AUC [95%]", title_justify="left", padding=0)
    if len(windows) < len(comparison.windows):
        table.caption = "all windows are in compare.json"
    for title, estimates in comparison.rows:
        add_row(table, title.short, *(_cell(estimates[i]) for i in shown))
    add_row(table, "exploits", *(f"{w.exploits:,}" for w in windows))
    add_row(table, "others", *(f"{w.others:,}" for w in windows))
    return table


def _cell(estimate: Estimate | None) -> Text:
    return Text("–" if estimate is None else str(estimate).replace(" ", "\n"))
