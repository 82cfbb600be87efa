"""The job behind `antipasto eval`: ask every arm of a run the task's held-out prompts, with the same random draws.

An *arm* is one version of the run's model: reference, as trained, deployed, or a control (`antipasto.app.runs.run_views`).

Answers are saved in ``eval.partial.jsonl`` as they come, and a call with the same options continues there. At the end they
replace ``eval.json`` and ``eval.jsonl``. A finished evaluation is reused too: another margin needs no new answers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from antipasto.app.data import digest
from antipasto.app.models import quiet
from antipasto.app.run_folder import RunFolder
from antipasto.app.runs import LoadedRun, load_run
from antipasto.evaluation.ask import Sampling, as_in_training, ask_arms, conclude, matched_scale
from antipasto.evaluation.records import (
    ANSWERS,
    DIALS,
    MEANS,
    PARTIAL,
    RANDOM,
    RATES,
    REFERENCE,
    Answer,
    Estimate,
    Evaluation,
    answer_line,
    read_answers,
    short,
    write_answers,
    write_evaluation,
)
from antipasto.tasks import Task
from antipasto.terminal import add_row, doing, is_live, plain, say

SIZING = 64
"""Number of held-out prompts used to scale θ down to the deployed model's KL to the reference."""


def evaluate_run(
    root: Path,
    console: Console,
    *,
    prompts: int | None,
    temperature: float | None,
    seed: int,
    batch_size: int,
    margin: float,
    dial: bool = False,
) -> Evaluation:
    """Evaluate every arm of a run on the same held-out prompts with the same random draws. `show` prints the result.

    Raises:
        ValueError: the run is not finished, its task has no held-out rows, or its base model has changed.
    """
    with RunFolder(root).held(new=False):
        run = load_run(root)
        task = run.load_task()
        if dial and not run.has_quarantine:
            raise ValueError(f"{root}: --dial needs a quarantine, and a run by method {run.method} has none.")
        if task.test is None:
            raise ValueError(f"Task {task.name!r} has no held-out rows: give it test rows to evaluate on.")
        rows = list(task.test)[:prompts]
        how = as_in_training(run.config, task, temperature=temperature, seed=seed, batch_size=batch_size)
        say(console, _drawn(run, how, temperature))
        facts = {"prompts": len(rows), **how.facts(), "method": run.method, **_digests(root, task, rows)}
        before, done = _earlier(root, facts, console)
        if run.has_quarantine:
            with doing(console, "measuring the KL of the deployed model to the reference"), quiet():
                asked = [row["prompt"] for row in rows[:SIZING]]
                facts["shrunk_by"] = before.get("shrunk_by") or matched_scale(run.model, run.tokenizer, asked, how)
        write_answers(root / PARTIAL, facts, done)
        arms = run.views(shrink=facts.get("shrunk_by"), dials=DIALS if dial else ())
        with asking(console, len(rows) * len(arms), len(done)) as tell, quiet():

            def keep(answers: list[Answer]) -> None:
                with (root / PARTIAL).open("a", encoding="utf-8") as file:
                    file.writelines(map(answer_line, answers))
                tell(answers)

            answers = ask_arms(run.model, run.tokenizer, task, rows, arms, how, done=done, on_answers=keep)
        evaluation = conclude(task.name, facts, answers, margin=margin)
        write_evaluation(evaluation, root)
        (root / PARTIAL).unlink()
        return evaluation


def _drawn(run: LoadedRun, how: Sampling, temperature: float | None) -> str:
    """One sentence on how answers are sampled."""
    said = {"temperature": how.temperature, **how.options, "max_new_tokens": how.max_new_tokens}
    text = "answers are sampled as in training" + (", except the temperature: " if temperature is not None else ": ")
    text += ", ".join(f"{name} {value}" for name, value in said.items())
    trainer = run.config.get("trainer") or {}
    if trainer.get("use_vllm") and trainer.get("generation_kwargs"):
        text += "; generation_kwargs were for vLLM and are not used here"
    return text


_LINES = 20  # progress lines of one evaluation in a log


@contextmanager
def asking(console: Console, total: int, done: int = 0) -> Iterator[Callable[[list[Answer]], None]]:
    """Show progress: a bar on a terminal, otherwise one line for each twentieth of the answers.

    Args:
        total: number of answers to come, including those that are done.
        done: number of answers from an earlier call.

    Yields:
        A function to call with new answers.
    """
    live = is_live(console)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not live, speed_estimate_period=24 * 3600.0) as bar:
        line = bar.add_task("asking", total=total, completed=done)

        def tell(answers: list[Answer]) -> None:
            before = int(bar.tasks[0].completed) * _LINES // total
            bar.update(line, description=plain(answers[0].arm), advance=len(answers))
            now, left = int(bar.tasks[0].completed), bar.tasks[0].time_remaining
            if not live and now * _LINES // total > before:
                text = f"asking {answers[0].arm}  {now:,}/{total:,} answers"
                text += f"  left {timedelta(seconds=round(left))}" if left is not None else ""
                console.print(plain(text), markup=False, highlight=False, soft_wrap=True)

        yield tell


def _digests(root: Path, task: Task, rows: Sequence[Any]) -> dict[str, str]:
    """Digests of the prompts and of the weights. An evaluation is continued only if both are unchanged."""
    answered_by = hashlib.sha256()
    for path in (root / "adapter" / "adapter_model.safetensors", root / "books.safetensors"):
        answered_by.update(path.read_bytes() if path.exists() else b"")
    asked = digest([task.name, [dict(row) for row in rows]])
    return {"asked": asked, "answered_by": answered_by.hexdigest()[:16]}


