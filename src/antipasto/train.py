"""`antipasto train`: any causal LM, any `Task`, TRL's GRPO, routed. Parse → config → `run`.

method    what becomes of what the gate claims                         gates by
plain     nothing is claimed
route     it fills the quarantine, which is deleted at deployment      direction, detector or both
erase     it is dropped                                                direction, detector or both
measure   nothing is moved, books are kept                             direction
penalty   flagged rollouts get reward 0                                detector
drop      nobody learns from flagged rollouts                          detector
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from rich.console import Console
from torch import nn
from transformers import HfArgumentParser, PrinterCallback

import antipasto as ap
from antipasto.gates import GateName
from antipasto.models import base_fingerprint, load_model, process_state, quiet, with_template_options
from antipasto.pairs import split_pairs
from antipasto.run_folder import COMPLETE, RunFolder, write_json, write_text
from antipasto.tasks import Task, load_task
from antipasto.trl import (
    CompleteCheckpoints,
    GRPOConfig,
    Interrupts,
    MetricsLog,
    ProgressBar,
    RoutedGRPOTrainer,
    RoutingCallback,
)
from antipasto.trl.advantages import deployed_positions
from antipasto.trl.trainer import DEPLOY_FRACTION

Method = Literal["plain", "route", "erase", "measure", "penalty", "drop"]
By = Literal["direction", "detector", "both"]
CONTROLS = ("random", "permuted")
T = TypeVar("T")
HELDOUT = 0.25  # share of the pairs that score the direction


@dataclasses.dataclass
class TrainConfig:
    """All that a run is made of; the options of `antipasto train`, and ``config.yaml``.

    Attributes:
        model: folder or hub name.
        task: as `antipasto.tasks.load_task` takes it.
        method: what becomes of what the gate claims.
        by: what the gate goes by; if None, the direction where there are pairs or a direction, else the detector.
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
        self.controls = tuple(self.controls)
        for name, allowed in (("method", get_args(Method)), ("by", (None, *get_args(By)))):
            if getattr(self, name) not in allowed:
                names = ", ".join(str(value) for value in allowed if value is not None)
                raise ValueError(f"{name} must be one of {names}, got {getattr(self, name)!r}.")
        if self.pairs is not None and self.direction is not None:
            raise ValueError("Give pairs or a direction, not both.")
        for name, kind in (
            ("steps", int),
            ("prompts", int),
            ("generations", int),
            ("seed", int),
            ("learning_rate", float),
        ):
            if not isinstance(getattr(self, name), (int, kind)) or isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}.")
        if self.method in ("plain", "penalty", "drop") and self.by is not None:
            raise ValueError(
                f"by={self.by} belongs to methods route, erase and measure; method {self.method} has no choice."
            )
        if self.method == "measure" and self.by not in (None, "direction"):
            raise ValueError("method measure goes by a direction.")
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
        return cls(**options)

    def to_yaml(self) -> str:
        """As ``config.yaml`` has it."""
        values = {**dataclasses.asdict(self), "controls": list(self.controls)}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


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
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **config.trainer,
    }
    args = _parse(options)
    if config.save_every % steps_per_cycle(args):
        raise ValueError(
            f"{steps_per_cycle(args)} steps learn from one generation (num_iterations, steps_per_generation), and a run can "
            f"be continued only between generations: save_every must be a multiple of that, not {config.save_every}."
        )
    if len(task.train) < config.prompts * steps_per_cycle(args):
        raise ValueError(f"Task {task.name!r} has {len(task.train)} training rows, fewer than one generation takes.")
    return args


def steps_per_cycle(args: GRPOConfig) -> int:
    """Optimizer steps that learn from one generation."""
    return max(1, args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps)


def _parse(options: Mapping[str, Any]) -> GRPOConfig:
    parser = HfArgumentParser(GRPOConfig)

    def refuse(message: str) -> None:
        raise ValueError(f"--trainer: {message}")

    parser.error = refuse
    words: list[str] = []
    for name, value in options.items():
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    (args,) = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    return args


