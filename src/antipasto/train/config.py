"""What a run is made of: options by name → `TrainConfig` → TRL's config."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import HfArgumentParser
from transformers.integrations import get_available_reporting_integrations

from antipasto.gates import GateName
from antipasto.options import check_finite, check_types
from antipasto.routing import Sharing
from antipasto.run_folder import write_yaml
from antipasto.tasks import Task
from antipasto.trl import (
    GRPOConfig,
)

Method = Literal["plain", "route", "erase", "measure", "penalty", "discount", "drop", "inoculate"]
By = Literal["direction", "detector", "both", "score"]
CONTROLS = ("random", "permuted")


@dataclasses.dataclass
class TrainConfig:
    """All that a run is made of; the options of `antipasto train`, and ``config.yaml``.

    Attributes:
        model: folder or hub name.
        task: as `antipasto.tasks.load_task` takes it.
        method: what becomes of what the gate claims.
        by: what the gate goes by; if None, the direction where there are pairs or a direction, else the detector. ``"score"``:
            a monitor made from the pairs flags rollouts by their score at the reference; under ``plain`` it only watches.
        false_alarms: with ``by="score"``, the share of the start's own answers that may be flagged; if None, the threshold is
            midway between held-out hacks and clean texts.
        sharing: ``"exclusive"``: flagged rollouts teach the quarantine, the others δS; ``"classic"``: the others teach both.
        pairs: JSON lines to extract the direction from; the task's own if None.
        direction: a direction's file, instead of pairs.
        estimator: of the direction.
        k: rows a layer of the direction.
        gate: of the direction.
        threshold: of the coordinate gate; 0.65 if None.
        controls: directions that keep books: ``random``, ``permuted``.
        deploy_fraction: share of rollouts of the deployed policy; if None, .5 where the method routes, else 0.
        rank: top singular directions of each layer; all if None.
        target_modules: layers to adapt; the known names if None.
        exclude_modules: layers to leave out of those.
        cache_dir: where bases are kept; ``"auto"``: the user's cache.
        dtype: of the base weights.
        steps: optimizer steps.
        prompts: prompts a step.
        generations: rollouts of each prompt.
        micro_batch: rollouts per forward and process; all of a step at once if None.
        learning_rate: of the knobs.
        beta: weight of the KL term.
        temperature: of sampling.
        max_completion_length: tokens; the task's own if None, else 256.
        seed: of everything.
        save_every: steps between checkpoints.
        trainer: anything else of `trl.GRPOConfig`, by name.
    """

    model: str
    task: str
    method: Method = "route"
    by: By | None = None
    false_alarms: float | None = None
    sharing: Sharing = "exclusive"
    pairs: str | None = None
    direction: str | None = None
    estimator: Literal["tstat", "mean", "svd"] = "tstat"
    k: int = 1
    gate: GateName = "coordinate"
    threshold: float | None = None
    controls: tuple[str, ...] = CONTROLS
    deploy_fraction: float | None = None
    rank: int | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | None = None
    cache_dir: str | None = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    steps: int = 100
    prompts: int = 4
    generations: int = 8
    micro_batch: int | None = None
    learning_rate: float = 1e-2
    beta: float = 0.0
    temperature: float = 1.0
    max_completion_length: int | None = None
    seed: int = 0
    save_every: int = 25
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.controls, list):  # YAML knows no tuples
            self.controls = tuple(self.controls)
        check_types(self)
        check_finite(self)
        if self.learning_rate < 0 or self.temperature <= 0:
            raise ValueError(
                f"learning_rate must be at least 0 and temperature above 0, got {self.learning_rate} and {self.temperature}."
            )
        if self.pairs is not None and self.direction is not None:
            raise ValueError("Give pairs or a direction, not both.")
        choices: dict[str, tuple[By, ...]] = {"plain": ("score",), "measure": ("direction",), "discount": ("score",)}
        choices["inoculate"] = ()
        choices |= dict.fromkeys(("penalty", "drop"), ("detector", "score"))
        possible = choices.get(self.method, get_args(By))
        if self.by is not None and self.by not in possible:
            raise ValueError(f"method {self.method} goes by {' or '.join(possible) or 'nothing'}, not by {self.by}.")
        if self.by == "score" and self.direction is not None:
            raise ValueError(
                "by=score makes its monitor from pairs, which calibrate it too: give pairs, not a direction."
            )
        if self.false_alarms is not None and self.by != "score":
            raise ValueError(f"false_alarms={self.false_alarms} belongs to by=score.")
        if self.false_alarms is not None and not 0 < self.false_alarms < 1:
            raise ValueError(f"false_alarms is a share in (0, 1), got {self.false_alarms}.")
        if self.sharing == "classic" and (self.method != "route" or self.by in (None, "direction")):
            raise ValueError("sharing=classic belongs to method route by score, detector or both.")
        if self.method != "route" and self.deploy_fraction:
            raise ValueError(f"deploy_fraction belongs to method route: under {self.method} there is no quarantine.")
        if unknown := sorted(set(self.controls) - set(CONTROLS)):
            raise ValueError(f"controls are {' and '.join(CONTROLS)}, got {', '.join(unknown)}.")
        for name in ("steps", "prompts", "generations", "save_every", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], where: str) -> TrainConfig:
        """A config from options by name.

        Raises:
            ValueError: an option that does not exist, or does not fit, or one that is missing.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise ValueError(f"{where}: there is no option {name!r}{_near(str(name), names)}")
        for name in ("model", "task"):
            if options.get(name) is None:
                raise ValueError(f"{where}: {name} is missing.")
        try:
            return cls(**options)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def to_yaml(self) -> str:
        """As ``config.yaml`` has it."""
        values = {**dataclasses.asdict(self), "controls": list(self.controls)}
        return write_yaml(values)


