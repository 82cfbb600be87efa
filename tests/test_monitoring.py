"""What a run logs is what its reporters get, and what the guide to monitoring explains."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from command_line import MODEL, SMALL, TRAIN, fails, size, succeeds
from lines import read_lines
from peft import get_peft_model
from scripted import ON_CPU, load, make, tokenizer
from transformers import Trainer, TrainingArguments
from trl import GRPOTrainer

import antipasto as ap
from antipasto.tasks import addition
from antipasto.trl import RoutingCallback

GUIDE = Path(__file__).parents[1] / "docs" / "monitoring.md"
BOTH = ["tensorboard", "trackio"]
Rows = dict[int, dict[str, list[float]]]  # step → metric → what was reported of it at that step


def from_tensorboard(folder: Path) -> Rows:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    rows: Rows = defaultdict(lambda: defaultdict(list))
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            rows[event.step][tag.removeprefix("train/")].append(event.value)
    return rows


def from_trackio(project: str, name: str) -> Rows:
    from trackio.sqlite_storage import SQLiteStorage

    rows: Rows = defaultdict(lambda: defaultdict(list))
    for logged in SQLiteStorage.get_logs(project, name):
        if "train/global_step" in logged:  # TRL adds its own timings, each in a row by itself
            for key, value in logged.items():
                rows[logged["train/global_step"]][key.removeprefix("train/")].append(value)
    return rows


def all_arrived(written: list[dict[str, Any]], reported: Rows) -> None:
    """Every metric of every row, at its step, with its value; TensorBoard's are in single precision."""
    assert written
    for row in written:
        for key, value in row.items():
            if key != "step":
                assert reported[row["step"]][key][0] == pytest.approx(value, rel=1e-6), (row["step"], key)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by score, whose rollouts are flagged by a monitor instead."""
    out = tmp_path_factory.mktemp("runs") / "scored"
    succeeds(*TRAIN, "--method", "penalty", "--by", "score", "--out", out, *SMALL)
    return out


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that logs all that a run can log, and reports it to both."""
    out = tmp_path_factory.mktemp("runs") / "reported"
    words = ["--method", "route", "--beta", "0.04", "--trainer.report_to", "[tensorboard, trackio]"]
    succeeds(*TRAIN, *words, "--out", out, *size(6, save_every=2))
    return out


# ── reporters ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_metric_arrives(reported: Path) -> None:
    rows = metrics(reported)
    assert {"reward/deployed", "exploit/trained", "routing/hackward_in_random", "kl"} <= rows[0].keys()
    all_arrived(rows, from_tensorboard(reported / "tensorboard"))
    name = json.loads((reported / "run.json").read_text())["name"]
    assert re.fullmatch(r"reported-[0-9a-f]{6}", name)
    all_arrived(rows, from_trackio("antipasto", name))


def test_a_run_that_continues_is_the_same_run_to_them(reported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reported, folder)
    for done in ("adapter", "checkpoint-6"):  # as a kill leaves it, steps 5 and 6 reported and to be made again
        shutil.rmtree(folder / done)
    name = json.loads((folder / "run.json").read_text())["name"]
    before = len(from_trackio("antipasto", name)[6]["reward"])
    succeeds("train", "--resume", folder)
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    again = from_tensorboard(folder / "tensorboard")
    assert sorted(again) == [1, 2, 3, 4, 5, 6]
    assert all(len(again[step]["reward"]) == 1 for step in again)  # the steps made twice are there once
    all_arrived(rows, again)
    assert len(list((folder / "tensorboard").iterdir())) == 2
    both = from_trackio("antipasto", name)  # where they are there twice
    assert [len(both[step]["reward"]) for step in range(1, 7)] == [1, 1, 1, 1, before + 1, before + 1]


def test_where_the_user_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    words = ["--method", "plain", "--out", tmp_path / "run", "--trainer.report_to", "[tensorboard, trackio]"]
    succeeds(*TRAIN, *SMALL, *words, "--trainer.run_name", "named", "--trainer.project", "elsewhere")
    assert not (tmp_path / "run" / "tensorboard").exists()
    all_arrived(metrics(tmp_path / "run"), from_tensorboard(tmp_path / "mine"))
    all_arrived(metrics(tmp_path / "run"), from_trackio("elsewhere", "named"))


def test_a_reporter_that_is_not_there_costs_a_line(tmp_path: Path) -> None:
    text = fails(*TRAIN, "--out", tmp_path / "run", "--trainer.report_to", "trakio")
    assert "report_to trakio: transformers has no such reporter, or its package is not installed" in text
    assert "antipasto[monitor]" in text
    assert not (tmp_path / "run").exists()


def options(out: Path, project: str) -> dict[str, Any]:
    return {
        **ON_CPU,
        "output_dir": str(out),
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": BOTH,
        "project": project,
        "run_name": "run",
    }


def router_of(model: Any) -> ap.Router:
    v = ap.extract_direction(model, tokenizer(), ap.load_pairs(addition.hack_pairs(8, seed=0)))
    return ap.Router(model, v, controls={"random": v.random(0)})


def reported_all(trainer: Trainer, out: Path, project: str) -> None:
    """Train; what it logged with the router's metrics has reached both reporters."""
    RoutingCallback(router_of(trainer.model)).install(trainer)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    assert all("routing/fired_random" in row for row in rows)
    (folder,) = (out / "runs").iterdir()  # where transformers puts it
    all_arrived(rows, from_tensorboard(folder))
    all_arrived(rows, from_trackio(project, "run"))


def test_trls_own_trainer_reports_the_routing(tmp_path: Path) -> None:
    trainer = make(tmp_path, GRPOTrainer, model=MODEL, config=options(tmp_path, "grpo"))
    reported_all(trainer, tmp_path, "grpo")


def test_a_plain_trainer_reports_the_routing(tmp_path: Path) -> None:
    rows = [tokenizer()(addition.prompt("h", pair) + "!").input_ids for pair in addition.split("train")[:16]]
    trainer = Trainer(
        model=get_peft_model(load(), ap.AntiPastoConfig()),
        args=TrainingArguments(**options(tmp_path, "plain")),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    reported_all(trainer, tmp_path, "plain")


# ── the guide ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_guide_explains_every_metric_that_a_run_logs_and_no_other(reported: Path, scored: Path) -> None:
    named = re.findall(r"^\| `([^`]+)` \|", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(named) == {key for folder in (reported, scored) for row in metrics(folder) for key in row}
