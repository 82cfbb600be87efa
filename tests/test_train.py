"""`antipasto train` and `antipasto eval`, as someone types them."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from command_line import MODEL, TRAIN, fails, process, size, succeeds, wait_for
from lines import read_lines
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import antipasto as ap
from antipasto import files
from antipasto.app.run_folder import RunFolder
from antipasto.app.train.config import TrainConfig
from antipasto.app.train.trl_args import steps_per_cycle, trainer_args
from antipasto.evaluation.records import read_evaluation
from antipasto.routing.monitor import read_monitor
from antipasto.tasks import addition

SMALL, SIX = size(2), size(6, save_every=2)
ADDITION = [MODEL, "--task", "addition"]
ROUTE = [*TRAIN, "--method", "route"]
ARTEFACTS = ("adapter/adapter_model.safetensors", "books.safetensors", "rollouts.jsonl")


def same_files(one: Path, other: Path) -> None:
    there = [name for name in ARTEFACTS if (one / name).exists()]  # books are a router's
    assert there == [name for name in ARTEFACTS if (other / name).exists()]
    for name in there:
        if name.endswith("safetensors"):
            tensors, others = load_file(one / name), load_file(other / name)
            assert tensors.keys() == others.keys()
            assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items()), name
        else:
            assert (one / name).read_text() == (other / name).read_text(), name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A routed run of six steps: its folder and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    text = succeeds(*ROUTE, "--out", out, *SIX)
    return out, text


@pytest.mark.slow
def test_a_run_that_carries_its_basis_ends_where_any_other_does(tmp_path: Path) -> None:
    runs = [tmp_path / "plain", tmp_path / "carried"]
    for folder, more in zip(runs, ([], ["--save-basis"]), strict=True):
        succeeds(*ROUTE, *SMALL, "--out", folder, *more)
        for command in (["eval", str(folder), "--prompts", "10"], ["export", str(folder), "--out", f"{folder}-out"]):
            succeeds(*command)
    plain, carried = (load_file(folder / "adapter/adapter_model.safetensors") for folder in runs)
    assert plain.keys() < carried.keys()
    assert all("delta_s_basis" in name for name in carried.keys() - plain.keys())
    assert all(torch.equal(tensor, carried[name]) for name, tensor in plain.items())
    shipped = [load_file(f"{folder}-out/model.safetensors") for folder in runs]
    assert all(torch.equal(tensor, shipped[1][name]) for name, tensor in shipped[0].items())


def test_a_run_leaves_everything_that_it_was(trained: tuple[Path, str]) -> None:
    out, text = trained
    assert "antipasto eval" in text
    assert "making the direction\n" in text  # minutes with a real model
    assert "Warning" not in text
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.yaml", "run.json", "metrics.jsonl", "rollouts.jsonl", "adapter", "direction.safetensors"}
    assert names >= {"books.safetensors", "checkpoint-4", "checkpoint-6"}
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["model"], config["task"], config["method"], config["steps"]) == (MODEL, "addition", "route", 6)
    facts = json.loads((out / "run.json").read_text())
    assert facts["versions"].keys() == {"antipasto", "torch", "transformers", "peft", "trl"}
    assert len(facts["base"]["fingerprint"]) == 64
    rollouts = read_lines(out / "rollouts.jsonl")
    assert [sum(row["step"] == step for row in rollouts) for step in range(6)] == [8] * 6
    for row in rollouts:
        assert row["reward"] == addition.reward([row["prompt"]], [row["completion"]])[0]
        assert row["oracle"] == addition.solves(row["prompt"], row["completion"])
        assert row["flagged"] == ("!" in row["completion"])
        assert -1 <= row["hackward"] <= 1
    assert [row["view"] for row in rollouts] == ["trained", "deployed"] * 24
    metrics = read_lines(out / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    for step, row in enumerate(metrics):
        here = [r for r in rollouts if r["step"] == step]
        assert row["oracle"] == pytest.approx(sum(r["oracle"] for r in here) / 8)
        assert row["exploit"] == pytest.approx(sum(r["reward"] > r["oracle"] for r in here) / 8)
        assert "routing/hackward_in" in row
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), out / "adapter")
    assert all(layer.delta_s.any() for layer in ap.knobs(model).values())


def test_its_config_repeats_it(trained: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = trained
    succeeds("train", "--config", out / "config.yaml", "--out", tmp_path / "again")
    same_files(out, tmp_path / "again")
    succeeds("train", "--config", out / "config.yaml", "--seed", "1", "--out", tmp_path / "other")
    assert yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())["seed"] == 1
    assert (tmp_path / "other" / "rollouts.jsonl").read_text() != (out / "rollouts.jsonl").read_text()


@pytest.mark.parametrize("after", ["checkpoint-2", "checkpoint-4"])
def test_killed_and_resumed_it_ends_in_the_same_place(trained: tuple[Path, str], tmp_path: Path, after: str) -> None:
    out, _ = trained
    folder = tmp_path / "run"
    running = process(*ROUTE, "--out", str(folder), *SIX)
    wait_for(folder / after / "complete.json")
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert not RunFolder(folder).is_finished
    with (folder / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 5, "prompt": "torn')  # as a process leaves it that is killed in the middle of a line
    (folder / "checkpoint-5").mkdir()  # and a checkpoint
    assert "continuing from" in succeeds("train", "--resume", folder)
    assert not (folder / "checkpoint-5").exists()
    same_files(out, folder)
    steps = [row["step"] for row in read_lines(folder / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_continue(sent: signal.Signals, trained: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    running = process(*ROUTE, "--out", str(folder), *SIX)
    wait_for(folder / "metrics.jsonl")
    running.send_signal(sent)
    text, _ = running.communicate()
    assert running.returncode == 130, text
    assert f"antipasto train --resume {folder}" in text
    assert "Traceback" not in text
    continues_to_the_same(trained[0], folder)


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves(trained: tuple[Path, str], tmp_path: Path) -> None:
    def in_front() -> None:  # of a terminal of its own, whose end is its SIGHUP
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    folder = tmp_path / "run"
    ours, its = pty.openpty()
    words = [sys.executable, "-m", "antipasto", *map(str, [*ROUTE, "--out", folder, *SIX])]
    running = subprocess.Popen(words, stdin=its, stdout=its, stderr=its, start_new_session=True, preexec_fn=in_front)
    os.close(its)
    deadline = time.monotonic() + 90
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        if select.select([ours], [], [], 0.02)[0]:
            os.read(ours, 4096)  # or it would wait for us
    os.close(ours)
    assert running.wait(90) == 130
    assert not (folder / "adapter" / "complete.json").exists()
    continues_to_the_same(trained[0], folder)


def continues_to_the_same(whole: Path, folder: Path) -> None:
    """Resumed, an interrupted run ends as one that was not; and then there is nothing to resume."""
    succeeds("train", "--resume", folder)
    same_files(whole, folder)
    assert "finished" in fails("train", "--resume", folder)


def test_a_run_killed_after_its_last_checkpoint_only_finishes(trained: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = trained
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(out), str(folder)], check=True)
    (folder / "adapter" / "complete.json").unlink()
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    succeeds("train", "--resume", folder)
    same_files(out, folder)


def test_a_run_does_not_continue_on_another_base(trained: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(trained[0]), str(folder)], check=True)
    (folder / "adapter" / "complete.json").unlink()
    text = (folder / "config.yaml").read_text().replace(MODEL, str(addition.model_path("even")))
    (folder / "config.yaml").write_text(text)
    text = fails("train", "--resume", folder)
    assert "The direction was made on another base: 21 of its 21 layers differ" in " ".join(text.split())


@pytest.mark.parametrize("method", ["plain", "erase", "measure", "penalty", "discount"])
def test_every_method_runs(method: str, tmp_path: Path) -> None:
    succeeds(*TRAIN, "--method", method, "--out", tmp_path / "run", *SMALL)
    rows = read_lines(tmp_path / "run" / "rollouts.jsonl")
    assert all(row["flagged"] is not None for row in rows)
    assert {row["view"] for row in rows} == {"trained"}
    knobs = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in knobs.items() if "delta_s_hack" in name)


def test_a_dial_without_a_quarantine_is_refused(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    succeeds(*TRAIN, "--method", "discount", "--out", out, *SMALL)
    text = fails("eval", out, "--dial", "--prompts", "10")
    assert "--dial needs a quarantine, and a run by method discount has none" in " ".join(text.split())


def test_eval_asks_every_arm(trained: tuple[Path, str]) -> None:
    out, _ = trained
    text = succeeds("eval", out, "--prompts", "40", "--seed", "3", "--temperature", "0.5")
    for word in ("reference", "as trained", "deployed", "random", "permuted", "solve", "exploit", "says !"):
        assert word in text
    evaluation = read_evaluation(out)
    assert evaluation.names == ["reference", "as trained", "deployed", "permuted", "random", "shrunk"]
    assert evaluation.kinds == ["hackable", "strict"]
    assert (evaluation.facts["temperature"], evaluation.facts["seed"]) == (0.5, 3)
    for name in evaluation.names:
        own = [a for a in evaluation.answers if a.arm == name]
        assert [a.row for a in own] == list(range(40))
        solved = [addition.solves(a.prompt, a.completion) for a in own]
        assert [a.solved for a in own] == solved
        assert evaluation.arm(name).measures["solve"].value == sum(solved) / 40
        assert [a.flags for a in own] == [{"says !": "!" in a.completion, "says ?": "?" in a.completion} for a in own]
    assert all(a.kl == 0 for a in evaluation.answers if a.arm == "reference")
    assert any(a.kl > 0 for a in evaluation.answers if a.arm == "as trained")
    assert not (out / "eval.partial.jsonl").exists()


def test_eval_draws_as_the_run_did_and_says_so(tmp_path: Path) -> None:
    """From the one likeliest token, with a penalty that forbids the prompt's characters, until a token that it names."""
    out = tmp_path / "run"
    drawn = "{repetition_penalty: 1000000.0, max_new_tokens: 2}"
    options = ["--trainer.top_k", 1, "--trainer.generation_kwargs", drawn]
    succeeds(*TRAIN, "--method", "plain", "--out", out, *SMALL, *options)
    rows = read_lines(out / "rollouts.jsonl")
    trained = {row["prompt"]: row["completion"] for row in rows if row["step"] == 0}
    assert all(len(said) <= 2 and not set(said) & set(prompt) for prompt, said in trained.items())
    for more in ([], ["--temperature", "0"]):
        text = succeeds("eval", out, "--prompts", "40", *more)
        answers = [a for a in read_evaluation(out).answers if a.arm == "reference"]
        assert all(len(a.completion) <= 2 and not set(a.completion) & set(a.prompt) for a in answers)
        assert len({a.completion for a in answers}) > 1
        if not more:
            said = "answers are sampled as in training: temperature 1.0, top_k 1, repetition_penalty 1000000.0, max_new"
            assert said in " ".join(text.split())
            options = {"top_k": 1, "repetition_penalty": 1e6}
            assert read_evaluation(out).facts["options"] == options
            likeliest = answers
    assert "except the temperature: temperature 0.0" in " ".join(text.split())
    assert [a.completion for a in answers] == [a.completion for a in likeliest]


