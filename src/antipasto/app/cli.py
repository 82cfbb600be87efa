"""The command line: parse, then one call.

What is wrong with the words themselves is said before torch is loaded: imports of what needs it are inside the commands, after
the checks. A mistake of the caller's costs one line and exit code 2. So does what a library calls a bad value or cannot read,
with the name of a file that has the traceback; ``ANTIPASTO_TRACEBACK=1`` prints every traceback instead.
"""

from __future__ import annotations

import dataclasses
import dis
import importlib.util
import inspect as introspection
import os
import shlex
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import typer
from rich.console import Console
from safetensors import SafetensorError

import antipasto
from antipasto.app.checks import check_file, check_model_name, check_new_file, check_new_folder, find_files
from antipasto.app.run_folder import RunFolder, parse_yaml, read_yaml
from antipasto.app.train.config import ADAPTER, TrainConfig, names_of, targets_of
from antipasto.names import HELDOUT, Dtype
from antipasto.options import near
from antipasto.tasks.loading import check_task_name
from antipasto.terminal import plain, say

if TYPE_CHECKING:
    from antipasto.adapter import AntiPastoConfig

app = typer.Typer(
    name="antipasto",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TRAIN, PREPARE, LOOK, SHIP = "Train", "Prepare", "Look", "Ship"
COLUMNS = "What the files say"

# options that several commands have
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model's folder, or its name on the hub.", show_default=False)
]


def _not_nan(value: float | None) -> float | None:
    """NaN is neither below nor above what an option's bounds say."""
    if value is not None and value != value:
        raise typer.BadParameter("nan is not a number.")
    return value


def _finite(value: float | None) -> float | None:
    if value is not None and abs(value) == float("inf"):
        raise typer.BadParameter(f"{value} is not finite.")
    return _not_nan(value)


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


