"""The command line as someone types it: how it ended, and what it printed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from typer.testing import CliRunner

from antipasto.app.cli import app
from antipasto.tasks import addition

MODEL = str(addition.model_path())
TRAIN = ["train", MODEL, "--task", "addition"]


def size(steps: int, save_every: int = 1) -> list[object]:
    """The words for steps of eight rollouts."""
    return ["--prompts", 2, "--generations", 4, "--steps", steps, "--save-every", save_every]


SMALL = size(1)


def run(*arguments: object, columns: int = 100) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": str(columns), "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def succeeds(*arguments: object, columns: int = 100) -> str:
    """All that was printed by a command that ended well."""
    code, text = run(*arguments, columns=columns)
    assert code == 0, text
    return text


def fails(*arguments: object, columns: int = 100) -> str:
    """All that was printed by a command that did not begin, or that was given up: without a traceback."""
    code, text = run(*arguments, columns=columns)
    assert code == 2, text
    assert "Traceback" not in text
    return text


def refused(*arguments: object) -> str:
    """The one line that a mistake costs; where it may be a fault of ours, it names a file with the traceback."""
    code, text = run(*arguments)
    assert code == 2, text
    assert "Traceback (most" not in text
    lines = [line for line in text.splitlines() if line.startswith("antipasto: ")]
    assert len(lines) == 1, text
    return lines[0]


def process(*arguments: object) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    words = [sys.executable, "-m", "antipasto", *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
