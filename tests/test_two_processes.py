"""A run over two processes ends where the run of one process does, and both processes end at the same place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lines import read_lines
from safetensors.torch import load_file
from scripted import GROUP
from two_processes import run

from antipasto.routing.books import read_books
from antipasto.tasks import addition

TESTS = Path(__file__).parent
# --multi_gpu is accelerate's word for processes on one machine; with ACCELERATE_USE_CPU they talk by gloo
LAUNCH = f"{sys.executable} -m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1".split()
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("per_rank", "accumulation", "kind"), [(GROUP, 1, ""), (GROUP // 4, 2, ""), (GROUP // 2, 2, "sharded")]
)
def test_two_processes_are_one(tmp_path: Path, per_rank: int, accumulation: int, kind: str) -> None:
    """Also where each prompt's rollouts lie on both, and under FSDP2, with a monitor."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    job = subprocess.run(
        [*LAUNCH, str(TESTS / "two_processes.py"), str(two), str(per_rank), str(accumulation), kind],
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)]),
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert job.returncode == 0, job.stderr[-4000:]
    run(one, 2 * per_rank, accumulation, kind and "scored")

    want = torch.load(one / "0.pt")
    got, other = (torch.load(two / f"{rank}.pt") for rank in range(2))
    for what in ("delta_s", "delta_s_hack"):
        assert torch.equal(got[what], other[what])
        assert want[what].abs().max() > 1e-3
        torch.testing.assert_close(got[what], want[what], atol=1e-4, rtol=1e-2)
        assert (got[what] - want[what]).norm() < 1e-3 * want[what].norm()
    assert got["metrics"] == other["metrics"]
    assert set(got["metrics"]) == set(want["metrics"])
    for name, value in want["metrics"].items():
        assert got["metrics"][name] == pytest.approx(value, rel=0.01, abs=1e-4), name
    names = [
        *(["score"] if kind else []),
        "flagged",
        "oracle",
        "exploit",
        "reward",
        "reward/deployed",
        "reward/trained",
    ]
    if accumulation == 1:  # TRL's KL is a mean over micro-batches, and who is in which is drawn in each process
        names.append("kl")
    for row, plain in zip(got["history"], want["history"], strict=True):
        for name in names:
            assert (name in row) == (name in plain)
            assert row.get(name, 0) == pytest.approx(plain.get(name, 0), rel=1e-3, abs=1e-6)

    adapter, plain_adapter = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (two, one))
    assert adapter.keys() == plain_adapter.keys()
    saved = [value for name, value in adapter.items() if "delta_s_hack" not in name]
    assert torch.equal(torch.cat(saved).sort().values, got["delta_s"].sort().values)
    books, twin, plain = (
        read_books(path) for path in (two / "0.safetensors", two / "1.safetensors", one / "0.safetensors")
    )
    assert books.steps == plain.steps == 4
    for name, layers in plain.books.items():
        for layer, part in layers.items():
            assert torch.equal(books.books[name][layer], twin.books[name][layer])
            torch.testing.assert_close(books.books[name][layer], part, atol=1e-4, rtol=1e-2)
    rows, wanted_rows = (read_lines(f / "log") for f in (two, one))
    assert len(rows) == len(wanted_rows) == 4 * 2 * per_rank * accumulation
    assert any(row["flagged"] for row in rows)
    for row, wanted_row in zip(rows, wanted_rows, strict=True):
        for name, value in wanted_row.items():
            assert row[name] == (pytest.approx(value, abs=1e-3) if isinstance(value, float) else value), name


@pytest.mark.slow
def test_the_command_line_under_accelerate_launch(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = f"train {addition.model_path()} --task addition --method route --by direction --out {out}".split()
    words += ["--prompts", "2", "--generations", "4"]

    def launch(*more: str) -> subprocess.CompletedProcess[str]:
        command = [*LAUNCH, "-m", "antipasto", *words, *more]
        env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)

    job = launch("--steps", "2", "--save-every", "1")
    assert job.returncode == 0, job.stderr[-4000:]
    assert job.stdout.count("antipasto eval") == 1  # one of them prints
    assert json.loads((out / "run.json").read_text())["processes"] == 2
    rows = read_lines(out / "rollouts.jsonl")
    assert [sum(row["step"] == step for row in rows) for step in (0, 1)] == [8, 8]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert (out / "adapter" / "complete.json").exists()

    again = launch("--steps", "2")  # into the same folder: an error of the main process stops both
    assert again.returncode != 0
    assert f"antipasto: {out} exists and is not an empty folder" in again.stderr
