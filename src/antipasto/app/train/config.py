"""The options of `antipasto train`, defined in one place. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from antipasto.app.options import AdapterOptions, adapter_option, names_of, option, options_of
from antipasto.app.run_folder import write_yaml
from antipasto.names import MODES, THRESHOLD, By, Method

if TYPE_CHECKING:
    from antipasto.adapter import AntiPastoConfig

CONTROLS = ("random", "permuted")


def _routing(default: Any, said: str, **typed: Any) -> Any:
    return option(default, said, rich_help_panel="Routing", **typed)


def _data(default: Any, said: str, **typed: Any) -> Any:
    return option(default, said, rich_help_panel="Data", **typed)


@dataclasses.dataclass
class TrainConfig(AdapterOptions):
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
    steps: int = option(100, "Optimizer steps.", min=1)
    prompts: int = option(4, "Prompts per step.", min=1)
    generations: int = option(8, "Rollouts per prompt.", min=2)
    micro_batch: int | None = option(
        None,
        "Rollouts, or texts of pairs, per forward and process. Lower it if memory runs out.",
        min=1,
        show_default="all of a step",
    )
    learning_rate: float = option(1e-2, "Learning rate.", min=0)
    beta: float = option(0.0, "Weight of the KL to the reference.", min=0)
    temperature: float = option(1.0, "Sampling temperature.")
    max_completion_length: int | None = option(
        None, "Maximum tokens of an answer.", min=1, show_default="the task's, or 256"
    )
    save_basis: bool = adapter_option(
        False, "Save the singular basis with the adapter, as its parameters: FSDP2 then divides it among the processes."
    )
    seed: int = option(0, "Seed of everything random.", min=0)
    save_every: int = option(25, "Steps between checkpoints.", min=1)
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.controls, list):  # YAML has no tuples
            self.controls = tuple(self.controls)
        super().__post_init__()
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
    def read(cls, name: str, value: Any) -> Any:
        """As `AdapterOptions.read`, and the control directions and columns.

        Example:
            >>> options = {"model": "m", "task": "addition", "controls": "none", "target_modules": "q_proj, v_proj"}
            >>> made = TrainConfig.from_mapping(options, "here")
            >>> made.controls, made.target_modules
            ((), ['q_proj', 'v_proj'])
        """
        if name == "controls" and isinstance(value, str):
            return () if value.strip() in ("", "none") else tuple(names_of(name, value))
        if name == "columns" and isinstance(value, str):
            return columns_of(value)
        return super().read(name, value)

    def adapter(self) -> AntiPastoConfig:
        """As `AdapterOptions.adapter`, with ``save_basis``."""
        config = super().adapter()
        config.save_basis = self.save_basis
        return config

    def to_yaml(self) -> str:
        """The contents of ``config.yaml``."""
        values = {**dataclasses.asdict(self), "controls": list(self.controls)}
        return write_yaml({name: values[name] for name in options_of(type(self))})


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
