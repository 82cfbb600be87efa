"""The results of an evaluation: all answers, a record per arm, and paired differences between arms.

    eval.jsonl          one `Answer` per line, after a first line that says how they were sampled
    eval.json           `Evaluation` without its answers: arms, paired differences, verdict
    eval.partial.jsonl  the answers so far, while the evaluation runs

An *arm* is the model in one view: the reference, as trained, deployed, without a control's book, and so on. Every arm gets
the same prompts with the same random draws, so that answers are paired by row.

    rate of k in n        Wilson score interval (Wilson 1927)
    mean of n numbers     percentile bootstrap over prompts (Efron 1979), 2,000 resamples
    difference of rates   paired by row: Newcombe's score interval (1998, method 10), whose width is not 0 if no row differs
    difference of means   mean of d_row = x_arm,row − x_other,row, with the interval of a mean

All intervals are 95% intervals over prompts. They say nothing about other training seeds. The percentile bootstrap is too
narrow for few prompts, and has zero width if all numbers are equal.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from antipasto.files import write_json, write_text
from antipasto.options import check_types
from antipasto.tasks import is_exploit, is_solved

FORMAT = "antipasto-eval-1"
EVAL, ANSWERS, PARTIAL = "eval.json", "eval.jsonl", "eval.partial.jsonl"
REFERENCE, TRAINED, DEPLOYED, RANDOM, SHRUNK = "reference", "as trained", "deployed", "random", "shrunk"
DIAL = "dial"
DIALS = (-0.5, -0.25, 0.25, 0.5, 0.75)
"""Multiples of the quarantine to evaluate: 0 is the deployed model, 1 the model as trained."""
RATES, MEANS = ("solve", "exploit"), ("reward", "kl", "length")
RESAMPLES = 2000
CONFIDENCE = 0.95
"""Of every interval, here and in the application."""


# ── numbers with intervals ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval.

    Example:
        >>> print(Estimate(0.5, 0.404, 0.596), Estimate(-12.31, -13.0, -11.5))
        .50 [.40,.60] -12.31 [-13.00,-11.50]
        >>> Estimate(0.1, 0.0, 0.2).excludes_zero, Estimate(-0.1, -0.2, -0.01).excludes_zero
        (False, True)
    """

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{short(self.value)} [{short(self.low)},{short(self.high)}]"


