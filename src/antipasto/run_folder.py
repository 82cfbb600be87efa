"""What a training run leaves on disk, and what of it a later process may trust.

    config.yaml            the resolved config: `antipasto train --config` repeats the run; config.json of `antipasto demo`
    run.json               its name among reporters, versions, command, method, the base model and its fingerprint
    metrics.jsonl          one line a step
    rollouts.jsonl         one line a rollout (`antipasto.trl.rollout_log`)
    direction.safetensors  what the run was routed by
    tensorboard/           what TensorBoard reads, where the run reports to it
    monitor.safetensors    what flagged its rollouts, where that was a monitor
    checkpoint-<step>/     the Trainer's, with books.safetensors; complete once ``complete.json`` is in it
    adapter/               the trained adapter, written at the end
    books.safetensors      the router's books, written at the end
    eval.json, eval.jsonl  written by `antipasto eval`

A process can be killed at any moment: a checkpoint without ``complete.json`` is passed over and removed, and lines of the logs
from after the checkpoint are written again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

CONFIG, DEMO_CONFIG, RUN, METRICS, ROLLOUTS = (
    "config.yaml",
    "config.json",
    "run.json",
    "metrics.jsonl",
    "rollouts.jsonl",
)
DIRECTION, BOOKS, ADAPTER, COMPLETE = "direction.safetensors", "books.safetensors", "adapter", "complete.json"
MONITOR = "monitor.safetensors"
TENSORBOARD = "tensorboard"


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

    def create(self) -> None:
        """Make the folder.

        Raises:
            ValueError: there is something in it, or it is a file.
        """
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            hint = f", or continue that run: antipasto train --resume {self.root}" if self.config.exists() else ""
            raise ValueError(f"{self.root} exists and is not an empty folder: choose another --out{hint}.")
        self.root.mkdir(parents=True, exist_ok=True)

    def read_config(self) -> dict[str, Any]:
        """The config of a run: ``config.yaml``, or the demo's ``config.json``.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        for name in (CONFIG, DEMO_CONFIG):
            if (self.root / name).is_file():
                return read_yaml(self.root / name)  # JSON is YAML
        raise ValueError(f"{self.root} is no run folder: there is no {CONFIG} in it.")

    def read_run(self) -> dict[str, Any]:
        """What ``run.json`` says.

        Raises:
            ValueError: it is not there, or no JSON.
        """
        if not self.run.is_file():
            raise ValueError(f"{self.root} is no run folder: there is no {RUN} in it.")
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
        """Whether the run came to its end."""
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


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
        ValueError: it is not YAML, or no mapping; names the file.
        OSError: it cannot be read.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold options, one 'name: value' a line, got {type(value).__name__}.")
    return value
