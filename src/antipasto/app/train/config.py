"""The options of `antipasto train`, defined in one place. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from antipasto.app.options import AdapterOptions, names_of, option, options_of
from antipasto.app.run_folder import write_yaml
from antipasto.names import MODES, THRESHOLD, By, Method

CONTROLS = ("random", "permuted")


def _routing(default: Any, said: str, **typed: Any) -> Any:
    return option(default, said, rich_help_panel="Routing", **typed)


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
        """As `AdapterOptions.read`, and the control directions.

        Example:
            >>> options = {"model": "m", "task": "addition", "controls": "none", "target_modules": "q_proj, v_proj"}
            >>> made = TrainConfig.from_mapping(options, "here")
            >>> made.controls, made.target_modules
            ((), ['q_proj', 'v_proj'])
        """
        if name == "controls" and isinstance(value, str):
            return () if value.strip() in ("", "none") else tuple(names_of(name, value))
        return super().read(name, value)

    def to_yaml(self) -> str:
        """The contents of ``config.yaml``."""
        values = {**dataclasses.asdict(self), "controls": list(self.controls)}
        return write_yaml({name: values[name] for name in options_of(type(self))})
