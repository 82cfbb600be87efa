"""Read JSON that may be damaged. Errors name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from antipasto.terminal import shorten


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is not JSON; names the file.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def read_rows(path: Path, notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a JSON-lines file, row by row.

    Args:
        notes: gets a sentence if the last line is cut off, because a run may still be writing it.

    Yields:
        The place of the row, for messages, and the row.

    Raises:
        ValueError: a line is not an object; names the line.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    notes.append(f"{path.name}: its last line is cut off, or still being written; it is not counted.")
                    return
                raise ValueError(f"{where}: not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected an object, got {type(row).__name__}.")
            yield where, row


def as_number(row: Mapping[str, Any], key: str, where: str) -> float | None:
    """Return a field of a row as a float, or None if it is missing or null.

    Raises:
        ValueError: it is not a number, or has too many digits for a float; names the place.

    Example:
        >>> as_number({"step": 3}, "step", "here"), as_number({}, "step", "here")
        (3.0, None)
    """
    value = row.get(key)
    try:
        if value is None or isinstance(value, (int, float)):
            return None if value is None else float(value)
    except OverflowError:
        pass
    raise ValueError(f"{where}: {key!r} must be a number, got {shorten(repr(value), 40)}.")


def as_flag(row: Mapping[str, Any], key: str, where: str) -> bool | None:
    """Return a field of a row as a bool, or None if it is missing or null.

    Raises:
        ValueError: it is neither a bool nor 0 or 1; names the place.

    Example:
        >>> as_flag({"flagged": 1}, "flagged", "here"), as_flag({}, "flagged", "here")
        (True, None)
    """
    value = row.get(key)
    if value is None or (isinstance(value, (int, float)) and value in (0, 1)):
        return None if value is None else bool(value)
    raise ValueError(f"{where}: {key!r} must be true, false, 0, 1 or null, got {shorten(repr(value), 40)}.")
