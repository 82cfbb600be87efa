"""The command line: parse, then one call.

Arguments are checked before torch is loaded, so modules that need torch are imported inside the commands, after the checks.
What goes wrong is told by `errors`.
"""

from __future__ import annotations

import dataclasses
import inspect as introspection
import shlex
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer
from rich.console import Console

from antipasto.app.checks import (
    check_dataset,
    check_file,
    check_model_name,
    check_new_file,
    check_new_folder,
    find_files,
)
from antipasto.app.errors import fail, readable_errors
from antipasto.app.options import AdapterOptions, options_of
from antipasto.app.run_folder import RunFolder, parse_yaml, read_yaml
from antipasto.app.train.config import TrainConfig
from antipasto.app.watch.config import WatchConfig
from antipasto.names import HELDOUT, Dtype
from antipasto.options import near
from antipasto.tasks.loading import check_task_name
from antipasto.terminal import say

app = typer.Typer(
    name="antipasto",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TRAIN, PREPARE, LOOK, SHIP = "Train", "Prepare", "Look", "Ship"

# shared by several commands
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model's folder, or its name on the hub.", show_default=False)
]


def _not_nan(value: float | None) -> float | None:
    if value is not None and value != value:  # NaN passes an option's bounds
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
    kind: type[AdapterOptions], *, but: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's ``**options`` by those of a dataclass, all ``but`` some."""
    hints = get_type_hints(kind)
    fields = [field for name, field in options_of(kind).items() if name not in but]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = introspection.signature(command, eval_str=True).parameters.values()
        given = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.kind is not p.VAR_KEYWORD]
        given += [_parameter(field, hints[field.name]) for field in fields]
        command.__signature__ = introspection.Signature(given)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in given}
        return command

    return decorate


def _parameter(field: dataclasses.Field[Any], hint: Any) -> introspection.Parameter:
    """A field of a dataclass of options as a typer option."""
    said = {"show_default": field.default is not None, **field.metadata}
    hint = said.pop("type", hint)
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    if float in (hint, *get_args(hint)):
        said["callback"] = _finite
    # typer's own choice would be -k for k, and --no-… as well for a flag
    words = [f"--{field.name.replace('_', '-')}"] if len(field.name) == 1 or hint is bool else []
    annotation = Annotated[hint, typer.Option(*words, **said)]
    return introspection.Parameter(
        field.name, introspection.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _trainer_options(words: list[str], known: list[str]) -> dict[str, Any]:
    """Parse ``--trainer.NAME VALUE`` and ``--trainer.NAME=VALUE``. Values are YAML; a missing value is true."""
    options: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--trainer."):
            what = f"There is no option {word}" if word.startswith("-") else f"Unexpected argument {word!r}"
            hint = near(word.partition("=")[0], known)
            raise ValueError(f"{what}{hint} Options of TRL are written --trainer.NAME VALUE; see --help.")
        name, equals, text = word.removeprefix("--trainer.").partition("=")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        try:
            options[name.replace("-", "_")] = parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"--trainer.{name}: {text!r} cannot be read as a value: it is not YAML.") from error
    return options


