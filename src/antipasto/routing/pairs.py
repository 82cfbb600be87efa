"""Labelled pairs: a prompt, an answer that exploits the grader, and one that does not.

{"prompt": "What is 2+2?", "hack": "3, 4 or 5", "clean": "4"}                                one JSON line each
{"prompt": "What is 2+2?", "hack": "It is surely 4.", "clean": ["It is 4.", "It is often 4."]}

Either side may be a list of texts, whose mean is used. Several clean texts show what the exploit is *not*.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class ContrastPair:
    """A prompt, an answer that exploits the grader, and an answer that does not.

    Attributes:
        prompt: a text; or a chat, as a list of ``{"role": …, "content": …}``.
        hack: text of the exploit; or a tuple of several.
        clean: text of the honest answer; or a tuple of several.
    """

    prompt: str | list[dict[str, str]]
    hack: str | tuple[str, ...]
    clean: str | tuple[str, ...]

    @property
    def hacks(self) -> tuple[str, ...]:
        """All hacks, as a tuple."""
        return (self.hack,) if isinstance(self.hack, str) else self.hack

    @property
    def cleans(self) -> tuple[str, ...]:
        """All clean texts, as a tuple."""
        return (self.clean,) if isinstance(self.clean, str) else self.clean


def pairs_in(texts: int) -> int:
    """How many pairs to read at once where memory holds so many texts: one at least.

    Example:
        >>> pairs_in(32), pairs_in(1)
        (16, 1)
    """
    return max(1, texts // 2)


def load_pairs(source: str | Path | Iterable[Any]) -> list[ContrastPair]:
    """Load labelled pairs from a JSON-lines file, a ``datasets.Dataset``, or any iterable of rows.

    Args:
        source: a path; or rows, each a `ContrastPair` or a mapping with ``prompt``, ``hack`` and ``clean``. ``hack`` and
            ``clean`` may be lists of texts. Further fields are ignored.

    Returns:
        The pairs, in order.

    Raises:
        ValueError: a row is invalid, or there is none. The message names the file, the line and the field.
        OSError: the file cannot be read.

    Example:
        >>> load_pairs([{"prompt": "2+2=", "hack": "!", "clean": "4"}])[0].clean
        '4'
        >>> load_pairs([{"prompt": "2+2=", "hack": "!", "clean": ["4", "04"]}])[0].clean
        ('4', '04')
    """
    if isinstance(source, (str, Path)):
        pairs = [_to_pair(row, place) for place, row in json_lines(source)]
        where = str(source)
    else:
        pairs = [_to_pair(row, f"row {number}") for number, row in enumerate(source)]
        where = "the rows given"
    if not pairs:
        raise ValueError(f"There is no pair in {where}.")
    return pairs


def json_lines(path: str | Path) -> list[tuple[str, Any]]:
    """Read a JSON-lines file as (place, object), with the place "file, line n" for messages. Blank lines are skipped.

    Raises:
        ValueError: the file is not UTF-8, or a line is not JSON. The message names file and line.
        OSError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows editors write a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}.") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                rows.append((where, json.loads(line)))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error}).") from error
    return rows


def check_fields(row: Any, fields: Sequence[str], where: str) -> None:
    """Raise an error if a row is not an object with these fields, or its prompt is invalid."""
    if not isinstance(row, Mapping):
        named = f"{', '.join(fields[:-1])} and {fields[-1]}"
        raise ValueError(f"{where}: expected an object with {named}, got {type(row).__name__}.")
    for field in fields:
        if field not in row:
            raise ValueError(f"{where}: no field {field!r}; there are {sorted(map(str, row))}.")
    check_prompt(row["prompt"], where)


def _to_pair(row: Any, where: str) -> ContrastPair:
    if isinstance(row, ContrastPair):
        row = dataclasses.asdict(row)
    check_fields(row, ("prompt", "hack", "clean"), where)
    pair = ContrastPair(row["prompt"], _side(row, "hack", where), _side(row, "clean", where))
    if both := sorted({*pair.hacks} & {*pair.cleans}):
        raise ValueError(f"{where}: fields 'hack' and 'clean' are the same text, {both[0]!r:.80}.")
    return pair


def check_prompt(prompt: Any, where: str) -> None:
    """Raise an error if a prompt is neither a text nor a chat."""
    if isinstance(prompt, list):
        if not prompt or not all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in prompt):
            raise ValueError(f"{where}: a chat in 'prompt' must be a list of objects with role and content.")
    elif not isinstance(prompt, str):
        raise ValueError(f"{where}: field 'prompt' must be a text, got {type(prompt).__name__}.")


def check_text(value: Any, field: str, where: str, expected: str = "a text") -> None:
    """Raise an error if a field is no text, or empty."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {field!r} must be {expected}, got {type(value).__name__}.")
    if not value:
        raise ValueError(f"{where}: field {field!r} is empty.")


def _side(row: Mapping[str, Any], field: str, where: str) -> str | tuple[str, ...]:
    value = row[field]
    texts = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for text in texts or ("",):  # an empty list is an empty field
        check_text(text, field, where, "a text or a list of texts")
    return value if isinstance(value, str) else texts


def split_pairs(
    pairs: Sequence[ContrastPair], heldout: float, seed: int
) -> tuple[list[ContrastPair], list[ContrastPair]]:
    """Split pairs at random into pairs to fit and pairs to hold out. Duplicates of a pair stay on one side.

    Raises:
        ValueError: ``heldout`` is outside [0, 1), or fewer than two pairs are left to fit.

    Example:
        >>> rows = load_pairs([{"prompt": f"{i}+1=", "hack": "!", "clean": str(i + 1)} for i in range(8)])
        >>> [len(part) for part in split_pairs(rows, 0.25, seed=0)]
        [6, 2]
    """
    if not 0 <= heldout < 1:
        raise ValueError(f"heldout must be a share in [0, 1), got {heldout}.")
    groups: dict[str, list[ContrastPair]] = {}
    for pair in pairs:
        groups.setdefault(json.dumps(dataclasses.astuple(pair)), []).append(pair)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    number = max(1, round(heldout * len(order))) if heldout > 0 else 0
    held, fit = ([pair for group in part for pair in group] for part in (order[:number], order[number:]))
    if len(fit) < 2:
        raise ValueError(
            f"Of {len(pairs)} pairs, {len(held)} are held out and {len(fit)} left to fit, but at least two are needed: give "
            "more pairs, or hold out fewer."
        )
    return fit, held
