"""What a training run leaves on disk, and what of it a later process may trust.

    config.yaml            the resolved config: `antipasto train --config` repeats the run
    run.json               its name among reporters, versions, command, method, the base model and its fingerprint
    metrics.jsonl          one line a step
    rollouts.jsonl         one line a rollout (`antipasto.evaluation.rollout_log`)
    direction.safetensors  what the run was routed by
    tensorboard/           what TensorBoard reads, where the run reports to it
    monitor.safetensors    what flagged its rollouts, where that was a monitor
    checkpoint-<step>/     the Trainer's, with books.safetensors; complete once ``complete.json`` is in it
    adapter/               the trained adapter, written at the end
    books.safetensors      the router's books, written at the end
    eval.json, eval.jsonl  written by `antipasto eval`
    .lock                  held while a process writes into the folder; without such a process it means nothing

``config.yaml`` is there from the beginning, ``run.json`` from just before the first step on: a folder without it was stopped
before there was anything to continue.

A process can be killed at any moment: a checkpoint without ``complete.json`` is passed over and removed, and lines of the logs
from after the checkpoint are written again.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from antipasto.app.locks import held, remove_leftovers
from antipasto.names import COMPLETE

CONFIG, RUN, METRICS, ROLLOUTS = "config.yaml", "run.json", "metrics.jsonl", "rollouts.jsonl"
DIRECTION, BOOKS, ADAPTER = "direction.safetensors", "books.safetensors", "adapter"
MONITOR = "monitor.safetensors"
TENSORBOARD = "tensorboard"
LOCK = ".lock"
_WRITTEN = [CONFIG, RUN, METRICS, ROLLOUTS, DIRECTION, BOOKS, MONITOR, ADAPTER]
_WRITTEN += ["eval.json", "eval.jsonl", "eval.partial.jsonl"]


class RunFolder:
    """The paths of one run.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config, self.run = root / CONFIG, root / RUN
        self.metrics, self.rollouts = root / METRICS, root / ROLLOUTS
        self.direction, self.books, self.adapter = root / DIRECTION, root / BOOKS, root / ADAPTER
        self.tensorboard, self.monitor = root / TENSORBOARD, root / MONITOR

    def check_new(self) -> None:
        """Refuse a place where no new run can be: a file, or a folder with something in it.

        Raises:
            ValueError: says what to do.
        """
        if self.root.exists() and (not self.root.is_dir() or any(p.name != LOCK for p in self.root.iterdir())):
            hint = ""
            if self.run.is_file():
                hint = f", or continue that run: antipasto train --resume {self.root}"
            elif self.config.is_file():
                hint = f", or begin that run again: antipasto train --config {self.config} --out ANOTHER"
            raise ValueError(f"{self.root} exists and is not an empty folder: choose another --out{hint}.")

    @contextmanager
    def held(self, *, new: bool) -> Iterator[None]:
        """Write into the folder for a while, and let no other process do so.

        Args:
            new: make the folder; an empty one is gone again at the end. Else it is a run's, in which what a killed process
                had begun to write is removed.

        Raises:
            ValueError: another process holds it; there is something in what should be new, or no run in what should be old.
        """
        if new:
            self.check_new()
            self.root.mkdir(parents=True, exist_ok=True)
        else:
            self.check()
        try:
            with held(self.root / LOCK, self.root):
                if new:
                    self.check_new()  # another process may have been faster
                else:
                    remove_leftovers(self.root, _WRITTEN)
                yield
        finally:
            if new:
                with suppress(OSError):  # there is something in it
                    self.root.rmdir()

    def check(self) -> None:
        """Refuse what is not a run folder.

        Raises:
            ValueError: says why.
        """
        if not self.root.exists():
            raise ValueError(f"There is no run folder {self.root}.")
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is a file, and no run folder.")
        if self.config.is_file():
            return
        if runs := sorted(path.parent.name for path in self.root.glob(f"*/{CONFIG}")):
            raise ValueError(f"{self.root} holds several runs: give one of {', '.join(runs[:8])}.")
        if (self.root / "config.json").is_file() and not self.run.exists():
            raise ValueError(f"{self.root} is a model, not a run: there is nothing of this library in it.")
        raise ValueError(f"{self.root} is not a run folder: there is no {CONFIG} in it.")

    def read_config(self) -> dict[str, Any]:
        """The config of a run.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        self.check()
        return read_yaml(self.config)

    def config_to_resume(self) -> dict[str, Any]:
        """The config of a run that can go on from what it has left.

        Raises:
            ValueError: it cannot; says why.
        """
        config = self.read_config()
        if not self.run.is_file():
            raise ValueError(self.unfinished or f"{self.run} is not there: the folder is damaged.")
        return config

    @property
    def unfinished(self) -> str | None:
        """Of a run that has not finished: how far it is, and what to do, in one sentence."""
        if self.is_finished:
            return None
        if not self.run.is_file():
            return (
                f"The run in {self.root} has not reached its first step. If it was stopped, there is nothing to continue: "
                f"begin it again with antipasto train --config {self.config} --out ANOTHER."
            )
        return f"The run in {self.root} has not finished: antipasto train --resume {self.root}"

    def read_run(self) -> dict[str, Any]:
        """What ``run.json`` says.

        Raises:
            ValueError: it is not there, or no JSON.
        """
        self.check()
        if not self.run.is_file():
            raise ValueError(self.unfinished or f"{self.run} is not there, and says what the run was: it is damaged.")
        try:
            facts = json.loads(self.run.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.run} cannot be read ({error}).") from error
        base = facts.get("base") if isinstance(facts, dict) else None
        if not isinstance(base, dict) or not isinstance(base.get("fingerprint"), str) or "processes" not in facts:
            raise ValueError(
                f"{self.run} does not say what a run says of itself: 'processes', and 'base' with 'fingerprint'."
            )
        return dict(facts)

    @property
    def is_finished(self) -> bool:
        """Whether the run finished."""
        return (self.adapter / COMPLETE).exists()

    def last_checkpoint(self) -> Path | None:
        """The latest complete checkpoint; later incomplete ones are removed."""
        checkpoints = sorted(self.root.glob("checkpoint-*"), key=step_of)
        for checkpoint in reversed(checkpoints):
            if (checkpoint / COMPLETE).exists():
                return checkpoint
            shutil.rmtree(checkpoint)  # the process ended while it was written
        return None


def step_of(checkpoint: Path) -> int:
    """How many steps a checkpoint's folder says that the run has made."""
    return int(checkpoint.name.rpartition("-")[2])