def start(config: TrainConfig, out: Path | None, console: Console, *, resume: bool = False) -> Path | None:
    """`run`, in a folder that all processes agree on: ``runs/<task>-<time>`` unless there is one.

    Returns:
        The folder; None after Ctrl-C.
    """
    process_state()
    name = re.sub(r"\W+", "-", Path(config.task.rpartition(":")[0] or config.task).stem)
    default = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    (folder,) = broadcast_object_list([str(out or default)])
    return Path(folder) if run(config, Path(folder), console, resume=resume) else None


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(config: TrainConfig, out: Path, console: Console, *, resume: bool = False) -> bool:
    """Train; leave a run folder.

    Args:
        config: the run.
        out: its folder: new or empty, or, to resume, one that a run has left.
        console: where to print; the main process prints.
        resume: continue from the folder's latest checkpoint.

    Returns:
        Whether the run came to its end; False after Ctrl-C.

    Raises:
        ValueError: options, files, model or task that do not fit; says which.
    """
    state = process_state()
    folder = RunFolder(out)
    console.quiet = console.quiet or not state.is_main_process
    if resume and folder.is_finished:
        raise ValueError(f"The run in {out} came to its end: there is nothing to continue.")
    task = load_task(config.task)
    with quiet():
        args = trainer_args(config, task, out, state.num_processes)
    if resume and (before := folder.read_run()["processes"]) != state.num_processes:
        raise ValueError(
            f"The run in {out} began on {before} process(es): it cannot continue on {state.num_processes}."
        )
    how = _Gating(config, task, has_direction=resume and folder.direction.exists())
    model, tokenizer = load_model(config.model, dtype=config.dtype)
    with_template_options(tokenizer, args.chat_template_kwargs)
    if not resume:
        _on_main(state, folder.create)
    checkpoint = _on_main(state, folder.last_checkpoint) if resume else None
    with quiet():
        trainer = RoutedGRPOTrainer(
            model=model,
            args=args,
            reward_funcs=_judge(task, "reward"),
            train_dataset=Dataset.from_list([dict(row) for row in task.train]),
            processing_class=tokenizer,
            peft_config=_adapter(config),
            router=how.router(folder, tokenizer, state),
            detector=_judge(task, "detector") if how.uses_detector or how.watches else None,
            flagged=how.flagged,
            oracle=None if task.oracle is None else _judge(task, "oracle"),
            deploy_fraction=config.deploy_fraction,
            rollout_log=folder.rollouts,
        )
        trainer.remove_callback(PrinterCallback)
        _on_main(state, lambda: _describe(trainer, config, folder, resume=resume))
        trainer.callback_handler.callbacks.append(MetricsLog(folder.metrics))
        trainer.add_callback(CompleteCheckpoints())
        with Interrupts(console, steps_per_cycle(args)) as interrupts, ProgressBar(console, "training") as bar:
            trainer.add_callback(interrupts)
            trainer.add_callback(bar)
            if checkpoint is not None:
                console.print(f"continuing from {checkpoint}", highlight=False)
            _train(trainer, checkpoint)
        if interrupts.stopped:
            console.print(
                f"stopped after step {trainer.state.global_step} of {args.max_steps}, and saved. "
                f"Continue with: antipasto train --resume {out}",
                highlight=False,
                soft_wrap=True,
            )
            return False
        _finish(trainer, folder)
    state.wait_for_everyone()
    console.print(f"run folder: {out}\nnext: antipasto eval {out}", highlight=False, soft_wrap=True)
    return True


def _train(trainer: RoutedGRPOTrainer, checkpoint: Path | None) -> None:
    """Train, from a checkpoint if there is one; from that of the last step on, there is nothing left but to take it."""
    if checkpoint is None or int(checkpoint.name.rpartition("-")[2]) < trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return
    trainer._load_from_checkpoint(str(checkpoint))
    if trainer.router is not None:
        trainer.router.load(checkpoint / RoutingCallback.FILE)
    trainer.state.global_step = trainer.args.max_steps


