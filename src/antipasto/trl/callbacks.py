"""Trainer callbacks: routing, the log of metrics, complete checkpoints, Ctrl-C, and warnings after the first step."""

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
from peft import PeftModel
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
    """Attaches a router to the optimizer of any Hugging Face Trainer during training.

    `Router.metrics` are added to the Trainer's logs as ``routing/…``. Every checkpoint gets the router's books
    (``books.safetensors``) in addition to the adapter, which holds ``delta_s_hack``. A resumed run continues from them.

    Args:
        router: the router of the model that the Trainer trains.
        resume_from: checkpoint folder whose books to continue from, if it is not ``checkpoint-<step>`` in the run's
            ``output_dir``.

    Raises:
        ValueError: (from ``train``) the checkpoint of a resumed run has no books.
    """

    FILE = "books.safetensors"

    def __init__(self, router: Router, resume_from: str | Path | None = None) -> None:
        self.router = router
        self.resume_from = resume_from
        self._attached = ExitStack()

    def detach(self) -> None:
        """Detach the router from the optimizer, if it is attached."""
        self._attached.close()

    def install(self, trainer: Trainer) -> None:
        """Add this callback to a Trainer before its reporters, so that they get the metrics (``add_callback`` appends)."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Attach the router; in a resumed run, load the checkpoint's books first."""
        assert optimizer is not None
        if state.global_step > 0:
            folder = Path(self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if not (folder / self.FILE).exists():
                raise ValueError(
                    f"The run continues at step {state.global_step}, but {folder / self.FILE} does not exist. "
                    "Pass RoutingCallback(router, resume_from=the checkpoint's folder)."
                )
            self._load(args, folder)
        self.detach()  # in case an earlier run ended in an exception
        self._attached.enter_context(self.router.attach(optimizer))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach the router; if the Trainer loaded the best checkpoint, load the books of that checkpoint."""
        with self._attached:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                self._load(args, Path(state.best_model_checkpoint))

    def _load(self, args: TrainingArguments, folder: Path) -> None:
        """Load a checkpoint's books, and its quarantine where the Trainer has not.

        Under DeepSpeed the Trainer loads the engine's checkpoint alone, which leaves out parameters that require no gradient.
        """
        self.router.load(folder / self.FILE)
        if args.deepspeed_plugin is not None and isinstance(self.router.model, PeftModel):
            self.router.model.load_adapter(folder, self.router.adapter_name, is_trainable=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the router's metrics to the logs and to the log history."""
        if logs is not None and self.router.steps > 0:
            metrics = {f"routing/{name}": value for name, value in self.router.metrics().items()}
            logs.update(metrics)
            if state.log_history:
                state.log_history[-1].update(metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the books in the checkpoint."""
        if state.is_world_process_zero:
            self.router.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE)


class MetricsLog(TrainerCallback):
    """Writes every logged row with a reward as a JSON line. A resumed run replaces the lines after its checkpoint.

    The file is there from the first step on, also if rows are logged later: it shows that the run has begun.

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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.path.touch()

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
                # NaN becomes null, for example if a reward function returned no number for any rollout of the step
                file.write(json.dumps({"step": state.global_step, **with_nulls(logs)}) + "\n")


class CompleteCheckpoints(TrainerCallback):
    """Marks each checkpoint after all of it is written, so that a checkpoint of a killed process can be recognised.

    Older checkpoints are removed after that. The Trainer would remove them before.

    Args:
        args: the Trainer's arguments. This callback takes over ``save_total_limit`` and sets it to None.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.limit, args.save_total_limit = args.save_total_limit, None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / COMPLETE, {"step": state.global_step})
            rotate_checkpoints(args.output_dir, self.limit, state.best_model_checkpoint, use_mtime=True)


class Interrupts(TrainerCallback):
    """On Ctrl-C, SIGTERM (from a scheduler) or SIGHUP (from a closed terminal), saves a checkpoint after the step and stops.

    A second signal stops at once. An ignored SIGHUP, as under nohup, stays ignored.

    This is a context manager: on exit, the previous signal handlers are restored.

    Args:
        console: where to print a message.
        every: stop only after a multiple of this many steps. If several steps learn from one generation, a run could not be
            resumed from a checkpoint between them.

    Attributes:
        stopped: whether a signal has ended the run.
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
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by other than Python code

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGHUP", None):
            self._let_go_of_terminals()
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        say(self._console, "", "interrupted: finishing this step, then saving. Once more to stop at once.")

    def _let_go_of_terminals(self) -> None:
        """Redirect output from a closed terminal to the null device; writing to it would raise an error and end the run."""
        for terminal in self._terminals:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, terminal)
            os.close(nowhere)
        self._terminals = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop all processes after the same step, even if the signal reached only some of them."""
        if state.global_step % self._every or state.global_step >= state.max_steps:
            return
        if any(gather_object([self._asked])):
            self.stopped = True
            control.should_save = control.should_training_stop = True


class FirstLook(TrainerCallback):
    """Warns after the first step if its rollouts show a problem with the task.

    Args:
        console: where to print the warnings.
    """

    EXPLOITS = 0.3
    """Warn from this share of exploits on: training can teach little more of the exploit."""
    HARDLY = 0.02
    """Warn if the oracle's mean is below this: it accepts almost nothing."""

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
        if self._has_looked or not logs or "reward" not in logs or "oracle" not in logs:
            return
        self._has_looked = True
        oracle, exploit = logs["oracle"], logs["exploit"]
        if exploit >= self.EXPLOITS:
            say(
                self._console,
                f"warning: {exploit:.2f} of the first step's rollouts are already exploits. A direction can only remove "
                "what training teaches, not what the model did before.",
            )
        if oracle < self.HARDLY:
            say(
                self._console,
                f"warning: the oracle's mean over the first step's rollouts is {oracle:.2f}. If the oracle is wrong, every "
                f"rollout with a reward of {REWARDED} or more counts as an exploit. If it is right, the task is too hard for "
                "this model.",
            )
