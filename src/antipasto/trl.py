"""What the library adds to a TRL run. The only module that imports trl; nothing imports it that does not train."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from antipasto.routing import Router

__all__ = ["GRPOConfig", "GRPOTrainer", "ProgressBar", "RolloutLog", "RoutingCallback"]

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


class RoutingCallback(TrainerCallback):
    """Routes in any Hugging Face Trainer: attaches the router while training runs.

    `Router.metrics` go into the Trainer's logs as ``routing/…``. Every checkpoint gets the books (``books.safetensors``),
    beside the adapter that holds ``delta_s_hack``; a run that is resumed continues from them.

    Args:
        router: of the model that the Trainer trains.
        resume_from: the checkpoint folder whose books to continue from, where that is not the folder
            ``checkpoint-<step>`` of the run's own ``output_dir``.

    Raises:
        ValueError: (from ``train``) a resumed run whose books are not there.
    """

    FILE = "books.safetensors"

    def __init__(self, router: Router, resume_from: str | Path | None = None) -> None:
        self.router = router
        self.resume_from = resume_from
        self._attached = ExitStack()

    def install(self, trainer: Trainer) -> None:
        """Add to a Trainer ahead of its reporters, so that they get the metrics too; ``add_callback`` comes after them."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Attach; continue from the checkpoint's books where the run is a continued one."""
        assert optimizer is not None
        if state.global_step > 0:
            folder = Path(self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if not (folder / self.FILE).exists():
                raise ValueError(
                    f"The run continues at step {state.global_step}, but {folder / self.FILE} is not there. "
                    "Pass RoutingCallback(router, resume_from=the checkpoint's folder)."
                )
            self.router.load(folder / self.FILE)
        self._attached.close()  # of an earlier run that ended in an exception
        self._attached.enter_context(self.router.attach(optimizer))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the optimizer; go back to the best checkpoint's books where the Trainer went back to its knobs."""
        self._attached.close()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.router.load(Path(state.best_model_checkpoint) / self.FILE)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics to what is logged, and to the log's history."""
        if logs is not None and self.router.steps > 0:
            metrics = {f"routing/{name}": value for name, value in self.router.metrics().items()}
            logs.update(metrics)
            if state.log_history:
                state.log_history[-1].update(metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the books into the checkpoint."""
        if state.is_world_process_zero:
            self.router.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE)
