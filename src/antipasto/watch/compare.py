"""How well each score tells exploits from the rest, by window of steps, where the files have labels.

Exploits against solved ones, both rewarded, where the files have reward and oracle; else label 1 against label 0. What every
window shows beside the score:

    score       at the reference, along the pairs' direction
    live        the same at the policy as it was, from the log: `hackward`
    nll         −log p of the reference, per token
    tokens      length
    probe       an activation probe of the same pairs
    permuted    the same effect sizes on shuffled coordinates
    random      random effect sizes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from antipasto.records import Estimate
from antipasto.terminal import add_row
from antipasto.watch.auc import auc
from antipasto.watch.sources import Index

TITLES = {
    "score": "score at the reference",
    "live": "score at the moving policy",
    "nll": "−log p of the reference, per token",
    "tokens": "length in tokens",
    "probe": "activation probe of the same pairs",
    "permuted": "permuted direction",
    "random": "random direction",
}


@dataclass(frozen=True)
class Compared:
    """One window.

    Attributes:
        first: step.
        last: step.
        exploits: how many.
        others: how many.
        aucs: by name of `TITLES`; None where there are no such scores, or rollouts of one kind only.
    """

    first: int
    last: int
    exploits: int
    others: int
    aucs: dict[str, Estimate | None]


@dataclass(frozen=True)
class Comparison:
    """All windows, and all steps together at the end where there are several."""

    windows: list[Compared]

    @property
    def rows(self) -> list[tuple[str, list[Estimate | None]]]:
        """Title and AUCs of each score that any window has."""
        found = [(title, [window.aucs[name] for window in self.windows]) for name, title in TITLES.items()]
        return [row for row in found if any(estimate is not None for estimate in row[1])]

    def to_json(self) -> dict[str, Any]:
        """As `compare.json` has it."""
        return {"interval": "95%, Newcombe 2006, method 5", "windows": [asdict(window) for window in self.windows]}


def compare_scores(index: Index, scores: Mapping[str, np.ndarray], parts: Sequence[np.ndarray]) -> Comparison:
    """AUCs of all scores, and of the log's own, in each part."""
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
    """For the terminal."""
    heads = [f"steps {w.first}–{w.last}" for w in comparison.windows]
    table = Table("AUC [95%]", *heads, title="exploits against the rest", title_justify="left")
    for title, estimates in comparison.rows:
        add_row(table, title, *("–" if one is None else one for one in estimates))
    counts = [f"{w.exploits:,} / {w.others:,}" for w in comparison.windows]
    add_row(table, "exploits / others", *counts)
    return table
