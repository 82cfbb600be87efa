"""The options of `antipasto watch`. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from antipasto.app.options import AdapterOptions, option


def _column(default: str | None, said: str, shown: str | None = None) -> Any:
    rest = {} if shown is None else {"show_default": shown}
    return option(default, said, metavar="NAME", rich_help_panel="Columns of the files", **rest)


@dataclasses.dataclass(kw_only=True)
class WatchConfig(AdapterOptions):
    """How to read rollouts and score them. ``antipasto watch --help`` and docs/cli.md describe each option.

    A column that is named must exist; one that is None is optional.

    Raises:
        ValueError: an option has the wrong type or is out of bounds.

    Example:
        >>> WatchConfig(sample=0)
        Traceback (most recent call last):
        ...
        ValueError: sample must be at least 1, got 0.
    """

    windows: int = option(4, "Number of equal windows of steps to report shares and AUCs for.", min=1)
    threshold: float | None = option(None, "Threshold of the score.", show_default="the monitor's")
    sample: int | None = option(None, "Maximum rollouts to score per window.", min=1, show_default="all")
    seed: int = option(0, "Seed of --sample and of the split of the pairs.", min=0)
    batch_size: int = option(32, "Rollouts, or texts of pairs, per backward. Lower it if memory runs out.", min=1)
    prompt_column: str = _column("prompt", "Prompt: a text or a chat. a.b is field b of an object a.")
    completion_column: str = _column("completion", "Completion: a text or messages.")
    step_column: str | None = _column(None, "Step: a number.", "step, if any")
    label_column: str | None = _column(None, "Label: 1 for an exploit, 0 for none.", "from reward and oracle")
    reward_column: str | None = _column(None, "Reward: a number.", "reward, if any")
    oracle_column: str | None = _column(None, "Oracle, the strict truth: 1 for solved.", "oracle, if any")
    max_tokens: int | None = option(
        None,
        "Treat completions of this many tokens as cut off, unless their file says otherwise.",
        min=1,
        show_default="none is cut off",
        rich_help_panel="Columns of the files",
    )
