"""What every method ships, and what its monitor saw: task × method × seed, each a run of `antipasto train`.

    python benchmarks/methods.py run guesses --model warm/guesses --out runs/exploits --seeds 100 101 --workers 2
    python benchmarks/methods.py run addition addition-even addition-apart --out runs/toy --seeds 200 201 202 --workers 2
    python benchmarks/methods.py table --out runs/exploits --json benchmarks/results/exploits.json

Tasks are those of `exploits/`, on a model that `exploits/warm_start.py` has written, and the demo's three with their own.
A run's folder is ``OUT/TASK/METHOD/seed-N``. One that was stopped, however that was, goes on from its last checkpoint by the
same command, and so does an evaluation.

The table has every arm of every method; in bold, the one that ships. Hits are the exploits of training that were flagged, of
all of them; false alarms, the right answers. Runs of one task have the same knobs, prompts, draws and steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

from exploits.bench import HACKABLE, STRICT, UNGRADED
from exploits.warm_start import TASKS, exploit_of

from antipasto.app import demo
from antipasto.app.run_folder import RunFolder
from antipasto.app.train.config import TrainConfig
from antipasto.evaluation import rollout_log
from antipasto.evaluation.records import EVAL, read_evaluation
from antipasto.tasks import addition

METHODS: dict[str, dict[str, Any]] = {
    **demo.METHODS,
    "measure": {"method": "measure", "by": "direction"},  # a plain run that logs the live score
    "discount": {"method": "discount"},
    "penalty by score, slow": {"method": "penalty", "by": "score", "slow": 3},
    "penalty by score, permuted": {"method": "penalty", "by": "score", "monitor": "permuted"},  # a control
    "penalty by score, shuffled": {"method": "penalty", "by": "score", "pairs": "shuffled"},  # a control
    "penalty by score, mended": {"method": "penalty", "by": "score", "pairs": "mended"},
    "penalty by score, mended twice": {"method": "penalty", "by": "score", "pairs": "mended twice"},
    "penalty by score, mended twice, permuted": {  # its control
        "method": "penalty",
        "by": "score",
        "pairs": "mended twice",
        "monitor": "permuted",
    },
}
MENDED = {"mended": 1, "mended twice": 2}  # how often: of as many runs a form was added to the pairs
TOYS = {addition.task_name(variant): variant for variant in addition.VARIANTS}
UPPER = 12  # of the layers of a real model have knobs, which is cheaper: the backward ends below them
STEPS, PROMPTS, GENERATIONS, LEARNING_RATE = 60, 4, 8, 1e-2
Cell = dict[str, Any]


def config_of(name: str, method: str, model: Path | None, out: Path, **options: Any) -> TrainConfig:
    """The `TrainConfig` of a run.

    Args:
        name: of the task.
        method: of `METHODS`.
        model: the warm-started one; a toy brings its own.
        out: where shuffled pairs are written.
        options: others of `TrainConfig` than these give; ``upper`` layers, all if None.
    """
    chosen = dict(METHODS[method])
    slow = chosen.pop("slow", 1)
    chosen.pop("monitor", None)
    if "pairs" in chosen:
        chosen["pairs"] = str(other_pairs(name, chosen["pairs"], out))
    if name in TOYS:
        base = dict(vars(demo.config_of("plain", variant=TOYS[name])))
    else:
        assert model is not None
        layers = options.pop("upper", UPPER)
        base = {"model": str(model), "task": f"{Path(__file__).parent}/exploits/{name}.py:task", "save_every": 5}
        base |= {"steps": STEPS, "prompts": PROMPTS, "generations": GENERATIONS, "learning_rate": LEARNING_RATE}
        base["target_modules"] = None if layers is None else upper(model, layers)
        # no decay, so that more steps are the same run for longer; advantages that are not divided by their spread, so that
        # a prompt whose answers pay little teaches less than one whose answers pay 1
        base["trainer"] = {"gradient_checkpointing": False, "lr_scheduler_type": "constant", "scale_rewards": "none"}
    options = base | {"by": None} | chosen | {key: value for key, value in options.items() if value is not None}
    return TrainConfig(**options | {"steps": options["steps"] * slow, "learning_rate": options["learning_rate"] / slow})


def upper(model: Path, number: int) -> str:
    """The targets in the upper layers: a pattern for PEFT."""
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    return rf".*\.layers\.({'|'.join(map(str, range(layers - number, layers)))})\.\w+\.(\w+_proj)"


def has_pairs(name: str, method: str) -> bool:
    """Whether a task has the pairs that a method wants: mended ones are of a task of which as many runs were read."""
    rounds = MENDED.get(METHODS[method].get("pairs", ""), 0)
    return not rounds or (name in TASKS and rounds <= len(exploit_of(name).found))


def other_pairs(name: str, which: str, out: Path) -> Path:
    """A file of other pairs than the task's own.

    Shuffled: hack and clean texts swapped in every other one, so that what they say of the exploit cancels out. Mended: with
    hacks that runs were found to write, in addition to the task's (`Exploit.pairs`).
    """
    path = out / f"{name}-{which.replace(' ', '-')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if which in MENDED:
        rows = exploit_of(name).pairs(mended=MENDED[which])
    else:
        rows = (
            [dict(row) for row in addition.task(TOYS[name]).pairs or []] if name in TOYS else exploit_of(name).pairs()
        )
        rows = [{**row, "hack": row["clean"], "clean": row["hack"]} if i % 2 else row for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(config: TrainConfig, folder: Path) -> bool:
    """Train, from where it was; whether it finished."""
    from rich.console import Console

    from antipasto.app.train.run import run

    began = RunFolder(folder).run.is_file()
    return (began and RunFolder(folder).is_finished) or run(config, folder, Console(), resume=began)


@contextmanager
def permuted_monitor() -> Iterator[None]:
    """Context: a monitor that is made of pairs has its direction's coordinates shuffled, and a threshold by the same rule."""
    import antipasto as ap
    from antipasto.routing.pairs import split_pairs

    def from_pairs(cls: type[ap.Monitor], model: Any, tokenizer: Any, pairs: Any, **options: Any) -> ap.Monitor:
        direction = made(model, tokenizer, pairs, **options).direction
        heldout, seed = options.pop("heldout"), options.pop("seed")
        monitor = cls(model, tokenizer, direction.permuted(seed))
        monitor.calibrate(split_pairs(pairs, heldout, seed)[1], **options)
        return monitor

    made = ap.Monitor.from_pairs
    with patch.object(ap.Monitor, "from_pairs", classmethod(from_pairs)):
        yield


