"""A run's task, on rows of a dataset where the config names one.

    rows       the dataset's, with columns renamed: of files, of a folder, or of the hub by `datasets.load_dataset`
    training   its train split
    held out   its test split, without prompts that are trained on; if there is none, a share of the training prompts (`HELD`)

JSON is read as it is written. `datasets` would read the text "2024-01-01" as a date.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from antipasto.app.checks import JSON, TABLES, check_dataset, split_name
from antipasto.app.models import first_line, hub_advice, quiet
from antipasto.options import near
from antipasto.reading import read_json
from antipasto.routing.pairs import json_lines
from antipasto.tasks import Task, load_task

HELD, MOST, SEED = 0.1, 500, 0
"""Of a dataset without a test split: the share of the distinct prompts that is held out, at most how many, and the seed. It is
not the run's seed, so that all runs are judged on the same prompts."""

Rows = list[dict[str, Any]]


def load_task_of(config: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> tuple[Task, dict[str, Any]]:
    """Load a run's task, on the rows of its dataset if it has one.

    Args:
        config: the run's, with ``task``; and with ``dataset``, ``columns``, ``dataset_train_split`` and ``dataset_test_split``
            if there is a dataset.
        before: ``run.json`` of the run, if it has begun.

    Returns:
        The task; and for ``run.json``, how many rows of the dataset there are and their digest, or nothing.

    Raises:
        ValueError: there is no such task or dataset, its rows do not fit the task, or they have changed since the run began.
    """
    task, source = load_task(str(config["task"])), config.get("dataset")
    if source is None:
        return task, {}
    columns = config.get("columns") or {}
    splits = {name: _renamed(rows, columns, f"{source}, {name}") for name, rows in _splits(source, config).items()}
    place = str(Path(source).resolve()) if Path(source).exists() else source
    try:
        if "test" not in splits:
            if task.from_rows is None:
                task.with_rows(splits["train"])  # so that a message counts rows before some are held out
            splits = hold_out(splits["train"])
        trained = set(map(_key, splits["train"]))
        test = [row for row in splits["test"] if _key(row) not in trained]
        if not test:
            raise ValueError("every prompt of its test split is in the train split too.")
        task = task.with_rows(splits["train"], test, place)
    except ValueError as error:
        raise ValueError(
            f"{source} does not fit the task {config['task']} (--columns NAME=COLUMN renames columns): {error}"
        ) from error
    rows = {"train": len(splits["train"]), "test": len(test), "digest": digest([splits["train"], test])}
    if before is not None and before.get("rows") != rows:
        raise ValueError(
            f"The rows of {source} have changed since the run began: it trained on {_said(before.get('rows'))}, and these are "
            f"{_said(rows)}. Restore them, or train again."
        )
    return task, {"rows": rows}


def hold_out(rows: Rows) -> dict[str, Rows]:
    """Hold some of the prompts out, always the same ones. Rows with the same prompt stay together.

    Example:
        >>> parts = hold_out([{"prompt": f"{i}+1="} for i in range(40)])
        >>> len(parts["train"]), len(parts["test"])
        (36, 4)
    """
    keys = list(dict.fromkeys(map(_key, rows)))
    if len(keys) < 2:
        raise ValueError("it has one prompt, and at least two are needed, since one is held out.")
    held = set(random.Random(SEED).sample(keys, min(math.ceil(HELD * len(keys)), MOST)))
    return {
        "train": [row for row in rows if _key(row) not in held],
        "test": [row for row in rows if _key(row) in held],
    }


def digest(value: Any) -> str:
    """A digest of rows, or of anything that holds them."""
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError):  # a key that is not a string, or a circular reference
        text = repr(value)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _key(row: Mapping[str, Any]) -> str:
    """What makes two rows the same question: the prompt, or all of a row without one."""
    return digest(row.get("prompt", row))


def _said(rows: Mapping[str, Any] | None) -> str:
    return "other rows" if rows is None else f"{rows['train']:,} ({rows['test']:,} held out, digest {rows['digest']})"


# ── the dataset ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _splits(source: str, config: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """The dataset's splits that are asked for, as ``train`` and, if it has one, ``test``."""
    check_dataset(source)
    there = _read(source)
    train, test = config.get("dataset_train_split") or "train", config.get("dataset_test_split")
    if test is None and "test" in there and split_name(train) != "test":
        test = "test"
    asked = {"train": train} if test is None else {"train": train, "test": test}
    return {part: _split(there, spec, source) for part, spec in asked.items()}


def _split(there: Mapping[str, Sequence[Any]], spec: str, source: str) -> Sequence[Any]:
    """A split, or a part of one such as ``train[:1000]`` or ``train[90%:]``, as `datasets.load_dataset` takes it."""
    name = split_name(spec)
    if name not in there:
        raise ValueError(f"There is no split {name!r} in {source}{near(name, there)} There are {', '.join(there)}.")
    rows = there[name]
    if name != spec:
        try:
            (part,) = _datasets(source).ReadInstruction.from_spec(spec).to_absolute({name: len(rows)})
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{source}: {spec!r} is no part of a split: {first_line(error)}") from error
        rows = list(rows)[part.from_ : part.to]
    if not len(rows):
        raise ValueError(f"The split {spec!r} of {source} is empty.")
    return rows


def _read(source: str) -> Mapping[str, Sequence[Any]]:
    """All splits of a dataset."""
    path = Path(source)
    if path.suffix in JSON and path.is_file():
        return {"train": _json_rows(path)}
    if files := sorted(path.glob("*.jsonl")) if path.is_dir() else []:
        return {file.stem: _json_rows(file) for file in files}
    datasets = _datasets(source)
    try:
        with quiet():
            if path.is_dir():
                found = datasets.load_from_disk(source)
            elif path.suffix in TABLES and path.is_file():
                found = datasets.load_dataset(TABLES[path.suffix], data_files=source)
            else:
                name, _, configuration = source.partition(":")
                found = datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError, RuntimeError, ImportError, datasets.exceptions.DatasetsError) as error:
        reason = f"The dataset {source} cannot be loaded: {first_line(error).rstrip('.')}."
        raise ValueError(reason if path.exists() else f"{reason}{hub_advice('a downloaded file')}") from error
    return found if isinstance(found, Mapping) else {"train": found}


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"Reading {source} needs the package datasets: pip install 'antipasto[trl]'.") from error
    return datasets


def _json_rows(path: Path) -> Rows:
    """The rows of a file: one list, or JSON lines."""
    if path.read_bytes().lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        placed = [(f"{path}, row {number}", row) for number, row in enumerate(read_json(path))]
    else:
        placed = json_lines(path)
    for place, row in placed:
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected an object, got {type(row).__name__}.")
    return [row for _, row in placed]


def _renamed(rows: Sequence[Any], columns: Mapping[str, str], where: str) -> Rows:
    """Rows with other names of some columns. ``columns``: name for the task → name in the dataset."""
    for number, row in enumerate(rows):
        for name, column in columns.items():
            if column not in row:
                raise ValueError(
                    f"{where}, row {number}: columns has {name}={column}, and there is no column {column!r}"
                    f"{near(column, row)} There are {', '.join(map(str, row))}."
                )
    gone = {*columns, *columns.values()}
    return [
        {**{name: value for name, value in row.items() if name not in gone}, **{n: row[c] for n, c in columns.items()}}
        for row in rows
    ]
