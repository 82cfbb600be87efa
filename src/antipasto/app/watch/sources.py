"""Read rollouts of any trainer, one by one, from JSON lines or parquet.

Columns have default names, and the caller may give others (`WatchConfig`). ``a.b`` is field b of an object a, ``a.0`` the
first entry of a list. The defaults fit the log of `RoutedGRPOTrainer` and TRL's ``completions_00010.parquet``.

    label   the label column's 1 or 0; or from reward and oracle: 1 rewarded and not solved, 0 rewarded and solved, else none
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from antipasto.app.watch.config import WatchConfig
from antipasto.reading import as_flag, as_number, read_rows
from antipasto.tasks import REWARDED, completion_text, is_exploit, is_solved
from antipasto.terminal import shorten

_BATCH = 1024  # rows of a parquet file in memory at a time
_REWARD, _ORACLE, _LIVE, _TRUNCATED = "reward", "oracle", "hackward", "truncated"
_IDS, _TOOL_MASK = "completion_ids", "tool_mask"


class Source(NamedTuple):
    """One rollout of a file.

    Attributes:
        file: its number among the files.
        row: its line or row, from 1.
        where: both, for messages.
        step: 0 if the file has none.
        prompt: a text or a chat.
        completion: a text or messages, as in the file.
        text: of the completion.
        truncated: whether it was cut off; None if the file does not say.
        ids: its token ids, if the file has them.
        tool_mask: 1 for each of ``ids`` that the model wrote, 0 for what tools answered; None if the file does not say.
        label: whether it is an exploit; None if unknown.
        reward: None if the file has none.
        live: the file's own score, `hackward`; None if it has none.
    """

    file: int
    row: int
    where: str
    step: int
    prompt: str | list[dict[str, str]]
    completion: Any
    text: str
    truncated: bool | None
    ids: list[int] | None
    tool_mask: list[int] | None
    label: bool | None
    reward: float | None
    live: float | None

    @property
    def key(self) -> tuple[int, int]:
        """File and row, which identify the rollout."""
        return self.file, self.row


@dataclass(frozen=True)
class Index:
    """The rollouts without their texts, as columns (n,). Unknown values are NaN.

    Attributes:
        file: number of the file.
        row: line or row in it, from 1.
        step: 0 if the file has none.
        label: 1 for an exploit, 0 for none.
        reward: from the file.
        live: the file's own score.
        notes: sentences about lines that were left out.
    """

    file: np.ndarray
    row: np.ndarray
    step: np.ndarray
    label: np.ndarray
    reward: np.ndarray
    live: np.ndarray
    notes: list[str]

    def __len__(self) -> int:
        return len(self.file)

    @property
    def keys(self) -> list[tuple[int, int]]:
        """File and row of each rollout."""
        return list(zip(self.file.tolist(), self.row.tolist(), strict=True))

    def only(self, chosen: np.ndarray) -> Index:
        """The rollouts at some positions."""
        columns = {name: column[chosen] for name, column in vars(self).items() if name != "notes"}
        return replace(self, **columns)

    def windows(self, number: int) -> list[np.ndarray]:
        """Positions of the rollouts of each window. Windows have about the same number of steps."""
        steps = np.unique(self.step)
        parts = np.array_split(steps, min(number, len(steps)))
        return [np.flatnonzero((self.step >= part[0]) & (self.step <= part[-1])) for part in parts]


def read_index(files: Sequence[Path], config: WatchConfig) -> Index:
    """Read all files once, without keeping the texts.

    Raises:
        ValueError: a file is damaged or lacks a column, or no file has a rollout; names the file and the line.
        OSError: a file cannot be read.
    """
    notes: list[str] = []
    rows = [
        (one.file, one.row, one.step, _number(one.label), _number(one.reward), _number(one.live))
        for one in read_sources(files, config, notes)
    ]
    if not rows:
        raise ValueError(f"There is no rollout in {', '.join(map(str, files[:3]))}{' …' if len(files) > 3 else ''}.")
    table = np.array(rows, dtype=float)
    whole = table[:, :3].astype(int)
    label, reward, live = table[:, 3:].T
    return Index(whole[:, 0], whole[:, 1], whole[:, 2], label, reward, live, notes)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def read_sources(
    files: Sequence[Path], config: WatchConfig, notes: list[str], *, among: Collection[tuple[int, int]] | None = None
) -> Iterator[Source]:
    """Yield every rollout, file by file.

    Args:
        files: in order.
        config: has the names of the columns.
        notes: gets a sentence for each last line that is cut off.
        among: yield only these rollouts, by file and row.

    Raises:
        ValueError: a file is damaged or lacks a column; names the file and the line.
    """
    for number, path in enumerate(files):
        for row, (where, values) in enumerate(_rows(path, notes), 1):
            if among is None or (number, row) in among:
                yield _parse(values, where, config, number, row)


def _rows(path: Path, notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix != ".parquet":
        yield from read_rows(path, notes)
        return
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install 'antipasto[trl]'.") from error
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty.")
    try:
        row = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for values in batch.to_pylist():
                    row += 1
                    yield f"{path}, row {row}", values
    except pa.ArrowException as error:
        raise ValueError(f"{path} is not a parquet file, or is damaged: {shorten(error, 120)}.") from error


def _parse(row: Mapping[str, Any], where: str, config: WatchConfig, file: int, number: int) -> Source:
    prompt, completion = (_reach(row, name, where) for name in (config.prompt_column, config.completion_column))
    prompt = _chat(prompt)
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and all(map(_is_message, prompt))):
        raise _invalid(where, config.prompt_column, "be a text or a chat", prompt)
    try:
        text = completion_text(_chat(completion))
    except (ValueError, TypeError, KeyError) as error:
        raise _invalid(where, config.completion_column, "be a text or an answer's messages", completion) from error
    step = _optional(row, config.step_column, "step", where)
    reward, oracle = (
        _optional(row, given, usual, where)
        for given, usual in ((config.reward_column, _REWARD), (config.oracle_column, _ORACLE))
    )
    if step is not None and not step.is_integer():
        raise ValueError(f"{where}: a step must be a whole number, got {step}.")
    ids = row.get(_IDS)
    if ids is not None and not (isinstance(ids, list) and ids and all(type(token) is int for token in ids)):
        raise _invalid(where, _IDS, "be a list of token ids", ids)
    tool_mask = row.get(_TOOL_MASK)
    if tool_mask is not None and not _is_mask(tool_mask, ids):
        raise _invalid(where, _TOOL_MASK, f"have a 1 or 0 for each of {_IDS!r}, one of them 1", tool_mask)
    return Source(
        file,
        number,
        where,
        0 if step is None else int(step),
        prompt,
        completion,
        text,
        as_flag(row, _TRUNCATED, where),
        ids,
        tool_mask,
        _label(_optional(row, config.label_column, None, where), reward, oracle, config, where),
        reward,
        _optional(row, None, _LIVE, where),
    )


def _invalid(where: str, column: str, must: str, value: Any) -> ValueError:
    return ValueError(f"{where}: {column!r} must {must}, got {shorten(repr(value), 60)}.")


def _is_mask(value: Any, ids: list[int] | None) -> bool:
    return isinstance(value, list) and ids is not None and len(value) == len(ids) and {1} <= set(value) <= {0, 1}


def _label(
    label: float | None, reward: float | None, oracle: float | None, config: WatchConfig, where: str
) -> bool | None:
    if config.label_column is not None:
        if label not in (None, 0.0, 1.0):
            raise ValueError(f"{where}: a label in {config.label_column!r} must be 0 or 1, got {label}.")
        return None if label is None else bool(label)
    if reward is None or oracle is None or reward < REWARDED:
        return None
    return True if is_exploit(reward, oracle) else False if is_solved(oracle) else None


def _optional(row: Mapping[str, Any], given: str | None, usual: str | None, where: str) -> float | None:
    """The number in a column. A column that the caller names must exist; the usual one is optional."""
    name = given or usual
    if name is None or (given is None and name not in row):
        return None
    value = as_number({name: _reach(row, name, where)}, name, where)
    return value if value is not None and math.isfinite(value) else None


def _reach(row: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of a column, or of a field in it, such as ``extra.reward``."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise ValueError(f"{where}: there is no column {name!r}; there are {', '.join(map(repr, sorted(row)))}.")
    return value


def _chat(said: Any) -> Any:
    """Drop a message's empty fields: parquet gives every message the fields of all messages."""
    if isinstance(said, list):
        return [{k: v for k, v in m.items() if v is not None} if isinstance(m, Mapping) else m for m in said]
    return said


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and {"role", "content"} <= set(message)


# ── file digests ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Known:
    """A file as it was read.

    Attributes:
        name: as the caller first spelled it.
        path: its absolute path.
        bytes: its size.
        sha256: of these bytes.
    """

    name: str
    path: str
    bytes: int
    sha256: str


def known(path: Path) -> Known:
    """Size and digest of a file now."""
    size = path.stat().st_size
    return Known(str(path), str(path.resolve()), size, _sha256(path, size))


def is_still(old: Known, path: Path) -> bool:
    """Whether the file still begins with the bytes that were read. It may have grown, as a run's log does."""
    return path.stat().st_size >= old.bytes and _sha256(path, old.bytes) == old.sha256


def _sha256(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (part := file.read(min(size, 1 << 20))):
            digest.update(part)
            size -= len(part)
    return digest.hexdigest()
