"""What a run shows while it trains, on a terminal that is read back."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import signal
import struct
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import TrainerState

from antipasto.tasks import addition
from antipasto.trl import Interrupts, ProgressBar
from antipasto.trl.live import ASCII_BLOCKS, BLOCKS, CELLS, cells, sparkline

LOGS = {
    "reward": 0.5,
    "reward/trained": 0.75,
    "reward/deployed": 0.25,
    "exploit": 0.125,
    "oracle": 0.375,
    "routing/hackward_in": 0.25,
    "routing/hackward_in_random": 0.125,
    "kl": 0.0625,
    "flagged": 0.875,
    "num_tokens": 1000.0,
}


class Terminal:
    """A console whose output an emulator reads."""

    def __init__(self, width: int = 80, *, encoding: str = "utf-8", **options: Any) -> None:
        self.raw = io.BytesIO()
        file = io.TextIOWrapper(self.raw, encoding=encoding, newline="", write_through=True)
        self.console = Console(file=file, width=width, height=24, **{"force_terminal": True, **options})
        self.width = width

    def screen(self) -> pyte.Screen:
        screen = pyte.Screen(self.width, 24)
        screen.set_mode(pyte.modes.LNM)  # as a tty does, a new line begins at the left
        pyte.ByteStream(screen).feed(self.raw.getvalue())
        return screen

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen().display if line.strip()]


def log(bar: ProgressBar, state: TrainerState, **logs: float | None) -> None:
    """One step, as the Trainer tells it."""
    state.global_step += 1
    bar.on_step_end(None, state, None)  # type: ignore[arg-type]
    bar.on_log(None, state, None, logs)  # type: ignore[arg-type]
    bar._progress.refresh()


def begun(terminal: Terminal, *, steps: int = 40, at: int = 0) -> tuple[ProgressBar, TrainerState]:
    bar, state = ProgressBar(terminal.console, "training, seed 0"), TrainerState(max_steps=steps, global_step=at)
    bar.on_train_begin(None, state, None)  # type: ignore[arg-type]
    return bar, state


# ── in a terminal ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_metric_has_its_row_while_it_trains_and_one_line_stays(width: int) -> None:
    terminal = Terminal(width)
    bar, state = begun(terminal)
    with bar:
        for _ in range(CELLS):
            log(bar, state, **LOGS)
        head, *rows = terminal.lines()
        assert terminal.screen().cursor.hidden
    assert head.startswith("training, seed 0 ━")
    assert " 24/40 " in head
    assert " left 0:00:0" in head
    words = [row.split() for row in rows]
    assert [c[:2] for c in words[:9]] == [
        ["reward", "0.500"],
        ["trained", "0.750"],
        ["deployed", "0.250"],
        ["exploit", "0.125"],
        ["oracle", "0.375"],
        ["hack-ward", "0.250"],
        ["KL", "0.062"],
        ["flagged", "0.875"],
        ["tokens/s", "0.000"],  # the count did not move
    ]
    assert words[5][3:] == ["chance", "0.125"]
    assert all(len(c[2]) == CELLS for c in words)  # none is cut off
    assert words[3][2][0] == BLOCKS[1]  # a share: drawn from 0 to 1
    assert words[5][2][0] == BLOCKS[-1]  # of its own largest value
    left = terminal.lines()
    assert len(left) == (1 if width >= 72 else 2)
    assert "24/40" in left[0]
    assert "reward 0.50  KL 0.062" in left[-1]
    assert "…" not in "".join(left)
    assert not terminal.screen().cursor.hidden


def test_what_is_not_logged_has_no_row() -> None:
    terminal = Terminal()
    bar, state = begun(terminal)
    with bar:
        assert len(terminal.lines()) == 1
        log(bar, state, loss=1.0)  # another callback's row
        assert len(terminal.lines()) == 1
        log(bar, state, reward=-1.0)
        assert [row.split()[0] for row in terminal.lines()[1:]] == ["reward"]
    assert "KL" not in terminal.lines()[0]


def test_what_others_print_is_above_it() -> None:
    terminal = Terminal()
    bar, state = begun(terminal)
    with bar:
        log(bar, state, reward=1.0)
        terminal.console.print("interrupted: finishing this step")
        log(bar, state, reward=1.0)
        lines = terminal.lines()
        assert lines[0] == "interrupted: finishing this step"
        assert [line.split()[0] for line in lines[1:]] == ["training,", "reward"]
    assert len(terminal.lines()) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_gives_the_terminal_back(error: type[BaseException]) -> None:
    terminal = Terminal()
    bar, state = begun(terminal)
    log(bar, state, reward=1.0)
    with pytest.raises(error), bar:
        raise error
    assert not terminal.screen().cursor.hidden
    assert len(terminal.lines()) == 1
    assert not bar._progress.live.is_started


def test_a_run_that_continues_counts_its_own_steps_alone() -> None:
    """100 of 110 steps were made before: at a fraction of a second each, the 8 left are no matter of minutes, nor of none."""
    terminal = Terminal()
    bar, state = begun(terminal, steps=110, at=100)
    now = 0.0
    bar._progress.get_time = lambda: now  # type: ignore[method-assign]
    bar._progress.reset(bar._task, total=110, completed=100)
    for _ in range(2):
        now += 60.0  # rich's own estimate forgets steps after half a minute
        log(bar, state, reward=1.0)
    assert bar._progress.tasks[0].time_remaining == 8 * 60


def test_tokens_a_second_are_those_of_the_last_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("antipasto.trl.live.time.monotonic", lambda: now)
    terminal = Terminal()
    bar = ProgressBar(terminal.console, "training")
    state = TrainerState(max_steps=40, num_input_tokens_seen=5000)
    bar.on_train_begin(None, state, None)  # type: ignore[arg-type]
    with bar:
        for step in range(1, 31):
            now += 2.0
            log(bar, state, reward=1.0, num_tokens=5000.0 + 100 * min(step, 20))
            if step in (1, 20, 30):
                assert terminal.lines()[-1].split()[1] == {1: "50.000", 20: "50.000", 30: "0.000"}[step]


@pytest.mark.parametrize(
    "options", [{"color_system": None}, {"no_color": True}, {"color_system": "truecolor"}], ids=str
)
def test_colours_are_nothing_that_it_needs(options: dict[str, Any]) -> None:
    terminal = Terminal(**options)
    bar, state = begun(terminal)
    with bar:
        log(bar, state, **LOGS)
        assert len(terminal.lines()) == 10
    assert (b"\x1b[3" in terminal.raw.getvalue()) == (options.get("color_system") == "truecolor")


def test_a_console_without_blocks_gets_ascii() -> None:
    terminal = Terminal(encoding="ascii")
    bar, state = begun(terminal)
    with bar:
        for reward in range(8):
            log(bar, state, reward=reward)
        assert terminal.lines()[1].split() == ["reward", "7.000", ASCII_BLOCKS]


# ── where there is none ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [{"force_terminal": False}, {"_environ": {"TERM": "dumb"}}], ids=["file", "dumb"])
def test_a_line_each_time_that_something_is_logged(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("antipasto.trl.live.time.monotonic", lambda: now)
    terminal = Terminal(100, **options)
    bar, state = begun(terminal, steps=3)
    bar._progress.get_time = lambda: now  # type: ignore[method-assign]
    with bar:
        for step in range(1, 4):
            now += 100.0
            log(bar, state, **{**LOGS, "num_tokens": 50_000.0 * step})
    lines = terminal.raw.getvalue().decode().splitlines()
    said = "reward 0.500  oracle 0.375  exploit 0.125  flagged 0.875  kl 0.062  500 tokens/s"
    assert lines[:3] == [f"step 1/3  {said}", f"step 2/3  {said}  left 0:01:40", f"step 3/3  {said}  left 0:00:00"]
    assert "3/3 reward 0.50  KL 0.062" in lines[3]
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_where_trl_has_no_number_there_is_none(is_terminal: bool) -> None:
    """It logs None where every reward function returned None for all rollouts of a step."""
    terminal = Terminal(100, force_terminal=is_terminal)
    bar, state = begun(terminal, steps=2)
    with bar:
        for reward in (0.5, None):
            log(bar, state, reward=reward)
    assert "reward nan" in terminal.raw.getvalue().decode()


def test_a_quiet_console_leaves_the_output_alone() -> None:
    terminal = Terminal(quiet=True)
    bar, state = begun(terminal)
    before = sys.stdout, sys.stderr
    with bar:
        log(bar, state, **LOGS)
        assert (sys.stdout, sys.stderr) == before
    assert terminal.raw.getvalue() == b""


# ── lines of blocks ──────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200))
def test_a_history_of_any_length_is_a_few_means(values: list[float]) -> None:
    means = cells(values, size=8)
    each = next(2**k for k in range(9) if len(values) <= 8 * 2**k)
    parts = [values[i : i + each] for i in range(0, len(values), each)]
    assert len(parts) <= 8
    assert means == pytest.approx([sum(part) / len(part) for part in parts], abs=1e-6)
    assert len(values) <= 8 or len(parts) > 4


def test_a_value_that_is_not_finite_is_said_and_not_drawn() -> None:
    terminal = Terminal()
    bar, state = begun(terminal)
    with bar:
        for kl in (1.0, float("nan")):
            log(bar, state, reward=1.0, kl=kl)
        assert terminal.lines()[-1].split() == ["KL", "nan", BLOCKS[-1]]


@given(st.lists(st.floats(-1e9, 1e9), max_size=CELLS))
def test_blocks_rise_with_values(values: list[float]) -> None:
    line = sparkline(values)
    assert len(line) == len(values)
    heights = [BLOCKS.index(block) for block in line]
    order = sorted(range(len(values)), key=values.__getitem__)
    assert [heights[i] for i in order] == sorted(heights)


# ── a real terminal ──────────────────────────────────────────────────────────────────────────────────────────────────


def in_a_terminal(watch: Callable[[pyte.Screen, int], None], *arguments: str) -> tuple[int, pyte.Screen]:
    """Run the command in a terminal of 80 x 24; what is on the screen is shown to ``watch`` with the process's id."""
    words = [sys.executable, "-m", "antipasto", *arguments]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, words, environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    screen = pyte.Screen(80, 24)
    stream = pyte.ByteStream(screen)
    try:
        while data := os.read(terminal, 65536):
            stream.feed(data)
            watch(screen, child)
    except OSError:  # how Linux says that the other end is closed
        pass
    finally:
        os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), screen