def _with_options(
    *, but: tuple[str, ...] = (), panel: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options of `TrainConfig`, in place of its ``**options``: all ``but`` some, or those of one panel."""
    fields = [field for field in dataclasses.fields(TrainConfig) if field.name not in but]
    fields = [field for field in fields if panel in (None, field.metadata.get("rich_help_panel"))]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = introspection.signature(command, eval_str=True).parameters.values()
        hints = get_type_hints(TrainConfig)
        given = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.kind is not p.VAR_KEYWORD]
        given += [_parameter(field, hints[field.name]) for field in fields]
        command.__signature__ = introspection.Signature(given)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in given}
        return command

    return decorate


def _parameter(field: dataclasses.Field[Any], hint: Any) -> introspection.Parameter:
    """A field as typer has it."""
    said = {"show_default": field.default is not None, **field.metadata}
    hint = said.pop("type", hint)
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    if float in (hint, *get_args(hint)):
        said["callback"] = _finite
    words = [f"--{field.name.replace('_', '-')}"] if len(field.name) == 1 else []  # typer would make -k of it
    annotation = Annotated[hint, typer.Option(*words, **said)]
    return introspection.Parameter(
        field.name, introspection.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _trainer_options(words: list[str], known: list[str]) -> dict[str, Any]:
    """``--trainer.NAME VALUE`` or ``--trainer.NAME=VALUE``, as YAML would read the value; without one, true."""
    options: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--trainer."):
            what = f"There is no option {word}" if word.startswith("-") else f"Nothing here takes {word!r}"
            hint = near(word.partition("=")[0], known)
            raise ValueError(f"{what}{hint} TRL's own are written --trainer.NAME VALUE; see --help.")
        name, equals, text = word.removeprefix("--trainer.").partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        try:
            options[name.replace("-", "_")] = parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"--trainer.{name}: {text!r} cannot be read as a value.") from error
    return options


@app.command(rich_help_panel=TRAIN)
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Seed of prompts, rollouts and evaluation.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds to run, from --seed on.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of 16 prompts x 16 rollouts.")] = 160,
    variant: Annotated[
        Literal["rare", "even", "apart"],
        typer.Option(help="The known hack rare, or as common as the other, or each on its own kind of prompt."),
    ] = "rare",
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also train by a detector, and by routing and erasing what a direction claims."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder, new or empty.", show_default="runs/demo-<time>")] = None,
) -> None:
    """Train a small model on a reward that can be fooled, by plain RL and by the default recipe; see what either ships.

    About two minutes a seed on two cores, three more with --compare. Each is a run folder as `antipasto train` leaves it.
    """
    out = out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    with _readable_errors(load=False):
        RunFolder(out).check_new()
    with _readable_errors(out, extra="trl"):
        from antipasto.app import demo as job

        options: dict[str, Any] = {"seed": seed, "seeds": seeds, "steps": steps, "variant": variant}
        found = job.run(out, Console(), **options, compare=compare)
    if found is None:
        raise typer.Exit(130)


@app.command(
    rich_help_panel=TRAIN,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    no_args_is_help=True,
)
@_with_options(but=("model", "task", "trainer"))
def train(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="A model's folder, or its name on the hub.", show_default=False)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="addition, reasoning_gym/NAME, path/to/task.py:NAME or package.module:NAME.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder, new or empty.", show_default="runs/<task>-<time>")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with any of these options; those on the command line win.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder; no other options.", show_default=False)
    ] = None,
    **options: Any,
) -> None:
    """Train any causal LM with GRPO on any task, routed. Leaves a run folder; Ctrl-C saves, and --resume continues.

    Everything else of TRL's GRPOConfig goes through by name: --trainer.scale_rewards none --trainer.report_to trackio.
    Runs under `accelerate launch -m antipasto train …` on several processes.
    """
    typed = {name: value for name, value in context.params.items() if _is_given(context, name)}
    with _readable_errors(load=False):
        if resume is not None:
            if (others := [name for name in typed if name != "resume"]) or context.args:
                words = [f"--{name.replace('_', '-')}" for name in others] + context.args[:1]
                raise ValueError(f"--resume takes everything from the run's folder: leave out {', '.join(words)}.")
            settings, out = RunFolder(resume).config_to_resume(), resume
        else:
            settings, out = _settings(context, typed, config)
    with _readable_errors(out, extra="trl"):
        from antipasto.app.train.run import start

        where = str(config or "antipasto train") if resume is None else str(RunFolder(resume).config)
        out = start(TrainConfig.from_mapping(settings, where), out, Console(), resume=resume is not None)
    if out is None:
        raise typer.Exit(130)


def _settings(context: typer.Context, typed: dict[str, Any], config: Path | None) -> tuple[dict[str, Any], Path | None]:
    """A new run's options: those of a file, and over them those that were typed; and where it is to be."""
    settings, words = _from_file(config), list(context.args)
    if str(typed.get("model", "")).startswith("-"):  # an unknown option, which click took for the argument
        words.insert(0, typed.pop("model"))
    settings |= {name: value for name, value in typed.items() if name != "config"}
    out = settings.pop("out", None)
    known = [word for parameter in context.command.params for word in parameter.opts]
    settings["trainer"] = {**settings.get("trainer", {}), **_trainer_options(words, known)}
    for name, check in (("model", check_model_name), ("task", check_task_name), ("pairs", check_file)):
        if settings.get(name) is not None:
            check(settings[name])
    if settings.get("direction") is not None and Path(settings["direction"]).exists():  # one in vain is told so first
        check_file(settings["direction"])
    if out is not None:
        RunFolder(Path(out)).check_new()
    return settings, None if out is None else Path(out)


def _from_file(path: Path | None) -> dict[str, Any]:
    """A YAML file's options; none are left out where nothing is said of them."""
    if path is None:
        return {}
    check_file(path)
    options = {name: value for name, value in read_yaml(path).items() if value is not None or name == "cache_dir"}
    known = ["out", *(field.name for field in dataclasses.fields(TrainConfig))]
    for name in options:
        if name not in known:
            raise ValueError(f"{path}: there is no option {name!r}{near(str(name), known)}")
    if not isinstance(options.get("trainer", {}), dict):
        raise ValueError(f"{path}: trainer must hold options by name, got {type(options['trainer']).__name__}.")
    return options


@app.command(rich_help_panel=PREPARE)
@_with_options(panel=ADAPTER)
def basis(
    model: Model,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it takes, by the model's config alone; compute nothing.")
    ] = False,
    **adapter: Any,
) -> None:
    """Compute the singular basis of every layer to be adapted, ahead of the runs that need it.

    What is there already is checked and left alone. The cache has all directions of a layer: --rank is for --dry-run.
    """
    with _readable_errors(load=False):
        if adapter["rank"] is not None and not dry_run:
            raise ValueError("--rank is for --dry-run: the cache has all directions of a layer.")
        check_model_name(model)
    with _readable_errors():
        from antipasto.app import commands

        config = _config(**adapter)
        if dry_run:
            commands.what_it_needs(model, config, Console(), dtype=adapter["dtype"])
            return
        commands.cache_bases(model, config, Console(), dtype=adapter["dtype"])