@dataclass(frozen=True)
class Rate:
    """A share of independent binary outcomes, with its 95% Wilson score interval.

    Attributes:
        hits: number of positive outcomes.
        total: number of outcomes.

    Example:
        >>> print(Rate(50, 100))
        .50 [.40,.60]
    """

    hits: int
    total: int

    @property
    def value(self) -> float:
        """The share, hits / total."""
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95% interval."""
        from scipy.stats import binomtest  # imported here because scipy is an extra, and not needed to read evaluations

        ci = binomtest(self.hits, self.total).proportion_ci(confidence_level=CONFIDENCE, method="wilson")
        return float(ci.low), float(ci.high)

    @property
    def estimate(self) -> Estimate:
        """The share as a number with an interval."""
        return Estimate(self.value, *self.interval)

    def __str__(self) -> str:
        return str(self.estimate)

    def to_json(self) -> dict[str, float]:
        """The rate as a flat record."""
        low, high = self.interval
        return {"hits": self.hits, "total": self.total, "rate": self.value, "low": low, "high": high}


def short(value: float) -> str:
    """Format with two decimals, without the zero before the point.

    Example:
        >>> short(0.25), short(-0.25), short(-0.001), short(3.0)
        ('.25', '-.25', '.00', '3.00')
    """
    text = f"{value:.2f}"
    if text == "-0.00":
        text = "0.00"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def mean_estimates(columns: np.ndarray) -> list[Estimate]:
    """Means of several quantities over the same prompts, with deterministic bootstrap intervals.

    Args:
        columns: (m, n), one row per quantity, n at least 2.
    """
    from scipy.stats import bootstrap

    result = bootstrap(
        (columns,),
        np.mean,
        axis=-1,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        batch=20,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [
        Estimate(float(v), float(lo), float(hi))
        for v, lo, hi in zip(columns.mean(axis=1), result.low, result.high, strict=True)
    ]


def rate_difference(ones: np.ndarray, others: np.ndarray) -> Estimate:
    """Paired difference p₁ − p₂ of two rates (Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10).

    With lᵢ, uᵢ the ends of the Wilson interval of pᵢ and φ the correlation of the outcomes, corrected for continuity:

        lower = p₁ − p₂ − √((p₁ − l₁)² − 2φ (p₁ − l₁)(u₂ − p₂) + (u₂ − p₂)²), and likewise upper with the other ends

    Args:
        ones: (n,) of 0 and 1.
        others: (n,) of the same prompts.

    Example:
        >>> print(rate_difference(np.array([1, 1, 1, 0] * 10), np.array([1, 0, 0, 0] * 10)))
        .50 [.32,.63]
    """
    n, both = len(ones), int((ones * others).sum())
    a, b = int(ones.sum()), int(others.sum())
    (l1, u1), (l2, u2) = Rate(a, n).interval, Rate(b, n).interval
    covariance = float(both * (n - a - b + both) - (a - both) * (b - both))
    if covariance > 0:
        covariance = max(covariance - n / 2, 0)
    scale = math.sqrt(a * (n - a) * b * (n - b))
    phi = covariance / scale if scale else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0.0))

    p1, p2 = a / n, b / n
    return Estimate(p1 - p2, p1 - p2 - reach(p1 - l1, u2 - p2), p1 - p2 + reach(u1 - p1, p2 - l2))


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Answer:
    """One arm's answer to one prompt.

    Attributes:
        arm: name of the arm.
        row: index of the prompt, from 0; the same for all arms.
        kind: the prompt's kind, if the task has kinds.
        prompt: a text, or a chat.
        completion: text of the answer, without special tokens.
        length: in tokens, including the end-of-sequence token if there is one.
        kl: KL(arm ‖ reference) in nats: summed over the answer's tokens, and at each over the whole vocabulary.
        reward: the training reward.
        oracle: 0 to 1; None if the task has no oracle.
        flags: name of a detector → whether it flags the answer.
    """

    arm: str
    row: int
    kind: str | None
    prompt: Any
    completion: str
    length: int
    kl: float
    reward: float
    oracle: float | None
    flags: dict[str, bool] = field(default_factory=dict)

    @property
    def solved(self) -> bool | None:
        """Whether the oracle calls it solved."""
        return None if self.oracle is None else is_solved(self.oracle)

    @property
    def exploits(self) -> bool | None:
        """Whether it is rewarded and not solved."""
        return None if self.oracle is None else is_exploit(self.reward, self.oracle)

    def measures(self) -> dict[str, float]:
        """The answer's measures by name: `RATES` as 0 or 1, if there is an oracle, and `MEANS`."""
        there = (
            {} if self.oracle is None else {"solve": float(bool(self.solved)), "exploit": float(bool(self.exploits))}
        )
        return {**there, "reward": self.reward, "kl": self.kl, "length": float(self.length)}


# ── summaries ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ArmRecord:
    """Measures of one arm.

    Attributes:
        arm: name of the arm.
        kind: kind of the prompts; None for all prompts.
        n: number of prompts.
        measures: the shares ``solve`` and ``exploit``, if there is an oracle; the means of ``reward``, ``kl`` (nats per
            answer) and ``length`` (tokens).
        flags: name of a detector → share of answers that it flags.
    """

    arm: str
    kind: str | None
    n: int
    measures: dict[str, Estimate]
    flags: dict[str, Estimate]


@dataclass(frozen=True)
class Difference:
    """Paired difference ``arm`` − ``to`` of two arms on the same prompts.

    Attributes:
        arm: name of one arm.
        to: name of the other arm.
        kind: kind of the prompts; None for all prompts.
        n: number of prompts.
        measures: as in `ArmRecord`.
        flags: as in `ArmRecord`.
    """

    arm: str
    to: str
    kind: str | None
    n: int
    measures: dict[str, Estimate]
    flags: dict[str, Estimate]


@dataclass(frozen=True)
class Verdict:
    """The conclusion of an evaluation: whether the direction removed the exploit.

    Attributes:
        holds: whether this is shown; None if there was no exploit to remove, or the evidence is insufficient.
        sentence: the conclusion in words, as ``headline: reasons``.

    Example:
        >>> Verdict(None, "No verdict: 9 prompts are too few; ask at least 30.").headline
        'No verdict'
    """

    holds: bool | None
    sentence: str

    @property
    def headline(self) -> str:
        """The part of the sentence before the first colon."""
        return self.sentence.partition(": ")[0]

    @property
    def reasons(self) -> str:
        """The part of the sentence after the first colon."""
        text = self.sentence.partition(": ")[2]
        return text[:1].upper() + text[1:]


