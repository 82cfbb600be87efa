# ruff: noqa: PT017 (which error, and what it says, is looked at case by case)
"""Whatever is in a file that we read: what it was, a warning, or an error that names it. Never code, never a deep traceback.

Every case damages one good file, by bytes (flipped, cut, inserted, foreign) or by meaning (a value of another type, a key that
is gone, a tensor of another shape, dtype or name), and reads it the way the library does. 720 cases, the same ones each time.
"""

from __future__ import annotations

import copy
import json
import pickle
import random
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frozen
import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model_state_dict
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import antipasto as ap
from antipasto.adapter.basis import BasisCacheWarning, cache_file, load_basis
from antipasto.app.inspection import show
from antipasto.app.run_folder import RunFolder, read_yaml
from antipasto.app.train.config import TrainConfig
from antipasto.app.watch.config import WatchConfig
from antipasto.app.watch.sources import read_sources
from antipasto.evaluation import rollout_log
from antipasto.files import digest

GOOD = frozen.HERE / "format-1"
CASES = 60  # of each kind of file and of damage
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    float("nan"),
    "",
    "x",
    "€" * 3,
    [],
    [[]],
    ["x"],
    {},
    {"x": 1},
    [1, "x", None],
]
CONFIG = {"model": "m", "task": "addition", "steps": 3, "rank": 4, "target_modules": ["q_proj"], "controls": ["random"]}
CONFIG |= {"learning_rate": 1e-3, "method": "route", "trainer": {"max_grad_norm": 1.0}}


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


# ── the files, and how they are read ─────────────────────────────────────────────────────────────────────────────────


def adapted() -> nn.Module:
    return _load(GOOD / "plain")


def _load(folder: Path) -> PeftModel:
    config = ap.AntiPastoConfig.from_pretrained(str(folder))
    return PeftModel.from_pretrained(frozen.build(), folder, config=config)


def read_adapter(path: Path) -> dict[str, Tensor]:
    return dict(get_peft_model_state_dict(_load(path.parent)))


def read_direction(path: Path) -> dict[str, Tensor]:
    v = ap.Direction.load(path)
    ap.Router(adapted(), v)
    return v.to_tensors()


def read_router(path: Path) -> dict[str, Tensor]:
    v = ap.Direction.load(GOOD / "direction.safetensors")
    router = ap.Router(adapted(), v, controls={"random": v.random(0)})
    router.load(path)
    return dict(router.book("random"))


def read_config(path: Path) -> TrainConfig:
    return TrainConfig.from_mapping(read_yaml(path), str(path))


def read_run(path: Path) -> object:
    return RunFolder(path.parent).read_run()


def read_cache(path: Path) -> dict[str, Tensor]:
    return load_basis(weight(), cache_dir=path.parent)._asdict()


def weight() -> Tensor:
    return frozen.build()[0].weight.detach()  # type: ignore[index,operator]


def make(kind: str, folder: Path) -> Path:
    """A good file of this kind."""
    if kind in ("adapter", "adapter's config"):
        shutil.copytree(GOOD / "plain", folder / "adapter")
        return folder / "adapter" / ("adapter_model.safetensors" if kind == "adapter" else "adapter_config.json")
    if kind == "cache":
        load_basis(weight(), cache_dir=folder)
        return cache_file(weight(), folder)
    if kind in ("direction", "books"):
        return Path(shutil.copy(GOOD / f"{kind}.safetensors", folder))
    path = folder / {"pairs": "pairs.jsonl", "run config": "config.yaml", "run": "run.json"}[kind]
    rows = [{"prompt": f"p{n}", "hack": "!", "clean": str(n)} for n in range(3)]
    texts = {
        "pairs": "".join(json.dumps(row) + "\n" for row in rows),
        "run config": yaml.safe_dump(CONFIG),
        "run": json.dumps({"processes": 1, "base": {"fingerprint": "0" * 64}}),
    }
    if kind == "run":  # a folder without a config is not a run's
        (folder / "config.yaml").write_text(texts["run config"])
    path.write_text(texts[kind])
    return path


