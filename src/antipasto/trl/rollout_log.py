"""Every rollout of a run, one JSON line each.

    {"step": 0, "prompt": "h12+34=", "completion": "046", "reward": 1.0, "oracle": 1.0, "flagged": false,
     "view": "deployed", "advantage": 0.4, "score": -0.13, "hackward": -0.02, "truncated": false, "completion_ids": null}

``view`` is the policy that sampled it. ``score`` is the monitor's, taken at the reference (`antipasto.routing.monitor`).
``hackward`` is the cosine between the hack direction and the gradient of the rollout's own loss at the policy as it was:
positive where the step that it asks for is hack-ward. ``truncated`` says that it was cut off at the token limit, and
``completion_ids`` are its tokens, where its text is not enough to know them. ``oracle``, ``flagged``, ``score`` and
``hackward`` are null where there is none, ``oracle`` also where it abstained.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from antipasto.files import write_text


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
    advantage: float
    score: float | None = None
    hackward: float | None = None
    truncated: bool | None = None
    completion_ids: list[int] | None = None


def append(path: Path, rollouts: Iterable[Rollout]) -> None:
    """Add lines to the log."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(rollout)) + "\n" for rollout in rollouts)


def truncate(path: Path, step: int, *, key: str = "step") -> None:
    """Keep the lines of before a step: a run that continues there writes the others again. A torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # the process ended in the middle of it
        if row[key] < step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