TRAIN = ["train", str(addition.model_path()), "--task", "addition", "--method", "route"]
TRAIN += ["--prompts", "16", "--generations", "16", "--beta", "0.005"]


def shows_the_view(screen: pyte.Screen) -> bool:
    names = [line.split()[0] for line in screen.display if line.strip()]
    return {"training", "reward", "exploit", "deployed", "oracle", "hack-ward", "KL", "tokens/s"} <= set(names)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of forkpty.*:DeprecationWarning")
def test_a_run_in_a_terminal(tmp_path: Path) -> None:
    seen: list[bool] = []

    def watch(screen: pyte.Screen, child: int) -> None:
        if shows_the_view(screen):
            seen.append(screen.cursor.hidden)

    code, screen = in_a_terminal(watch, *TRAIN, "--steps", "3", "--out", str(tmp_path / "run"))
    assert code == 0
    assert seen
    assert all(seen)
    assert not screen.cursor.hidden
    assert not shows_the_view(screen)
    assert "run folder: " in "".join(screen.display)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of forkpty.*:DeprecationWarning")
def test_ctrl_c_in_a_terminal(tmp_path: Path) -> None:
    asked: list[int] = []

    def watch(screen: pyte.Screen, child: int) -> None:
        if shows_the_view(screen) and not asked:
            asked.append(child)
            os.kill(child, signal.SIGINT)

    code, screen = in_a_terminal(watch, *TRAIN, "--steps", "160", "--out", str(tmp_path / "run"))
    text = "\n".join(screen.display)
    assert asked
    assert code == 130
    assert not screen.cursor.hidden
    assert "/160 reward 0." in text
    assert "antipasto train --resume" in text
    assert not shows_the_view(screen)


def test_a_handler_that_python_did_not_set_leaves_the_default_behind() -> None:
    """`signal.getsignal` gives None for it, and `signal.signal` takes no None."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        interrupts = Interrupts(Console(file=io.StringIO()))
        with interrupts:
            interrupts._before[signal.SIGTERM] = None
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
