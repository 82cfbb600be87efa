"""Write the report of one or several runs as one HTML file (`antipasto.app.report.html`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from antipasto.app.checks import check_new_file
from antipasto.app.inspection import knob_rows, settings
from antipasto.app.report import figures, tables
from antipasto.app.report.answers import outcome, side_by_side
from antipasto.app.report.html import page_of
from antipasto.app.report.run import Run, read_runs
from antipasto.evaluation.verdict import where_the_exploit_is
from antipasto.files import write_text

BUDGET = 600_000
"""Maximum characters of rollouts, and again of answers, of all runs of a page. Keeps the page below two megabytes."""
MOST_PATTERNS = 12
"""Maximum number of patterns of outcomes to list."""


def write_report(runs: Sequence[Path], out: Path | None = None, *, force: bool = False) -> Path:
    """Write the report of one or several runs.

    Args:
        runs: run folders of `antipasto train`.
        out: the file; None: ``report.html`` in the run's folder, or for several runs in the current folder.
        force: overwrite ``out``. A run's own ``report.html`` is always overwritten.

    Returns:
        The file's path.

    Raises:
        ValueError: a folder is not a run folder or is damaged, or the file exists; names it.
        OSError: a file cannot be read or written.
    """
    own = out is None and len(runs) == 1
    path = runs[0] / "report.html" if own else out or Path("report.html")
    check_new_file(path, force=own or force)
    write_text(path, render(read_runs(runs, budget=BUDGET)))
    return path


def render(runs: Sequence[Run]) -> str:
    views = [_view(run, f"r{i}", len(runs)) for i, run in enumerate(runs)]
    return page_of(
        "page.html",
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        kind="report",
        views=views,
        several=len(runs) > 1,
        comparison=_comparison(runs) if len(runs) > 1 else None,
        most_patterns=MOST_PATTERNS,
    )


# ── values for the template ──────────────────────────────────────────────────────────────────────────────────────────


def _view(run: Run, slug: str, number: int) -> dict[str, Any]:
    evaluation, lists = run.evaluation, _lists(run)
    return {
        "run": run,
        "lead": _lead(run),
        "slug": slug,
        "evaluation": evaluation,
        "arms": [] if evaluation is None else tables.arm_blocks(evaluation),
        "differences": [] if evaluation is None else tables.difference_blocks(evaluation),
        "rows": None if evaluation is None else side_by_side(evaluation, budget=BUDGET // number),
        "dial": None if evaluation is None else figures.dial(evaluation, where_the_exploit_is(evaluation.arms)),
        "overview": figures.overview(run),
        "asked": [] if evaluation is None else _asked(evaluation.facts),
        "training": figures.training(run),
        "maps": figures.maps(run),
        "spectra": figures.spectra(run),
        "knobs": [] if run.knobs is None else knob_rows(run.knobs),
        "books": [] if run.books is None else tables.book_rows(run.books, run.knobs),
        "heldout": None if run.direction is None else run.direction.heldout,
        "lists": lists,
        "outcomes": sorted({outcome(one) for _, shown in lists for one in shown}),
        "settings": settings(run.config),
        "facts": settings({k: v for k, v in run.facts.items() if k != "command"}),
        "command": _command(run),
    }


def _lead(run: Run) -> list[tuple[str, str]]:
    """Names and values of the line below the title."""
    task = None if run.evaluation is None else run.evaluation.task
    values = {"task": task, **run.facts, **run.config}
    names = ("method", "task", "variant", "model", "steps", "seed")
    return [(name, str(values[name])) for name in names if values.get(name) is not None]


def _asked(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """How answers were sampled."""
    flat = {**facts, **(facts.get("options") or {})}
    said = ("prompts", "batch_size", "method", "asked", "answered_by", "options")
    return [(name, value) for name, value in flat.items() if name not in said and value is not None]


def _lists(run: Run) -> list[tuple[str, list[Any]]]:
    if run.rollouts is None:
        return []
    ends = [("Highest hack-ward score", run.rollouts.highest), ("Lowest hack-ward score", run.rollouts.lowest)]
    return [(title, shown) for title, shown in (*ends, ("A random sample", run.rollouts.sample)) if shown]


def _comparison(runs: Sequence[Run]) -> dict[str, Any]:
    evaluated = [(run.name, figures.run_colour(i), run.evaluation) for i, run in enumerate(runs) if run.evaluation]
    may_differ = ("method", "shrunk_by", "answered_by", "batch_size")
    facts = [[e.task, {k: v for k, v in e.facts.items() if k not in may_differ}] for _, _, e in evaluated]
    asked = {json.dumps(each, sort_keys=True, default=str) for each in facts}
    return {
        "blocks": tables.comparison_blocks(evaluated) if evaluated else [],
        "same": len(asked) <= 1,
        "left_out": [run.name for run in runs if run.evaluation is None],
        "plots": figures.overlaid(runs),
    }


def _command(run: Run) -> str | None:
    """The command that repeats the run."""
    if isinstance(run.facts.get("command"), str):
        return str(run.facts["command"])
    return f"antipasto train --config {run.folder / 'config.yaml'}"
