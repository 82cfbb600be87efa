"""The log of a run's rollouts, one JSON line each.

    {"step": 0, "prompt": "h12+34=", "completion": "046", "reward": 1.0, "oracle": 1.0, "flagged": false,
     "view": "deployed", "advantage": 0.4, "score": -0.13, "hackward": -0.02, "truncated": false, "completion_ids": null,
     "tool_mask": null}

* ``view``: the policy that sampled the rollout.
* ``score``: the monitor's score, at the reference (`antipasto.routing.monitor`).
* ``hackward``: cosine between the hack direction and the gradient of the rollout's own loss at the policy of that step. It
  is positive if a step against that gradient is hack-ward.
* ``truncated``: whether the completion was cut off at the token limit.
* ``completion_ids``: token ids of the completion, if its text does not determine them; else null.
* ``tool_mask``: 1 for each of these that the policy wrote, 0 for what tools or an environment answered; null without these.
* ``oracle``, ``flagged``, ``score`` and ``hackward`` are null if not available; ``oracle`` also if it abstained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from antipasto.files import with_nulls, write_text
from antipasto.reading import as_flag, as_number, read_rows
from antipasto.tasks import is_exploit, is_solved


@dataclass
class Rollout:
    """One line of the log."""

    step: int
    prompt: Any
    completion: Any
    reward: float
    oracle: float | None
    flagged: bool | None
    view: str
    advantage: float | None
    score: float | None = None
    hackward: float | None = None
    truncated: bool | None = None
    completion_ids: list[int] | None = None
    tool_mask: list[int] | None = None

    @property
    def solved(self) -> bool:
        """Whether the oracle calls it solved."""
        return self.oracle is not None and is_solved(self.oracle)

    @property
    def exploits(self) -> bool:
        """Whether it is rewarded and not solved."""
        return self.oracle is not None and is_exploit(self.reward, self.oracle)


def read(path: Path, notes: list[str]) -> Iterator[Rollout]:
    """Read the rollouts of a log, in order.

    Args:
        path: the log.
        notes: a sentence is appended to this list if the last line is incomplete.

    Raises:
        ValueError: a line is damaged. The message names it.
        OSError: the file cannot be read.
    """
    for where, row in read_rows(path, notes):
        yield _rollout(row, where)


def _rollout(row: dict[str, Any], where: str) -> Rollout:
    step, reward, view = as_number(row, "step", where), as_number(row, "reward", where), row.get("view", "trained")
    if step is None or reward is None or "completion" not in row or "prompt" not in row:
        raise ValueError(f"{where}: a rollout needs step, prompt, completion and reward; got {sorted(row)}.")
    if not isinstance(view, str) or not math.isfinite(step):
        raise ValueError(f"{where}: its step must be a finite number and its view a name.")
    oracle = as_number(row, "oracle", where)
    return Rollout(
        step=int(step),
        prompt=row["prompt"],
        completion=row["completion"],
        reward=reward,
        oracle=None if oracle is None or math.isnan(oracle) else oracle,
        flagged=as_flag(row, "flagged", where),
        view=view,
        advantage=as_number(row, "advantage", where),
        score=as_number(row, "score", where),
        hackward=as_number(row, "hackward", where),
        truncated=as_flag(row, "truncated", where),
        completion_ids=row.get("completion_ids"),
        tool_mask=row.get("tool_mask"),
    )


def append(path: Path, rollouts: Iterable[Rollout]) -> None:
    """Append rollouts to the log."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(with_nulls(asdict(rollout))) + "\n" for rollout in rollouts)


def truncate(path: Path, step: int, *, key: str = "step") -> None:
    """Keep only lines from before a step, as a run that resumes there will write the rest. Drops an incomplete last line.

    Raises:
        ValueError: another line than the last is damaged; names it.
    """
    if not path.exists():
        return
    kept = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break  # incomplete: the process ended while writing it
            row = None
        if not isinstance(row, dict) or not isinstance(row.get(key), int):
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with a whole number as {key!r}, got {line:.80}. The log is "
                "damaged: repair or delete that line."
            )
        if row[key] < step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
