"""The options of `antipasto train`, defined in one place. Imports no torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from antipasto.app.run_folder import write_yaml
from antipasto.names import MODES, THRESHOLD, By, Dtype, Method
from antipasto.options import check_bounds, check_finite, check_types, near

CONTROLS = ("random", "permuted")
ROUTING, ADAPTER, DATA = "Routing", "Adapter", "Data"
"""Groups of options in ``--help``."""


def _option(default: Any, said: str, **typed: Any) -> Any:
    """Define an option as a dataclass field.

    Args:
        default: its default.
        said: its help text.
        typed: ``min`` and ``max``, also checked for values from files; ``type``, if the command line takes another type;
            ``metavar``, ``show_default`` and ``rich_help_panel`` of `typer.Option`.
    """
    return dataclasses.field(default=default, metadata={"help": said, **typed})


def _routing(default: Any, said: str, **typed: Any) -> Any:
    return _option(default, said, rich_help_panel=ROUTING, **typed)


def _adapter(default: Any, said: str, **typed: Any) -> Any:
    return _option(default, said, rich_help_panel=ADAPTER, **typed)


def _data(default: Any, said: str, **typed: Any) -> Any:
    return _option(default, said, rich_help_panel=DATA, **typed)


@dataclasses.dataclass
class TrainConfig:
    """The options of a run, as `antipasto train` takes them and ``config.yaml`` stores them.

    ``antipasto train --help`` and docs/cli.md describe each. ``trainer`` holds other options of `trl.GRPOConfig`, by name.

    Raises:
        ValueError: an option has the wrong type, is out of bounds, or contradicts another.

    Example:
        >>> TrainConfig("smollm2", "addition", steps=0)
        Traceback (most recent call last):
        ...
        ValueError: steps must be at least 1, got 0.
    """

    model: str
    task: str
    method: Method = _routing(
        "penalty", "What to do with rollouts, or with parts of an update, that look like the exploit."
    )
    by: By | None = _routing(
        None,
        "How to recognize them: a monitor's score, the task's detector, or a direction.",
        show_default="score if there are pairs, else detector; direction with route, erase and measure",
    )
    false_alarms: float | None = _routing(
        None,
        "With --by score: share of the base model's own answers that may be flagged.",
        show_default="a threshold between held-out hacks and clean texts",
    )
    pairs: str | None = _routing(
        None, "Labelled pairs for the monitor or the direction.", metavar="FILE", show_default="the task's"
    )
    direction: str | None = _routing(None, "A saved direction, instead of pairs.", metavar="FILE")
    threshold: float | None = _routing(
        None, "Effect size above which a coordinate is routed.", show_default=str(THRESHOLD)
    )
    controls: tuple[str, ...] = _routing(
        CONTROLS, "Control directions: each records what it would have moved; or none.", type=str, metavar="NAMES"
    )
    deploy_fraction: float | None = _routing(
        None, "Share of rollouts sampled from the deployed policy.", min=0, max=1, show_default="0.5 with route"
    )
    rank: int | None = _adapter(None, "Number of top singular directions per layer.", min=1, show_default="all")
    target_modules: list[str] | str | None = _adapter(
        None,
        "Layers to adapt: comma-separated names, 'all-linear', or a regular expression.",
        type=str,
        metavar="NAMES",
        show_default="known names",
    )
    exclude_modules: list[str] | None = _adapter(
        None, "Layers of these not to adapt.", type=str, metavar="NAMES", show_default="none"
    )
    cache_dir: str | None = _adapter(
        "auto", "Cache folder of singular bases.", metavar="DIR", show_default="$ANTIPASTO_CACHE or the user's"
    )
    dtype: Dtype = _adapter("auto", "Dtype of the weights; 'auto' as saved. Each dtype has its own bases.")
    dataset: str | None = _data(
        None,
        "Rows instead of the task's: a .jsonl, .json, .csv or .parquet file, a folder, or a name on the hub, as owner/name "
        "or owner/name:configuration.",
        metavar="SOURCE",
        show_default="the task's",
    )
    columns: dict[str, str] | None = _data(
        None,
        "Columns to rename. prompt=question: what the task calls prompt is the dataset's column question.",
        type=str,
        metavar="NAME=COLUMN,...",
        show_default="none",
    )
    dataset_train_split: str | None = _data(
        None, "Split to train on, or a part of one: train[:1000].", metavar="SPLIT", show_default="train"
    )
    dataset_test_split: str | None = _data(
        None,
        "Held-out split.",
        metavar="SPLIT",
        show_default="test, if any; else a tenth of the training prompts, at most 500",
    )
    steps: int = _option(100, "Optimizer steps.", min=1)
    prompts: int = _option(4, "Prompts per step.", min=1)
    generations: int = _option(8, "Rollouts per prompt.", min=2)
    micro_batch: int | None = _option(
        None,
        "Rollouts, or texts of pairs, per forward and process. Lower it if memory runs out.",
        min=1,
        show_default="all of a step",
    )
    learning_rate: float = _option(1e-2, "Learning rate.", min=0)
    beta: float = _option(0.0, "Weight of the KL to the reference.", min=0)
    temperature: float = _option(1.0, "Sampling temperature.")
    max_completion_length: int | None = _option(
        None, "Maximum tokens of an answer.", min=1, show_default="the task's, or 256"
    )
    seed: int = _option(0, "Seed of everything random.", min=0)
    save_every: int = _option(25, "Steps between checkpoints.", min=1)
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.controls, list):  # YAML has no tuples
            self.controls = tuple(self.controls)
        check_types(self)
        check_finite(self)
        check_bounds(self)
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}.")
        if self.pairs is not None and self.direction is not None:
            raise ValueError("Give pairs or a direction, not both.")
        if unknown := sorted(set(self.controls) - set(CONTROLS)):
            raise ValueError(f"controls must be among {', '.join(CONTROLS)}, got {', '.join(unknown)}.")
        for name in ("columns", "dataset_train_split", "dataset_test_split"):
            if self.dataset is None and getattr(self, name) is not None:
                raise ValueError(f"{name} is for a dataset: give that too, or leave it out.")
        self._check_gate()

    def _check_gate(self) -> None:
        """Check that the options of the method fit together."""
        choices: dict[str, tuple[By, ...]] = dict.fromkeys(("plain", "discount"), ("score",))
        choices |= dict.fromkeys(MODES, ("direction",))
        possible = choices.get(self.method, ("score", "detector"))
        if self.by is not None and self.by not in possible:
            raise ValueError(f"method {self.method} takes by={' or '.join(possible)}, got by={self.by}.")
        if self.false_alarms is not None and self.by not in (None, "score"):
            raise ValueError(f"false_alarms={self.false_alarms} works only with by=score, got by={self.by}.")
        if self.false_alarms is not None and not 0 < self.false_alarms < 1:
            raise ValueError(f"false_alarms must be above 0 and below 1, got {self.false_alarms}.")
        if self.method != "route" and self.deploy_fraction:
            raise ValueError(f"deploy_fraction works only with method=route: {self.method} has no quarantine.")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], where: str) -> TrainConfig:
        """Make a config from options by name. A list may be given as a comma-separated text.

        Args:
            options: values by name.
            where: they come from, for messages.

        Raises:
            ValueError: an option is unknown, invalid or missing.

        Example:
            >>> options = {"model": "m", "task": "addition", "controls": "none", "target_modules": "q_proj, v_proj"}
            >>> made = TrainConfig.from_mapping(options, "here")
            >>> made.controls, made.target_modules
            ((), ['q_proj', 'v_proj'])
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise ValueError(f"{where}: there is no option {name!r}{near(str(name), names)}")
        for name in ("model", "task"):
            if options.get(name) is None:
                raise ValueError(f"{where}: {name} is missing.")
        try:
            return cls(**{name: _read(name, value) for name, value in options.items()})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def to_yaml(self) -> str:
        """The contents of ``config.yaml``."""
        values = {**dataclasses.asdict(self), "controls": list(self.controls)}
        return write_yaml(values)


