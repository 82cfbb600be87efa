"""`RoutedGRPOTrainer` with ``deepspeed=`` in its GRPOConfig, on two real processes, ends where one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing as mp
from trained import KINDS, child, run

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any]:
    """The folder; by one process, and by each of two."""
    folder = tmp_path_factory.mktemp("zero-trainer")
    mp.spawn(child, args=(str(folder),), nprocs=2)
    return (
        folder,
        {kind: run(folder / kind, kind, 1) for kind in KINDS},
        *(torch.load(folder / f"{r}.pt") for r in (0, 1)),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_zero_trains_as_one_process(found: tuple[Path, Any, Any, Any], kind: str) -> None:
    folder, want, got, other = (found[0], *(one[kind] for one in found[1:]))
    assert (got["engine"], got["steps"] if kind == "route" else 3) == ("DeepSpeedEngine", 3)
    for what in ("delta_s", "delta_s_hack"):
        assert torch.equal(got[what], other[what])
        torch.testing.assert_close(got[what], want[what], atol=1e-4, rtol=1e-2)
        assert (got[what] - want[what]).norm() <= 1e-3 * want[what].norm()
    assert want["delta_s"].abs().max() > 1e-3
    assert bool(want["delta_s_hack"].any()) == (kind == "route")
    for row, plain in zip(got["history"], want["history"], strict=True):
        for name in ("score", "flagged", "oracle", "exploit", "reward", "grad_norm"):
            assert (name in row) == (name in plain)
            assert row.get(name, 0) == pytest.approx(plain.get(name, 0), rel=1e-3, abs=1e-6), name
    saved = load_file(folder / "two" / kind / "adapter" / "adapter_model.safetensors")
    parts = torch.cat([value for name, value in saved.items() if "delta_s_hack" not in name])
    assert torch.equal(parts.sort().values, got["delta_s"].sort().values)
    if kind == "route":
        assert got["metrics"] == other["metrics"]
        assert got["metrics"] == {name: pytest.approx(x, rel=0.01, abs=1e-4) for name, x in want["metrics"].items()}
        for layer, part in want["book"].items():
            torch.testing.assert_close(got["book"][layer], part, atol=1e-4, rtol=1e-2)


def test_a_resumed_run_continues_with_its_quarantine(found: tuple[Path, Any, Any, Any]) -> None:
    """DeepSpeed's own checkpoint leaves it out."""
    for of_rank in found[2:]:
        got, want = of_rank["resumed"], of_rank["route"]
        assert got["steps"] == want["steps"] == 3
        for what in ("delta_s", "delta_s_hack"):
            assert torch.equal(got[what], want[what])
        assert all(torch.equal(got["book"][layer], part) for layer, part in want["book"].items())
        assert got["metrics"] == want["metrics"]
