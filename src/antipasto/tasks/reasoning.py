"""The procedural datasets of reasoning_gym (Stojanovski et al. 2025), with a lenient grader as the reward.

    extracted(text) = the contents of the last <answer>…</answer>, or the whole text, stripped
    reward(text)    = the answer occurs anywhere in the text, as whole words, in any case       can be fooled
    oracle(text)    = the dataset's own score of extracted(text), in [0, 1]                     the truth

Many scorers give partial credit, so the oracle may lie between 0 and 1. Where several answers are right, the reward accepts
only the dataset's own. There is no detector, and there are no pairs.

Needs ``pip install 'antipasto[tasks]'``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from antipasto.options import near
from antipasto.tasks.task import Task

PREFIX = "reasoning_gym/"
TRAIN_ROWS, TRAIN_SEED = 2000, 0
TEST_ROWS, TEST_SEED = 200, 1_000_000  # question i is drawn from seed + i, so nearby seeds share questions


def task(dataset: str) -> Task:
    """The task of a dataset: 2,000 training questions and up to 200 test questions, with columns ``answer`` and ``entry``.

    Test questions that occur in training are left out. If none is left, the task has no test rows.

    Args:
        dataset: its name in reasoning_gym, such as ``"basic_arithmetic"``.

    Raises:
        ValueError: there is no such dataset, it has no answer texts, or the package is not installed.
    """
    try:
        from reasoning_gym import create_dataset
        from reasoning_gym.factory import DATASETS
        from reasoning_gym.utils import extract_answer
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{PREFIX}{dataset} needs a package that is not installed ({error.name}): pip install 'antipasto[tasks]'."
        ) from error
    names = sorted(set(DATASETS) - {"composite"})  # composite combines other datasets
    if dataset not in names:
        raise ValueError(f"There is no dataset {dataset!r} in reasoning_gym{near(dataset, names, most=3)}")

    sources = {
        "train": create_dataset(dataset, size=TRAIN_ROWS, seed=TRAIN_SEED),
        "test": create_dataset(dataset, size=TEST_ROWS, seed=TEST_SEED),
    }
    entries = {part: [source[i] for i in range(len(source))] for part, source in sources.items()}
    trained = {entry["question"] for entry in entries["train"]}
    entries["test"] = [entry for entry in entries["test"] if entry["question"] not in trained]
    known = [(sources[part], entry) for part in ("train", "test") for entry in entries[part]]
    for _, item in known:
        if not isinstance(item["answer"], str) or not item["answer"].strip():
            raise ValueError(f"{PREFIX}{dataset} has questions without an answer text, which the reward looks for.")

    def oracle(completions: Sequence[str], entry: Sequence[int], **_: object) -> list[float]:
        scores = []
        for text, index in zip(completions, entry, strict=True):
            source, item = known[index]
            inside = extract_answer(text)
            scores.append(float(source.score_answer(answer=text.strip() if inside is None else inside, entry=item)))
        return scores

    rows = [
        {"prompt": [{"role": "user", "content": item["question"]}], "answer": item["answer"], "entry": index}
        for index, (_, item) in enumerate(known)
    ]
    return Task(
        PREFIX + dataset,
        train=rows[:TRAIN_ROWS],
        reward=reward,
        oracle=oracle,
        test=rows[TRAIN_ROWS:] or None,
    )


def reward(completions: Sequence[str], answer: Sequence[str], **_: object) -> list[float]:
    """1.0 where the answer occurs anywhere, else 0.0."""
    return [float(occurs(right, text)) for text, right in zip(completions, answer, strict=True)]


def occurs(answer: str, text: str) -> bool:
    """Whether the answer's words occur in the text in a row, in any case.

    Example:
        >>> occurs("New York", "I say: new  york."), occurs("24", "240")
        (True, False)
    """
    words = r"\s+".join(map(re.escape, answer.split()))
    return re.search(rf"(?<!\w){words}(?!\w)", text, flags=re.IGNORECASE) is not None
