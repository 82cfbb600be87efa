"""Write docs/cli.md, the reference of the command line, from the commands themselves.

python scripts/write_cli_reference.py          # after a change of cli.py
python scripts/write_cli_reference.py --check  # says whether it was forgotten; writes nothing
"""

from __future__ import annotations

import argparse
import inspect
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.models import ArgumentInfo, CommandInfo, OptionInfo

from antipasto.app.cli import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
INTRODUCTION = """# Command line

`scripts/write_cli_reference.py` writes this page from the commands themselves; `antipasto COMMAND --help` says the same. A
mistake in the call gives a short message on stderr and exit code 2. So does a `ValueError`, `OSError` or `ImportError` of
another library; the message names a file with the traceback. Ctrl-C gives exit code 130. With `ANTIPASTO_TRACEBACK=1` every
error is printed in full. `antipasto --version` prints the version. `python -m antipasto` is the same program.
"""


_WORDS = {int: "a whole number", float: "a number", Path: "a path", str: "a text"}


class Parameter(typing.NamedTuple):
    """One row of a table: what is typed, what it takes, what it is if left out, what it means, and in which group."""

    name: str
    takes: str
    default: str
    help: str
    group: str


def page() -> str:
    """The whole page."""
    assert not app.registered_groups, "commands of commands are not known here"
    commands = app.registered_commands
    rows = [f"| [`antipasto {name(c)}`](#antipasto-{name(c)}) | {_cell(_first_sentence(c))} |" for c in commands]
    sections = [section(command) for command in commands]
    return "\n".join([INTRODUCTION, "| | |", "|---|---|", *rows, "", *sections])


def section(command: CommandInfo) -> str:
    """A command: what it does, how it is called, and its parameters by group."""
    assert command.callback is not None
    described = inspect.cleandoc(command.help or command.callback.__doc__ or "")
    rows = parameters(command.callback)
    arguments = [_typed(row) for row in rows if row.group == "Arguments"]
    usage = " ".join(["antipasto", name(command), *arguments, "[OPTIONS]"])
    parts = [f"## antipasto {name(command)}", described, f"```text\n{usage}\n```"]
    for group in dict.fromkeys(row.group for row in rows):
        parts.append(f"**{group}**")
        table = ["| | takes | if left out | |", "|---|---|---|---|"]
        table += [
            f"| {row.name} | {row.takes} | {row.default} | {_cell(row.help)} |" for row in rows if row.group == group
        ]
        parts.append("\n".join(table))
    return "\n\n".join(parts) + "\n"


def _typed(argument: Parameter) -> str:
    word = argument.name.strip("`")
    return f"[{word}]" if argument.default else word


def name(command: CommandInfo) -> str:
    """What is typed for it."""
    assert command.callback is not None
    return command.name or command.callback.__name__.replace("_", "-")


def parameters(function: Callable[..., Any]) -> list[Parameter]:
    """The parameters of a command's function: arguments first, then the options that are in no panel."""
    hints = typing.get_type_hints(function, include_extras=True)
    rows = []
    for key, parameter in inspect.signature(function).parameters.items():
        if typing.get_origin(hints[key]) is not typing.Annotated:
            continue  # typer's own context
        kind, info = typing.get_args(hints[key])
        assert isinstance(info, (ArgumentInfo, OptionInfo))
        typed = (info.metavar or key.upper()) if isinstance(info, ArgumentInfo) else _option(key, info)
        group = "Arguments" if isinstance(info, ArgumentInfo) else info.rich_help_panel or "Options"
        rows.append(Parameter(f"`{typed}`", _takes(kind, info), _default(parameter, info), info.help or "", group))
    order = {"Arguments": 0, "Options": 1}
    return sorted(rows, key=lambda row: order.get(row.group, 2))


def _option(key: str, info: OptionInfo) -> str:
    # the names after the variable's own are what is typed
    spelled = [word for word in info.param_decls or () if word.startswith("-")]
    return ", ".join(spelled) or f"--{key.replace('_', '-')}"


def _takes(kind: Any, info: ArgumentInfo | OptionInfo) -> str:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (one for one in typing.get_args(kind) if one is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    if kind is bool:
        return "–"
    if typing.get_origin(kind) is list:
        (kind,) = typing.get_args(kind)
        return f"{_WORDS[kind]}, or several"
    words = _WORDS[kind]
    if info.metavar and isinstance(info, OptionInfo):
        words = f"{info.metavar}"
    bounds = [f"from {info.min:g}"] if info.min is not None else []
    bounds += [f"to {info.max:g}"] if info.max is not None else []
    return " ".join([words, *bounds])


def _default(parameter: inspect.Parameter, info: ArgumentInfo | OptionInfo) -> str:
    if parameter.default is inspect.Parameter.empty:
        return "" if isinstance(info, ArgumentInfo) else "needed"
    if isinstance(info.show_default, str):
        return _cell(info.show_default)
    if parameter.default is None or parameter.default is False:
        return "–"
    return f"`{parameter.default}`"


def _first_sentence(command: CommandInfo) -> str:
    assert command.callback is not None
    return inspect.cleandoc(command.help or command.callback.__doc__ or "").partition("\n\n")[0].replace("\n", " ")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="say whether the page is as it should be; write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE} does not say what the commands are: run python scripts/write_cli_reference.py")


if __name__ == "__main__":
    main()