# ── YAML ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain words: ``no`` and ``on`` are texts, ``1e-4`` is a number, ``12:30`` and ``2026-01-01`` are texts."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as a text."""


def _plain_words() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """First character → (tag, what has it), of the core schema of YAML 1.2.2, section 10.3.2; and ``<<``."""
    words = {
        "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
        "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
        "float": (
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
            "-+.0123456789",
        ),
        "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        "merge": (r"<<", "<"),
    }
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, (pattern, first) in words.items():
        for character in first:
            table.setdefault(character, []).append((f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{pattern})$")))
    return table


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)  # 010 is ten


_Loader.yaml_implicit_resolvers = _Dumper.yaml_implicit_resolvers = _plain_words()
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def parse_yaml(text: str | bytes) -> Any:
    """What a YAML text says; its plain words as YAML 1.2 has them.

    Raises:
        ValueError: it is not YAML; says where.

    Example:
        >>> parse_yaml("{strategy: no, rate: 1e-4, on: true}")
        {'strategy': 'no', 'rate': 0.0001, 'on': True}
    """
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{' '.join(str(error).split())}".rstrip(".")) from error
    try:
        return loader.get_single_data()
    # a tag on what it does not fit (!!bool foo, !!int "") is an error of any kind there
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")) from error
    finally:
        loader.dispose()


def write_yaml(value: Any) -> str:
    """A text that `parse_yaml` reads as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        ValueError: it is not YAML, or no mapping; names the file.
        OSError: it cannot be read.
    """
    try:
        value = parse_yaml(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold options, one 'name: value' a line, got {type(value).__name__}.")
    return value
