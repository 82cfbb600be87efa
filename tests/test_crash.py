"""Killed at whatever moment, a process leaves the old state or the new one; several at once do each piece of work once."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from crashing import SIZE, leftovers
from families import FAMILIES
from peft import PeftModel, get_peft_model
from processes import at_once
from torch import nn

import antipasto as ap
from antipasto.adapter import basis as module
from antipasto.adapter.basis import BasisCacheWarning, decompose, load_basis
from antipasto.files import replacing_folder

TESTS = Path(__file__).parent


def crash(kind: str, folder: Path, tries: int, timeout: float) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(TESTS / "crashing.py"), kind, str(folder), str(tries), "0"],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "tries", "outcomes"),
    [
        ("cache", 80, {"whole"}),
        ("save_adapter", 80, {"old", "new"}),
        ("save_pretrained", 40, {"old", "new", "refused"}),  # PEFT writes one file after the other
    ],
)
def test_killed_at_any_moment(kind: str, tries: int, outcomes: set[str], tmp_path: Path) -> None:
    """(With files written in place, or an adapter saved into its place, these fail within a few tries.)"""
    found = crash(kind, tmp_path, tries, 280)
    in_the_middle = found.pop("in the middle")
    assert set(found) <= outcomes
    assert sum(found.values()) == tries
    if kind != "save_pretrained":
        assert in_the_middle > tries / 4  # it was not spared by being fast


@pytest.mark.thorough
@pytest.mark.timeout(1500)
def test_a_run_killed_again_and_again_ends_where_it_would_have(tmp_path: Path) -> None:
    found = crash("run", tmp_path, 40, 1400)
    assert found["killed"] >= 40
    assert found["the same end"] >= 2


# ── many processes ───────────────────────────────────────────────────────────────────────────────────────────────────


def _wrap_when_told(folder: str, start: object, results: object) -> None:
    torch.set_num_threads(1)
    original, calls = module.decompose, []
    module.decompose = lambda weight: (calls.append(1), original(weight))[1]
    model = FAMILIES["llama"].build()
    start.wait()  # type: ignore[attr-defined]
    layers = ap.wrap(model, ap.AntiPastoConfig(cache_dir=folder))
    results.put((len(calls), len(layers), sum(layer.U.sum().item() for layer in layers.values())))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_eight_processes_decompose_each_weight_once(tmp_path: Path) -> None:
    calls, layers, sums = zip(*at_once(_wrap_when_told, [(str(tmp_path),)] * 8), strict=True)
    assert set(layers) == {14}
    assert sum(calls) == 14
    assert len(set(sums)) == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}
    assert len(list(tmp_path.iterdir())) == 14
    assert not leftovers(tmp_path)


def _hold(path: str, ready: object) -> None:
    module.decompose = lambda weight: ready.set() or __import__("time").sleep(600)  # type: ignore[attr-defined]
    load_basis(torch.eye(SIZE), cache_dir=path)


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    worker = context.Process(target=_hold, args=(str(tmp_path), ready))
    worker.start()
    assert ready.wait(120)
    assert [name.endswith(".lock") for name in leftovers(tmp_path)] == [True]
    worker.kill()
    worker.join()
    assert torch.equal(load_basis(torch.eye(SIZE), cache_dir=tmp_path).S, torch.ones(SIZE))
    assert not leftovers(tmp_path)


# ── a cache that comes and goes ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("before", ["the first is decomposed", "the second is looked for"])
def test_a_cache_that_vanishes_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    """Also what was loaded from it stays: its pages are mapped from files that are gone."""
    cache = tmp_path / "cache"
    first = load_basis(torch.eye(3), cache_dir=cache)
    first = load_basis(torch.eye(3), cache_dir=cache)

    def vanish(weight: torch.Tensor) -> ap.Basis:
        for path in cache.iterdir():
            path.unlink()
        cache.rmdir()
        return decompose(weight)

    if before == "the first is decomposed":
        monkeypatch.setattr(module, "decompose", vanish)
        with pytest.warns(BasisCacheWarning, match=r"cannot be written .* Continuing without it"):
            second = load_basis(2 * torch.eye(3), cache_dir=cache)
    else:
        vanish(torch.eye(3))
        second = load_basis(2 * torch.eye(3), cache_dir=cache)
        assert len(list(cache.iterdir())) == 1  # it is made again
    assert torch.equal(second.S, torch.full((3,), 2.0))
    assert torch.equal(first.S, torch.ones(3))


def test_a_full_disk_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    adapted = get_peft_model(model, ap.AntiPastoConfig(target_modules=["0"]))
    ap.save_adapter(adapted, tmp_path / "adapter")
    ap.knobs(adapted)["0"].delta_s.data.fill_(1.0)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            ap.save_adapter(adapted, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    loaded = PeftModel.from_pretrained(
        nn.Sequential(nn.Linear(4, 4)), tmp_path / "adapter", config=_unchecked(tmp_path)
    )
    assert not ap.knobs(loaded)["0"].delta_s.any()


def _unchecked(folder: Path) -> ap.AntiPastoConfig:
    config = ap.AntiPastoConfig.from_pretrained(str(folder / "adapter"))
    config.check_base = False
    return config


def test_without_an_exchange_of_names_a_folder_is_replaced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on systems that have none."""
    monkeypatch.setattr("antipasto.files._exchange", lambda one, other: False)
    for text in ("old", "new"):
        with replacing_folder(tmp_path / "folder") as folder:
            (folder / "file").write_text(text)
        assert (tmp_path / "folder" / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not exchange names")
def test_on_linux_there_is_no_moment_without_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment between two renames is too short for kills at random to meet it."""
    folder = tmp_path / "folder"
    folder.mkdir()

    def rename(path: Path, target: Path) -> Path:
        raise AssertionError(f"{path} is renamed")

    monkeypatch.setattr(Path, "rename", rename)
    with replacing_folder(folder) as new:
        (new / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_where_the_second_rename_fails_the_old_folder_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("antipasto.files._exchange", lambda one, other: False)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    rename = Path.rename

    def second_fails(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"), replacing_folder(folder) as new:
        (new / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in folder.iterdir()] == ["old"]
