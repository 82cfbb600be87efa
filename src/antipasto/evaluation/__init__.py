"""Sample answers from several arms of a model (`ask`), summarise them (`records`), and draw a conclusion (`verdict`)."""

from antipasto.evaluation.ask import (
    Sampling,
    ask_arms,
    conclude,
    matched_scale,
    own_answers,
    sample_completions,
)
from antipasto.evaluation.records import Evaluation, read_evaluation

__all__ = [
    "Evaluation",
    "Sampling",
    "ask_arms",
    "conclude",
    "matched_scale",
    "own_answers",
    "read_evaluation",
    "sample_completions",
]