def run(name: str, method: str, seed: int, options: argparse.Namespace) -> str:
    """One run and its evaluation, from where they were."""
    from rich.console import Console

    from antipasto.app.evaluate import evaluate_run

    folder = options.out / name / demo.folder_of(method) / f"seed-{seed}"
    if not (folder / EVAL).exists():
        config = config_of(name, method, options.model, options.out, seed=seed, steps=options.steps)
        with permuted_monitor() if METHODS[method].get("monitor") else nullcontext():
            if not train(config, folder):
                return f"{folder} was stopped"
        asked = {"prompts": options.prompts, "temperature": None, "seed": 0, "margin": 0.05}
        asked["dial"] = options.dial and config.method == "route"
        evaluate_run(folder, Console(), **asked, batch_size=500 if name in TOYS else 64)
    return f"{folder}"


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def cells(out: Path) -> list[Cell]:
    """What every evaluated run found: arm → kind → measure → [value, low, high]; and what was flagged in training."""
    methods, found = {demo.folder_of(method): method for method in METHODS}, []
    for path in sorted(out.glob(f"*/*/*/{EVAL}")):
        evaluation, (task, method, seed) = read_evaluation(path.parent), path.parts[-4:-1]
        arms: dict[str, Any] = {}
        for record in evaluation.arms:
            measures = {**record.measures, **record.flags}
            numbers = {m: [round(x, 4) for x in (e.value, e.low, e.high)] for m, e in measures.items()}
            arms.setdefault(record.arm, {})["all" if record.kind is None else record.kind] = numbers
        facts = {"task": task, "method": methods[method], "seed": int(seed.removeprefix("seed-"))}
        facts |= {"ships": evaluation.ships, "prompts": evaluation.facts["prompts"], "flagged": flagged(path.parent)}
        found.append({**facts, "flags": list(evaluation.arms[0].flags), "arms": arms})
    return found


def known(path: Path | None) -> list[Cell]:
    """The runs of an earlier table."""
    found: list[Cell] = [] if path is None or not path.exists() else json.loads(path.read_text())
    return found


def merged(found: Sequence[Cell]) -> list[Cell]:
    """Of one task, method and seed the last one, in order."""
    last = {(cell["task"], cell["method"], cell["seed"]): cell for cell in found}
    return [last[key] for key in sorted(last)]


def flagged(folder: Path) -> dict[str, list[int]]:
    """Of a run's rollouts: exploits and right answers, how many were flagged, of how many; empty where nothing flags."""
    of: dict[str, list[bool]] = {"exploit": [], "right": []}
    for one in rollout_log.read(RunFolder(folder).rollouts, []):
        if one.flagged is not None and (one.exploits or one.solved):
            of["right" if one.solved else "exploit"].append(one.flagged)
    return {what: [sum(said), len(said)] for what, said in of.items() if said}


