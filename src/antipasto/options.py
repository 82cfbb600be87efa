"""Check the fields of a dataclass against their types and bounds. Files and command lines bring values of any type."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Hashable, Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_types(options: Any, names: list[str] | None = None) -> None:
    """Check that every value has the type of its field.

    Args:
        names: the fields to check; None: all.

    Raises:
        ValueError: a value has the wrong type; names the field, the expected type and the value.

    Example:
        >>> @dataclasses.dataclass
        ... class Options:
        ...     steps: int = 3
        >>> check_types(Options("many"))
        Traceback (most recent call last):
        ...
        ValueError: steps must be int, got 'many'.
    """
    from typeguard import TypeCheckError, check_type  # slow to import

    hints = _hints(type(options))  # type: ignore[arg-type]  # a type is hashable
    for name in names or [field.name for field in dataclasses.fields(options)]:
        value = getattr(options, name)
        try:
            check_type(value, hints[name])
            kinds = (hints[name], *get_args(hints[name]))
            if isinstance(value, bool) and bool not in kinds:
                raise TypeCheckError("a bool is an int to Python, and here a mistake")
            if isinstance(value, int) and float in kinds:
                float(value)  # fails if it has hundreds of digits
        except (TypeCheckError, OverflowError):
            expected = inspect.formatannotation(hints[name]).replace("typing.", "").replace("NoneType", "None")
            if get_origin(hints[name]) is Literal:
                expected = f"one of {', '.join(map(str, get_args(hints[name])))}"
            raise ValueError(f"{name} must be {expected}, got {_shown(value)}.") from None


def check_finite(options: Any) -> None:
    """Check that no field is NaN or infinite.

    Args:
        options: an instance of a dataclass whose types were checked.

    Raises:
        ValueError: a field is not finite; names the field.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name} must be a finite number, got {value}.")


def check_bounds(options: Any) -> None:
    """Check every field against the ``min`` and ``max`` of its metadata.

    Args:
        options: an instance of a dataclass whose types were checked.

    Raises:
        ValueError: a field is out of bounds; names the field and the value.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        low, high = field.metadata.get("min"), field.metadata.get("max")
        if value is not None and low is not None and value < low:
            raise ValueError(f"{field.name} must be at least {low}, got {value}.")
        if value is not None and high is not None and value > high:
            raise ValueError(f"{field.name} must be at most {high}, got {value}.")


def near(name: str, names: Iterable[str], most: int = 1) -> str:
    """End a sentence about an unknown name, with at most that many suggestions of similar ones.

    Example:
        >>> "There is no option stepz" + near("stepz", ["steps", "seed"])
        "There is no option stepz; did you mean 'steps'?"
    """
    close = difflib.get_close_matches(name, list(names), n=most)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else "."


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.200}"
    except ValueError:  # Python does not print integers of more than 4,300 digits
        return f"a value of type {type(value).__name__} that is too long to show"


@functools.cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return get_type_hints(kind)