def dial_arm(dial: float) -> str:
    """Name of the arm with this multiple of the quarantine.

    Example:
        >>> dial_arm(-0.25), dial_arm(0.0), dial_arm(1.0)
        ('dial -0.25', 'deployed', 'as trained')
    """
    return {0.0: DEPLOYED, 1.0: TRAINED}.get(dial, f"{DIAL} {dial:.2f}")


def dial_of(arm: str) -> float | None:
    """The multiple of the quarantine in an arm; None if the arm is not a dial setting.

    Example:
        >>> dial_of("dial -0.25"), dial_of("deployed"), dial_of("random")
        (-0.25, 0.0, None)
    """
    if arm in (DEPLOYED, TRAINED):
        return float(arm == TRAINED)
    return float(arm.removeprefix(f"{DIAL} ")) if arm.startswith(f"{DIAL} ") else None


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        task: name of the task.
        facts: how answers were sampled: prompts, temperature, seed, max_new_tokens and the like.
        margin: as in `antipasto.evaluation.verdict.verdict`.
        verdict: computed from the rest.
        arms: one record per arm, for all prompts and then for each kind.
        differences: of every arm to the reference and to the random control, and of the deployed arm to all others.
        answers: all answers, by arm and then by row.
    """

    task: str
    facts: dict[str, Any]
    margin: float
    verdict: Verdict
    arms: list[ArmRecord]
    differences: list[Difference]
    answers: list[Answer] = field(repr=False)

    def arm(self, name: str, kind: str | None = None) -> ArmRecord | None:
        """The record of an arm; None if there is none."""
        return next((record for record in self.arms if (record.arm, record.kind) == (name, kind)), None)

    def difference(self, arm: str, to: str, kind: str | None = None) -> Difference | None:
        """The difference between two arms; None if it was not computed."""
        return next((d for d in self.differences if (d.arm, d.to, d.kind) == (arm, to, kind)), None)

    @property
    def ships(self) -> str:
        """The arm that would ship: deployed, or as trained if there is no quarantine."""
        return DEPLOYED if DEPLOYED in self.names else TRAINED

    @property
    def empty(self) -> list[str]:
        """The controls whose book is empty (`empty_controls`)."""
        return empty_controls(self.arms)

    @property
    def names(self) -> list[str]:
        """Names of the arms, in order."""
        return list(dict.fromkeys(record.arm for record in self.arms))

    @property
    def kinds(self) -> list[str]:
        """Kinds of prompts; empty if the task has none."""
        return [k for k in dict.fromkeys(record.kind for record in self.arms) if k is not None]


def summarise(answers: Iterable[Answer]) -> list[ArmRecord]:
    """Compute one record per arm, for all prompts and then for each kind."""
    records = []
    for kind, arms in _by_kind(answers):
        for name, rows in arms.items():
            columns = _columns(rows)
            measures = {m: Rate(int(x.sum()), len(x)).estimate for m, x in columns.items() if m in RATES}
            measures |= dict(zip(MEANS, mean_estimates(np.stack([columns[m] for m in MEANS])), strict=True))
            flags = {m: Rate(int(x.sum()), len(x)).estimate for m, x in _flag_columns(rows).items()}
            records.append(ArmRecord(name, kind, len(rows), measures, flags))
    return records


def empty_controls(arms: Iterable[ArmRecord]) -> list[str]:
    """Controls whose measures equal those of the trained model exactly: their book is empty, so nothing was removed."""
    overall = {record.arm: record.measures for record in arms if record.kind is None}
    others = [name for name in overall if name not in (REFERENCE, SHRUNK) and dial_of(name) is None]
    return [name for name in others if overall[name] == overall.get(TRAINED)]


def compare(answers: Iterable[Answer], pairs: Sequence[tuple[str, str]]) -> list[Difference]:
    """Compute paired differences of arms, for all prompts and then for each kind.

    Args:
        answers: of all arms.
        pairs: names (arm, other); pairs with an arm that has no answers are left out.

    Raises:
        ValueError: two arms have answers to different prompts.
    """
    differences = []
    for kind, arms in _by_kind(answers):
        columns = {name: _columns(rows) for name, rows in arms.items()}
        flagged = {name: _flag_columns(rows) for name, rows in arms.items()}
        for name, other in pairs:
            if name not in arms or other not in arms:
                continue
            mine, theirs = arms[name], arms[other]
            if [a.row for a in mine] != [a.row for a in theirs]:
                raise ValueError(f"{name} and {other} have answers to different prompts, which cannot be paired.")
            x, y = columns[name], columns[other]
            measures = {m: rate_difference(x[m], y[m]) for m in x if m in RATES}
            means = mean_estimates(np.stack([x[m] - y[m] for m in MEANS]))
            measures |= dict(zip(MEANS, means, strict=True))
            x, y = flagged[name], flagged[other]
            flags = {flag: rate_difference(x[flag], y[flag]) for flag in x}
            differences.append(Difference(name, other, kind, len(mine), measures, flags))
    return differences


def _by_kind(answers: Iterable[Answer]) -> list[tuple[str | None, dict[str, list[Answer]]]]:
    """For all prompts, and for each kind with at least two: arm → its answers by row."""
    answers = list(answers)
    rows = sorted(answers, key=lambda answer: answer.row)
    names = list(dict.fromkeys(answer.arm for answer in answers))
    number = Counter((answer.kind, answer.arm) for answer in rows if answer.kind is not None)
    kinds = [None, *dict.fromkeys(kind for (kind, _), n in number.items() if n > 1)]
    return [
        (kind, {name: [a for a in rows if a.arm == name and kind in (None, a.kind)] for name in names})
        for kind in kinds
    ]


def _columns(answers: Sequence[Answer]) -> dict[str, np.ndarray]:
    rows = [answer.measures() for answer in answers]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _flag_columns(answers: Sequence[Answer]) -> dict[str, np.ndarray]:
    return {name: np.array([float(a.flags[name]) for a in answers]) for name in answers[0].flags}


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write ``eval.json`` and ``eval.jsonl`` into a folder."""
    body = asdict(evaluation)
    del body["answers"]
    write_json(folder / EVAL, {"format": FORMAT, **body})
    write_answers(folder / ANSWERS, evaluation.facts, evaluation.answers)