def _earlier(root: Path, facts: dict[str, Any], console: Console) -> tuple[dict[str, Any], list[Answer]]:
    """Facts and answers of an earlier evaluation with the same options, finished or not; empty if there is none."""
    for path in (root / PARTIAL, root / ANSWERS):
        try:
            before, found = read_answers(path) if path.exists() else ({}, [])
        except ValueError as error:
            say(console, f"asking again: {error}")
            continue
        if before and facts.items() <= before.items():
            say(console, f"continuing: {len(found):,} answers are there already")
            return before, found
    return {}, []


# ── on the screen ────────────────────────────────────────────────────────────────────────────────────────────────────


def show(evaluation: Evaluation, console: Console) -> None:
    """Print an evaluation: rates, means, differences and the verdict."""
    first = evaluation.arms[0]
    if first.flags or "solve" in first.measures:
        console.print(rates_table([evaluation]))
    console.print(_means_table(evaluation))
    console.print(Text(plain(evaluation.verdict.sentence)))


def rates_table(evaluations: Sequence[Evaluation]) -> Group:
    """Rates by arm and kind of prompt: with intervals for one evaluation, as mean ± sd for several seeds."""
    first = evaluations[0]
    drawn = "greedy" if first.facts.get("temperature") == 0 else "sampled"
    rows = {name: [(evaluation, name) for evaluation in evaluations] for name in first.names}
    tables = _rates(f"{first.arms[0].n:,} answers of each model, {drawn}", "model", rows)
    if RANDOM in first.names:
        caption = Text(
            "random, permuted, …: what that control would have moved is removed, not the quarantine", "table.caption"
        )
        if empty := [name for name in first.empty if all(name in e.empty for e in evaluations)]:
            caption.append(f"\n{plain(', '.join(empty))}: its book is empty, so nothing is removed")
        tables[-1].caption = caption
    return Group(*tables)


def comparison(runs: Mapping[str, Sequence[Evaluation]]) -> Group:
    """What each run would ship, and the reference. ``runs``: name → its evaluations, one per seed."""
    first = next(iter(runs.values()))
    rows = {REFERENCE: [(evaluation, REFERENCE) for evaluation in first]}
    rows |= {name: [(evaluation, evaluation.ships) for evaluation in seeds] for name, seeds in runs.items()}
    return Group(*_rates("what each would ship", "run", rows))


COLUMNS = 4
"""Rates and flags that fit into 80 columns, next to a name. Further ones are in a table of their own."""


def _rates(title: str, what: str, rows: Mapping[str, Sequence[tuple[Evaluation, str]]]) -> list[Table]:
    """Tables of rates and flags, one row for each name and kind of prompt. ``rows``: name → (evaluation, arm) per seed."""
    first, arm = next(iter(rows.values()))[0]
    seeds = len(next(iter(rows.values())))
    record = first.arm(arm)
    assert record is not None
    columns = [
        *(("measures", name) for name in RATES if name in record.measures),
        *(("flags", f) for f in record.flags),
    ]
    kinds: list[str | None] = [*first.kinds] or [None]
    tables = []
    width = math.ceil(len(columns) / math.ceil(len(columns) / COLUMNS))  # tables of about the same width
    for start in range(0, len(columns), width):
        part = columns[start : start + width]
        table = _table(
            f"{title} {'[95% interval]' if seeds == 1 else f'(mean ± sd of {seeds} seeds)'}" if not start else ""
        )
        for column in (what, *(name for _, name in part)):
            table.add_column(Text(plain(column)))
        for kind in kinds:
            if kind is not None:
                add_row(table, Text(plain(f"{kind} prompts"), style="italic"))
            for name, found in rows.items():
                records = [record for evaluation, arm in found if (record := evaluation.arm(arm, kind)) is not None]
                add_row(table, name, *(cell([getattr(r, group)[each] for r in records]) for group, each in part))
            table.add_section()
        tables.append(table)
    return tables


def cell(estimates: Sequence[Estimate]) -> str:
    """One estimate with its interval, or several seeds as mean ± standard deviation."""
    if len(estimates) == 1:
        return str(estimates[0])
    values = [estimate.value for estimate in estimates]
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def _means_table(evaluation: Evaluation) -> Table:
    """Means of every arm, and the paired difference of what ships to it."""
    ships = evaluation.ships
    rates = [name for name in RATES if name in evaluation.arms[0].measures]
    table = _table(f"means, and {ships} minus each model [95% interval, paired by prompt]")
    for title in ("model", *(f"{ships} − it: {rate}" for rate in rates), "reward", "KL", "length"):
        table.add_column(title, justify="right" if title in ("reward", "KL", "length") else "left")
    for name in evaluation.names:
        record, less = evaluation.arm(name), evaluation.difference(ships, name)
        assert record is not None
        means = [short(record.measures[m].value) for m in MEANS]
        add_row(table, name, *(str(less.measures[rate]) if less else "" for rate in rates), *means)
    table.caption = "KL to the reference in nats per answer; length in tokens"
    return table


def _table(title: str) -> Table:
    """An empty table, narrow enough for 80 columns."""
    said = Text(plain(title), "table.title")
    return Table(title=said, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left", caption_justify="left")
