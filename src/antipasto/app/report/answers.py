"""Select the rows of an evaluation to show side by side, and count how the arms differ over all rows.

An arm's *outcome* on a prompt is solved, exploited (rewarded, not solved) or failed; without an oracle, rewarded or not.
A *pattern* is the outcomes of reference, as trained and deployed, if they were asked.

The selection takes one row of each pattern in turn, so rare patterns appear too. Patterns in which the arms differ come first.
The very first row, if there is one, is exploited by the trained model and solved by the deployed one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from antipasto.app.report.rollouts import within
from antipasto.evaluation.records import DEPLOYED, REFERENCE, TRAINED, Answer, Evaluation
from antipasto.evaluation.rollout_log import Rollout
from antipasto.tasks import REWARDED

ROWS = 120
_TRUNK = (REFERENCE, TRAINED, DEPLOYED)


@dataclass(frozen=True)
class Row:
    """One prompt, and every arm's answer to it.

    Attributes:
        number: from 0, as in eval.jsonl.
        pattern: the outcomes of reference, as trained and deployed.
    """

    number: int
    kind: str | None
    prompt: Any
    pattern: tuple[str, ...]
    answers: list[Answer]

    @property
    def differs(self) -> bool:
        return len(set(self.pattern)) > 1


@dataclass(frozen=True)
class SideBySide:
    """The selected rows, and counts over all rows.

    Attributes:
        arms: the arms of a pattern.
        total: number of prompts.
        rows: the selection, in the order to show.
        patterns: pattern → number of prompts, over all prompts.
    """

    arms: tuple[str, ...]
    total: int
    rows: list[Row]
    patterns: dict[tuple[str, ...], int]


def outcome(answer: Answer | Rollout) -> str:
    """The outcome of an answer or a rollout, in one or two words."""
    if answer.oracle is None:
        return "rewarded" if answer.reward >= REWARDED else "not rewarded"
    return "solved" if answer.solved else "exploited" if answer.exploits else "failed"


def _story(evaluation: Evaluation) -> set[tuple[str, str]]:
    """(arm, outcome) of the first row to show: what the quarantine removed, or without one what training changed."""
    if DEPLOYED in evaluation.names:
        return {(TRAINED, "exploited"), (DEPLOYED, "solved")}
    found = [evaluation.arm(name) for name in (REFERENCE, TRAINED)]
    before, after = (
        record.measures["exploit"].value if record and "exploit" in record.measures else 0 for record in found
    )
    before_and_after = ("solved", "exploited") if after > before else ("exploited", "solved")
    return set(zip((REFERENCE, TRAINED), before_and_after, strict=True))


def side_by_side(evaluation: Evaluation, *, budget: int) -> SideBySide:
    """Select rows and count patterns.

    Args:
        budget: maximum characters of text.
    """
    arms = tuple(name for name in _TRUNK if name in evaluation.names) or tuple(evaluation.names[:3])
    by_row: dict[int, list[Answer]] = {}
    for answer in evaluation.answers:
        by_row.setdefault(answer.row, []).append(answer)
    rows = []
    for number, answers in sorted(by_row.items()):
        outcomes = {answer.arm: outcome(answer) for answer in answers}
        pattern = tuple(outcomes[name] for name in arms if name in outcomes)
        rows.append(Row(number, answers[0].kind, answers[0].prompt, pattern, answers))
    counts = dict(Counter(row.pattern for row in rows).most_common())
    turns = zip_longest(*([row for row in rows if row.pattern == pattern] for pattern in counts))
    mixed = [row for turn in turns for row in turn if row is not None]
    mixed.sort(key=lambda row: not row.differs)
    wanted = _story(evaluation)
    story = next((row for row in mixed if wanted <= {(one.arm, outcome(one)) for one in row.answers}), None)
    chosen = sorted(mixed, key=lambda row: row is not story)[: ROWS * 3 // 4]
    chosen += [row for row in mixed if row not in chosen and not row.differs][: ROWS - len(chosen)]
    kept = within(chosen, lambda row: [row.prompt, *(answer.completion for answer in row.answers)], budget)
    return SideBySide(arms, len(rows), kept, counts)
