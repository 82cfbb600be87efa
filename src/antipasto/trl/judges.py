"""Call detectors and oracles as TRL calls reward functions, and check their answers.

    detector   rollout → {0, 1}             a bool, 0 or 1, also of NumPy or torch; apply a threshold to a score first
    oracle     rollout → [0, 1] or None     None or NaN to abstain: the rollout counts neither as exploit nor as solved

Neither can affect training: random draws and changes of global state are undone (`antipasto.unchanged`).
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
    """Call a judge and check its answers: one bool per rollout from a detector, one number or None from an oracle.

    Args:
        role: detector or oracle.
        judge: the function. Without ``**kwargs``, it gets only the arguments that it names.
        rollouts: ``prompts``, ``completions`` and everything else that TRL passes to a reward function.

    Raises:
        ValueError: the number of answers differs from the number of rollouts, or an answer is invalid.
    """
    given = {name: _own(name, value) for name, value in _named(judge, rollouts).items()}
    with unchanged(draws=False):
        answers = judge(**given)
        if inspect.isawaitable(answers):
            answers = awaited(answers)
    answers = answers.tolist() if hasattr(answers, "tolist") else answers
    n = len(rollouts["prompts"])
    if not isinstance(answers, Sequence) or isinstance(answers, (str, bytes)):
        raise ValueError(
            f"The {role} returned {answers!r} for {n} rollouts, expected a list with one value per rollout."
        )
    if len(answers) != n:
        raise ValueError(f"The {role} returned {len(answers)} values for {n} rollouts, expected one per rollout.")
    check = _flag if role == "detector" else _truth
    return [check(answer, row) for row, answer in enumerate(answers)]


def _own(name: str, value: Any) -> Any:
    """Copy a column, so that the judge may modify it. TRL's other arguments are passed as they are."""
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
    """The answer as a float; None if it is not a number."""
    answer = answer.item() if getattr(answer, "ndim", None) == 0 else answer  # NumPy scalars and 0-d tensors
    return float(answer) if isinstance(answer, numbers.Real) else None


def _flag(answer: Any, row: int) -> bool:
    number = _number(answer)
    if number not in (0, 1):
        raise ValueError(
            f"The detector returned {answer!r} for rollout {row}, expected a bool, 0 or 1. If it computes scores, apply a "
            "threshold: return [score > threshold for score in scores]."
        )
    return bool(number)


def _truth(answer: Any, row: int) -> float | None:
    number = math.nan if answer is None else _number(answer)
    if number is None or not (math.isnan(number) or 0 <= number <= 1):
        raise ValueError(
            f"The oracle returned {answer!r} for rollout {row}, expected a bool, a number from 0 to 1, or None to abstain."
        )
    return None if math.isnan(number) else number
