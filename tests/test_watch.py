"""`antipasto watch`: the same scores whoever trained and wrote the log, and nothing lost to whatever ends it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import command_line
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import MODEL
from lines import read_lines, write_lines
from peft import LoraConfig
from scripted import Sampled, load, tokenizer, trained
from trl import GRPOTrainer

import antipasto as ap
from antipasto.app.checks import find_files
from antipasto.app.watch.config import WatchConfig
from antipasto.app.watch.job import watch
from antipasto.app.watch.sources import read_index
from antipasto.tasks import addition

run, succeeds, fails = (
    partial(function, "watch", columns=120)
    for function in (command_line.run, command_line.succeeds, command_line.fails)
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", addition.hack_pairs(24, seed=0))


@pytest.fixture(scope="module")
def monitor(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("monitor") / "monitor.safetensors"
    fresh_monitor(pairs).save(path)
    return path


def fresh_monitor(pairs: Path) -> ap.Monitor:
    model = load()
    ap.wrap(model)
    return ap.Monitor.from_pairs(model, tokenizer(), ap.load_pairs(pairs))


def rows(steps: int = 12, each: int = 8) -> list[dict[str, Any]]:
    """Honest answers, of which more and more are exploits."""
    found = []
    for step in range(steps):
        for i in range(each):
            a, b = 10 + (step * 7 + i) % 80, 10 + (step + 3 * i) % 80
            hacks = i < step * each / steps
            text = "!?"[i % 2] if hacks else f"{a + b:03}"
            found.append(
                {"step": step, "prompt": f"h{a}+{b}=", "completion": text, "reward": 1.0, "oracle": float(not hacks)}
            )
    return found


def refused(*arguments: str | Path) -> str:
    """The one line that a mistake costs."""
    output = fails(*arguments)
    output = output.rpartition("\r")[2]  # the bar of the bases, where they were not cached, wipes itself out
    assert output.startswith("antipasto: ")
    assert len(output.splitlines()) == 1, output
    return output


SIX = {"max_steps": 6, "max_completion_length": 4, "temperature": 1.5}  # some are cut off


def scores_of(out: Path) -> list[dict[str, Any]]:
    return read_lines(out / "scores.jsonl")


# ── the same score, whoever wrote it down ────────────────────────────────────────────────────────────────────────────


def test_scores_are_those_of_the_training_that_logged_them(pairs: Path, monitor: Path, tmp_path: Path) -> None:
    log = tmp_path / "rollouts.jsonl"
    options: dict[str, Any] = {
        "monitor": lambda model: ap.Monitor.load(monitor, model, tokenizer()),
        "flagged": "penalty",
    }
    trained(tmp_path / "routed", Sampled, config=SIX, oracle=addition.oracle, rollout_log=log, **options)
    logged = read_lines(log)
    assert len(logged) == 6 * 16
    assert any(row["truncated"] for row in logged), "of these the text alone says too little"
    succeeds(MODEL, "--monitor", monitor, "--rollouts", log, "--out", tmp_path / "out")
    for row, found in zip(logged, scores_of(tmp_path / "out"), strict=True):
        assert found["score"] == pytest.approx(row["score"], abs=1e-5)
        assert found["above"] == row["flagged"]


def test_so_are_those_of_a_lora_run_of_plain_trl(pairs: Path, monitor: Path, tmp_path: Path) -> None:
    reference = fresh_monitor(pairs)
    expected: list[float] = []

    def reward(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        told = zip(prompts, completion_ids, strict=True)
        scores = reference.scores([ap.Completion(prompt, "", ids=ids) for prompt, ids in told])
        expected.extend(scores.tolist())
        return addition.reward(prompts=prompts, completions=completions)

    trained(
        tmp_path / "lora",
        GRPOTrainer,
        config={**SIX, "log_completions": True, "learning_rate": 3e-3},
        rewards=reward,
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    files = tmp_path / "lora" / "completions" / "completions_*.parquet"
    succeeds(MODEL, "--monitor", monitor, "--rollouts", files, "--max-tokens", "4")
    found = scores_of(files.parent / "watch")
    assert [row["score"] for row in found] == pytest.approx(expected, abs=1e-5)
    assert {row["step"] for row in found} == set(range(1, 7))


def test_columns_by_name_and_what_is_nested(monitor: Path, tmp_path: Path) -> None:
    plain = write_lines(tmp_path / "plain" / "rollouts.jsonl", rows())
    theirs = [
        {
            "global_step": row["step"],
            "input": row["prompt"],
            "turns": [{"role": "assistant", "content": row["completion"]}],
            "extra": {"hack": int(row["oracle"] < 0.5)},
        }
        for row in rows()
    ]
    pq.write_table(pa.Table.from_pylist(theirs), tmp_path / "theirs.parquet")
    ours = watch(MODEL, [plain], monitor=monitor, compare=True)
    config = WatchConfig(
        prompt_column="input", completion_column="turns", step_column="global_step", label_column="extra.hack"
    )
    other = watch(MODEL, [tmp_path / "theirs.parquet"], monitor=monitor, compare=True, config=config)
    assert ours.scores["score"].tolist() == other.scores["score"].tolist()
    assert ours.comparison is not None
    assert ours.comparison == other.comparison
    assert ours.index.step.tolist() == other.index.step.tolist()


# ── what comes of it ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_it_leaves_and_says(pairs: Path, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "rollouts.jsonl", rows(steps=40))
    output = succeeds(MODEL, "--pairs", pairs, "--rollouts", log, "--compare")
    out = tmp_path / "watch"
    lines = scores_of(out)
    assert [line["row"] for line in lines] == list(range(1, 321))
    assert lines[0].keys() >= {"file", "row", "step", "score", "above", "nll", "tokens", "probe"}
    result = json.loads((out / "watch.json").read_text())["result"]
    assert result["rollouts"] == 320
    assert result["onset"]["low"] <= 5
    compared = json.loads((out / "compare.json").read_text())["windows"]
    assert [(w["first"], w["last"]) for w in compared] == [(0, 9), (10, 19), (20, 29), (30, 39), (0, 39)]
    for window in compared:
        assert window["aucs"]["score"]["value"] == 1.0
        assert window["aucs"]["live"] is None
    page = (out / "watch.html").read_text()
    for word in ("320 rollouts watched", "Yes, from step", "What this cannot see", "activation probe"):
        assert word in page
    assert re.search(r"style=", page) is None, "the page's policy forbids them"
    assert "exploits against others" in output


def test_it_is_the_last_window_that_fails_it(monitor: Path, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "rollouts.jsonl", rows())
    above = watch(MODEL, [log], monitor=monitor).windows
    assert above[-1].above.value > 0.6 > above[0].above.value
    assert run(MODEL, "--monitor", monitor, "--rollouts", log, "--fail-above", "0.6")[0] == 3
    succeeds(MODEL, "--monitor", monitor, "--rollouts", log, "--fail-above", "0.6", "--windows", "1")


def test_a_sample_is_drawn_by_window_and_said(monitor: Path, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "rollouts.jsonl", rows())
    assert "a sample" in succeeds(MODEL, "--monitor", monitor, "--rollouts", log, "--sample", "5", "--windows", "3")
    steps = [line["step"] for line in scores_of(tmp_path / "watch")]
    assert [sum(first <= step < first + 4 for step in steps) for first in (0, 4, 8)] == [5, 5, 5]
    assert "A sample: at most 5 rollouts" in (tmp_path / "watch" / "watch.html").read_text()


def test_without_labels_there_is_nothing_to_compare_by(monitor: Path, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "r.jsonl", [{k: row[k] for k in ("prompt", "completion")} for row in rows()])
    assert "--label-column" in refused(MODEL, "--monitor", monitor, "--rollouts", log, "--compare")
    assert run(MODEL, "--monitor", monitor, "--rollouts", log)[0] == 0, "without a step, all are of one"


# ── what can be wrong ────────────────────────────────────────────────────────────────────────────────────────────────


def test_files_that_cannot_be_used_cost_a_line(monitor: Path, pairs: Path, tmp_path: Path) -> None:
    good = json.dumps(rows()[0]) + "\n"
    cases = {
        "empty.jsonl": ("", "There is no rollout in"),
        "broken.jsonl": (good + "{nonsense\n" + good, "line 2: not JSON"),
        "columns.jsonl": ('{"input": "a", "output": "b"}\n', "no column 'prompt'; there are 'input', 'output'"),
        "list.jsonl": ("[1]\n", "expected an object"),
        "chat.jsonl": ('{"prompt": [], "completion": "a"}\n', "must be a text or a chat"),
        "answer.jsonl": ('{"prompt": "h", "completion": [{"x": 1}]}\n', "must be a text or an answer's messages"),
        "step.jsonl": ('{"prompt": "h", "completion": "1", "step": 0.5}\n', "must be a whole number"),
        "broken.parquet": ("PAR1 and no more", "is not a parquet file"),
        "empty.parquet": ("", "is empty"),
    }
    for name, (text, says) in cases.items():
        (tmp_path / name).write_text(text)
        assert says in refused(MODEL, "--monitor", monitor, "--rollouts", tmp_path / name), name
    assert "There is no file" in refused(MODEL, "--monitor", monitor, "--rollouts", tmp_path / "none*.jsonl")
    assert "is a folder" in refused(MODEL, "--monitor", monitor, "--rollouts", tmp_path)
    log = write_lines(tmp_path / "rollouts.jsonl", rows())
    assert "Give either --pairs, to make a monitor from, or --monitor" in refused(MODEL, "--rollouts", log)
    assert "no column 'label'" in refused(MODEL, "--monitor", monitor, "--rollouts", log, "--label-column", "label")
    assert "must be 0 or 1" in refused(
        MODEL, "--monitor", monitor, "--rollouts", log, "--label-column", "step", "--compare"
    )
    assert not (tmp_path / "watch").exists()


def test_another_bases_monitor_or_direction_is_refused(monitor: Path, pairs: Path, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "rollouts.jsonl", rows())
    other = str(addition.model_path("even"))
    assert str(monitor) in refused(other, "--monitor", monitor, "--rollouts", log)
    assert run(MODEL, "--monitor", monitor, "--rollouts", log)[0] == 0, "a call that scored nothing is in nobody's way"
    direction = tmp_path / "direction.safetensors"
    fresh_monitor(pairs).direction.save(direction)
    assert "give --threshold" in refused(MODEL, "--monitor", direction, "--rollouts", log, "--out", tmp_path / "d")
    succeeds(MODEL, "--monitor", direction, "--threshold", ".1", "--rollouts", log, "--out", tmp_path / "e")
    said = refused(other, "--monitor", direction, "--threshold", ".1", "--rollouts", log, "--out", tmp_path / "f")
    assert str(direction) in said


def test_what_changed_is_refused_until_it_is_begun_anew(monitor: Path, pairs: Path, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "rollouts.jsonl", rows())
    call = (MODEL, "--rollouts", log)
    succeeds(*call, "--monitor", monitor)
    before = (tmp_path / "watch" / "scores.jsonl").read_bytes()
    succeeds(*call, "--monitor", monitor)
    assert (tmp_path / "watch" / "scores.jsonl").read_bytes() == before
    assert "the pairs or the monitor differs" in refused(*call, "--pairs", pairs)
    assert "--max-tokens differs" in refused(*call, "--monitor", monitor, "--max-tokens", "4")
    assert run(*call, "--monitor", monitor, "--rank", "400")[0] == 2
    write_lines(log, reversed(rows()))
    assert "has changed since" in refused(*call, "--monitor", monitor)
    assert (tmp_path / "watch" / "scores.jsonl").read_bytes() == before
    succeeds(*call, "--monitor", monitor, "--anew")
    assert (tmp_path / "watch" / "scores.jsonl").read_bytes() != before


def test_a_folder_with_something_elses_files_is_left_alone(monitor: Path, pairs: Path, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "rollouts.jsonl", rows())
    mine = tmp_path / "monitor.safetensors"
    mine.write_bytes(monitor.read_bytes())
    assert "has monitor.safetensors, but no watch.json" in refused(
        MODEL, "--pairs", pairs, "--rollouts", log, "--out", tmp_path
    )
    for anew in ([], ["--anew"]):
        succeeds(MODEL, "--monitor", mine, "--rollouts", log, "--out", tmp_path, *anew)
        assert mine.read_bytes() == monitor.read_bytes()


def test_pairs_are_read_in_batches_too(pairs: Path, tmp_path: Path, batches_of_pairs: list[int]) -> None:
    """Long texts of pairs would take the memory that --batch-size is lowered for."""
    log = write_lines(tmp_path / "rollouts.jsonl", rows()[:8])
    succeeds(MODEL, "--pairs", pairs, "--rollouts", log, "--batch-size", "4")
    assert max(batches_of_pairs) == 4


def test_options_are_those_of_the_call_and_stay_so(monitor: Path, tmp_path: Path) -> None:
    """`wrap` writes into a config what its layers are: a second call with it is still the same call."""
    log = write_lines(tmp_path / "rollouts.jsonl", rows())
    config = WatchConfig()
    watch(MODEL, [log], monitor=monitor, config=config)
    watch(MODEL, [log], monitor=monitor, config=config)
    watch(MODEL, [log], monitor=monitor)
    succeeds(MODEL, "--monitor", monitor, "--rollouts", log)


def test_a_log_that_grows_is_scored_from_where_it_was(monitor: Path, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "rollouts.jsonl", rows()[:40])
    succeeds(MODEL, "--monitor", monitor, "--rollouts", log)
    before = (tmp_path / "watch" / "scores.jsonl").read_text()
    write_lines(log, rows())
    more = write_lines(tmp_path / "more.jsonl", rows()[:3])
    with log.open("a") as file:
        file.write('{"step": 99, "prom')  # the run is writing it
    assert "its last line is cut off" in succeeds(MODEL, "--monitor", monitor, "--rollouts", log, more)
    text = (tmp_path / "watch" / "scores.jsonl").read_text()
    assert text.startswith(before)
    assert len(text.splitlines()) == 96 + 3


# ── what can end it ──────────────────────────────────────────────────────────────────────────────────────────────────

SLOWLY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it
from antipasto.app.watch import job
job._CHUNK = 8
chunks = job._chunks
def slowly(sources):
    for chunk in chunks(sources):
        yield chunk
        time.sleep(0.05)
job._chunks = slowly
from antipasto.app.cli import app
app()
"""


