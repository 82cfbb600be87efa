"""Print text from files and models safely: no markup, no control characters."""

from __future__ import annotations

import unicodedata
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


def plain(text: object) -> str:
    r"""Return the text on one line, with invisible characters escaped.

    These are control characters, line breaks, bidirectional marks and lone surrogates.

    Example:
        >>> print(plain("a\nb \x1b[31mred"))
        a\nb \x1b[31mred
    """
    return "".join(
        ch.encode("unicode_escape").decode() if unicodedata.category(ch) in _ACTED_ON else ch for ch in str(text)
    )


_ACTED_ON = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def shorten(text: object, width: int) -> str:
    """Apply `plain` and cut the middle out of a text longer than ``width``.

    Example:
        >>> shorten("abcdefghij", 7)
        'abc…hij'
    """
    # cut first: a text may be very long, and a character never becomes shorter
    raw = str(text)
    whole = plain(raw if len(raw) <= 2 * width else raw[:width] + "…" + raw[-width:])
    if len(whole) <= width:
        return whole
    head = width // 2
    return f"{whole[:head]}…{whole[len(whole) - (width - 1 - head) :]}"


def add_row(table: Table, *cells: object) -> None:
    """Add a row whose cells are printed literally: no markup, no control characters."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(plain(cell)) for cell in cells))


def is_live(console: Console) -> bool:
    """Whether printed text can be overwritten. False for a file, a log or a dumb terminal."""
    return console.is_terminal and not console.is_dumb_terminal


def doing(console: Console, what: str) -> AbstractContextManager[object]:
    """Show what is running: a spinner on a terminal, one line in a log."""
    text = Text(plain(what))
    if is_live(console):
        return console.status(text)
    console.print(text, soft_wrap=True)
    return nullcontext()


def progress_bar(console: Console) -> Progress:
    """A progress bar that disappears when done. Disabled where the output is not a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(
        *columns,
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not is_live(console),
    )


def say(console: Console, *lines: str) -> None:
    """Print lines literally: no markup, no emoji codes, no control characters."""
    console.print(Text("\n".join(map(plain, lines))), soft_wrap=True)