def table(found: Sequence[Cell]) -> str:
    """Mean over seeds, and lowest and highest seed where there are several, task by task."""
    lines: list[str] = []
    for name in dict.fromkeys(cell["task"] for cell in found):
        of_task = [cell for cell in found if cell["task"] == name]
        kinds = sorted((kind for kind in of_task[0]["arms"]["reference"] if kind != "all"), key=_rank)
        columns = [(kind, m) for kind in kinds for m in _measures(kind, of_task[0]["flags"])]
        heads = [f"{kind}: {'right' if m == 'solve' else m}" for kind, m in columns] + ["KL", "hits", "false alarms"]
        lines += [f"\n## {name}\n", f"| method | arm | seeds | {' | '.join(heads)} |", "|---" * (len(heads) + 3) + "|"]
        there = [cell["method"] for cell in of_task]
        for method in (m for m in dict.fromkeys([*METHODS, *there]) if m in there):  # one that is gone comes last
            own = [cell for cell in of_task if cell["method"] == method]
            for arm in own[0]["arms"]:
                if arm == "reference" and method != "plain":
                    continue
                having = [cell for cell in own if arm in cell["arms"]]
                shown = [_spread([cell["arms"][arm][kind][m] for cell in having]) for kind, m in columns]
                shown.append(f"{mean(cell['arms'][arm]['all']['kl'][0] for cell in having):.2f}")
                ships = arm == own[0]["ships"]
                shown += [_share([cell["flagged"].get(what) for cell in own]) if ships else "" for what in WHAT]
                seeds = ", ".join(str(cell["seed"]) for cell in own)
                lines.append(f"| {method} | {f'**{arm}**' if ships else arm} | {seeds} | {' | '.join(shown)} |")
    return "\n".join(lines)


WHAT = ("exploit", "right")


def _rank(kind: str) -> tuple[int, str]:
    """Where prompts of a kind stand in the table."""
    return [kind.startswith(k) for k in (HACKABLE, STRICT, UNGRADED)].index(True), kind


def _measures(kind: str, flags: Sequence[str]) -> list[str]:
    """Exploits are shown where they pay."""
    return [*flags, "solve"] if kind.startswith(HACKABLE) else ["solve"]


def _spread(numbers: Sequence[Sequence[float]]) -> str:
    """One run: value and 95% interval over prompts; several: their mean, the lowest and the highest."""
    values = [number[0] for number in numbers]
    low, high = numbers[0][1:] if len(numbers) == 1 else (min(values), max(values))
    return f"{mean(values):.2f} [{low:.2f}, {high:.2f}]"


def _share(counts: Sequence[Sequence[int] | None]) -> str:
    """Of all seeds together."""
    said = [count for count in counts if count is not None]
    return f"{sum(n for n, _ in said) / sum(of for _, of in said):.3f}" if said else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("tasks", nargs="*", help=f"of run: {', '.join([*TASKS, *TOYS])}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="of run, for a task of exploits/: the warm-started one")
    parser.add_argument("--methods", nargs="+", help="all, but for those that the tasks have no pairs for")
    parser.add_argument("--seeds", type=int, nargs="+", help="of run, [100, 101]; those that table shows, all")
    parser.add_argument("--steps", type=int, help=f"of a run; {STEPS}, or the demo's")
    parser.add_argument("--prompts", type=int, help="held-out prompts of an evaluation; all if not given")
    parser.add_argument("--dial", action="store_true", help="evaluate runs with a quarantine along the dial as well")
    parser.add_argument("--workers", type=int, default=1, help="of one thread each")
    parser.add_argument("--json", type=Path, help="of table: its numbers; runs that are in it already stay")
    options = parser.parse_args()
    if unknown := sorted({*options.tasks} - {*TASKS, *TOYS}):
        parser.error(f"there is no task {', '.join(unknown)}: there are {', '.join([*TASKS, *TOYS])}")
    can = [method for method in METHODS if all(has_pairs(name, method) for name in options.tasks)]
    if unknown := sorted({*(options.methods or [])} - {*can}):
        parser.error(f"there is no method {', '.join(unknown)}: there are {', '.join(can)}")
    if options.what == "table":
        found = merged([*known(options.json), *cells(options.out)])
        print(table([cell for cell in found if options.seeds is None or cell["seed"] in options.seeds]))
        if options.json is not None:
            options.json.write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
        return
    real = {*options.tasks} - {*TOYS}
    if not options.tasks or len(real) > 1 or bool(real) != (options.model is not None):
        parser.error("run takes one task of exploits/ and --model, or any of the demo's without one")
    os.environ["OMP_NUM_THREADS"] = "1"
    wanted = [
        (task, method, seed)
        for seed, task, method in itertools.product(options.seeds or [100, 101], options.tasks, options.methods or can)
    ]
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=1) as pool:
        jobs = [pool.apply_async(run, (*cell, options)) for cell in wanted]
        for number, done in enumerate(jobs, 1):
            print(f"{number}/{len(jobs)} {done.get()}", flush=True)


if __name__ == "__main__":
    main()