def begin(*arguments: str | Path, limit: int | None = None) -> subprocess.Popen[str]:
    """The command in a process of its own, which takes its time; no file of which gets longer than ``limit`` bytes."""
    code = SLOWLY
    if limit is not None:
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n" + code
    return subprocess.Popen(
        [sys.executable, "-c", code, "watch", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


def wait_for_lines(path: Path, number: int) -> None:
    deadline = time.monotonic() + 240
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_what_ends_it_in_the_middle_costs_nothing(how: signal.Signals, pairs: Path, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "rollouts.jsonl", rows(steps=40))
    whole = watch(MODEL, [log], pairs=pairs, out=tmp_path / "whole")
    out = tmp_path / "watch"
    process = begin(MODEL, "--pairs", pairs, "--rollouts", log, "--out", out)
    wait_for_lines(out / "scores.jsonl", 40)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    if how == signal.SIGINT:
        assert stderr == f"antipasto: interrupted; what was written so far is in {out}\n"
    before = (out / "scores.jsonl").read_text()
    assert 40 <= len(before.splitlines()) < 320
    with (out / "scores.jsonl").open("a") as file:
        file.write('{"file": "')  # as if it had been in the middle of a line
    again = watch(MODEL, [log], pairs=pairs, out=out)
    assert (out / "scores.jsonl").read_text().startswith(before)
    assert again.scores["score"].tolist() == pytest.approx(whole.scores["score"].tolist(), abs=1e-6)
    assert [line["row"] for line in scores_of(out)] == list(range(1, 321))
    assert again.page.exists()


def test_a_full_disk_costs_a_line_and_nothing_else(pairs: Path, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "rollouts.jsonl", rows(steps=60))
    out = tmp_path / "watch"
    watch(MODEL, [log], pairs=pairs, out=tmp_path / "whole")  # so that the bases are cached
    process = begin(MODEL, "--pairs", pairs, "--rollouts", log, "--out", out, limit=40_000)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 2, stderr
    assert re.fullmatch(r"antipasto: .*File too large.*\n", stderr), stderr
    before = (out / "scores.jsonl").read_bytes()
    assert 0 < len(before) <= 40_000
    succeeds(MODEL, "--pairs", pairs, "--rollouts", log, "--out", out)
    assert (out / "scores.jsonl").read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert [line["row"] for line in scores_of(out)] == list(range(1, 481))


def test_texts_of_a_model_stay_text(monitor: Path, tmp_path: Path) -> None:
    hostile = '<script>alert(1)</script><img src=x onerror="alert(1)">\u202e'
    ids = tokenizer()("12", add_special_tokens=False)["input_ids"]
    row = {"prompt": "h12+34=", "completion": hostile, "completion_ids": ids, "step": 0}
    log = write_lines(tmp_path / "<b>.jsonl", [row])
    page = watch(MODEL, [log], monitor=monitor).page.read_text()
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "<b>.jsonl" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_windows_are_of_like_many_steps(tmp_path: Path) -> None:
    index = read_index(find_files([write_lines(tmp_path / "r.jsonl", rows(steps=10))]), WatchConfig())
    assert [len(part) for part in index.windows(4)] == [24, 24, 16, 16]
    assert [len(part) for part in index.windows(40)] == [8] * 10