@app.command(rich_help_panel=PREPARE)
@_with_options(panel=ADAPTER)
def extract(
    model: Model,
    pairs: Annotated[
        Path, typer.Option(metavar="FILE", help="JSON lines with prompt, hack and clean.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The direction, a safetensors file.", show_default=False)],
    heldout: Annotated[
        float, typer.Option(min=0, max=1, callback=_finite, help="Share of pairs to score with and not use.")
    ] = HELDOUT,
    seed: Annotated[int, typer.Option(min=0, help="Of the split into fitted and held-out pairs.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs per backward: lower it if memory runs out.")] = 16,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out.")] = False,
    **adapter: Any,
) -> None:
    """Make a hack direction out of labelled pairs, and say how well it orders pairs that it was not made from.

    Also says what else tells the pairs' hacks from their clean texts, such as length: the direction is along all of it.
    """
    with _readable_errors(load=False):
        check_model_name(model)
        check_file(pairs)
        check_new_file(out, force=force)
    with _readable_errors():
        from antipasto.app import commands

        commands.extract(
            model,
            pairs,
            out,
            _config(**adapter),
            Console(),
            dtype=adapter["dtype"],
            heldout=heldout,
            seed=seed,
            batch_size=batch_size,
            force=force,
        )


@app.command("map", rich_help_panel=PREPARE)
@_with_options(panel=ADAPTER)
def map_forms(
    model: Model,
    forms: Annotated[
        Path, typer.Option(metavar="FILE", help="JSON lines with form, prompt and text.", show_default=False)
    ],
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Labelled pairs, to make the monitor from.", show_default=False),
    ] = None,
    monitor: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A saved monitor, instead of pairs.", show_default=False)
    ] = None,
    heldout: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the pairs that the threshold is taken from.")
    ] = HELDOUT,
    seed: Annotated[int, typer.Option(min=0, help="Of the split of the pairs.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per backward: lower it if memory runs out.")] = 32,
    **adapter: Any,
) -> None:
    """Score texts by the name of their form: which of them the score takes for the exploit, and which it does not.

    Rows go from the highest mean to the lowest, with the threshold among them. AUC is against the form named 'clean', or else
    against the pairs' held-out clean texts: .5 is chance.
    """
    with _readable_errors(load=False):
        check_model_name(model)
        for file in (forms, pairs, monitor):
            if file is not None:
                check_file(file)
    with _readable_errors():
        from antipasto.app import commands

        commands.score_map(
            model,
            forms,
            _config(**adapter),
            Console(),
            pairs_file=pairs,
            monitor_file=monitor,
            dtype=adapter["dtype"],
            heldout=heldout,
            seed=seed,
            batch_size=batch_size,
        )


@app.command(rich_help_panel=LOOK)
def eval(
    run: Annotated[Path, typer.Argument(help="A run folder that `antipasto train` left.", show_default=False)],
    prompts: Annotated[int | None, typer.Option(min=2, help="How many held-out prompts.", show_default="all")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, callback=_finite, help="Of sampling; 0 is greedy.", show_default="the run's")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at once.")] = 128,
    margin: Annotated[
        float,
        typer.Option(
            min=0, max=1, callback=_finite, help="How much less the deployed model may solve, for the verdict."
        ),
    ] = 0.05,
    dial: Annotated[
        bool, typer.Option("--dial", help="Also ask with parts of the quarantine in, from -0.5 of it to all.")
    ] = False,
) -> None:
    """Ask every arm of a run the task's held-out prompts: reference, as trained, deployed, each control's book taken out.

    Prints rates and paired differences with 95% intervals, and what they allow to say. Leaves eval.json and, with every
    answer, eval.jsonl in the run folder; after an interruption, the same command continues.
    """
    with _readable_errors(load=False):
        RunFolder(run).check()
    with _readable_errors(run, extra="report"):
        from antipasto.app import arms
        from antipasto.evaluation.records import ANSWERS

        console = Console()
        evaluation = arms.evaluate_run(
            run,
            console,
            prompts=prompts,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            margin=margin,
            dial=dial,
        )
        arms.show(evaluation, console)
        say(console, f"written: {run / ANSWERS}", f"next: antipasto report {shlex.quote(str(run))}")


@app.command(rich_help_panel=LOOK)
def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="A run folder, an adapter's folder, a direction or books file.", show_default=False),
    ],
) -> None:
    """Show what a run left: config, rewards, rollouts, adapter, direction, books. Loads no model."""
    with _readable_errors(load=False):
        if path.exists() and not path.is_dir():
            check_file(path)
        elif not (path / "adapter_config.json").exists():
            RunFolder(path).check()
    with _readable_errors():
        from antipasto.app import inspection

        inspection.show(path, Console())


