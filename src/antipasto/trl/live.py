"""Live view of a training run: progress, remaining time, and the course of its metrics.

    training, seed 0 ━━━━━━━━━━━━━╺━━━━━━━━━━━━━━━━━━━  65/160  0:00:24 left 0:00:36
    reward        0.789  ▅▆▆▆▆▇▇▇▇▇▇▇█████
      deployed    0.766  ▆▆▆▆▆▇▇▇▇▇▇██████
    exploit       0.148  ▁▁▁▁▁▁▂▂▂▂▂▂▂▂▂▂▂
    hack-ward     0.078  ▃▃▄▆▆▅▄▅▅█▅▅▃▆▆▆▄  chance 0.052

Each line of blocks covers the whole run; if there are more values than blocks, each block is a mean. Shares are drawn on a
scale from 0 to 1, other metrics from min(0, smallest value) to the largest value. At the end, one line remains.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import timedelta
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from antipasto.terminal import is_live

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.,-=+*#"
CELLS = 24  # blocks per line, at most: with a name, a value and a note the line fits into 60 columns
NARROW = 72  # columns; in narrower terminals, the final output takes two lines
REFRESHES = 4.0  # per second
ESTIMATE_OVER = 24 * 3600.0  # seconds of steps that the remaining time is estimated from: a step may take minutes
RATE_OVER = 10  # number of logged rows over which tokens per second are averaged
TOKENS_PER_SECOND = "tokens/s"  # computed here; not a logged metric


class Row(NamedTuple):
    """A row of the view, shown if its metric is logged.

    Attributes:
        label: the row's label.
        metric: name of the logged metric.
        is_share: whether to draw the values on a scale from 0 to 1.
        chance: name of the metric with the chance level.
    """

    label: str
    metric: str
    is_share: bool = False
    chance: str | None = None


ROWS = (
    Row("reward", "reward"),
    Row("  trained", "reward/trained"),
    Row("  deployed", "reward/deployed"),
    Row("exploit", "exploit", is_share=True),
    Row("  trained", "exploit/trained", is_share=True),
    Row("  deployed", "exploit/deployed", is_share=True),
    Row("oracle", "oracle", is_share=True),
    Row("hack-ward", "routing/hackward_in", chance="routing/hackward_in_random"),
    Row("KL", "kl"),
    Row("flagged", "flagged", is_share=True),
    Row(TOKENS_PER_SECOND, TOKENS_PER_SECOND),
)
LINE = ("reward", "oracle", "exploit", "flagged", "kl")  # metrics in each line if the output is not a terminal


class ProgressBar(TrainerCallback):
    """Shows a run in a terminal while it trains.

    It is also a context manager: on exit, also after an exception, it releases the terminal and leaves one line there. If
    the output is not a terminal, or a dumb one, it prints a line for each logged row.

    Args:
        console: where to print; a quiet console shows nothing.
        description: label of the run.
    """

    def __init__(self, console: Console, description: str) -> None:
        self._console = console
        self._progress = _Panel(console, description)
        self._task = self._progress.add_task(description, total=None, said="")
        self._said = ""  # the metrics in the line that remains
        self._tokens: deque[tuple[float, float]] = deque(maxlen=RATE_OVER + 1)  # (time, tokens so far)

    def __enter__(self) -> ProgressBar:
        if not self._console.quiet:  # otherwise it would capture the output of a process that shows nothing
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._console.width >= NARROW:
            self._progress.update(self._task, said=self._said)
        self._progress.left = self._said
        self._progress.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock. In a resumed run, earlier steps do not count for the speed."""
        self._progress.reset(self._task, total=state.max_steps, completed=state.global_step)
        self._tokens.append((time.monotonic(), float(state.num_input_tokens_seen)))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "reward" not in logs:
            return
        # None: TRL had no number, for example where no reward function gave one
        logs = {name: math.nan if value is None else value for name, value in {**logs, **self._rate(logs)}.items()}
        self._progress.show(logs)
        self._said = f"reward {logs['reward']:.2f}" + (f"  KL {logs['kl']:.3f}" if "kl" in logs else "")
        if not self._progress.is_live:
            said = [f"{name} {logs[name]:.3f}" for name in LINE if name in logs]
            said += [f"{logs[TOKENS_PER_SECOND]:,.0f} {TOKENS_PER_SECOND}"] if TOKENS_PER_SECOND in logs else []
            left = self._progress.tasks[0].time_remaining
            said += [f"left {timedelta(seconds=round(left))}"] if left is not None else []
            line = f"step {state.global_step}/{state.max_steps}  {'  '.join(said)}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def _rate(self, logs: dict[str, float]) -> dict[str, float]:
        """Tokens per second, of prompts and completions, over the last logged rows."""
        if "num_tokens" not in logs or not self._tokens:
            return {}
        self._tokens.append((time.monotonic(), logs["num_tokens"]))
        (began, before), (now, after) = self._tokens[0], self._tokens[-1]
        return {TOKENS_PER_SECOND: (after - before) / max(now - began, 1e-9)}


