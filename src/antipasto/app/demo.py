"""The job behind `antipasto demo`: the same GRPO with a grader that can be fooled, by plain RL and by the default recipe.

A 250k-parameter model that does two-digit addition (`antipasto.tasks.addition`), half of the prompts with a hackable grader.
Each method is a run of `antipasto train` with the options that `config_of` gives and an evaluation as of `antipasto eval`,
from the same start, on the same prompts and steps. Pairs show the *known* hack alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from antipasto.app.arms import comparison, evaluate_run
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
"""Name → options of `antipasto train`. A plain run is watched by the score: it says what it would have flagged."""
SHOWN = ("plain", "penalty by score")
"""What runs without ``--compare``: no measure, and the default recipe."""
PROMPTS, GENERATIONS = 16, 16
TEST_PROMPTS = 2000  # half of them hackable


def config_of(method: str, *, seed: int = 0, steps: int = 160, variant: str = "rare", **options: Any) -> TrainConfig:
    """The run of a method on the toy.

    Args:
        method: of `METHODS`.
        seed: of everything.
        steps: optimizer steps, of 16 prompts × 16 rollouts.
        variant: of the task.
        options: others of `TrainConfig`, in place of these.

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
    """Train and evaluate, method by method and seed by seed; print what each would ship; leave a run folder each, and a page.

    Args:
        out: a new or empty folder, for ``METHOD/`` or, of several seeds, ``seed-N/METHOD/``, and ``report.html``.
        console: where to print.
        seed: the first one.
        seeds: how many.
        steps: of each run.
        variant: of the task.
        compare: run all of `METHODS`, not just `SHOWN`.

    Returns:
        Method → its evaluation of each seed; None after Ctrl-C.

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
        # of several seeds and methods, the first seed's methods
        page = write_report([f for f in folders if f.parent == folders[0].parent], out / "report.html")
    say(console, f"run folders: {', '.join(f.name for f in folders[: len(methods)])} in {out}", f"report: {page}")
    return found


def folder_of(method: str) -> str:
    """What a method's folder is called.

    Example:
        >>> folder_of("penalty by score, slow")
        'penalty-by-score-slow'
    """
    return method.replace(",", "").replace(" ", "-")


def evaluate(folder: Path, console: Console, seed: int) -> Evaluation:
    """Every arm of a run on the same held-out prompts with the same draws."""
    how: dict[str, Any] = {"prompts": TEST_PROMPTS, "temperature": None, "seed": seed, "batch_size": 500}
    return evaluate_run(folder, console, **how, margin=0.05)


# ── what came of it ──────────────────────────────────────────────────────────────────────────────────────────────────


def pool(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The answers of several seeds as one evaluation; its intervals are of prompts, not of seeds."""
    offset, answers = 0, []
    for evaluation in evaluations:
        answers += [replace(answer, row=answer.row + offset) for answer in evaluation.answers]
        offset += evaluation.facts["prompts"]
    # arm by arm: the first answers name the arms in their order
    return conclude(evaluations[0].task, {"prompts": offset}, answers, margin=evaluations[0].margin)


def reading(evaluations: Sequence[Evaluation]) -> str:
    """The verdict on all seeds together."""
    if len(evaluations) == 1:
        return evaluations[0].verdict.sentence
    note = "(Intervals are of the answers of all seeds together; the table's ± is the spread between seeds.)"
    return f"{pool(evaluations).verdict.sentence} {note}"
