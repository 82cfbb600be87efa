"""The job behind `antipasto train`: any causal LM, any `Task`, TRL's GRPO, routed."""

from __future__ import annotations

import dataclasses
import re
import secrets
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from rich.console import Console
from transformers import PrinterCallback
from transformers.integrations import TensorBoardCallback

import antipasto as ap
from antipasto.adapter.fingerprints import hashed_once
from antipasto.app.models import base_fingerprint, load_model, process_state, quiet, with_template_options
from antipasto.app.run_folder import RunFolder, step_of
from antipasto.app.runs import finish_run, run_facts
from antipasto.app.train.config import TrainConfig
from antipasto.app.train.gating import Gating, on_main
from antipasto.app.train.trl_args import steps_per_cycle, trainer_args
from antipasto.evaluation.ask import as_in_training
from antipasto.files import write_json, write_text
from antipasto.tasks import Task, load_task
from antipasto.terminal import say
from antipasto.trl import (
    CompleteCheckpoints,
    FirstLook,
    Interrupts,
    MetricsLog,
    ProgressBar,
    RoutedGRPOTrainer,
    RoutingCallback,
)


def start(config: TrainConfig, out: Path | None, console: Console, *, resume: bool = False) -> Path | None:
    """`run`, in a folder that all processes agree on: ``runs/<task>-<time>`` unless there is one.

    Returns:
        The folder; None after Ctrl-C.
    """
    process_state()
    name = re.sub(r"\W+", "-", Path(config.task.rpartition(":")[0] or config.task).stem)
    default = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    (name,) = broadcast_object_list([str(out or default)])
    folder = Path(name)
    if not run(config, folder, console, resume=resume):
        return None
    say(console, f"run folder: {folder}", f"next: antipasto eval {shlex.quote(str(folder))}")
    return folder


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(config: TrainConfig, out: Path, console: Console, *, resume: bool = False) -> bool:
    """Train; leave a run folder.

    Args:
        config: the run.
        out: its folder: new or empty, or, to resume, one that a run has left.
        console: where to print; the main process prints.
        resume: continue from the folder's latest checkpoint.

    Returns:
        Whether the run finished; False after Ctrl-C.

    Raises:
        ValueError: options, files, model or task that do not fit; says which.
    """
    state = process_state()
    folder = RunFolder(out)
    console.quiet = console.quiet or not state.is_main_process
    with ExitStack() as held:

        def hold() -> None:  # by one of the processes for all
            held.enter_context(folder.held(new=not resume))

        on_main(state, hold)
        begins = not resume and state.is_main_process
        with _beginning(config, folder) if begins else nullcontext():
            return _run(config, folder, console, state, resume=resume)


def _run(config: TrainConfig, folder: RunFolder, console: Console, state: PartialState, *, resume: bool) -> bool:
    """`run`, in a folder that is held."""
    if resume and folder.is_finished:
        raise ValueError(f"The run in {folder.root} finished: there is nothing to continue.")
    if resume and (before := folder.read_run()["processes"]) != state.num_processes:
        raise ValueError(
            f"The run in {folder.root} began on {before} process(es): it cannot continue on {state.num_processes}."
        )
    task = load_task(config.task)
    with quiet():
        args = trainer_args(config, task, folder.root, state.num_processes)
    how = Gating(config, task, has_direction=resume and (folder.direction.exists() or folder.monitor.exists()))
    model, tokenizer = load_model(config.model, dtype=config.dtype)
    with_template_options(tokenizer, args.chat_template_kwargs)
    check_chats(tokenizer, config.model, task)
    checkpoint = on_main(state, folder.last_checkpoint) if resume else None
    with quiet(), hashed_once():
        trainer = RoutedGRPOTrainer(
            model=model,
            args=args,
            reward_funcs=_judge(task, "reward"),
            train_dataset=Dataset.from_dict({"row": range(len(task.train))}),  # `_prompts_of` and `_judge` look them up
            processing_class=tokenizer,
            peft_config=_adapter(config),
            router=how.router(folder, tokenizer, state),
            detector=None if task.detector is None or how.uses_monitor else _judge(task, "detector"),
            monitor=how.monitor(
                folder, tokenizer, state, as_in_training(dataclasses.asdict(config), task, seed=config.seed), console
            ),
            flagged=how.flagged,
            oracle=None if task.oracle is None else _judge(task, "oracle"),
            deploy_fraction=config.deploy_fraction,
            rollout_log=folder.rollouts,
        )
        trainer.data_collator = _prompts_of(task)
        trainer.remove_callback(PrinterCallback)
        on_main(state, lambda: _describe(trainer, config, folder, resume=resume))
    with quiet():
        if state.is_main_process:
            _name_for_reporters(trainer, folder, checkpoint)
        trainer.callback_handler.callbacks.append(MetricsLog(folder.metrics))
        trainer.add_callback(CompleteCheckpoints(args))
        with Interrupts(console, steps_per_cycle(args)) as interrupts, ProgressBar(console, "training") as bar:
            trainer.add_callback(interrupts)
            trainer.add_callback(bar)
            if checkpoint is None:
                trainer.add_callback(FirstLook(console))
            else:
                say(console, f"continuing from {checkpoint}")
            _train(trainer, checkpoint)
        if interrupts.stopped:
            say(
                console,
                f"stopped after step {trainer.state.global_step} of {args.max_steps}, and saved. "
                f"Continue with: antipasto train --resume {shlex.quote(str(folder.root))}",
            )
            return False
        finish_run(trainer, trainer.router, folder)
    state.wait_for_everyone()
    return True