@app.command(rich_help_panel=LOOK)
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, one or several.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page.", show_default="RUN/report.html; ./report.html for several"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite it.")] = False,
) -> None:
    """Write one HTML file: what a run taught, what would ship, and what was read and moved; of several runs, side by side.

    Opens by a double click, without network. That of a single run in its own folder is overwritten; loads no model.
    """
    with _readable_errors(load=False):
        for run in runs:
            RunFolder(run).check()
    with _readable_errors(extra="report"):
        from antipasto.app.report import write_report

        page = write_report(runs, out, force=force)
        say(Console(), f"report: {page}")


@app.command(rich_help_panel=LOOK)
@_with_options(panel=ADAPTER)
def watch(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            help="The model before training: its folder, or its name on the hub.",
            show_default=False,
        ),
    ],
    rollouts: Annotated[
        list[str],
        typer.Option(
            metavar="FILE", help="JSON lines or parquet; several, or a pattern in quotes.", show_default=False
        ),
    ],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="FILE...", help="More files of rollouts.", show_default="none")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON lines with prompt, hack and clean.", show_default="--monitor"),
    ] = None,
    monitor: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A saved monitor; or a direction, with --threshold.", show_default="--pairs"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for scores and page.", show_default="watch, beside the first file"),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Judge the score by the files' labels, beside other scores.")
    ] = False,
    windows: Annotated[int, typer.Option(min=1, help="Parts of the steps that shares and AUCs are of.")] = 4,
    fail_above: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="RATE",
            help="Exit with 3 where the share above the threshold, in the last window, is above this.",
            show_default="never",
        ),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Instead of the monitor's own.", show_default="the monitor's")
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Rollouts of each window, at most.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of --sample, and of the split of the pairs.")] = 0,
    anew: Annotated[bool, typer.Option("--anew", help="Score again what --out has scores of.")] = False,
    prompt_column: Annotated[
        str, typer.Option(metavar="NAME", help="A text or a chat; a.b reaches into an object.", rich_help_panel=COLUMNS)
    ] = "prompt",
    completion_column: Annotated[
        str, typer.Option(metavar="NAME", help="A text or messages.", rich_help_panel=COLUMNS)
    ] = "completion",
    step_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A number.", show_default="step, if any", rich_help_panel=COLUMNS),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="1 for an exploit, 0 for none.",
            show_default="by reward and oracle",
            rich_help_panel=COLUMNS,
        ),
    ] = None,
    reward_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A number.", show_default="reward, if any", rich_help_panel=COLUMNS),
    ] = None,
    oracle_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The strict truth, 1 for solved.",
            show_default="oracle, if any",
            rich_help_panel=COLUMNS,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="A completion of so many tokens was cut off, where its file does not say.",
            show_default="none was",
            rich_help_panel=COLUMNS,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rollouts per backward: lower it if memory runs out.")] = 32,
    **adapter: Any,
) -> None:
    """Score the rollouts of any run, of any trainer and any adapter, by the model it started from; write a page about them.

    Knows the log of `antipasto train` and TRL's log_completions by themselves, others by the names of their columns. An
    interrupted call goes on where it was; so does one whose files have grown. Needs nothing of the trained model.
    """
    with _readable_errors(load=False):
        check_model_name(base)
        for file in (pairs, monitor):
            if file is not None:
                check_file(file)
        files = find_files([*rollouts, *(more or [])])
    with _readable_errors(out, extra="report"):
        from antipasto.app.watch import command

        config = command.WatchConfig(
            columns=command.Columns(
                prompt_column, completion_column, step_column, label_column, reward_column, oracle_column
            ),
            max_tokens=max_tokens,
            threshold=threshold,
            sample=sample,
            windows=windows,
            seed=seed,
            dtype=adapter["dtype"],
            batch_size=batch_size,
            adapter=_config(**adapter),
        )
        last = command.run(
            base,
            files,
            Console(),
            pairs=pairs,
            monitor=monitor,
            out=out,
            compare=compare,
            anew=anew,
            config=config,
        )
    if fail_above is not None and last > fail_above:
        _fail(
            f"{last:.3f} of the rollouts of the last window are above the threshold, more than {fail_above:g}", code=3
        )