def _near(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


# ── config → TRL ─────────────────────────────────────────────────────────────────────────────────────────────────────

_OURS = {  # GRPOConfig's name → ours, where they are the same thing
    "output_dir": "out",
    "max_steps": "steps",
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
    "trust_remote_code": "a model that transformers knows: code that comes with one is never run",
}


def trainer_args(config: TrainConfig, task: Task, out: Path, processes: int) -> GRPOConfig:
    """TRL's config of a run.

    Raises:
        ValueError: a name or value that GRPOConfig does not know, one that has an option of its own, or a batch that does not
            divide among processes and micro-batches.
    """
    names = [field.name for field in dataclasses.fields(GRPOConfig) if field.init]
    for name in config.trainer:
        if name in _OURS:
            raise ValueError(f"--trainer.{name} has an option of its own here: use {_OURS[name]}.")
        if name not in names:
            raise ValueError(f"--trainer.{name}: TRL's GRPOConfig has no {name!r}{_near(name, names)}")
    rollouts = config.prompts * config.generations
    micro_batch = config.micro_batch or max(1, rollouts // processes)
    if rollouts % (micro_batch * processes):
        raise ValueError(
            f"A step of {config.prompts} prompts x {config.generations} rollouts is {rollouts}, which does not divide into "
            f"micro-batches of {micro_batch} on {processes} process(es)."
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
    if isinstance(reporters, list):  # the parser would take the first of them
        options["report_to"] = "none"
    args = _parse(options)
    if isinstance(reporters, list):
        args.report_to = reporters
    if args.remove_unused_columns:
        raise ValueError("--trainer.remove_unused_columns true would leave the task's functions without their rows.")
    _check_reporters(args.report_to)
    if config.save_every % steps_per_cycle(args):
        raise ValueError(
            f"{steps_per_cycle(args)} steps learn from one generation (num_iterations, steps_per_generation), and a run can "
            f"be continued only between generations: save_every must be a multiple of that, not {config.save_every}."
        )
    if len(task.train) < config.prompts * steps_per_cycle(args):
        raise ValueError(f"Task {task.name!r} has {len(task.train)} training rows, fewer than one generation takes.")
    return args


def _check_reporters(names: list[str]) -> None:
    there = get_available_reporting_integrations()
    for name in names:
        if name not in there:
            raise ValueError(
                f"--trainer.report_to {name}: transformers has no such reporter, or its package is not installed. Here there "
                f"is {', '.join(there) or 'none'}; pip install 'antipasto[monitor]' brings tensorboard and trackio."
            )


def steps_per_cycle(args: GRPOConfig) -> int:
    """Optimizer steps that learn from one generation."""
    return max(1, args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps)


def _word(value: Any) -> str:
    """A value as one types it."""
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
    except (ValueError, TypeError) as error:  # GRPOConfig checks its options where it is made
        raise ValueError(f"--trainer: {error}") from error
    return args