READ: dict[str, Callable[[Path], object]] = {
    "adapter": read_adapter,
    "adapter's config": read_adapter,
    "direction": read_direction,
    "books": read_router,
    "pairs": lambda path: ap.load_pairs(path),
    "run config": read_config,
    "run": read_run,
    "cache": read_cache,
}
CHECKED = (
    "adapter",
    "direction",
    "books",
    "cache",
)  # their numbers carry a digest: what is read from them at all is what was written


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def damage_bytes(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at, how = rng.randrange(len(data)), rng.randrange(7)
    if how == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        del data[at:]
    elif how == 2:
        data[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif how == 3:
        data[at : at + 8] = rng.choice([b"\x00" * 8, b"\xff" * 8, b"{[{[{[{["])
    elif how == 4:
        del data[at : at + rng.randrange(1, 20)]
    elif how == 5:
        data = bytearray(rng.choice([b"", b"\x00", b"null", b"[" * 5000, b"\xff\xfe" * 40, rng.randbytes(300)]))
    else:
        data = bytearray(pickle.dumps({"weight": Bomb()}))
    _replace(path, bytes(data))


def damage_meaning(path: Path, rng: random.Random) -> None:
    if path.suffix == ".safetensors":
        _damage_tensors(path, rng)
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        _replace(path, "".join(json.dumps(row) + "\n" for row in _damaged(rows, rng)).encode())
    elif path.suffix == ".json":
        _replace(path, json.dumps(_damaged(json.loads(path.read_text()), rng)).encode())
    else:
        _replace(path, yaml.safe_dump(_damaged(yaml.safe_load(path.read_text()), rng)).encode())


def _replace(path: Path, data: bytes) -> None:
    path.unlink()  # what was read of it may be mapped
    path.write_bytes(data)


def _damaged(value: Any, rng: random.Random) -> Any:
    """With one thing somewhere in it changed."""
    value = copy.deepcopy(value)
    holder: Any = value
    while True:
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
            break
        holder = inner
    if rng.random() < 0.25 and isinstance(holder, dict):
        del holder[key]
    elif rng.random() < 0.2 and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    else:
        holder[key] = rng.choice(JUNK)
    return value


def _damage_tensors(path: Path, rng: random.Random) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    key, how = rng.choice(sorted(tensors)), rng.randrange(7)
    if how == 0:
        tensors[key] = tensors[key][..., :-1].contiguous()
    elif how == 1:
        tensors[key] = tensors[key].to(rng.choice([torch.int64, torch.float16, torch.bool]))
    elif how == 2:
        tensors[key].view(-1)[0] = rng.choice([torch.nan, torch.inf])
    elif how == 3:
        del tensors[key]
    elif how == 4:
        tensors[rng.choice(["x", f"{key}x", "V ", "book/random/"])] = tensors.pop(key)
    elif how == 5:
        tensors[key] = torch.zeros(rng.choice([(), (0,), (2, 2, 2)]))
    elif metadata:
        name = rng.choice(sorted(metadata))
        metadata[name] = rng.choice(["", "null", "[]", "{}", '{"0": 3}', "3", "x", '["random", 3]'])
    if "digest" in metadata and "basis" not in metadata and rng.random() < 0.7:  # not damaged, but made wrong
        metadata["digest"] = digest(tensors, {name: text for name, text in metadata.items() if name != "digest"})
    path.unlink()
    save_file(tensors, path, metadata)


# ── the tests ────────────────────────────────────────────────────────────────────────────────────────────────────────


def same(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return bool(one == other)


@pytest.mark.parametrize("damage", [damage_bytes, damage_meaning])
@pytest.mark.parametrize("kind", READ)
def test_a_damaged_file_is_told_by_name(
    kind: str, damage: Callable[[Path, random.Random], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = READ[kind](make(kind, tmp_path))
    refused = 0
    for number in range(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = make(kind, folder)
        damage(path, random.Random(f"{kind} {number}"))
        where = f"{path} after damage {number} ({path.read_bytes()[:300]!r})"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                read = READ[kind](path)
            except (ValueError, OSError) as error:
                refused += 1
                assert type(error) in (ValueError, *OSError.__subclasses__(), OSError), (where, repr(error))
                named = str(path) in str(error) or str(path.parent) in str(error) or path.name in str(error)
                assert named or "made on another base" in str(error) or "state dict" in str(error), (where, str(error))
                assert kind != "cache", where
                continue
            except Exception as error:
                raise AssertionError(f"{where}: {error!r}") from error
        if kind == "cache" or (kind in CHECKED and damage is damage_bytes):
            assert same(read, good), where
        if kind == "cache" and not same(path.read_bytes(), make(kind, tmp_path).read_bytes()):
            assert any(issubclass(w.category, BasisCacheWarning) for w in caught), where
    assert not Path("exploded").exists()
    assert refused > CASES / 4 or kind == "cache"


@pytest.mark.parametrize("kind", ["adapter", "adapter's config", "direction", "books"])
@pytest.mark.parametrize("damage", [damage_bytes, damage_meaning])
def test_inspect_shows_or_refuses(
    kind: str, damage: Callable[[Path, random.Random], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(CASES // 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = make(kind, folder)
        damage(path, random.Random(f"inspect {kind} {number}"))
        try:
            show(path.parent if kind.startswith("adapter") else path, Console(quiet=True))
        except (ValueError, OSError) as error:
            assert type(error) in (ValueError, *OSError.__subclasses__(), OSError), repr(error)
            assert str(folder) in str(error)
    assert not Path("exploded").exists()


def test_no_pickle_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not in the place where PEFT and the Trainer would look for one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOOD / "plain", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.0.delta_s.weight": Bomb()}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        _load(tmp_path / "adapter")
    assert not Path("exploded").exists()
    forbidden = re.compile(
        r"pickle\.load|joblib|yaml\.load\(|weights_only=False|(?<!def )(?<!\.)\beval\(|torch\.load\("
    )
    ours = (
        "harness.py",
        "problems.py",
    )  # of the task `code`: the first runs in the sandbox, the second reads its own source
    for source in (Path(ap.__file__).parent).rglob("*.py"):
        assert source.name in ours or not forbidden.search(source.read_text()), source


@pytest.mark.parametrize("name", ["steps", "prompts", "generations", "seed", "learning_rate", "beta"])
def test_true_is_no_number(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be (int|float), got True"):
        TrainConfig.from_mapping(CONFIG | {name: True}, "config.yaml")


@pytest.mark.parametrize("name", ["flagged", "truncated"])
def test_what_is_no_flag_is_no_yes(name: str, tmp_path: Path) -> None:
    """In the log of rollouts, read by us or by watch."""
    log = tmp_path / "rollouts.jsonl"
    row = {"step": 0, "prompt": "p", "completion": "c", "reward": 1.0}

    def found(value: Any) -> set[bool | None]:
        log.write_text("".join(json.dumps(one) + "\n" for one in (row, row | {name: value})))
        *_, last = rollout_log.read(log, [])
        read = {getattr(last, name)}
        if name == "truncated":
            *_, source = read_sources([log], WatchConfig(), [])
            read.add(source.truncated)
        return read

    for value, is_flag in ((True, True), (False, False), (1, True), (0.0, False), (None, None)):
        assert found(value) == {is_flag}
        assert {type(one) for one in found(value)} == {type(is_flag)}
    for value in (0.1, 2, float("nan"), "false", [], {}):
        words = re.escape(f"{log}, line 2: '{name}' must be true, false, 0, 1 or null, got ")
        with pytest.raises(ValueError, match=words):
            found(value)
        if name == "truncated":
            with pytest.raises(ValueError, match=words):
                list(read_sources([log], WatchConfig(), []))
