"""A run over two processes ends where the run of one process does, and both processes end at the same place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripted import GROUP
from two_processes import run

from antipasto.routing import read_books

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.utils.data.dataloader.*pin_memory.*")
TESTS = Path(__file__).parent


@pytest.mark.parametrize(("per_rank", "accumulation"), [(GROUP, 1), (GROUP // 4, 2)])
def test_two_processes_are_one(tmp_path: Path, per_rank: int, accumulation: int) -> None:
    """Also where each prompt's rollouts lie on both."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    job = subprocess.run(
        [sys.executable, *launch, str(TESTS / "two_processes.py"), str(two), str(per_rank), str(accumulation)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert job.returncode == 0, job.stderr[-4000:]
    run(one, 2 * per_rank, accumulation)

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
    names = ["flagged", "oracle", "exploit", "reward", "reward/deployed", "reward/trained"]
    if accumulation == 1:  # TRL's KL is a mean over micro-batches, and who is in which is drawn in each process
        names.append("kl")
    for row, plain in zip(got["history"], want["history"], strict=True):
        for name in names:
            assert (name in row) == (name in plain)
            assert row.get(name, 0) == pytest.approx(plain.get(name, 0), rel=1e-3, abs=1e-6)

    books, twin, plain = (
        read_books(path) for path in (two / "0.safetensors", two / "1.safetensors", one / "0.safetensors")
    )
    assert books.steps == plain.steps == 4
    for name, layers in plain.books.items():
        for layer, part in layers.items():
            assert torch.equal(books.books[name][layer], twin.books[name][layer])
            torch.testing.assert_close(books.books[name][layer], part, atol=1e-4, rtol=1e-2)
    assert books.momentum is not None
    assert plain.momentum is not None
    for mine, theirs, wanted in zip(books.momentum, twin.momentum, plain.momentum, strict=True):
        assert torch.equal(mine, theirs)
        assert (mine - wanted).norm() < 1e-3 * wanted.norm()

    rows, wanted_rows = ([json.loads(line) for line in (f / "log").read_text().splitlines()] for f in (two, one))
    assert len(rows) == len(wanted_rows) == 4 * 2 * per_rank * accumulation
    assert any(row["flagged"] for row in rows)
    for row, wanted_row in zip(rows, wanted_rows, strict=True):
        for name, value in wanted_row.items():
            assert row[name] == (pytest.approx(value, abs=1e-3) if isinstance(value, float) else value), name
