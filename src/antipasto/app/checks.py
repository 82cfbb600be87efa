"""Checks of command-line arguments that run before torch is loaded, which takes seconds."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from pathlib import Path


def check_model_name(name_or_path: str) -> None:
    """Check that a text is a model's folder or may be a name on the hub.

    Raises:
        ValueError: it is neither; says what to do.
    """
    path = Path(name_or_path)
    config = path / "adapter_config.json"
    if config.is_file():
        base = _base_model(config)
        known = " (its config does not name it)" if base is None else f", {base}"
        raise ValueError(f"{name_or_path} is an adapter, not a model: give the model that it was trained on{known}.")
    if name_or_path and path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"The folder {name_or_path} holds no model: there is no config.json in it. Give a folder written by "
            "save_pretrained, or a name on the hub."
        )
    if path.is_file():
        raise ValueError(f"{name_or_path} is a file: give a model's folder, or its name on the hub.")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name_or_path) and not (name_or_path and path.exists()):
        raise ValueError(
            f"There is no folder {name_or_path!r}: give a model's folder, or its name on the hub (owner/name)."
        )


def _base_model(config: Path) -> str | None:
    try:
        return json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config} is damaged, or is not the config of an adapter.") from error


JSON, TABLES = (".jsonl", ".json"), {".csv": "csv", ".parquet": "parquet"}
"""Endings of a dataset's files; those of tables with the name that `datasets.load_dataset` has for them."""


def check_dataset(source: str) -> None:
    """Check that a text is a file or folder of rows, or may be a dataset's name on the hub.

    Raises:
        ValueError: it is neither; says what to do.
    """
    path, endings = Path(source), (*JSON, *TABLES)
    if source and path.is_dir():
        return
    if path.suffix in endings:
        check_file(path)
    elif source and path.exists():
        raise ValueError(f"{source}: expected a dataset's file that ends in {', '.join(endings)}.")
    elif not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?", source):
        raise ValueError(
            f"There is no file or folder {source!r}: give one, or a dataset's name on the hub (owner/name, or "
            "owner/name:configuration)."
        )


def split_name(spec: str) -> str:
    """The split that a part of one is of.

    Example:
        >>> split_name("train[:1000]"), split_name("train")
        ('train', 'train')
    """
    return spec.partition("[")[0]


def check_file(path: str | Path) -> None:
    """Check that a path is a regular file, which can be read more than once.

    Raises:
        ValueError: it does not exist, or is a folder, pipe or device; says what to do.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"There is no file {path}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file.")
    if not path.is_file():
        raise ValueError(
            f"{path} is a pipe or a device, which cannot be read twice: save its contents to a file and give that."
        )


def check_new_file(path: str | Path, *, force: bool) -> None:
    """Check that a file can be written: it does not exist, or ``force`` is set, and it is not a folder.

    Raises:
        ValueError: it cannot; says what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: --out names the file to write.")
    if path.exists() and not force:
        raise ValueError(f"{path} exists: choose another --out, or overwrite it with --force.")


def check_new_folder(path: str | Path, *, force: bool) -> None:
    """Check that a folder can be written: it is new or empty, or ``force`` is set, and it is not a file.

    Raises:
        ValueError: it cannot; says what to do.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: give a folder that is new or empty.")
    if not force and path.is_dir() and any(path.iterdir()):
        raise ValueError(
            f"{path} exists and is not empty: choose another --out, or replace an earlier export with --force."
        )


def find_files(patterns: Sequence[str | Path]) -> list[Path]:
    """Resolve file names and patterns with ``*`` to files, each once.

    Raises:
        ValueError: there is no file, or one that `check_file` refuses; names it.
    """
    found: dict[Path, Path] = {}
    for pattern in map(str, patterns):
        paths = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        if not paths:
            raise ValueError(f"There is no file {pattern}: give files of rollouts, or a pattern in quotes.")
        for path in map(Path, paths):
            if path.is_dir():
                raise ValueError(f"{path} is a folder: give the files in it, such as '{path}/*.parquet'.")
            check_file(path)
            found.setdefault(path.resolve(), path)
    if not found:
        raise ValueError("Give at least one file of rollouts.")
    return list(found.values())