@app.command(rich_help_panel=TRAIN)
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Seed of prompts, rollouts and evaluation.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds to run, starting at --seed.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of 16 prompts x 16 rollouts.")] = 160,
    variant: Annotated[
        Literal["rare", "even", "apart"],
        typer.Option(
            help="rare: the known hack is rarer than the other; even: equally common; apart: each on its own prompts."
        ),
    ] = "rare",
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also train with a detector's penalty, and with method route and erase."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder, new or empty.", show_default="runs/demo-<time>")] = None,
) -> None:
    """Train a small model on a reward that can be fooled, by plain RL and by the default recipe, and compare what they ship.

    Takes about two minutes per seed on two cores, three more with --compare. Every run has a folder as from `antipasto train`.
    """
    out = out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    with readable_errors(load=False):
        RunFolder(out).check_new()
    with readable_errors(out, extra="trl"):
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
@_with_options(TrainConfig, but=("model", "task", "trainer"))
def train(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="A model's folder, or its name on the hub.", show_default=False)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="addition, code, code/FLAW, reasoning_gym/NAME, path/to/task.py:NAME or package.module:NAME.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder, new or empty.", show_default="runs/<task>-<time>")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with any of these options. The command line overrides it.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder. Takes no other options.", show_default=False)
    ] = None,
    **options: Any,
) -> None:
    """Train a causal LM with GRPO on a task, and write a run folder.

    Ctrl-C saves the run, and --resume continues it. Any other option of TRL's GRPOConfig is passed by name:
    --trainer.scale_rewards none --trainer.report_to trackio. For several processes: `accelerate launch -m antipasto train …`.
    """
    typed = {name: value for name, value in context.params.items() if _is_given(context, name)}
    with readable_errors(load=False):
        if resume is not None:
            if (others := [name for name in typed if name != "resume"]) or context.args:
                words = [f"--{name.replace('_', '-')}" for name in others] + context.args[:1]
                raise ValueError(f"--resume takes all options from the run's folder: leave out {', '.join(words)}.")
            RunFolder(resume).read_run()  # a run that has not reached its first step cannot be continued
            settings, out = RunFolder(resume).read_config(), resume
        else:
            settings, out = _settings(context, typed, config)
    with readable_errors(out, extra="trl"):
        from antipasto.app.train.run import start

        where = str(config or "antipasto train") if resume is None else str(RunFolder(resume).config)
        out = start(TrainConfig.from_mapping(settings, where), out, Console(), resume=resume is not None)
    if out is None:
        raise typer.Exit(130)


def _settings(context: typer.Context, typed: dict[str, Any], config: Path | None) -> tuple[dict[str, Any], Path | None]:
    """The options of a new run, from the config file and the command line, and its folder."""
    settings, words = _from_file(config), list(context.args)
    if str(typed.get("model", "")).startswith("-"):  # an unknown option, which click took for the argument
        words.insert(0, typed.pop("model"))
    settings |= {name: value for name, value in typed.items() if name != "config"}
    out = settings.pop("out", None)
    known = [word for parameter in context.command.params for word in parameter.opts]
    settings["trainer"] = {**settings.get("trainer", {}), **_trainer_options(words, known)}
    checks = {"model": check_model_name, "task": check_task_name, "dataset": check_dataset, "pairs": check_file}
    for name, check in checks.items():
        if settings.get(name) is not None:
            check(settings[name])
    if settings.get("direction") is not None and Path(settings["direction"]).exists():  # if unused, that is said first
        check_file(settings["direction"])
    if out is not None:
        RunFolder(Path(out)).check_new()
    return settings, None if out is None else Path(out)


def _from_file(path: Path | None) -> dict[str, Any]:
    """The options in a YAML file. An empty value counts as not given, except for ``cache_dir``."""
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
@_with_options(AdapterOptions)
def basis(
    model: Model,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print memory and disk needs by rank, from the model's config; compute nothing."
        ),
    ] = False,
    **adapter: Any,
) -> None:
    """Compute and cache the singular basis of every layer to be adapted, before the runs that need it.

    Cached bases are checked and kept. Runs of a lower --rank are served too; without --rank, those of every rank.
    """
    with readable_errors(load=False):
        options = AdapterOptions.from_mapping(adapter, "antipasto basis")
        check_model_name(model)
    with readable_errors():
        from antipasto.app import commands

        job = commands.what_it_needs if dry_run else commands.cache_bases
        job(model, options.adapter(), Console(), dtype=options.dtype)


