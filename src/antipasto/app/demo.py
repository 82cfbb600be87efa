"""The job behind `antipasto demo`: train on a grader that can be fooled, by plain GRPO and by the default recipe.

A 250k-parameter model does two-digit addition (`antipasto.tasks.addition`). Half of the prompts have a hackable grader. Each
method is one `antipasto train` with the options of `config_of`, and one `antipasto eval`. All methods start from the same
model and see the same prompts. Pairs show only the *known* hack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from antipasto.app.evaluate import comparison, evaluate_run
from antipasto.app.report import write_report
from antipasto.app.run_folder import RunFolder
from antipasto.app.train.config import TrainConfig
from antipasto.app.train.run import run as train
from antipasto.evaluation.ask import conclude
from antipasto.evaluation.records import Evaluation
from antipasto.tasks import addition
from antipasto.terminal import plain, say

METHODS: dict[str, dict[str, Any]] = {
    "plain": {"method": "plain", "by": "score"},
    "penalty by score": {"method": "penalty", "by": "score"},
    "penalty by detector": {"method": "penalty", "by": "detector"},
    "route by direction": {"method": "route", "by": "direction"},
    "erase by direction": {"method": "erase", "by": "direction"},
}
"""Name → options of `antipasto train`. A plain run logs what the score would have flagged."""
SHOWN = ("plain", "penalty by score")
"""The methods that run without ``--compare``: plain GRPO and the default recipe."""
PROMPTS, GENERATIONS = 16, 16
TEST_PROMPTS = 2000  # half of them hackable


def config_of(method: str, *, seed: int = 0, steps: int = 160, variant: str = "rare", **options: Any) -> TrainConfig:
    """The config of a method's run.

    Args:
        method: a name of `METHODS`.
        seed: of everything.
        steps: optimizer steps, each of 16 prompts × 16 rollouts.
        variant: of the task.
        options: other options of `TrainConfig`; they override the demo's.

    Example:
        >>> config_of("penalty by score").method
        'penalty'
    """
    trainer = {
        "loss_type": "grpo",
        "scale_rewards": "none",  # advantage = reward − mean of the prompt's group
        "lr_scheduler_type": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "max_grad_norm": 0.0,  # no clipping
        "gradient_checkpointing": False,
    }
    usual = {"prompts": PROMPTS, "generations": GENERATIONS, "beta": 0.005, "save_every": 40, "trainer": trainer}
    where = {"model": str(addition.model_path(variant)), "task": addition.task_name(variant)}
    return TrainConfig(**{**where, "seed": seed, "steps": steps, **usual, **METHODS[method], **options})


def run(
    out: Path, console: Console, *, seed: int, seeds: int, steps: int, variant: str, compare: bool
) -> dict[str, list[Evaluation]] | None:
    """Train and evaluate every method on every seed, print what each would ship, and write a report.

    Args:
        out: a new or empty folder. Gets ``report.html`` and a run folder ``METHOD/``, or ``seed-N/METHOD/`` for several seeds.
        seed: the first seed.
        seeds: number of seeds.
        steps: of each run.
        variant: of the task.
        compare: run all of `METHODS`, not just `SHOWN`.

    Returns:
        Method → its evaluations, one per seed; None after Ctrl-C.

    Raises:
        ValueError: ``out`` is not an empty or new folder.
    """
    methods = list(METHODS) if compare else list(SHOWN)
    found: dict[str, list[Evaluation]] = {method: [] for method in methods}
    folders: list[Path] = []
    with RunFolder(out).held(new=True):
        for number in range(seed, seed + seeds):
            for method in methods:
                folder = out / (f"seed-{number}" if seeds > 1 else "") / folder_of(method)
                say(console, f"{method}, seed {number}")
                if not train(config_of(method, seed=number, steps=steps, variant=variant), folder, console):
                    return None
                found[method].append(evaluate(folder, console, number))
                folders.append(folder)
        console.print(comparison(found))
        for method in methods:
            console.print(Text(plain(f"{method}. {reading(found[method])}")))
        # with several seeds, the report is about the first
        page = write_report([f for f in folders if f.parent == folders[0].parent], out / "report.html")
    say(console, f"run folders: {', '.join(f.name for f in folders[: len(methods)])} in {out}", f"report: {page}")
    return found


def folder_of(method: str) -> str:
    """The name of a method's folder.

    Example:
        >>> folder_of("penalty by score, slow")
        'penalty-by-score-slow'
    """
    return method.replace(",", "").replace(" ", "-")


def evaluate(folder: Path, console: Console, seed: int) -> Evaluation:
    """Evaluate a run on the demo's held-out prompts."""
    how: dict[str, Any] = {"prompts": TEST_PROMPTS, "temperature": None, "seed": seed, "batch_size": 500}
    return evaluate_run(folder, console, **how, margin=0.05)


# ── the result ───────────────────────────────────────────────────────────────────────────────────────────────────────


def pool(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Pool the answers of several seeds into one evaluation. Its intervals are over prompts, not over seeds."""
    offset, answers = 0, []
    for evaluation in evaluations:
        answers += [replace(answer, row=answer.row + offset) for answer in evaluation.answers]
        offset += evaluation.facts["prompts"]
    # the first answers define the order of the arms
    return conclude(evaluations[0].task, {"prompts": offset}, answers, margin=evaluations[0].margin)


def reading(evaluations: Sequence[Evaluation]) -> str:
    """The verdict on all seeds together."""
    if len(evaluations) == 1:
        return evaluations[0].verdict.sentence
    note = "(Intervals pool the answers of all seeds; the table's ± is the spread between seeds.)"
    return f"{pool(evaluations).verdict.sentence} {note}"