class _Gating:
    """What a config and a task together say about direction, detector and router.

    Raises:
        ValueError: they do not fit together, or a file of pairs or a direction is bad.
    """

    def __init__(self, config: TrainConfig, task: Task, *, has_direction: bool) -> None:
        self.config, self.task = config, task
        method, by = config.method, config.by
        has_pairs = bool(config.pairs or config.direction or task.pairs)
        if method in ("route", "erase") and by is None:
            by = "direction" if has_pairs else "detector"
        self.uses_direction = method == "measure" or (method in ("route", "erase") and by in ("direction", "both"))
        self.uses_detector = method in ("penalty", "drop") or (
            method in ("route", "erase") and by in ("detector", "both")
        )
        if self.uses_direction and not has_pairs:
            raise ValueError(
                f"method {method} by {by} needs a direction: task {task.name!r} brings no pairs, so give --pairs."
            )
        if self.uses_detector and task.detector is None:
            raise ValueError(f"method {method} needs a detector, and task {task.name!r} has none.")
        self._refuse_unused()
        fraction = config.deploy_fraction
        if fraction is None:
            fraction = DEPLOY_FRACTION if method == "route" else 0.0
        deployed_positions(config.generations, fraction)
        if self.uses_direction and not has_direction:  # a bad file is better known of before the model is loaded
            if config.direction is not None:
                ap.Direction.load(config.direction)
            else:
                self._pairs()
        # a detector that nothing goes by is still worth a column in the logs
        self.watches = task.detector is not None and not self.uses_detector
        flagged: dict[str, Literal["penalty", "drop"]] = {"penalty": "penalty", "drop": "drop"}
        self.flagged: Literal["watch", "route", "penalty", "drop"] = (
            "watch" if self.watches else flagged.get(method, "route")
        )

    def _refuse_unused(self) -> None:
        """Options of a direction where there is none, or of its extraction where it comes from a file."""
        defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
        names: tuple[str, ...] = ("estimator", "k") if self.config.direction is not None else ()
        if not self.uses_direction:
            names = ("pairs", "direction", "threshold", "gate", "estimator", "k")
        for name in names:
            if getattr(self.config, name) != defaults[name]:
                why = "a direction's file is given" if self.uses_direction else "this run goes by no direction"
                raise ValueError(f"{name}={getattr(self.config, name)} does nothing here: {why}.")

    def _pairs(self) -> tuple[list[ap.ContrastPair], list[ap.ContrastPair]]:
        """To fit, and to hold out."""
        pairs = ap.load_pairs(self.config.pairs if self.config.pairs is not None else list(self.task.pairs or []))
        return split_pairs(pairs, HELDOUT, self.config.seed)

    def router(self, folder: RunFolder, tokenizer: Any, state: PartialState) -> Callable[[nn.Module], ap.Router] | None:
        """A function that makes the router of an adapted model; None where the method has none."""
        config = self.config
        if config.method not in ("route", "erase", "measure"):
            return None
        mode = config.method

        def make(model: nn.Module) -> ap.Router:
            if not self.uses_direction:
                return ap.Router(model, None, mode=mode)
            # one process extracts, and all read the same file
            _on_main(state, lambda: self._make_direction(model, tokenizer, folder.direction))
            v = ap.Direction.load(folder.direction)
            controls = {name: getattr(v, name)(config.seed) for name in config.controls}
            return ap.Router(model, v, mode=mode, gate=config.gate, threshold=config.threshold, controls=controls)

        return make

    def _make_direction(self, model: nn.Module, tokenizer: Any, path: Path) -> None:
        if path.exists():
            return
        if self.config.direction is not None:
            v = ap.Direction.load(self.config.direction)
        else:
            fit, heldout = self._pairs()
            model.eval()
            v = ap.extract_direction(
                model, tokenizer, fit, heldout=heldout, estimator=self.config.estimator, k=self.config.k
            )
            model.train()
        temporary = path.with_name(f".{path.name}.tmp")
        v.save(temporary)
        temporary.replace(path)


def _on_main(state: PartialState, function: Callable[[], T]) -> T:
    """Call on the main process; what it returns, or the error that it raises, comes to all."""
    result: list[Any] = [None, None]
    if state.is_main_process:
        try:
            result = [function(), None]
        except (ValueError, OSError) as error:
            if state.num_processes == 1:
                raise
            result = [None, f"{error}"]
    value, message = broadcast_object_list(result)
    if message is not None:
        raise ValueError(message)
    return value


def _adapter(config: TrainConfig) -> ap.AntiPastoConfig:
    adapter = ap.AntiPastoConfig(
        rank=config.rank, target_modules=config.target_modules, exclude_modules=config.exclude_modules
    )
    adapter.cache_dir = config.cache_dir
    return adapter


def _judge(task: Task, role: Literal["reward", "oracle", "detector"]) -> Callable[..., list[float]]:
    """One of a task's functions as TRL calls it, checked."""

    def judge(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        return task.ask(role, prompts, completions, {name: columns[name] for name in task.columns})

    judge.__name__ = role
    return judge


def _describe(trainer: RoutedGRPOTrainer, config: TrainConfig, folder: RunFolder, *, resume: bool) -> None:
    """Write config and facts; of a run that continues, check that it is the same base."""
    digest = base_fingerprint(trainer.model)
    if resume:
        before = folder.read_run()["base"]["fingerprint"]
        if before != digest:
            raise ValueError(
                f"{config.model} has other weights now than when {folder.root} began: it cannot be continued."
            )
        return
    write_text(folder.config, config.to_yaml())
    names = ("antipasto", "torch", "transformers", "peft", "trl")
    facts = {
        "command": " ".join(sys.argv),
        "versions": {name: version(name) for name in names},
        "base": {"model": config.model, "fingerprint": digest},
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "processes": trainer.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": str(trainer.accelerator.device),
    }
    write_json(folder.run, facts)


def _finish(trainer: RoutedGRPOTrainer, folder: RunFolder) -> None:
    """Adapter and books, where they are looked for."""
    trainer.save_model(str(folder.adapter))
    if trainer.accelerator.is_main_process:
        if trainer.router is not None:
            trainer.router.save(folder.books)
        write_json(folder.adapter / COMPLETE, {"step": trainer.state.global_step})
