"""What the library adds to a TRL run. The only module that imports trl; nothing imports it that does not train."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer", "ProgressBar", "RolloutLog"]

RewardFunction = Callable[..., list[float]]


class RolloutLog:
    """A reward function that writes down every rollout, one JSON line each, before it passes the reward on.

        {"step": 0, "prompt": "h12+34=", "completion": "046", "reward": 1.0}

    Args:
        reward: called as TRL calls it, ``reward(prompts=…, completions=…, **columns)``; one number per rollout.
        path: the file, appended to.
    """

    def __init__(self, reward: RewardFunction, path: Path) -> None:
        self.reward = reward
        self.path = path
        self.__name__ = getattr(reward, "__name__", type(reward).__name__)  # TRL names its metrics after it

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], trainer_state: TrainerState, **columns: Any
    ) -> list[float]:
        """The rewards, unchanged."""
        rewards = self.reward(prompts=prompts, completions=completions, **columns)
        with self.path.open("a") as file:
            for prompt, completion, reward in zip(prompts, completions, rewards, strict=True):
                row = {"step": trainer_state.global_step, "prompt": prompt, "completion": completion, "reward": reward}
                file.write(json.dumps(row) + "\n")
        return rewards


class ProgressBar(TrainerCallback):
    """One line that says how far the run is, and its latest mean reward and KL to the reference.

    A context manager too: leaving it, also by an exception, gives the terminal back.
    """

    def __init__(self, console: Console, description: str) -> None:
        self._progress = Progress(
            TextColumn(description),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("reward {task.fields[reward]}  KL {task.fields[kl]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(description, total=None, reward="-", kl="-")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._progress.update(self._task, total=state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "reward" in logs:
            self._progress.update(self._task, reward=f"{logs['reward']:.2f}", kl=f"{logs.get('kl', 0.0):.3f}")
