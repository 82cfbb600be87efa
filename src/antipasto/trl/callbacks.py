"""What sits beside a Trainer: the router's hooks, the log of metrics, whole checkpoints, and what Ctrl-C does."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import gather_object
from rich.console import Console
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from antipasto.evaluation.rollout_log import truncate
from antipasto.files import with_nulls, write_json
from antipasto.names import COMPLETE
from antipasto.routing.router import Router
from antipasto.tasks.task import REWARDED
from antipasto.terminal import say


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

    def detach(self) -> None:
        """Let go of the optimizer, where it is still held."""
        self._attached.close()

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
        self.detach()  # of an earlier run that ended in an exception
        self._attached.enter_context(self.router.attach(optimizer))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the optimizer; go back to the best checkpoint's books where the Trainer went back to its knobs."""
        with self._attached:
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


class MetricsLog(TrainerCallback):
    """Every logged row as a JSON line. A run that continues writes the lines of its steps again.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            truncate(self.path, state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "reward" in logs and state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                # a NaN is null, as where a reward function had no number for any rollout of the step
                file.write(json.dumps({"step": state.global_step, **with_nulls(logs)}) + "\n")


class CompleteCheckpoints(TrainerCallback):
    """Marks a checkpoint once all of it is written, so that one that a killed process left in the middle is told apart.

    Older ones are removed after that, and no longer by the Trainer, which does it before.

    Args:
        args: the Trainer's; its ``save_total_limit`` is taken over from it.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.limit, args.save_total_limit = args.save_total_limit, None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / COMPLETE, {"step": state.global_step})
            rotate_checkpoints(args.output_dir, self.limit, state.best_model_checkpoint, use_mtime=True)


class Interrupts(TrainerCallback):
    """Ctrl-C, a scheduler's SIGTERM, and SIGHUP, of a terminal that is closed, save a checkpoint at the end of the step.

    A second one stops at once. A SIGHUP that is ignored, as under nohup, stays ignored.

    A context manager: outside of it, signals do what they did before.

    Args:
        console: where to say so.
        every: stop only after a multiple of this many steps: where several steps learn from one generation, a checkpoint
            between them could not be continued from.

    Attributes:
        stopped: whether that has ended the run.
    """

    def __init__(self, console: Console, every: int = 1) -> None:
        self._console = console
        self._every = every
        self._asked = False
        self.stopped = False
        self._before: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> Interrupts:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        self._before = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGHUP", None):
            self._let_go_of_terminals()
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        say(self._console, "", "interrupted: finishing this step, then saving. Once more to stop at once.")

    def _let_go_of_terminals(self) -> None:
        """One that was closed takes no more output: writing to it is an error, which would end the run instead."""
        for terminal in self._terminals:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, terminal)
            os.close(nowhere)
        self._terminals = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """All processes stop after the same step, also where the signal reached one of them later."""
        if state.global_step % self._every or state.global_step >= state.max_steps:
            return
        if any(gather_object([self._asked])):
            self.stopped = True
            control.should_save = control.should_training_stop = True


class FirstLook(TrainerCallback):
    """Says, after the first step, what its rollouts show to be wrong before hours are spent on it.

    Args:
        console: where to say so.
    """

    EXPLOITS = 0.3
    """From this share of exploits on, there is little left for training to teach of it."""
    HARDLY = 0.02
    """Below this, an oracle says yes to next to nothing."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._has_looked = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the first row with rewards."""
        if self._has_looked or not logs or "reward" not in logs or "oracle" not in logs:
            return
        self._has_looked = True
        oracle, exploit = logs["oracle"], logs["exploit"]
        if exploit >= self.EXPLOITS:
            say(
                self._console,
                f"warning: {exploit:.2f} of the first step's rollouts are exploits already. What the start does is not "
                "what training teaches, and a direction takes out what training teaches.",
            )
        if oracle < self.HARDLY:
            say(
                self._console,
                f"warning: the oracle's mean over the first step's rollouts is {oracle:.2f}. If that is its mistake, every "
                f"rollout with a reward of {REWARDED} or more counts as an exploit; if it is right, the task is too hard for "
                "this model to begin with.",
            )