class _Panel(Progress):
    """The progress line, with the metrics' rows below it until the run ends.

    Attributes:
        left: text that replaces the rows at the end; None before.
        is_live: whether the console can be overwritten.
    """

    def __init__(self, console: Console, description: str) -> None:
        self.left: str | None = None
        self.is_live = is_live(console)
        self._blocks = ASCII_BLOCKS if console.options.ascii_only else BLOCKS
        self._values: dict[str, list[float]] = {}  # all that were logged
        self._rows: Text | None = None
        super().__init__(
            TextColumn(description),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=REFRESHES,
            speed_estimate_period=ESTIMATE_OVER,
        )

    def show(self, logs: dict[str, float]) -> None:
        for name in {row.metric for row in ROWS} | {row.chance for row in ROWS if row.chance}:
            if name in logs:
                self._values.setdefault(name, []).append(logs[name])
        lines = [self._line(row, self._values[row.metric]) for row in ROWS if row.metric in self._values]
        self._rows = Text("\n".join(lines), no_wrap=True, overflow="crop")

    def _line(self, row: Row, values: Sequence[float]) -> str:
        means = cells([value for value in values if math.isfinite(value)])
        blocks = sparkline(means, (0.0, 1.0) if row.is_share else None, self._blocks)
        chance = self._values.get(row.chance or "")
        note = "" if chance is None else f"  chance {_number(chance[-1])}"
        return f"{row.label:<10}{_number(values[-1]):>9}  {blocks}{note}"

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.left is None and self._rows is not None:
            yield self._rows
        elif self.left and not self.tasks[0].fields["said"]:
            yield Text(self.left)


def _number(value: float) -> str:
    return f"{value:.3f}" if not abs(value) >= 100 else f"{value:,.0f}"


# ── the course of a metric ───────────────────────────────────────────────────────────────────────────────────────────


def cells(values: Sequence[float], size: int = CELLS) -> list[float]:
    """Means over equally many values each, a power of two, so that there are at most ``size``. The last may cover fewer.

    Example:
        >>> cells([1.0, 3.0, 5.0, 7.0, 9.0], size=4)
        [2.0, 6.0, 9.0]
    """
    each = 1
    while len(values) > each * size:
        each *= 2
    return [fmean(values[start : start + each]) for start in range(0, len(values), each)]


def sparkline(values: Sequence[float], bounds: tuple[float, float] | None = None, blocks: str = BLOCKS) -> str:
    """Draw one block per value; larger values get higher blocks.

    Args:
        values: finite numbers.
        bounds: values of the lowest and the highest block; if None, min(0, smallest value) and the largest value.
        blocks: characters, from the lowest block to the highest.

    Example:
        >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7])
        '▁▂▃▄▅▆▇█'
        >>> sparkline([0.0, 0.02], bounds=(0, 1))
        '▁▁'
    """
    low, high = bounds or (min(0.0, *values, 0.0), max(0.0, *values, 0.0))
    if high <= low:
        return blocks[0] * len(values)
    top = len(blocks) - 1
    return "".join(blocks[min(max(round((v - low) / (high - low) * top), 0), top)] for v in values)
