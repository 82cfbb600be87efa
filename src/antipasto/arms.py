"""The job behind `antipasto eval`: every arm of a run, asked the task's held-out prompts with the same draws.

reference       both knobs out: the base model
as trained      θ = δS + δS_hack
deployed        the quarantine out
random, …       a control's book out instead
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from antipasto.evaluate import ArmRecord, judge_arm, sample_completions
from antipasto.files import write_json, write_text
from antipasto.knobs import deployed, reference
from antipasto.models import base_fingerprint, best_device, load_model, quiet, with_template_options
from antipasto.routing import read_books
from antipasto.run_folder import RunFolder
from antipasto.tasks import Task, load_task
from antipasto.terminal import add_row
from antipasto.tuner import AntiPastoConfig
from antipasto.tuner.layer import View
from antipasto.tuner.views import seen_as


def evaluate_run(
    root: Path,
    console: Console,
    *,
    prompts: int | None,
    temperature: float | None,
    seed: int,
    batch_size: int,
) -> list[ArmRecord]:
    """Every arm of a run on the same held-out prompts with the same draws; prints a table, writes eval.json and eval.jsonl.

    Raises:
        ValueError: this is no run that came to its end, its task has no held-out rows, or its base model is another one now.
    """
    folder = RunFolder(root)
    config = folder.read_config()
    if not folder.is_finished:
        raise ValueError(f"The run in {root} has not come to its end: antipasto train --resume {root}")
    task = load_task(config["task"])
    if task.test is None:
        raise ValueError(f"Task {task.name!r} has no held-out rows (test): there is nothing to ask.")
    rows = list(task.test)[:prompts]
    temperature = config["temperature"] if temperature is None else temperature
    model, tokenizer = load_model(config["model"], dtype=config["dtype"])
    with_template_options(tokenizer, config["trainer"].get("chat_template_kwargs"))
    with quiet():
        adapter = AntiPastoConfig.from_pretrained(str(folder.adapter))
        adapter.cache_dir = config["cache_dir"]
        model = PeftModel.from_pretrained(model.to(best_device()), folder.adapter, config=adapter)
    if base_fingerprint(model) != folder.read_run()["base"]["fingerprint"]:
        raise ValueError(
            f"{config['model']} has other weights now than when {root} was trained: its knobs mean nothing there."
        )
    views = _views(model, folder, config["method"])
    max_new_tokens = config["max_completion_length"] or task.max_completion_length or 256
    records = []
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        line = bar.add_task("", total=len(rows) * len(views))
        for name, view in views.items():
            bar.update(line, description=name)
            with view, quiet():
                answers = sample_completions(
                    model,
                    tokenizer,
                    [row["prompt"] for row in rows],
                    max_new_tokens=max_new_tokens,
                    seed=seed,
                    batch_size=batch_size,
                    temperature=temperature,
                    on_batch=lambda n: bar.advance(line, n),
                )
            records.append(judge_arm(name, task, rows, answers))
    facts = {"prompts": len(rows), "temperature": temperature, "seed": seed}
    write_json(root / "eval.json", {**facts, "arms": [record.to_json() for record in records]})
    lines = [
        json.dumps({"arm": record.name, "prompt": row["prompt"], "completion": text})
        for record in records
        for row, text in zip(rows, record.completions, strict=True)
    ]
    write_text(root / "eval.jsonl", "".join(line + "\n" for line in lines))
    console.print(_arms_table(task, records, facts))
    return records


def _views(model: PeftModel, folder: RunFolder, method: str) -> dict[str, AbstractContextManager[None]]:
    views: dict[str, AbstractContextManager[None]] = {"reference": reference(model), "as trained": nullcontext()}
    if method == "route":
        views["deployed"] = deployed(model)
    if folder.books.exists() and method != "erase":  # there, what the direction claimed is out of θ already, for good
        for name, book in read_books(folder.books).books.items():
            views[name] = seen_as(model, View.TRAINED, {layer: -part for layer, part in book.items()})
    return views


def _arms_table(task: Task, records: Sequence[ArmRecord], facts: dict[str, Any]) -> Table:
    names = [record.name for record in records]
    table = Table(
        title=f"share of {facts['prompts']} held-out prompts [95% interval], one answer each at temperature "
        f"{facts['temperature']:g}",
        caption="random, permuted: that control's book out instead of the quarantine" if "random" in names else None,
    )
    table.add_column("model")
    shown = [name for name in ("solve", "exploit", "flagged") if getattr(records[0], name) is not None]
    for name in shown:
        table.add_column(task.detects if name == "flagged" else name)
    table.add_column("mean reward")
    for record in records:
        add_row(table, record.name, *(str(getattr(record, name)) for name in shown), f"{record.reward:.2f}")
    return table
