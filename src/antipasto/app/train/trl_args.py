"""Make TRL's `GRPOConfig` from `TrainConfig`: own options, and all others under TRL's names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser
from transformers.integrations import get_available_reporting_integrations

from antipasto.app.train.config import TrainConfig
from antipasto.names import MODES
from antipasto.options import near
from antipasto.tasks import Task
from antipasto.trl import GRPOConfig

_OURS = {  # GRPOConfig's name → our option for the same thing
    "output_dir": "out",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "per_device_train_batch_size": "prompts, generations and micro_batch",
    "gradient_accumulation_steps": "prompts, generations and micro_batch",
    "num_generations": "generations",
    "learning_rate": "learning_rate",
    "beta": "beta",
    "temperature": "temperature",
    "max_completion_length": "max_completion_length",
    "seed": "seed",
    "save_steps": "save_every",
    "resume_from_checkpoint": "resume",
    "model_init_kwargs": "dtype",
    "trust_remote_code": "a model that transformers supports itself, since custom code is never run",
}


def trainer_args(config: TrainConfig, task: Task, out: Path, processes: int) -> GRPOConfig:
    """Make TRL's config of a run.

    Raises:
        ValueError: GRPOConfig has no such name or value, the name has an option of its own, DeepSpeed's stage or
            dtype excludes the method, or the batch does not divide into micro-batches and processes.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig) if field.init}
    names = list(defaults)
    for name, value in config.trainer.items():
        if name in _OURS:
            raise ValueError(f"--trainer.{name} cannot be set: use {_OURS[name]}.")
        if name not in names:
            raise ValueError(f"--trainer.{name}: TRL's GRPOConfig has no {name!r}{near(name, names)}")
        if value is None and defaults[name] is not None:
            raise ValueError(
                f"--trainer.{name} has no value: it would be {defaults[name]}, which leaving it out means too."
            )
    rollouts = config.prompts * config.generations
    micro_batch = config.micro_batch or max(1, rollouts // processes)
    if rollouts % (micro_batch * processes):
        raise ValueError(
            f"A step has {config.prompts} prompts x {config.generations} generations = {rollouts} rollouts, which do not "
            f"divide into micro-batches of {micro_batch} on {processes} process(es): change one of them."
        )
    options = {
        "output_dir": str(out),
        "max_steps": config.steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": rollouts // (micro_batch * processes),
        "num_generations": config.generations,
        "learning_rate": config.learning_rate,
        "beta": config.beta,
        "temperature": config.temperature,
        "max_completion_length": config.max_completion_length or task.max_completion_length or 256,
        "seed": config.seed,
        "save_strategy": "steps",
        "save_steps": config.save_every,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": "none",
        "project": "antipasto",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **config.trainer,
    }
    reporters = options["report_to"]
    if isinstance(reporters, list):  # the parser would take only the first
        options["report_to"] = "none"
    args = _parse(options)
    if isinstance(reporters, list):
        args.report_to = reporters
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        raise ValueError(
            "An adapter cannot be made under DeepSpeed's ZeRO-3, which loads weights in parts: use ZeRO-1, ZeRO-2 or FSDP2."
        )
    if args.deepspeed_plugin is not None and config.method in MODES and (args.bf16 or args.fp16):
        raise ValueError(
            f"method {config.method} needs knobs in fp32, and DeepSpeed would cast them: use --trainer.bf16 false (true is "
            "the default on a GPU) and no --trainer.fp16. --dtype bfloat16 keeps the base in bf16."
        )
    if args.remove_unused_columns:
        raise ValueError("--trainer.remove_unused_columns must be false: the task's functions need their rows.")
    if args.save_only_model:
        raise ValueError(
            "--trainer.save_only_model must be false: --resume needs the optimizer and the random generators."
        )
    _check_reporters(args.report_to)
    cycle, update = args.steps_per_generation * args.num_iterations, args.gradient_accumulation_steps
    if cycle % update and update % cycle:
        raise ValueError(
            f"One generation is for {cycle} micro-batches (steps_per_generation x num_iterations), and a step takes {update}: "
            "one must divide the other, since a run can be resumed only between generations."
        )
    if config.save_every % steps_per_cycle(args):
        raise ValueError(
            f"save_every must be a multiple of {steps_per_cycle(args)}, got {config.save_every}: so many steps train on one "
            "generation (num_iterations, steps_per_generation), and a run can be resumed only between generations."
        )
    if len(task.train) < (prompts := args.generation_batch_size // args.num_generations):
        raise ValueError(
            f"Task {task.name!r} has {len(task.train)} training rows, fewer than one generation takes ({prompts}): lower "
            "prompts."
        )
    return args


def _check_reporters(names: list[str]) -> None:
    there = get_available_reporting_integrations()
    for name in names:
        if name not in there:
            raise ValueError(
                f"--trainer.report_to {name}: transformers has no such reporter, or its package is not installed. Installed: "
                f"{', '.join(there) or 'none'}; pip install 'antipasto[monitor]' adds tensorboard and trackio."
            )


def steps_per_cycle(args: GRPOConfig) -> int:
    """Number of optimizer steps that train on one generation."""
    return max(1, args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps)


def _word(value: Any) -> str:
    """A value as typed on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parse(options: Mapping[str, Any]) -> GRPOConfig:
    parser = HfArgumentParser(GRPOConfig)

    def refuse(message: str) -> None:
        raise ValueError(message)

    parser.error = refuse
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(_word, value)]
        elif value is not None:
            words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else _word(value)]
    try:
        (args,) = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except (ValueError, TypeError) as error:  # GRPOConfig checks its options when it is created
        raise ValueError(f"--trainer: {error}") from error
    return args
