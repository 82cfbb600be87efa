"""`antipasto watch` as a command: run the job and print the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from antipasto.app.watch.compare import comparison_table
from antipasto.app.watch.job import watch
from antipasto.app.watch.result import Watched
from antipasto.terminal import add_row, say


def run(base: str, rollouts: Sequence[str | Path], console: Console, **options: Any) -> float:
    """Call `watch` and print the result.

    Returns:
        The share above the threshold in the last window.
    """
    watched = watch(base, rollouts, console=console, **options)
    console.print(_table(watched))
    for note in watched.index.notes:
        console.print(note, highlight=False, markup=False)
    if watched.comparison is not None:
        console.print(comparison_table(watched.comparison))
    say(console, f"page: {watched.page}")
    return watched.windows[-1].above.value


def _table(watched: Watched) -> Table:
    number = f"{len(watched.index):,} rollouts" + (", a sample" if watched.facts["sample"] is not None else "")
    title = f"{number}, threshold {watched.monitor.threshold:.3f}"
    table = Table("steps", "share above [95%]", "rollouts", title=title, title_justify="left")
    for window in watched.windows:
        add_row(table, f"{window.first}–{window.last}", window.above, f"{window.above.total:,}")
    table.caption = Text(
        f"onset of a rise: {'none found' if watched.onset is None else watched.onset}", "table.caption"
    )
    table.caption_justify = "left"
    return table
