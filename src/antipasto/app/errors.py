"""Errors of the command line: a user's mistake in one line, anything else with the name of a file that has the traceback.

A ``raise`` of this library is meant for the user and complete. A library's error gets that file's name, and so does
``sys.exit`` in somebody's task. ``ANTIPASTO_TRACEBACK=1`` prints every traceback instead.
"""

from __future__ import annotations

import dis
import importlib.util
import os
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from safetensors import SafetensorError

import antipasto
from antipasto.names import AntiPastoWarning
from antipasto.terminal import plain

EXTRAS = {"trl": ("trl", "datasets", "scipy", "matplotlib"), "report": ("scipy", "matplotlib")}
"""Extra → packages that must be installed for it."""


@contextmanager
def readable_errors(out: Path | None = None, *, extra: str | None = None, load: bool = True) -> Iterator[None]:
    """Turn errors that a user can fix into one line and exit code 2, and Ctrl-C into exit code 130.

    Args:
        out: the command's run folder, for messages.
        extra: the extra that the command needs; checked first.
        load: load torch and the library first.
    """
    try:
        if extra is not None:
            _check_extra(extra)
        if load:
            antipasto._load()
        with _warnings_in_one_line():
            yield
    except (ValueError, OSError, SafetensorError, ImportError, RuntimeError, SystemExit) as error:
        if os.environ.get("ANTIPASTO_TRACEBACK", "0") not in ("", "0"):
            raise
        message = _said(error, out)
        if message is None:
            raise
        fail(message)
    except KeyboardInterrupt:
        fail("interrupted" if out is None else f"interrupted; what was written so far is in {out}", code=130)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show this library's warnings without the line of code that they are from."""
    before = warnings.formatwarning

    def shown(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if issubclass(category, AntiPastoWarning):
            return f"warning: {plain(' '.join(str(message).split()))}\n"
        return before(message, category, filename, lineno, line)

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = before


def _check_extra(extra: str) -> None:
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"This command needs {', '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed: "
            f"pip install 'antipasto[{extra}]'"
        )


def _said(error: BaseException, out: Path | None) -> str | None:
    """An error in one line; None if it should be raised as it is."""
    if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
        return None  # nobody reads on, as in `… | head`: rich and click end without a word
    if isinstance(error, SystemExit):
        return f"something called sys.exit({error.code!r}) while the command ran. {_traceback_file(error)}"
    if isinstance(error, RuntimeError):
        if type(error).__name__ == "NotIsolatedError":  # by name: only a task that runs programs loads its module
            return str(error)
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            return None
        return f"a checkpoint could not be written: is the disk full? The run folder is {out}."  # torch.save's words
    if isinstance(error, OSError) and error.errno is not None:  # the system's, which names the file
        return f"{error}." if out is None else f"{error}. The run folder is {out}."
    if _is_ours(error):
        return str(error)
    text = str(error).rstrip(".") or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        name = error.name.partition(".")[0]
        # some libraries put a sentence where the name belongs
        text = error.name.rstrip(". \n") if " " in name else f"{name} is not installed, or is incomplete ({text})"
    return f"{text}. {_traceback_file(error)}"


def _is_ours(error: BaseException) -> bool:
    """Whether a ``raise`` statement of this package made the error: then its text is complete and meant for the user."""
    last = error.__traceback__
    if last is None:
        return False
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    if not Path(code.co_filename).resolve().is_relative_to(Path(__file__).parents[1].resolve()):
        return False
    return code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]  # otherwise a C function failed in this line


def _traceback_file(error: BaseException) -> str:
    """Write the traceback to a file, and return a sentence that names it."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="antipasto-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.writelines(traceback.format_exception(error))
    return f"Traceback in {file.name}; ANTIPASTO_TRACEBACK=1 prints it."


def fail(message: str, *, code: int = 2) -> None:
    typer.echo(f"antipasto: {plain(' '.join(message.split()))}", err=True)
    raise typer.Exit(code)