def _read(name: str, value: Any) -> Any:
    """Parse an option that holds several names; leave others as they are."""
    if not isinstance(value, str):
        return value
    if name == "controls":
        return () if value.strip() in ("", "none") else tuple(names_of(name, value))
    if name == "target_modules":
        return targets_of(value)
    if name == "columns":
        return columns_of(value)
    return names_of(name, value) if name == "exclude_modules" else value


def names_of(option: str, text: str) -> list[str]:
    """Parse comma-separated names.

    Raises:
        ValueError: a name is empty.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"{option} takes comma-separated names, got {text!r}.")
    return names


def columns_of(text: str) -> dict[str, str]:
    """Parse columns to rename.

    Raises:
        ValueError: one is not NAME=COLUMN, or a name is there twice.

    Example:
        >>> columns_of("prompt=question, answer=solution")
        {'prompt': 'question', 'answer': 'solution'}
    """
    parts = [[word.strip() for word in part.split("=", 1)] for part in names_of("columns", text)]
    if not all(len(part) == 2 and all(part) for part in parts) or len({part[0] for part in parts}) < len(parts):
        raise ValueError(f"columns takes NAME=COLUMN, separated by commas, each NAME once, got {text!r}.")
    return dict(parts)


def targets_of(text: str, option: str = "target_modules") -> list[str] | str:
    """Parse the layers to adapt: comma-separated names, or as PEFT takes it, ``all-linear`` or a regular expression.

    Example:
        >>> targets_of("q_proj,v_proj"), targets_of("all-linear"), targets_of(".*(q|v)_proj")
        (['q_proj', 'v_proj'], 'all-linear', '.*(q|v)_proj')
    """
    if text == "all-linear" or re.search(r"[^\w., -]", text):
        return text
    return names_of(option, text)
