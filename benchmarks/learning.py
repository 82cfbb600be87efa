"""Reward against steps, for adapters of different kinds: what does a trainable number learn?

    python benchmarks/learning.py --json demo.json                          # the demo's task, 160 steps
    python benchmarks/learning.py --draw demo.json --to learning.svg
    python benchmarks/learning.py --json keep.json --explore-seeds 1 --only "rank 16" --keep top bottom spread pairs
    python benchmarks/learning.py --json keep-guesses.json --task guesses --model warm/guesses --steps 40 --seeds 100 \
        --rates 1e-2 --only "rank 16" --keep top bottom spread pairs

Plain GRPO, no router, with each adapter at three learning rates and several seeds; of the learning rates, the one with the
highest mean reward over the last window counts, averaged over seeds. Shown is the mean reward of the window before each mark,
mean ± standard deviation over seeds. What fools the grader counts too: this is about learning what is rewarded, not about
what ought to be.

The demo's task: `antipasto demo`'s own settings and prompts, variant even, windows of 20 steps; with ``--explore-seeds`` the
learning rate is chosen on fewer seeds than are then shown. With ``--task``, one of exploits/, on a model that
exploits/warm_start.py has written, with the settings of methods.py: knobs on the upper layers alone.

With ``--keep``, which singular directions a layer keeps at a rank below its own: those of the largest singular values, as the
library does; of the smallest; evenly spread over the spectrum; or those with the largest effect sizes of the task's pairs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args
from unittest.mock import patch

import peft
import torch
from contestants import TARGETS, trainable
from datasets import Dataset
from exploits.warm_start import TASKS, exploit_of
from methods import config_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer
from trl import GRPOTrainer

import antipasto as ap
from antipasto.adapter.basis import Basis
from antipasto.app import demo
from antipasto.app.models import quiet
from antipasto.app.train.config import TrainConfig
from antipasto.app.train.trl_args import trainer_args
from antipasto.tasks import Task, addition

ADAPTERS: dict[str, tuple[peft.PeftConfig, tuple[float, ...]]] = {
    "full rank": (ap.AntiPastoConfig(), (3e-3, 1e-2, 3e-2)),
    "rank 64": (ap.AntiPastoConfig(rank=64), (3e-3, 1e-2, 3e-2)),
    "rank 16": (ap.AntiPastoConfig(rank=16), (3e-3, 1e-2, 3e-2)),
    "LoRA r=16": (peft.LoraConfig(r=16, target_modules=TARGETS), (3e-4, 1e-3, 3e-3)),
    "LoRA r=1": (peft.LoraConfig(r=1, target_modules=TARGETS), (3e-4, 1e-3, 3e-3)),
    "TinyLoRA u=64": (peft.TinyLoraConfig(u=64, target_modules=TARGETS), (3e-4, 1e-3, 3e-3)),
}
WINDOW, MARKS = 20, (20, 40, 80, 120, 160)
Keep = Literal["top", "bottom", "spread", "pairs"]


@dataclass(frozen=True)
class Problem:
    """What is learned: a task, and the options of a plain run on it, by seed, steps and learning rate."""

    title: str
    task: Task
    config_of: Callable[..., TrainConfig]

    def train(self, adapter: peft.PeftConfig, learning_rate: float, seed: int, steps: int) -> Trainer:
        """By TRL's own trainer: an adapter needs no other."""
        config = self.config_of(seed=seed, steps=steps, learning_rate=learning_rate)
        config.trainer["save_strategy"] = "no"
        with tempfile.TemporaryDirectory() as folder:
            trainer = GRPOTrainer(
                model=AutoModelForCausalLM.from_pretrained(config.model),
                args=trainer_args(config, self.task, Path(folder), 1),
                reward_funcs=self.task.reward_func(),
                train_dataset=Dataset.from_list([dict(row) for row in self.task.train]),
                processing_class=AutoTokenizer.from_pretrained(config.model, padding_side="left"),
                peft_config=on_targets(adapter, config),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return trainer


def on_targets(adapter: peft.PeftConfig, config: TrainConfig) -> peft.PeftConfig:
    """The same adapter, on the layers that a run adapts."""
    adapter = copy.copy(adapter)
    if config.target_modules is not None:
        adapter.target_modules = config.target_modules
    return adapter


def of_the_demo(variant: str) -> Problem:
    return Problem(
        f"the demo's task, {variant}", addition.task(variant), partial(demo.config_of, "plain", variant=variant)
    )


def of_the_bench(name: str, model: Path) -> Problem:
    return Problem(name, exploit_of(name).task(), partial(config_of, name, "plain", model, Path()))


@contextmanager
def keeping(which: Keep, problem: Problem) -> Iterator[None]:
    """While it is open, a basis that is cut to a rank keeps these of its directions."""
    effects: dict[float, torch.Tensor] = {}  # sum of a basis's singular values → its effect sizes
    if which == "pairs":
        config = problem.config_of(seed=0, steps=1, learning_rate=1e-2)
        model, tokenizer = (kind.from_pretrained(config.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
        layers = ap.wrap(model, config.adapter())
        direction = ap.extract_direction(model, tokenizer, ap.load_pairs(problem.task.pairs or []))
        assert direction.effect is not None
        effects = {float(layers[name].S.sum()): effect.abs() for name, effect in direction.effect.items()}

    def truncate(basis: Basis, rank: int) -> Basis:
        r = basis.rank
        if rank >= r:
            return basis
        kept = {
            "top": lambda: torch.arange(rank),
            "bottom": lambda: torch.arange(r - rank, r),
            "spread": lambda: torch.linspace(0, r - 1, rank).round().long(),
            "pairs": lambda: effects[float(basis.S.sum())].topk(rank).indices.sort().values,
        }[which]()
        return Basis(basis.U[:, kept].clone(), basis.S[kept].clone(), basis.Vh[kept].clone())

    with (
        tempfile.TemporaryDirectory() as own,  # a cache of its own: the files of the usual one hold the top directions
        patch.dict(os.environ, {"ANTIPASTO_CACHE": own}),
        patch.object(Basis, "truncate", truncate),
    ):
        yield


def curve(train: Callable[..., Trainer], *run: Any) -> tuple[list[float], int]:
    """The mean reward of every step, and the number of trainable numbers."""
    with quiet():
        trainer = train(*run)
    log: list[dict[str, Any]] = trainer.state.log_history
    return [row["reward"] for row in log if "reward" in row], sum(p.numel() for p in trainable(trainer.model))


def last(curves: list[list[float]]) -> float:
    """Mean reward of the last window, over the seeds."""
    return statistics.mean(statistics.mean(one[-WINDOW:]) for one in curves)


def measure(train: Callable[..., Trainer], name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All runs of one adapter: those that choose the learning rate, and the other seeds at that rate."""
    adapter, rates = ADAPTERS[name]
    seeds, steps = options.seeds, options.steps
    explore = options.explore_seeds or len(seeds)
    curves: dict[float, list[list[float]]] = {rate: [] for rate in options.rates or rates}
    for rate in curves:
        for seed in seeds[:explore]:
            one, numbers = curve(train, adapter, rate, seed, steps)
            curves[rate].append(one)
    best = max(curves, key=lambda rate: last(curves[rate]))
    curves[best] += [curve(train, adapter, best, seed, steps)[0] for seed in seeds[explore:]]
    return {"numbers": numbers, "best": best, "curves": {str(rate): runs for rate, runs in curves.items()}}


def draw(results: list[Path], to: Path) -> None:
    """Mean and range over the seeds of every adapter at its best learning rate, a panel for each result."""
    import matplotlib.pyplot as plt  # the extra `plots`; nothing else here needs it

    figure, panels = plt.subplots(1, len(results), figsize=(6.8 * len(results), 3.6), squeeze=False)
    for panel, path in zip(panels[0], results, strict=True):
        result = json.loads(path.read_text())
        for name, one in result["adapters"].items():
            runs = one["curves"][str(one["best"])]
            smooth = [[statistics.mean(run[max(0, s - WINDOW) : s]) for s in range(1, len(run) + 1)] for run in runs]
            steps, by_step = range(1, len(smooth[0]) + 1), list(zip(*smooth, strict=True))
            (line,) = panel.plot(
                steps, [statistics.mean(values) for values in by_step], label=f"{name} ({one['numbers']:,})"
            )
            panel.fill_between(steps, *zip(*((min(v), max(v)) for v in by_step), strict=True), alpha=0.15)
            line.set_linewidth(1.6)
        panel.set(title=result["title"], xlabel="step", ylabel=f"reward, mean of {WINDOW} steps")
        panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--explore-seeds", type=int, help="how many of them choose the learning rate; all")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--variant", choices=addition.VARIANTS, default="even", help="of the demo's task")
    parser.add_argument("--task", choices=TASKS, help="one of exploits/ instead, with --model")
    parser.add_argument("--model", type=Path, help="that exploits/warm_start.py has written")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates; those of the adapter")
    parser.add_argument("--only", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    parser.add_argument(
        "--keep", nargs="+", choices=get_args(Keep), default=["top"], help="which directions, at a rank"
    )
    parser.add_argument("--json", type=Path, help="write every curve here")
    parser.add_argument("--draw", type=Path, nargs="+", help="draw these files instead of measuring")
    parser.add_argument("--to", type=Path, default=Path("learning.svg"))
    arguments = parser.parse_args()
    if arguments.draw:
        draw(arguments.draw, arguments.to)
        return
    if (arguments.task is None) != (arguments.model is None):
        parser.error("--task and --model go together")
    problem = of_the_bench(arguments.task, arguments.model) if arguments.task else of_the_demo(arguments.variant)
    marks = tuple(step for step in MARKS if step <= arguments.steps)
    print("| adapter | numbers | best lr | " + " | ".join(f"step {step}" for step in marks) + " |")
    print("|---" * (3 + len(marks)) + "|")
    everything: dict[str, Any] = {"title": problem.title, "seeds": arguments.seeds, "adapters": {}}
    for name, keep in itertools.product(arguments.only, arguments.keep):
        with keeping(keep, problem):
            result = measure(problem.train, name, arguments)
        name = name if arguments.keep == ["top"] else f"{name}, {keep}"
        cells = []
        for step in marks:
            values = [
                statistics.mean(one[max(0, step - WINDOW) : step]) for one in result["curves"][str(result["best"])]
            ]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        print(f"| {name} | {result['numbers']:,} | {result['best']:g} | " + " | ".join(cells) + " |", flush=True)
        everything["adapters"][name] = result
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(everything) + "\n")


if __name__ == "__main__":
    main()