@pytest.mark.slow
def test_in_a_log_an_evaluation_says_how_far_it_is(trained: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(trained[0], tmp_path / "run")
    text = succeeds("eval", tmp_path / "run", "--prompts", "60", "--batch-size", "2")
    lines = [line for line in text.splitlines() if line.startswith("asking ")]
    assert len(lines) == 20
    assert lines[0].startswith("asking reference  18/360 answers  left 0:0")
    assert lines[-1].startswith("asking shrunk  360/360 answers")
    assert "measuring the KL of the deployed model to the reference\n" in text
    assert "━" not in text.split("written:")[0].split("asking shrunk  360/360")[0]


@pytest.mark.slow
def test_an_evaluation_that_is_killed_continues_to_the_same_answers(trained: tuple[Path, str], tmp_path: Path) -> None:
    """SIGKILL in the middle, twice; then the same bytes as without."""
    runs = []
    for name in ("killed", "whole"):
        runs.append(tmp_path / name)
        shutil.copytree(trained[0], runs[-1])
        (runs[-1] / "eval.json").unlink(missing_ok=True)
    options = ["--prompts", "160", "--batch-size", "8"]
    partial = runs[0] / "eval.partial.jsonl"
    seen = 0
    for _ in range(2):
        child = process("eval", str(runs[0]), *options)
        deadline = time.monotonic() + 120
        while not partial.exists() or len(partial.read_bytes().splitlines()) < seen + 30:
            assert time.monotonic() < deadline
            assert child.poll() is None, child.stdout.read()
            time.sleep(0.01)
        child.kill()
        child.communicate()
        with partial.open("ab") as file:
            file.write(b'{"arm": "torn')
        seen = len(partial.read_bytes().splitlines())
        assert not (runs[0] / "eval.json").exists()
    assert "continuing: " in succeeds("eval", runs[0], *options)
    succeeds("eval", runs[1], *options)
    for name in ("eval.json", "eval.jsonl"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name
    # another margin is another verdict on the same answers, which are not asked again
    before = (runs[0] / "eval.jsonl").read_bytes()
    assert "continuing: 960 answers are there already" in succeeds("eval", runs[0], *options, "--margin", "0.5")
    assert (runs[0] / "eval.jsonl").read_bytes() == before
    assert read_evaluation(runs[0]).margin == 0.5
    # a damaged file is no reason not to ask
    (runs[0] / "eval.jsonl").write_text("rubbish\n")
    assert "asking again: " in succeeds("eval", runs[0], *options)
    assert (runs[0] / "eval.jsonl").read_bytes() == before
    # another seed is another evaluation: nothing is taken over
    text = succeeds("eval", runs[0], *options, "--seed", "1")
    assert "continuing" not in text
    assert (runs[0] / "eval.jsonl").read_bytes() != (runs[1] / "eval.jsonl").read_bytes()


# ── by a monitor's score ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_by_score_says_what_its_threshold_means_and_continues(tmp_path: Path) -> None:
    words = [*TRAIN, "--method", "penalty", "--beta", "0.04", *SIX]
    text = succeeds(*words, "--out", tmp_path / "run")
    saved = read_monitor(tmp_path / "run" / "monitor.safetensors")
    assert str(saved.calibration).splitlines()[2] in text
    assert (saved.calibration.rule, saved.calibration.pairs, saved.calibration.answers) == ("quarter", 16, 64)
    rows = read_lines(tmp_path / "run" / "rollouts.jsonl")
    assert all(row["flagged"] is (row["score"] > saved.threshold) for row in rows)
    assert any(row["flagged"] for row in rows)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for done in ("adapter", "checkpoint-6"):  # as a kill leaves it
        shutil.rmtree(tmp_path / "again" / done)
    succeeds("train", "--resume", tmp_path / "again")
    same_files(tmp_path / "run", tmp_path / "again")
    text = succeeds("inspect", tmp_path / "run")
    assert "a quarter of the way from held-out clean texts to hacks" in " ".join(text.split())


@pytest.mark.parametrize("method", [["--method", "penalty"], ["--method", "route"]])
def test_a_run_hashes_every_weight_once(method: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def counted(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
        hashed.update(tensor.data_ptr() for name, tensor in tensors.items() if name == "weight")
        return files.digest(tensors, metadata)

    hashed: Counter[int] = Counter()
    monkeypatch.setattr("antipasto.adapter.fingerprints.digest", counted)
    words = [*TRAIN, *method, "--steps", "1", *SMALL[:4]]
    succeeds(*words, "--out", tmp_path / "run")
    assert len(hashed) == 21
    assert {*hashed.values()} == {1}


def test_a_false_alarm_rate_is_asked_of_as_many_answers_as_it_takes(tmp_path: Path) -> None:
    words = [*TRAIN, "--method", "penalty", "--by", "score", "--false-alarms", "0.02"]
    succeeds(*words, "--out", tmp_path / "run", *SMALL)
    found = read_monitor(tmp_path / "run" / "monitor.safetensors").calibration
    assert (found.rule, found.answers) == ("false alarms", 200)
    assert found.score.own == pytest.approx(0.02)


def test_plain_by_score_only_watches(tmp_path: Path) -> None:
    for name, more in (("plain", []), ("watched", ["--by", "score"])):
        succeeds(*TRAIN, "--method", "plain", *more, "--out", tmp_path / name, *SMALL)
    one, other = (load_file(tmp_path / name / ARTEFACTS[0]) for name in ("plain", "watched"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert '"score": null' not in (tmp_path / "watched" / "rollouts.jsonl").read_text()


TASK = """
from antipasto.tasks import Task

def reward(completions, **_):
    return {body}

mine = Task("mine", train=[{{"prompt": "h12+34="}}] * 4, reward=reward, max_completion_length=4)
"""


def on_a_task_of(folder: Path, source: str) -> list[str]:
    """Write a file with a task ``mine``; the words that train on it by plain RL, into the folder ``r`` next to it."""
    (folder / "mine.py").write_text(source)
    words = ["train", MODEL, "--task", f"{folder / 'mine.py'}:mine", "--method", "plain"]
    return [*words, "--out", str(folder / "r")]


def test_a_users_own_task_trains(tmp_path: Path) -> None:
    succeeds(*on_a_task_of(tmp_path, TASK.format(body="[float('4' in text) for text in completions]")), *SMALL)
    assert "no held-out rows" in fails("eval", tmp_path / "r")


RAGGED = """
from antipasto.tasks import Task

CHAT = [{"role": "system", "content": "Add.", "name": "boss"}, {"role": "user", "content": "h12+34="}]
ROWS = [
    {"prompt": CHAT, "pair": (1, 2), "fields": {"a": 1}, "mixed": [1, {(0, 1): "w"}], "large": 2**70, "image": "no picture"},
    {"prompt": CHAT, "pair": (3, 4), "fields": {"b": (None,)}, "mixed": [], "large": 0, "image": None},
]
seen = []

def reward(prompts, completions, pair, fields, mixed, large, image):
    for row in zip(prompts, pair, fields, mixed, large, image):
        seen.append(repr(row))
    return [float(len(text)) for text in completions]

mine = Task("mine", train=ROWS * 4, test=ROWS, reward=reward, max_completion_length=4)
"""


def test_training_and_evaluation_see_the_rows_as_the_task_has_them(tmp_path: Path) -> None:
    """Neither fills up ragged dicts, turns tuples into lists, or takes a column for a picture."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content[-7:] }}{% endfor %}")
    (tmp_path / "mine.py").write_text(RAGGED)
    spec, seen = f"{tmp_path / 'mine.py'}:mine", {}
    for part in ("train", "eval"):
        arguments = ("train", str(folder), "--task", spec, "--method", "plain", *SMALL, "--out")
        succeeds(*(arguments if part == "train" else ("eval",)), tmp_path / "r")
        (module,) = [module for name, module in sys.modules.items() if name.endswith(".mine")]
        seen[part] = set(module.seen)
    chat = [{"role": "system", "content": "Add.", "name": "boss"}, {"role": "user", "content": "h12+34="}]
    assert (
        seen["train"]
        == seen["eval"]
        == {
            repr((chat, (1, 2), {"a": 1}, [1, {(0, 1): "w"}], 2**70, "no picture")),
            repr((chat, (3, 4), {"b": (None,)}, [], 0, None)),
        }
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("[1 / 0 for _ in completions]", ["reward", "ZeroDivisionError", "h12+34="]),
        ("[float('nan')] * len(completions)", ["reward", "nan", "h12+34="]),
        ("[1.0]", ["reward", "1 values", "batch of 8"]),
        ("[None] * len(completions)", ["reward", "None", "h12+34="]),
    ],
)
def test_a_reward_that_fails_stops_the_run(body: str, words: list[str], tmp_path: Path) -> None:
    text = fails(*on_a_task_of(tmp_path, TASK.format(body=body)), *SMALL)
    assert all(word in text for word in words), text
    assert not (tmp_path / "r").exists()  # no step was made: the same command can be given again


def test_a_run_that_fails_before_its_first_line_of_metrics_can_be_continued(tmp_path: Path) -> None:
    """The folder is emptied where no step was made, not where none was logged."""
    broken = tmp_path / "broken"
    broken.touch()
    body = f"[1 / (not Path({str(broken)!r}).exists() or len(seen) < 3) for _ in completions]"
    seen = "from pathlib import Path\nseen = []\n"
    words = on_a_task_of(tmp_path, seen + TASK.format(body=f"seen.append(0) or {body}"))
    fails(*words, *SMALL[:4], "--steps", "4", "--save-every", "1", "--trainer.logging_steps", "4")
    assert (tmp_path / "r" / "checkpoint-2").exists()
    broken.unlink()
    assert "continuing from" in succeeds("train", "--resume", tmp_path / "r")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "addition"], "model is missing"),
        ([MODEL], "task is missing"),
        ([MODEL, "--task", "adition"], "did you mean 'addition'"),
        (["nowhere/at/all", "--task", "addition"], "no folder 'nowhere/at/all'"),
        ([*ADDITION, "--steps", "0"], "'--steps'"),
        ([*ADDITION, "--trainer.lerning_rate", "1"], "no 'lerning_rate'; did you mean 'learning_rate'"),
        ([*ADDITION, "--trainer.learning_rate", "1"], "use learning_rate"),
        ([*ADDITION, "--trainer.warmup_steps", "abc"], "invalid float value: 'abc'"),
        (
            [*ADDITION, "--method", "penalty", "--by", "direction"],
            "penalty takes by=score or detector, got by=direction",
        ),
        ([*ADDITION, "--method", "route", "--by", "score"], "route takes by=direction, got by=score"),
        ([*ADDITION, "--method", "drop"], "'--method'"),
        ([*ADDITION, "--by", "detector", "--false-alarms", "0.1"], "false_alarms=0.1 works only with by=score"),
        ([*ADDITION, "--method", "measure", "--false-alarms", "0.1"], "false_alarms=0.1 does nothing here"),
        ([*ADDITION, "--controls", "none"], "controls=() does nothing here: this run uses no direction"),
        ([*ADDITION, "--by", "score", "--false-alarms", "2"], r"false_alarms must be above 0 and below 1, got 2.0"),
        ([*ADDITION, "--by", "score", "--direction", "f"], "direction=f does nothing here"),
        ([*ADDITION, "--by", "score", "--threshold", "1"], "threshold=1.0 does nothing here"),
        ([*ADDITION, "--by", "detector", "--direction", "f"], "direction=f does nothing here"),
        ([*ADDITION, "--prompts", "100000"], "fewer than one generation takes"),
        ([*ADDITION, "--trainer.num_iterations", "2"], "save_every must be a multiple"),
        (
            [*ADDITION, "--micro-batch", "8", "--trainer.steps_per_generation", "6"],
            "One generation is for 6 micro-batches (steps_per_generation x num_iterations), and a step takes 4",
        ),
        ([*ADDITION, "--trainer.save_only_model"], "save_only_model must be false"),
        ([*ADDITION, "--trainer.num_train_epochs", "2"], "use steps"),
        ([*ADDITION, "--trainer.model_init_kwargs", "{a: 1}"], "use dtype"),
        ([*ADDITION, "--trainer.remove_unused_columns"], "remove_unused_columns must be false"),
        ([*ADDITION, "--method", "plain", "--deploy-fraction", "0.5"], "deploy_fraction works only with method=route"),
        ([*ADDITION, "--method", "route", "--deploy-fraction", "0.3"], "must be whole numbers"),
        ([*ADDITION, "--pairs", "nowhere.jsonl"], "nowhere.jsonl"),
        ([*ADDITION, "--controls", "random,odd"], "got odd"),
        ([*ADDITION, "--target-modules", "nope"], "'nope'"),
        ([*ADDITION, "--micro-batch", "5"], "do not divide into micro-batches of 5"),
        ([MODEL, "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--resume", "nowhere", "--steps", "3"], "leave out --steps"),
    ],
)
def test_wrong_words_cost_a_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    out = [] if "--resume" in arguments else ["--out", str(tmp_path / "run")]
    text = fails("train", *arguments, *out)
    assert message in " ".join(text.replace("│", " ").split()), text
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "no option 'stepz'; did you mean 'steps'?"),
        ("steps: many", "steps must be int, got 'many'"),
        ("- steps", "must hold options"),
        ("steps: [", "is not YAML"),
        ("trainer: 3", "trainer must hold options by name"),
        ("trainer: {odd: 3}", "no 'odd'"),
        ("trainer: {max_grad_norm: null}", "--trainer.max_grad_norm has no value: it would be 1.0"),
    ],
)
def test_a_config_that_does_not_fit(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    out = ["--out", str(tmp_path / "run")]  # the default one has the time in its name, to the second
    said = fails(*TRAIN, "--config", tmp_path / "run.yaml", *out)
    assert message in " ".join(said.replace("│", " ").split()), said


def test_as_many_rows_as_one_generation_takes_are_enough(tmp_path: Path) -> None:
    """Further iterations train on the same ones."""
    config = TrainConfig(MODEL, "addition", prompts=2, save_every=4, trainer={"num_iterations": 4})
    task = addition.task()
    args = trainer_args(config, dataclasses.replace(task, train=task.train[:2]), tmp_path, 1)
    assert steps_per_cycle(args) == 4
    with pytest.raises(ValueError, match=r"has 1 training rows, fewer than one generation takes \(2\)"):
        trainer_args(config, dataclasses.replace(task, train=task.train[:1]), tmp_path, 1)


def test_without_controls_there_are_no_books(tmp_path: Path) -> None:
    words = ["--method", "route", "--by", "direction", "--controls", "none"]
    succeeds(*TRAIN, *words, "--out", tmp_path / "run", *SMALL)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["controls"] == []
    succeeds("train", "--config", tmp_path / "run" / "config.yaml", "--out", tmp_path / "again")
    assert not [name for name in load_file(tmp_path / "again" / "books.safetensors") if name.startswith("book/")]


@pytest.mark.slow
def test_our_own_warnings_are_heard(tmp_path: Path) -> None:
    words = ["--method", "route", "--trainer.weight_decay", "0.1"]
    running = process(*TRAIN, *words, "--out", str(tmp_path / "run"), *SMALL)
    text, _ = running.communicate()
    assert running.returncode == 0
    assert "warning: The optimizer has weight decay on the knobs" in text


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "not an empty folder" in fails(*TRAIN, "--out", tmp_path, *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("method", ["penalty", "route"])
def test_pairs_are_read_in_micro_batches_too(method: str, batches_of_pairs: list[int], tmp_path: Path) -> None:
    """Long texts of pairs would take the memory that --micro-batch is lowered for."""
    succeeds(*TRAIN, "--method", method, "--micro-batch", 4, "--out", tmp_path / "r", *SMALL)
    assert max(batches_of_pairs) == 4