@contextmanager
def _beginning(config: TrainConfig, folder: RunFolder) -> Iterator[None]:
    """Say from the beginning what the folder is; where it comes to no step, leave it as empty as it was."""
    write_text(folder.config, config.to_yaml())
    try:
        yield
    except Exception:
        if not folder.metrics.exists():
            shutil.rmtree(folder.tensorboard, ignore_errors=True)
            for path in (folder.config, folder.direction, folder.monitor, folder.run, folder.rollouts):
                path.unlink(missing_ok=True)
        raise


def check_chats(tokenizer: Any, model: str, task: Task) -> None:
    """Refuse chats where the tokenizer cannot make a text of one."""
    if task.is_chat and tokenizer.chat_template is None:
        raise ValueError(
            f"The prompts of task {task.name!r} are chats, and the tokenizer of {model} has no chat template: give a model "
            "that was taught chats (often called -Instruct or -it), or prompts that are plain texts."
        )


def _train(trainer: RoutedGRPOTrainer, checkpoint: Path | None) -> None:
    """Train, from a checkpoint if there is one; from that of the last step on, there is nothing left but to take it."""
    if checkpoint is None or step_of(checkpoint) < trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return
    trainer._load_from_checkpoint(str(checkpoint))
    if trainer.router is not None:
        trainer.router.load(checkpoint / RoutingCallback.FILE)
    trainer.state.global_step = trainer.args.max_steps


def _name_for_reporters(trainer: RoutedGRPOTrainer, folder: RunFolder, checkpoint: Path | None) -> None:
    """Let a run that continues be the same run to them; TensorBoard takes back what came after the checkpoint."""
    if trainer.args.run_name is None:
        trainer.args.run_name = folder.read_run().get("name")
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.tb_writer = callback._SummaryWriter(
                log_dir=callback.logging_dir or str(folder.tensorboard),
                purge_step=None if checkpoint is None else step_of(checkpoint) + 1,
            )


def _adapter(config: TrainConfig) -> ap.AntiPastoConfig:
    adapter = ap.AntiPastoConfig(
        rank=config.rank, target_modules=config.target_modules, exclude_modules=config.exclude_modules
    )
    adapter.cache_dir = config.cache_dir
    return adapter


def _prompts_of(task: Task) -> Callable[[list[dict[str, int]]], list[dict[str, Any]]]:
    """Numbers of rows → what TRL sees of them. No row goes through Arrow, which would fill up ragged ones and lose tuples."""

    def collate(numbers: list[dict[str, int]]) -> list[dict[str, Any]]:
        return [{"prompt": task.train[number["row"]]["prompt"], **number} for number in numbers]

    return collate


def _judge(task: Task, role: Literal["reward", "oracle", "detector"]) -> Callable[..., list[float]]:
    """One of a task's functions as TRL calls it, checked; it gets the rows as the task has them, as in an evaluation."""

    def judge(prompts: list[Any], completions: list[Any], row: list[int], **_: Any) -> list[float]:
        rows = [task.train[number] for number in row]
        return task.ask(role, prompts, completions, {name: [each[name] for each in rows] for name in task.columns})

    judge.__name__ = role
    return judge


def _describe(trainer: RoutedGRPOTrainer, config: TrainConfig, folder: RunFolder, *, resume: bool) -> None:
    """Write the facts; of a run that continues, check that it is the same base."""
    digest = base_fingerprint(trainer.model)
    if resume:
        before = folder.read_run()["base"]["fingerprint"]
        if before != digest:
            raise ValueError(
                f"{config.model} has other weights now than when {folder.root} began: it cannot be continued."
            )
        return
    facts = run_facts(trainer, config.model, digest, task=config.task, method=config.method)
    name = f"{folder.root.resolve().name}-{secrets.token_hex(3)}"  # reporters take runs of one name for one
    write_json(folder.run, {"name": name, **facts})
