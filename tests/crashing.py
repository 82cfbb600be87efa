"""Processes that are killed at random moments while they write; run as a program of its own, by `test_crash.py`.

    python tests/crashing.py KIND FOLDER TRIES SEED

Forks a child that writes one state after the other without end, kills it by SIGKILL somewhere in the middle of it, and looks
at what is there; again and again. Prints what was found, as JSON: how often which outcome, and how many kills were in the
middle of a write. Anything that is neither the old state nor the new one ends it with a traceback.

KIND ``run`` is `antipasto train` with a checkpoint after every step: killed, resumed, killed until it finishes, which
must be the end of a run that nobody killed, to the bit.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from frozen import build
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

import antipasto as ap
from antipasto.adapter.basis import cache_file, decompose, load_basis
from antipasto.tasks import addition

SIZE = 48


def adapted(state: str, folder: Path) -> PeftModel:
    """Two adapters that have not even the layers in common."""
    targets = ["0", "2"] if state == "old" else ["0"]
    model = get_peft_model(build(), ap.AntiPastoConfig(target_modules=targets, rank=4 if state == "old" else None))
    for layer in ap.knobs(model).values():
        layer.delta_s.data.fill_(1.0 if state == "old" else 2.0)
    return model


def save_adapters(folder: Path, started: Callable[[], None], save: Callable[[PeftModel, Path], None]) -> None:
    models = [adapted("old", folder), adapted("new", folder)]
    save(models[0], folder / "adapter")
    started()
    for model in itertools.cycle(models[::-1]):
        save(model, folder / "adapter")


def look_at_adapter(folder: Path) -> str:
    loaded = PeftModel.from_pretrained(build(), folder / "adapter")
    for state in ("old", "new"):
        want, found = (get_peft_model_state_dict(model) for model in (adapted(state, folder), loaded))
        if want.keys() == found.keys() and all(torch.equal(want[key], found[key]) for key in want):
            return state
    raise AssertionError(f"a mixture: {get_peft_model_state_dict(loaded)}")


def look_at_peft_adapter(folder: Path) -> str:
    try:
        return look_at_adapter(folder)
    except ValueError as error:
        assert "was not saved together with the" in str(error), error  # noqa: PT017
        return "refused"


def weight(number: int) -> Tensor:
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(number))


def fill_cache(folder: Path, started: Callable[[], None]) -> None:
    for number in itertools.count():
        load_basis(weight(number), cache_dir=folder)
        if number == 0:
            started()


def look_at_cache(folder: Path) -> str:
    """Every file is whole; whatever was left is no hindrance, and goes."""
    done = 0
    while cache_file(weight(done), folder).exists():
        done += 1
    began = time.monotonic()
    for number in range(done + 1):
        for got, want in zip(load_basis(weight(number), cache_dir=folder), decompose(weight(number)), strict=True):
            assert torch.equal(got, want)
    assert time.monotonic() - began < 20, "something was waited for"
    assert not leftovers(folder), leftovers(folder)
    return "whole"


def leftovers(folder: Path) -> list[str]:
    """Names of temporary files, and of locks."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".") or path.suffix == ".lock"]


KINDS: dict[str, tuple[Callable[[Path, Callable[[], None]], None], Callable[[Path], str]]] = {
    "cache": (fill_cache, look_at_cache),
    "save_adapter": (lambda folder, started: save_adapters(folder, started, ap.save_adapter), look_at_adapter),
    "save_pretrained": (
        lambda folder, started: save_adapters(folder, started, lambda model, path: model.save_pretrained(str(path))),
        look_at_peft_adapter,
    ),
}


def write_until_killed(write: Callable[[Path, Callable[[], None]], None], folder: Path, after: float) -> None:
    """Returns once the child is dead; ``after`` seconds from its first complete write."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write(folder, lambda: os.write(writer, b"x") and None)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"x", "the child ended by itself"
    os.close(reader)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


TRAIN = ["--task", "addition", "--method", "route"]
TRAIN += ["--prompts", "2", "--generations", "4", "--steps", "6"]
TRAIN += ["--save-every", "1", "--trainer.save_total_limit", "1"]


def train(folder: Path, after: float) -> int | None:
    """Exit code of the run, begun or resumed; None if it was killed, ``after`` seconds from its beginning."""
    from antipasto.app.cli import app  # imports what training needs

    resume = (folder / "run.json").exists()
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    arguments = ["--resume", str(folder)] if resume else [str(addition.model_path()), *TRAIN, "--out", str(folder)]
    child = os.fork()
    if child == 0:
        quiet = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            app(["train", *arguments])
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(1)
    deadline = time.monotonic() + after
    while time.monotonic() < deadline:
        if (ended := os.waitpid(child, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def kill_runs(root: Path, tries: int, rng: random.Random) -> collections.Counter[str]:
    import antipasto.app.train.run  # noqa: F401 (so that a child finds it imported)

    found: collections.Counter[str] = collections.Counter()
    began = time.monotonic()
    assert train(root / "whole", math.inf) == 0, (root / "whole.log").read_text()
    duration = time.monotonic() - began
    killed = 0
    while killed < tries:
        folder, code = root / str(found["the same end"]), None
        while code is None:
            if (folder / "adapter" / "complete.json").exists():  # killed when there was nothing left to do
                break
            code = train(folder, rng.uniform(0, duration) if killed < tries else math.inf)
            if code is None:
                killed += 1
                unmarked = [p for p in folder.glob("checkpoint-*") if not (p / "complete.json").exists()]
                found["in the middle"] += bool(unmarked or list(folder.glob(".*")))
        assert code in (0, None), folder.with_suffix(".log").read_text()[-2000:]
        for name in ("adapter/adapter_model.safetensors", "books.safetensors"):
            want, got = load_file(root / "whole" / name), load_file(folder / name)
            assert want.keys() == got.keys()
            assert all(torch.equal(want[key], got[key]) for key in want), name
        assert (root / "whole" / "rollouts.jsonl").read_text() == (folder / "rollouts.jsonl").read_text()
        found["the same end"] += 1
    return found + collections.Counter(killed=killed)


def main(kind: str, folder: str, tries: int, seed: int) -> None:
    torch.set_num_threads(1)
    if kind == "run":
        print(json.dumps(kill_runs(Path(folder), tries, random.Random(seed))))
        return
    warnings.simplefilter("error")
    write, look = KINDS[kind]
    rng = random.Random(seed)
    found: collections.Counter[str] = collections.Counter()
    for number in range(tries):
        place = Path(folder) / str(number)
        place.mkdir()
        write_until_killed(write, place, rng.uniform(0, 0.03))
        found["in the middle"] += bool(leftovers(place))
        found[look(place)] += 1
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
