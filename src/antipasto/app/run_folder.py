"""The files of a run folder, and which of them a later process may trust.

    config.yaml            the resolved config: `antipasto train --config` repeats the run
    run.json               the run's name for reporters, versions, command, method, the base model and its fingerprint
    metrics.jsonl          one line per step
    rollouts.jsonl         one line per rollout (`antipasto.evaluation.rollout_log`)
    direction.safetensors  the direction of a run that routes by one
    monitor.safetensors    the monitor of a run that flags rollouts by one
    tensorboard/           if the run reports to TensorBoard
    checkpoint-<step>/     the Trainer's checkpoint, with books.safetensors; complete once it has ``complete.json``
    adapter/               the trained adapter, written at the end
    books.safetensors      the router's books, written at the end
    eval.json, eval.jsonl  written by `antipasto eval`
    .lock                  locked while a process writes into the folder; the file alone means nothing

``config.yaml`` is written first, ``run.json`` just before the first step. A folder without ``run.json`` has nothing to
continue.

A process can be killed at any moment. A checkpoint without ``complete.json`` is skipped and removed. Log lines from after the
checkpoint are written again.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import yaml

from antipasto.app.locks import LOCK, held_folder, remove_leftovers
from antipasto.names import COMPLETE
from antipasto.reading import read_json

CONFIG, RUN, METRICS, ROLLOUTS = "config.yaml", "run.json", "metrics.jsonl", "rollouts.jsonl"
DIRECTION, BOOKS, ADAPTER = "direction.safetensors", "books.safetensors", "adapter"
MONITOR = "monitor.safetensors"
TENSORBOARD = "tensorboard"
_WRITTEN = [CONFIG, RUN, METRICS, ROLLOUTS, DIRECTION, BOOKS, MONITOR, ADAPTER]
_WRITTEN += ["eval.json", "eval.jsonl", "eval.partial.jsonl"]


class RunFolder:
    """The paths of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config, self.run = root / CONFIG, root / RUN
        self.metrics, self.rollouts = root / METRICS, root / ROLLOUTS
        self.direction, self.books, self.adapter = root / DIRECTION, root / BOOKS, root / ADAPTER
        self.tensorboard, self.monitor = root / TENSORBOARD, root / MONITOR

    def check_new(self) -> None:
        """Check that the folder is new or empty.

        Raises:
            ValueError: it is not; says what to do.
        """
        if self.root.exists() and (not self.root.is_dir() or any(p.name != LOCK for p in self.root.iterdir())):
            hint = ""
            if self.run.is_file():
                hint = f", or continue that run: antipasto train --resume {self.root}"
            elif self.config.is_file():
                hint = f", or start that run again: antipasto train --config {self.config} --out ANOTHER"
            raise ValueError(f"{self.root} exists and is not an empty folder: choose another --out{hint}.")

    @contextmanager
    def held(self, *, new: bool) -> Iterator[None]:
        """Context manager that locks the folder for this process.

        Args:
            new: create the folder, and remove it at the end if it is still empty. If False, it must be a run folder; temporary
                files of a killed process are removed.

        Raises:
            ValueError: another process holds the lock, a new folder is not empty, or an old one is not a run folder.
        """
        check = self.check_new if new else self.check
        check()
        with held_folder(self.root):
            check()  # again: another process may have been faster
            if not new:
                remove_leftovers(self.root, _WRITTEN)
            yield

    def check(self) -> None:
        """Check that this is a run folder.

        Raises:
            ValueError: it is not; says why.
        """
        if not self.root.exists():
            raise ValueError(f"There is no run folder {self.root}.")
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is a file, not a run folder.")
        if self.config.is_file():
            return
        if runs := sorted(path.parent.name for path in self.root.glob(f"*/{CONFIG}")):
            raise ValueError(f"{self.root} holds several runs: give one of {', '.join(runs[:8])}.")
        if (self.root / "config.json").is_file() and not self.run.exists():
            raise ValueError(f"{self.root} is a model, not a run folder: give the folder that antipasto train wrote.")
        raise ValueError(f"{self.root} is not a run folder: there is no {CONFIG} in it.")

    def read_config(self) -> dict[str, Any]:
        """Read the run's config.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        self.check()
        return read_yaml(self.config)

    @property
    def unfinished(self) -> str | None:
        """A sentence on an unfinished run: how far it is and what to do. None if it is finished."""
        if self.is_finished:
            return None
        if not self.run.is_file():
            return (
                f"The run in {self.root} has not reached its first step. If it was stopped, there is nothing to continue: "
                f"start it again with antipasto train --config {self.config} --out ANOTHER."
            )
        return f"The run in {self.root} has not finished: antipasto train --resume {self.root}"

    def read_run(self) -> dict[str, Any]:
        """Read ``run.json``.

        Raises:
            ValueError: it does not exist, is not JSON, or lacks an entry.
        """
        self.check()
        if not self.run.is_file():
            raise ValueError(
                self.unfinished or f"There is no {self.run}, which describes the run: the folder is damaged."
            )
        facts = read_json(self.run)
        base = facts.get("base") if isinstance(facts, dict) else None
        if not isinstance(base, dict) or not isinstance(base.get("fingerprint"), str) or "processes" not in facts:
            raise ValueError(f"{self.run} is damaged: it needs 'processes', and 'base' with 'fingerprint'.")
        return dict(facts)

    @property
    def is_finished(self) -> bool:
        return (self.adapter / COMPLETE).exists()

    def last_checkpoint(self) -> Path | None:
        """Return the latest complete checkpoint, and remove later incomplete ones."""
        checkpoints = sorted(self.root.glob("checkpoint-*"), key=step_of)
        for checkpoint in reversed(checkpoints):
            if (checkpoint / COMPLETE).exists():
                return checkpoint
            shutil.rmtree(checkpoint)
        return None


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.rpartition("-")[2])


# ── YAML ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


Resolvers = dict[str, list[tuple[str, re.Pattern[str]]]]
"""First character → (tag, pattern)."""


class _Loader(yaml.SafeLoader):
    """Resolves scalars as YAML 1.2: ``no``, ``on``, ``12:30`` and ``2026-01-01`` are texts, ``1e-4`` is a number."""

    yaml_implicit_resolvers: ClassVar[Resolvers] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes texts that `_Loader` would read as something else."""

    yaml_implicit_resolvers: ClassVar[Resolvers] = {}


_WORDS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
"""Tag → pattern and first characters of the core schema of YAML 1.2.2, section 10.3.2, and of ``<<``."""
for _tag, (_pattern, _first) in _WORDS.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), list(_first))


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)  # 010 is ten, not eight


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def parse_yaml(text: str | bytes) -> Any:
    """Parse a YAML text, with scalars as in YAML 1.2.

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
    # a wrong tag (!!bool foo, !!int "") raises any of these
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")) from error
    finally:
        loader.dispose()


def write_yaml(value: Any) -> str:
    """Write a value as YAML that `parse_yaml` reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ValueError: it is not YAML, or not a mapping; names the file.
        OSError: it cannot be read.
    """
    try:
        value = parse_yaml(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold options, one 'name: value' per line, got {type(value).__name__}.")
    return value