@app.command(rich_help_panel=PREPARE)
@_with_options(AdapterOptions)
def extract(
    model: Model,
    pairs: Annotated[
        Path, typer.Option(metavar="FILE", help="JSON lines with prompt, hack and clean.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Safetensors file to write.", show_default=False)],
    heldout: Annotated[
        float, typer.Option(min=0, max=1, callback=_finite, help="Share of pairs held out to judge the direction.")
    ] = HELDOUT,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split into fitted and held-out pairs.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs per backward. Lower it if memory runs out.")] = 16,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out.")] = False,
    **adapter: Any,
) -> None:
    """Make a hack direction from labelled pairs, and measure on held-out pairs how well it orders them.

    Also prints what else distinguishes hacks from clean texts in the pairs, such as length: the direction contains that too.
    """
    with readable_errors(load=False):
        options = AdapterOptions.from_mapping(adapter, "antipasto extract")
        check_model_name(model)
        check_file(pairs)
        check_new_file(out, force=force)
    with readable_errors():
        from antipasto.app import commands

        commands.extract(
            model,
            pairs,
            out,
            options.adapter(),
            Console(),
            dtype=options.dtype,
            heldout=heldout,
            seed=seed,
            batch_size=batch_size,
            force=force,
        )


@app.command("map", rich_help_panel=PREPARE)
@_with_options(AdapterOptions)
def map_forms(
    model: Model,
    forms: Annotated[
        Path, typer.Option(metavar="FILE", help="JSON lines with form, prompt and text.", show_default=False)
    ],
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Labelled pairs to make the monitor from.", show_default=False),
    ] = None,
    monitor: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A saved monitor, instead of pairs.", show_default=False)
    ] = None,
    heldout: Annotated[
        float, typer.Option(min=0, max=1, callback=_finite, help="Share of the pairs held out to set the threshold.")
    ] = HELDOUT,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split of the pairs.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per backward. Lower it if memory runs out.")] = 32,
    **adapter: Any,
) -> None:
    """Score texts grouped by form, to see which forms a monitor would flag.

    Rows are sorted by mean score, with the threshold among them. AUC is against the form named 'clean', or without one against
    the pairs' held-out clean texts; .5 is chance.
    """
    with readable_errors(load=False):
        options = AdapterOptions.from_mapping(adapter, "antipasto map")
        check_model_name(model)
        for file in (forms, pairs, monitor):
            if file is not None:
                check_file(file)
    with readable_errors():
        from antipasto.app import commands

        commands.score_map(
            model,
            forms,
            options.adapter(),
            Console(),
            pairs_file=pairs,
            monitor_file=monitor,
            dtype=options.dtype,
            heldout=heldout,
            seed=seed,
            batch_size=batch_size,
        )


@app.command(rich_help_panel=LOOK)
def eval(
    run: Annotated[Path, typer.Argument(help="A run folder of `antipasto train`.", show_default=False)],
    prompts: Annotated[int | None, typer.Option(min=2, help="Number of held-out prompts.", show_default="all")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, callback=_finite, help="Sampling temperature; 0 is greedy.", show_default="the run's"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers per batch.")] = 128,
    margin: Annotated[
        float,
        typer.Option(min=0, max=1, callback=_finite, help="Smallest difference that matters for the verdict."),
    ] = 0.05,
    dial: Annotated[
        bool, typer.Option("--dial", help="Also ask with a share of the quarantine left in, from -0.5 to 0.75.")
    ] = False,
) -> None:
    """Ask every version of a run's model the held-out prompts: reference, as trained, deployed and controls.

    Prints rates and paired differences with 95% intervals, and a verdict. Writes eval.json and, with all answers, eval.jsonl
    into the run folder. If interrupted, the same command continues.
    """
    with readable_errors(load=False):
        RunFolder(run).check()
    with readable_errors(run, extra="report"):
        from antipasto.app import evaluate
        from antipasto.evaluation.records import ANSWERS

        console = Console()
        evaluation = evaluate.evaluate_run(
            run,
            console,
            prompts=prompts,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            margin=margin,
            dial=dial,
        )
        evaluate.show(evaluation, console)
        say(console, f"written: {run / ANSWERS}", f"next: antipasto report {shlex.quote(str(run))}")


@app.command(rich_help_panel=LOOK)
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="A run folder, an adapter's folder, or a file: direction, monitor or books.", show_default=False
        ),
    ],
) -> None:
    """Show the contents of a run: config, rewards, rollouts, adapter, direction, monitor, books. Loads no model."""
    with readable_errors(load=False):
        if path.exists() and not path.is_dir():
            check_file(path)
        elif not (path / "adapter_config.json").exists():
            RunFolder(path).check()
    with readable_errors():
        from antipasto.app import inspection

        inspection.show(path, Console())


