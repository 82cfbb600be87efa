"""Detectors and oracles, called as TRL calls a reward function, and what they may answer.

    detector   rollout → {0, 1}             a bool, 0 or 1; also NumPy's and torch's. A score needs a threshold first.
    oracle     rollout → [0, 1], or none    None or NaN where it abstains: neither exploit nor solve

Both only look: nothing that they draw, set or change reaches the training run (`antipasto.unchanged`).
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from antipasto.unchanged import awaited, copies, unchanged

Judge = Callable[..., Any]
Role = Literal["detector", "oracle"]


def ask(role: Role, judge: Judge, rollouts: Mapping[str, Any]) -> list[Any]:
    """One answer per rollout, checked: bools of a detector, numbers or None of an oracle.

    Args:
        role: which of the two it is.
        judge: the function. Without ``**kwargs`` it gets what it names.
        rollouts: ``prompts``, ``completions`` and what else TRL gives to a reward function.

    Raises:
        ValueError: it gave another number of answers than there are rollouts, or what is none.
    """
    given = {name: _own(name, value) for name, value in _named(judge, rollouts).items()}
    with unchanged(draws=False):
        answers = judge(**given)
        if inspect.isawaitable(answers):
            answers = awaited(answers)
    answers = answers.tolist() if hasattr(answers, "tolist") else answers
    n = len(rollouts["prompts"])
    if not isinstance(answers, Sequence) or isinstance(answers, (str, bytes)):
        raise ValueError(f"The {role} gave {answers!r} for {n} rollouts: a list with one value each is expected.")
    if len(answers) != n:
        raise ValueError(f"The {role} gave {len(answers)} values for {n} rollouts: one each is expected.")
    check = _flag if role == "detector" else _truth
    return [check(answer, row) for row, answer in enumerate(answers)]


def _own(name: str, value: Any) -> Any:
    """A column that the judge may write into; what TRL gives beside the columns is TRL's."""
    if not isinstance(value, list):
        return value
    return list(value) if name == "environments" else copies(value)


def _named(judge: Judge, rollouts: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        parameters = inspect.signature(judge).parameters.values()
    except ValueError:  # some functions in C have no signature
        return rollouts
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return rollouts
    return {parameter.name: rollouts[parameter.name] for parameter in parameters if parameter.name in rollouts}


def _number(answer: Any) -> float | None:
    """Its value; None where it is not a number."""
    answer = answer.item() if getattr(answer, "ndim", None) == 0 else answer  # NumPy's scalars, tensors of one number
    return float(answer) if isinstance(answer, numbers.Real) else None


def _flag(answer: Any, row: int) -> bool:
    number = _number(answer)
    if number not in (0, 1):
        raise ValueError(
            f"The detector gave {answer!r} for rollout {row}: it flags with a bool, 0 or 1. A score needs a stated threshold: "
            "return [score > threshold for score in scores]."
        )
    return bool(number)


def _truth(answer: Any, row: int) -> float | None:
    number = math.nan if answer is None else _number(answer)
    if number is None or not (math.isnan(number) or 0 <= number <= 1):
        raise ValueError(
            f"The oracle gave {answer!r} for rollout {row}: a bool or a number from 0 to 1 is expected, or None where it "
            "abstains."
        )
    return None if math.isnan(number) else number
