"""Read a run folder for the report: check every part, and collect a sentence for each missing part.

A missing part is left out of the page. A damaged part is an error, because a page without it would silently be incomplete.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antipasto.app.inspection import Knobs, read_adapter
from antipasto.app.report.rollouts import Rollouts, read_rollouts
from antipasto.app.run_folder import RunFolder
from antipasto.evaluation.records import EVAL, PARTIAL, Evaluation, read_evaluation
from antipasto.names import MODES, THRESHOLD
from antipasto.reading import as_number, read_json, read_rows
from antipasto.routing.books import Books, read_books
from antipasto.routing.directions import Direction

Series = dict[str, list[tuple[float, float]]]
"""A metric's name → (step, value) of every line that has it."""


@dataclass(frozen=True)
class Run:
    """The contents of a run folder; None for missing parts.

    Attributes:
        name: short, and unique on the page.
        config: the resolved options.
        facts: ``run.json``: command, versions, base.
        metrics: by name.
        knobs: layer → δS and δS_hack.
        missing: a sentence for each missing part.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    metrics: Series
    rollouts: Rollouts | None
    evaluation: Evaluation | None
    knobs: dict[str, Knobs] | None
    direction: Direction | None
    books: Books | None
    missing: list[str]

    @property
    def method(self) -> str:
        """The ``--method`` of the run."""
        return str(self.config.get("method") or "unknown method")

    @property
    def threshold(self) -> float:
        """The effect size above which the coordinate gate guards a coordinate."""
        value = as_number(self.config, "threshold", f"{self.folder}, its config")
        return THRESHOLD if value is None else value


def read_runs(folders: Sequence[Path], *, budget: int) -> list[Run]:
    """Read run folders.

    Args:
        folders: at least one, each once.
        budget: maximum characters of rollouts, of all runs together.

    Raises:
        ValueError: no folder, the same one twice, not a run folder, or a damaged part; names the file.
        OSError: a file cannot be read.
    """
    if not folders:
        raise ValueError("A report needs at least one run folder.")
    paths = [folder.resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is named twice: name each run once.")
    return [
        _read_run(folder, name, budget // len(paths)) for folder, name in zip(folders, short_names(paths), strict=True)
    ]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Shorten paths to as many last parts as needed to tell them apart.

    Example:
        >>> short_names([Path("/runs/a/seed-0"), Path("/runs/b/seed-0")])
        ['a/seed-0', 'b/seed-0']
    """
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("two paths are equal")


def _read_run(folder: Path, name: str, budget: int) -> Run:
    place, missing = RunFolder(folder), list[str]()
    config = place.read_config()
    as_number(config, "threshold", f"{folder}, its config")

    def there(path: Path, otherwise: str) -> bool:
        if not path.exists():
            missing.append(otherwise)
        return path.exists()

    facts: dict[str, Any] = {}
    if there(place.run, "There is no run.json: only the config says which versions and which base model were used."):
        facts = read_json(place.run)
        if not isinstance(facts, dict):
            raise ValueError(f"{place.run}: expected names and values, got {type(facts).__name__}.")
    if place.unfinished is not None:
        missing.append(place.unfinished)
    evaluation = None
    if (folder / EVAL).exists():
        evaluation = read_evaluation(folder)
    else:
        begun = "Its evaluation did not finish; continue with" if (folder / PARTIAL).exists() else "Not evaluated yet"
        missing.append(f"{begun}: antipasto eval {folder}")
    metrics: Series = {}
    if there(place.metrics, "There is no metrics.jsonl: the run logged no step and has no curves."):
        metrics = _read_metrics(place.metrics, missing)
    rollouts = None
    if there(place.rollouts, "There is no rollouts.jsonl, so no rollouts are shown."):
        rollouts = read_rollouts(place.rollouts, missing, budget=budget)
    knobs = None
    weights = place.adapter / "adapter_model.safetensors"
    if there(weights, "There is no adapter yet: it is written at the run's end."):
        knobs, _ = read_adapter(weights)
        if not all(vector.isfinite().all() for layer in knobs.values() for vector in layer[:2] if vector is not None):
            missing.append("The adapter has NaN or Inf: the run diverged, and its layers cannot be drawn.")
            knobs = None
    direction = None
    if there(place.direction, _no_direction(place, {**config, **facts})):
        direction = Direction.load(place.direction)
    books = None
    if there(place.books, _no_books(place, {**config, **facts})):
        books = read_books(place.books)
    return Run(name, folder, config, facts, metrics, rollouts, evaluation, knobs, direction, books, missing)


def _no_direction(place: RunFolder, said: Mapping[str, Any]) -> str:
    method = said.get("method")
    if not place.run.exists() and method in MODES:
        return "There is no direction: the run was stopped before it had one, or it uses none."
    by = f" by {said['by']}" if said.get("by") else ""
    return f"There is no direction: method {method!r}{by} used none."


def _no_books(place: RunFolder, said: Mapping[str, Any]) -> str:
    """Why there are no books. They are written at the end of every run with a router."""
    if place.is_finished or said.get("method") not in MODES:
        return f"There are no books of controls: method {said.get('method')!r} keeps none."
    return "There are no books of controls yet: they are written at the run's end, and until then in its checkpoints."


def _read_metrics(path: Path, notes: list[str]) -> Series:
    metrics: Series = {}
    for number, (where, row) in enumerate(read_rows(path, notes), 1):
        step = as_number(row, "step", where)
        for key, value in row.items():
            if key == "step" or not isinstance(value, (int, float)):
                continue
            found = as_number(row, key, where)
            if found is not None and math.isfinite(found):
                metrics.setdefault(key, []).append((number if step is None else step, found))
    return metrics