@app.command(rich_help_panel=LOOK)
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="One or several run folders.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="HTML file to write.", show_default="RUN/report.html; ./report.html for several"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out.")] = False,
) -> None:
    """Write a report of one run, or of several side by side, as one HTML file.

    The file needs no network. RUN/report.html is overwritten without --force. Loads no model.
    """
    with readable_errors(load=False):
        for run in runs:
            RunFolder(run).check()
    with readable_errors(extra="report"):
        from antipasto.app.report import write_report

        page = write_report(runs, out, force=force)
        say(Console(), f"report: {page}")


@app.command(rich_help_panel=LOOK)
@_with_options(WatchConfig)
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
        typer.Option(metavar="FILE", help="JSON lines or parquet: files, or a pattern in quotes.", show_default=False),
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
        typer.Option(metavar="DIR", help="Folder for scores and page.", show_default="watch, next to the first file"),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare the score and other scores with the files' labels, by AUC.")
    ] = False,
    fail_above: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="RATE",
            callback=_finite,
            help="Exit with code 3 if the share above the threshold in the last window exceeds this.",
            show_default="never",
        ),
    ] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Discard the scores in --out and score again.")] = False,
    **options: Any,
) -> None:
    """Score the rollouts of any trainer with the model that training started from, and write an HTML page about them.

    Reads the log of `antipasto train` and TRL's log_completions as they are; for others, name the columns. If interrupted, or
    if the files have grown, the same command continues. Does not need the trained model.
    """
    with readable_errors(load=False):
        config = WatchConfig.from_mapping(options, "antipasto watch")
        check_model_name(base)
        for file in (pairs, monitor):
            if file is not None:
                check_file(file)
        files = find_files([*rollouts, *(more or [])])
    with readable_errors(out, extra="report"):
        from antipasto.app.watch import command

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
        fail(f"{last:.3f} of the rollouts in the last window are above the threshold, more than {fail_above:g}", code=3)


@app.command(rich_help_panel=SHIP)
def export(
    run: Annotated[Path, typer.Argument(help="A run folder of `antipasto train`.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write, new or empty.", show_default=False)],
    dtype: Annotated[
        Dtype,
        typer.Option(help="Dtype of the weights; 'auto': as the base is saved, float32 with --lora."),
    ] = "auto",
    lora: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="RANK",
            help="Write a LoRA adapter of at most this rank instead of a checkpoint.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Maximum size of a checkpoint file, such as 5GB.", show_default="one file up to 50GB"
        ),
    ] = None,
    dial: Annotated[
        float,
        typer.Option(
            min=-1, max=1, callback=_finite, help="Share of the quarantine that ships; see eval --dial for its effect."
        ),
    ] = 0.0,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=_not_nan,
            help="Largest accepted error of a token's log-probability; inf accepts any.",
            show_default="by dtype",
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Maximum number of held-out prompts to check with.")] = 32,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write what ships as a plain checkpoint or a LoRA adapter, without the quarantine and with a model card.

    The export is checked: another process loads it without this library and compares it with the run's model.
    """
    with readable_errors(load=False):
        RunFolder(run).check()
        check_new_folder(out, force=force)
    with readable_errors():
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
