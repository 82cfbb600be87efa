"""The command line: parse, then one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from antipasto.terminal import plain
from antipasto.tuner import AntiPastoConfig

app = typer.Typer(
    name="antipasto",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TRAIN, PREPARE, LOOK = "Train", "Prepare", "Look"

# options that several commands have
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model's folder, or its name on the hub.", show_default=False)
]
TargetModules = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES", help="Layers to adapt: names with commas between, or 'all-linear'.", show_default="known names"
    ),
]
ExcludeModules = Annotated[
    str | None, typer.Option(metavar="NAMES", help="Layers to leave out of those.", show_default="none")
]
CacheDir = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Where singular bases are kept.", show_default="$ANTIPASTO_CACHE or the user's"),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the weights; 'auto' as saved. Each dtype has its own bases."),
]


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


@app.command(rich_help_panel=TRAIN)
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
    out = out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    with _readable_errors(out, extra="trl"):
        from antipasto import demo as job

        job.run(job.DemoConfig(seed, steps, variant), out, Console(), seeds=seeds)


@app.command(rich_help_panel=PREPARE)
def basis(
    model: Model,
    target_modules: TargetModules = None,
    exclude_modules: ExcludeModules = None,
    cache_dir: CacheDir = None,
    dtype: Dtype = "auto",
) -> None:
    """Compute the singular basis of every layer to be adapted, ahead of the runs that need it.

    What is there already is checked and left alone.
    """
    with _readable_errors():
        from antipasto import commands

        config = _config(target_modules, exclude_modules, cache_dir)
        commands.cache_bases(model, config, Console(), dtype=dtype)


@app.command(rich_help_panel=PREPARE)
def extract(
    model: Model,
    pairs: Annotated[
        Path, typer.Option(metavar="FILE", help="JSON lines with prompt, hack and clean.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The direction, a safetensors file.", show_default=False)],
    estimator: Annotated[
        Literal["tstat", "mean", "svd"], typer.Option(help="What the rows are made of; effect sizes come with each.")
    ] = "tstat",
    k: Annotated[int, typer.Option("--k", min=1, help="Rows a layer; more than one with 'svd' only.")] = 1,
    heldout: Annotated[float, typer.Option(min=0, max=1, help="Share of pairs to score with and not use.")] = 0.25,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Top singular directions of each layer.", show_default="all")
    ] = None,
    target_modules: TargetModules = None,
    exclude_modules: ExcludeModules = None,
    cache_dir: CacheDir = None,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the split into fitted and held-out pairs.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs per backward: lower it if memory runs out.")] = 16,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out.")] = False,
) -> None:
    """Make a hack direction out of labelled pairs, and say how well it orders pairs that it was not made from."""
    with _readable_errors():
        from antipasto import commands

        commands.extract(
            model,
            pairs,
            out,
            _config(target_modules, exclude_modules, cache_dir, rank),
            Console(),
            dtype=dtype,
            estimator=estimator,
            k=k,
            heldout=heldout,
            seed=seed,
            batch_size=batch_size,
            force=force,
        )


@app.command(rich_help_panel=LOOK)
def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="A run folder, an adapter's folder, a direction or books file.", show_default=False),
    ],
) -> None:
    """Show what a run left: config, rewards, rollouts, adapter, direction, books. Loads no model."""
    with _readable_errors():
        from antipasto import inspection

        inspection.show(path, Console())


def _config(
    target_modules: str | None, exclude_modules: str | None, cache_dir: str | None, rank: int | None = None
) -> AntiPastoConfig:
    targets = target_modules if target_modules == "all-linear" else _names("--target-modules", target_modules)
    excluded = _names("--exclude-modules", exclude_modules)
    config = AntiPastoConfig(target_modules=targets, exclude_modules=excluded, rank=rank)
    if cache_dir is not None:
        config.cache_dir = cache_dir
    return config


def _names(option: str, text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ValueError(f"{option} takes names with commas between, got {text!r}.")
    return names


@contextmanager
def _readable_errors(out: Path | None = None, *, extra: str | None = None) -> Iterator[None]:
    """What a user can do something about costs one line and exit code 2; Ctrl-C, 130.

    Args:
        out: the command's run folder, named where it matters.
        extra: the extra that the command needs.
    """
    try:
        yield
    except ValueError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error}." if out is None else f"{error}. The run folder is {out}.")
    except ImportError as error:
        _fail(
            f"{error}." if extra is None else f"{error}. It needs the extra {extra!r}: pip install 'antipasto[{extra}]'"
        )
    except KeyboardInterrupt:
        _fail("interrupted" if out is None else f"interrupted; what was written so far is in {out}", code=130)


def _fail(message: str, *, code: int = 2) -> None:
    typer.echo(f"antipasto: {plain(' '.join(message.split()))}", err=True)
    raise typer.Exit(code)
