"""The command line: parse, then one call."""

from __future__ import annotations

from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="antipasto",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"antipasto {version('antipasto')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """RL post-training in the singular basis of the weights, with a quarantine for what should not ship."""


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Seed of prompts, rollouts and evaluation.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to run, from --seed on.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of 16 prompts x 16 rollouts.")] = 160,
    variant: Annotated[
        str, typer.Option(help="How common the known hack is at the start: 'rare', or 'even' with the unknown one.")
    ] = "rare",
    out: Annotated[Path | None, typer.Option(help="Run folder, new or empty.", show_default="runs/demo-<time>")] = None,
) -> None:
    """Train a small model on a reward that can be fooled; see what it learns, and what is left without the quarantine.

    About a minute a seed on two cores. Leaves every rollout with its reward in the run folder.
    """
    console = Console()
    out = out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        from antipasto import demo as job

        job.run(job.DemoConfig(seed, steps, variant), out, console, seeds=seeds)
    except ValueError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error}. The run folder is {out}.")
    except ImportError as error:
        _fail(f"{error}. The demo needs the extra 'trl': pip install 'antipasto[trl]'")
    except KeyboardInterrupt:
        _fail(f"interrupted; what was written so far is in {out}", code=130)


def _fail(message: str, *, code: int = 2) -> None:
    typer.echo(f"antipasto: {message}", err=True)
    raise typer.Exit(code)