@app.command(rich_help_panel=SHIP)
def export(
    run: Annotated[Path, typer.Argument(help="A run folder of `antipasto train`.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write, new or empty.", show_default=False)],
    dtype: Annotated[
        Dtype,
        typer.Option(help="Of the weights; 'auto' as the base is saved, float32 with --lora."),
    ] = "auto",
    lora: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="RANK",
            help="A LoRA adapter of at most this rank instead of a checkpoint.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of the checkpoint's files, 5GB.", show_default="one file up to 50GB"),
    ] = None,
    dial: Annotated[
        float,
        typer.Option(
            min=-1, max=1, callback=_finite, help="How much of the quarantine ships; eval --dial says what that does."
        ),
    ] = 0.0,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=_not_nan,
            help="Refuse if a token's log-probability is farther off than this; inf keeps anything.",
            show_default="by dtype",
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts to check with, at most.")] = 32,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write a plain checkpoint of what ships, the quarantine left out, or a LoRA adapter; with a model card.

    Another process, with plain transformers and nothing of this library, loads it and must compute what the run's model does.
    """
    with _readable_errors(load=False):
        RunFolder(run).check()
        check_new_folder(out, force=force)
    with _readable_errors():
        from antipasto.app.export import export_run

        export_run(
            run,
            out,
            Console(),
            dtype=dtype,
            lora=lora,
            dial=dial,
            max_shard_size=max_shard_size,
            tolerance=tolerance,
            prompts=prompts,
            force=force,
        )


def _config(
    *, rank: int | None, target_modules: str | None, exclude_modules: str | None, cache_dir: str | None, dtype: str
) -> AntiPastoConfig:
    """The adapter's, of the options of that panel; the dtype is the model's."""
    from antipasto.adapter import AntiPastoConfig

    targets = None if target_modules is None else targets_of(target_modules, "--target-modules")
    excluded = None if exclude_modules is None else names_of("--exclude-modules", exclude_modules)
    config = AntiPastoConfig(target_modules=targets, exclude_modules=excluded, rank=rank)
    config.cache_dir = cache_dir
    return config


EXTRAS = {"trl": ("trl", "datasets", "scipy", "matplotlib"), "report": ("scipy", "matplotlib")}
"""Extra → the packages that a command which needs it imports."""


@contextmanager
def _readable_errors(out: Path | None = None, *, extra: str | None = None, load: bool = True) -> Iterator[None]:
    """What a user can do something about costs one line and exit code 2; Ctrl-C, 130.

    Args:
        out: the command's run folder, named where it matters.
        extra: the extra that the command needs; said before anything else where it is not installed.
        load: load torch, and the library on it; else what is in here goes without.
    """
    try:
        if extra is not None:
            _check_extra(extra)
        if load:
            antipasto._load()
        yield
    except (ValueError, OSError, SafetensorError, ImportError, RuntimeError, SystemExit) as error:
        if os.environ.get("ANTIPASTO_TRACEBACK", "0") not in ("", "0"):
            raise
        message = _said(error, out)
        if message is None:
            raise
        _fail(message)
    except KeyboardInterrupt:
        _fail("interrupted" if out is None else f"interrupted; what was written so far is in {out}", code=130)


def _check_extra(extra: str) -> None:
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"This needs {', '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed: "
            f"pip install 'antipasto[{extra}]'"
        )


def _said(error: BaseException, out: Path | None) -> str | None:
    """An error in one line; None for one that is told whole."""
    if isinstance(error, SystemExit):
        return f"something called sys.exit({error.code!r}) in the middle of it. {_traceback_file(error)}"
    if isinstance(error, RuntimeError):
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            return None
        return f"a checkpoint could not be written: is the disk full? The run folder is {out}."  # torch.save's words
    if isinstance(error, OSError) and error.errno is not None:  # the system's, which says of what
        return f"{error}." if out is None else f"{error}. The run folder is {out}."
    if _is_ours(error):
        return str(error)
    text = str(error).rstrip(".") or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        name = error.name.partition(".")[0]
        # some put a sentence of their own where the name belongs
        text = error.name.rstrip(". \n") if " " in name else f"{name} is not installed, or lacks a part ({text})"
    return f"{text}. {_traceback_file(error)}"


def _is_ours(error: BaseException) -> bool:
    """Whether a ``raise`` of this package made it: then its text is for the user, and says all that there is to know."""
    last = error.__traceback__
    if last is None:
        return False
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    if not Path(code.co_filename).resolve().is_relative_to(Path(__file__).parents[1].resolve()):
        return False
    return code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]  # else a function in C failed in this line


def _traceback_file(error: BaseException) -> str:
    """Where the traceback is, written there."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="antipasto-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.writelines(traceback.format_exception(error))
    return f"Traceback in {file.name}; ANTIPASTO_TRACEBACK=1 prints it."


def _fail(message: str, *, code: int = 2) -> None:
    typer.echo(f"antipasto: {plain(' '.join(message.split()))}", err=True)
    raise typer.Exit(code)
