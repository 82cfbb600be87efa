"""An evaluation's answers, row by row, arm beside arm: which rows to show, and how the arms part ways over all of them.

An arm's *outcome* on a prompt is solved, exploited (rewarded, not solved) or failed; without an oracle, rewarded or not.
A *pattern* is the outcomes of reference, as trained and deployed, as far as they were asked. All patterns take turns in the
selection, those in which the arms differ first, so that a rare one is there beside a common one. The first row is one that the
trained model exploits and the deployed one solves, if there is any: what the page is about.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from antipasto.app.report.rollouts import LONGEST, MARKUP
from antipasto.evaluation.records import DEPLOYED, REFERENCE, TRAINED, Answer, Evaluation
from antipasto.tasks import REWARDED

ROWS = 120
_TRUNK = (REFERENCE, TRAINED, DEPLOYED)


@dataclass(frozen=True)
class Row:
    """One prompt, and every arm's answer to it.

    Attributes:
        number: from 0, as in eval.jsonl.
        pattern: the outcomes of reference, as trained and deployed.
        differs: whether these are not all the same.
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
    """The rows of the page.

    Attributes:
        arms: of the pattern.
        total: how many prompts were asked.
        rows: a selection, in the order in which to show them.
        patterns: pattern → how many of all prompts.
    """

    arms: tuple[str, ...]
    total: int
    rows: list[Row]
    patterns: dict[tuple[str, ...], int]


def outcome(answer: Answer) -> str:
    """What came of an answer, in one word."""
    if answer.oracle is None:
        return "rewarded" if answer.reward >= REWARDED else "not rewarded"
    return "solved" if answer.solved else "exploited" if answer.exploits else "failed"


def _story(evaluation: Evaluation) -> set[tuple[str, str]]:
    """(arm, outcome) of the first example: what the quarantine took out, or else what training did to the start."""
    if DEPLOYED in evaluation.names:
        return {(TRAINED, "exploited"), (DEPLOYED, "solved")}
    found = [evaluation.arm(name) for name in (REFERENCE, TRAINED)]
    before, after = (
        record.measures["exploit"].value if record and "exploit" in record.measures else 0 for record in found
    )
    before_and_after = ("solved", "exploited") if after > before else ("exploited", "solved")
    return set(zip((REFERENCE, TRAINED), before_and_after, strict=True))


def side_by_side(evaluation: Evaluation, *, budget: int) -> SideBySide:
    """Choose rows.

    Args:
        evaluation: with its answers.
        budget: how many characters of text to show.
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
    kept: list[Row] = []
    for row in chosen:
        texts = [row.prompt, *(answer.completion for answer in row.answers)]
        budget -= sum(MARKUP // 2 + min(LONGEST, len(json.dumps(text))) for text in texts)
        if budget < 0 and kept:
            break
        kept.append(row)
    return SideBySide(arms, len(rows), kept, counts)
