"""The job behind `antipasto train`: train a causal LM on a `Task` with TRL's GRPO, and route or penalize the exploit."""

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

from antipasto.adapter.fingerprints import hashed_once
from antipasto.app.data import load_task_of
from antipasto.app.models import base_fingerprint, load_model, process_state, quiet, with_template_options
from antipasto.app.run_folder import RunFolder, step_of
from antipasto.app.runs import finish_run, run_facts
from antipasto.app.train.config import TrainConfig
from antipasto.app.train.method import RunMethod, on_main
from antipasto.app.train.trl_args import steps_per_cycle, trainer_args
from antipasto.evaluation.ask import as_in_training
from antipasto.files import write_json, write_text
from antipasto.tasks import Task
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
    """Call `run`, by default in ``runs/<task>-<time>``, the same folder on all processes.

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
    """Train, and write a run folder.

    Args:
        out: its folder: new or empty, or the run folder to resume.
        console: where the main process prints.
        resume: continue from the folder's latest checkpoint.

    Returns:
        Whether the run finished; False after Ctrl-C.

    Raises:
        ValueError: options, files, model or task are invalid; says which.
    """
    state = process_state()
    folder = RunFolder(out)
    console.quiet = console.quiet or not state.is_main_process
    with ExitStack() as held:

        def hold() -> None:  # one process locks the folder for all
            held.enter_context(folder.held(new=not resume))

        on_main(state, hold)
        begins = not resume and state.is_main_process
        with _beginning(config, folder) if begins else nullcontext():
            return _run(config, folder, console, state, resume=resume)


def _run(config: TrainConfig, folder: RunFolder, console: Console, state: PartialState, *, resume: bool) -> bool:
    """`run`, in a locked folder."""
    if resume and folder.is_finished:
        raise ValueError(f"The run in {folder.root} finished: there is nothing to continue.")
    facts = folder.read_run() if resume else None
    if facts is not None and (before := facts["processes"]) != state.num_processes:
        raise ValueError(
            f"The run in {folder.root} began on {before} process(es), and this is {state.num_processes}: start {before}."
        )
    task, rows = load_task_of(dataclasses.asdict(config), facts)
    with quiet():
        args = trainer_args(config, task, folder.root, state.num_processes)
    how = RunMethod(config, task, has_direction=resume and (folder.direction.exists() or folder.monitor.exists()))
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
            peft_config=config.adapter(),
            router=how.router(folder, tokenizer, state, console),
            detector=None if task.detector is None or how.uses_monitor else _judge(task, "detector"),
            monitor=how.monitor(
                folder, tokenizer, state, as_in_training(dataclasses.asdict(config), task, seed=config.seed), console
            ),
            flagged=how.flagged,
            oracle=None if task.oracle is None else _judge(task, "oracle"),
            deploy_fraction=config.deploy_fraction,
            rollout_log=folder.rollouts,
        )
        check_saves_adapter(trainer)
        trainer.data_collator = _prompts_of(task)
        trainer.remove_callback(PrinterCallback)
        on_main(state, lambda: _describe(trainer, config, folder, rows, resume=resume))
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
    """Write the config first. If the run fails before its first step, empty the folder again."""
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
    """Check that the tokenizer has a chat template if prompts are chats."""
    if task.is_chat and tokenizer.chat_template is None:
        raise ValueError(
            f"The prompts of task {task.name!r} are chats, and the tokenizer of {model} has no chat template: give a chat "
            "model (often called -Instruct or -it), or prompts that are plain texts."
        )


def check_saves_adapter(trainer: RoutedGRPOTrainer) -> None:
    """Check that the Trainer will write an adapter: under FSDP it does so from whole state dicts only."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError(
            f"FSDP's state dict type is {plugin.state_dict_type}, with which no adapter would be written: set "
            "fsdp_state_dict_type to FULL_STATE_DICT in accelerate's config or on its command line."
        )


def _train(trainer: RoutedGRPOTrainer, checkpoint: Path | None) -> None:
    """Train, from a checkpoint if there is one. If it is of the last step, only load it."""
    if checkpoint is None or step_of(checkpoint) < trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return
    trainer._load_from_checkpoint(str(checkpoint))
    if trainer.router is not None:
        trainer.router.load(checkpoint / RoutingCallback.FILE)
    trainer.state.global_step = trainer.args.max_steps


def _name_for_reporters(trainer: RoutedGRPOTrainer, folder: RunFolder, checkpoint: Path | None) -> None:
    """Report a resumed run under its old name. TensorBoard drops what came after the checkpoint."""
    if trainer.args.run_name is None:
        trainer.args.run_name = folder.read_run().get("name")
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.tb_writer = callback._SummaryWriter(
                log_dir=callback.logging_dir or str(folder.tensorboard),
                purge_step=None if checkpoint is None else step_of(checkpoint) + 1,
            )


def _prompts_of(task: Task) -> Callable[[list[dict[str, int]]], list[dict[str, Any]]]:
    """A collator from row numbers to prompts. Rows never go through Arrow, which pads ragged dicts and loses tuples."""

    def collate(numbers: list[dict[str, int]]) -> list[dict[str, Any]]:
        return [{"prompt": task.train[number["row"]]["prompt"], **number} for number in numbers]

    return collate


def _judge(task: Task, role: Literal["reward", "oracle", "detector"]) -> Callable[..., list[float]]:
    """A task's function in TRL's signature, with checked results. It gets the task's own rows, as in an evaluation."""

    def judge(prompts: list[Any], completions: list[Any], row: list[int], **_: Any) -> list[float]:
        rows = [task.train[number] for number in row]
        return task.ask(role, prompts, completions, {name: [each[name] for each in rows] for name in task.columns})

    judge.__name__ = role
    return judge


def _describe(
    trainer: RoutedGRPOTrainer, config: TrainConfig, folder: RunFolder, rows: dict[str, Any], *, resume: bool
) -> None:
    """Write ``run.json``; for a resumed run, check that the base model is unchanged."""
    digest = base_fingerprint(trainer.model)
    if resume:
        before = folder.read_run()["base"]["fingerprint"]
        if before != digest:
            raise ValueError(
                f"{config.model} has changed since {folder.root} began: restore those weights to continue."
            )
        return
    facts = run_facts(trainer, config.model, digest, task=config.task, method=config.method)
    name = f"{folder.root.resolve().name}-{secrets.token_hex(3)}"  # reporters merge runs of the same name
    write_json(folder.run, {"name": name, **facts, **rows})