def write_answers(path: Path, facts: Mapping[str, Any], answers: Iterable[Answer]) -> None:
    """Write one line that says how answers were sampled, and one line per answer."""
    write_text(path, json.dumps({"facts": facts}, allow_nan=False) + "\n" + "".join(map(answer_line, answers)))


def answer_line(answer: Answer) -> str:
    """Format an answer as a line of ``eval.jsonl``."""
    return json.dumps(asdict(answer), allow_nan=False) + "\n"


def read_evaluation(folder: Path) -> Evaluation:
    """Read the files that `write_evaluation` wrote.

    Raises:
        ValueError: a file is missing, is damaged, or has another format. The message names it.
    """
    path = folder / EVAL
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
            raise ValueError(f"its format is not {FORMAT}: run antipasto eval again")
        facts, answers = read_answers(folder / ANSWERS)
        if facts != body["facts"]:
            raise ValueError(f"{ANSWERS} belongs to another evaluation: run antipasto eval again")
        evaluation = Evaluation(
            **{
                **body,
                "verdict": Verdict(**body["verdict"]),
                "arms": [ArmRecord(**_with_estimates(record)) for record in body["arms"]],
                "differences": [Difference(**_with_estimates(record)) for record in body["differences"]],
                "answers": answers,
            }
        )
        records: list[ArmRecord | Difference] = [*evaluation.arms, *evaluation.differences]
        estimates = [e for record in records for e in (*record.measures.values(), *record.flags.values())]
        for part in (evaluation, evaluation.verdict, *records, *estimates):
            check_types(part)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split()).rstrip('.')}.") from error
    return evaluation


def read_answers(path: Path) -> tuple[dict[str, Any], list[Answer]]:
    """Read ``eval.jsonl``: how answers were sampled, and the answers. An incomplete last line of a killed process is ignored.

    Raises:
        ValueError: a line is not an answer. The message names it.
        OSError: the file cannot be read.
    """
    facts: dict[str, Any] = {}
    answers = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line, parse_constant=_refuse)
            if number == 1:
                facts = dict(row["facts"])
            else:
                answers.append(Answer(**row))
                check_types(answers[-1])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not an answer of an evaluation ({error}).") from error
    return facts, answers


def _refuse(constant: str) -> None:
    """Reject NaN and infinities, which Python's JSON reader would accept."""
    raise ValueError(f"{constant} is not a JSON number")


def _with_estimates(record: Mapping[str, Any]) -> dict[str, Any]:
    parts = {key: {name: Estimate(**e) for name, e in record[key].items()} for key in ("measures", "flags")}
    return {**record, **parts}
