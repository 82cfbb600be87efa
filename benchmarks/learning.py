"""Reward against steps, for adapters of different kinds: what does a trainable number learn?

    python benchmarks/learning.py --json demo.json                          # the demo's task, 160 steps
    python benchmarks/learning.py --model PATH --steps 24 --json real.json  # a chat model on `contains`
    python benchmarks/learning.py --draw demo.json real.json --to learning.svg

Plain GRPO, no router, with each adapter at three learning rates and several seeds; of the learning rates, the one with the
highest mean reward over the last window counts, averaged over seeds. Shown is the mean reward of the window before each mark,
mean ± standard deviation over seeds. What fools the grader counts too: this is about learning what is rewarded, not about
what ought to be.

The demo's task: `antipasto demo`'s own settings and prompts, variant even, windows of 20 steps. ``contains``, for a model such
as SmolLM2-135M-Instruct: 4 prompts x 8 rollouts of up to 24 tokens a step, temperature 1, no KL, linear decay, windows of
4 steps; with ``--explore-seeds`` the learning rate is chosen on fewer seeds than are then shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
from contestants import TARGETS, trainable
from datasets import Dataset
from rich.console import Console
from transformers import AutoTokenizer, PrinterCallback, Trainer

import antipasto as ap
from antipasto.demo import job
from antipasto.models import load_model, quiet
from antipasto.tasks import addition, load_task
from antipasto.trl import GRPOConfig, GRPOTrainer

ADAPTERS: dict[str, tuple[peft.PeftConfig, tuple[float, ...]]] = {
    "full rank": (ap.AntiPastoConfig(), (3e-3, 1e-2, 3e-2)),
    "rank 64": (ap.AntiPastoConfig(rank=64), (3e-3, 1e-2, 3e-2)),
    "rank 16": (ap.AntiPastoConfig(rank=16), (3e-3, 1e-2, 3e-2)),
    "LoRA r=16": (peft.LoraConfig(r=16, target_modules=TARGETS), (3e-4, 1e-3, 3e-3)),
    "LoRA r=1": (peft.LoraConfig(r=1, target_modules=TARGETS), (3e-4, 1e-3, 3e-3)),
    "TinyLoRA u=64": (peft.TinyLoraConfig(u=64, target_modules=TARGETS), (3e-4, 1e-3, 3e-3)),
}
MARKS: dict[str, tuple[int, tuple[int, ...]]] = {
    "demo": (20, (20, 40, 80, 120, 160)),
    "contains": (4, (4, 8, 12, 16, 24)),
}
Train = Callable[[peft.PeftConfig, float, int], Trainer]


def on_demo(steps: int, variant: str) -> Train:
    """The demo's task."""
    tokenizer = AutoTokenizer.from_pretrained(addition.model_path(variant))

    def train(adapter: peft.PeftConfig, learning_rate: float, seed: int) -> Trainer:
        config = job.DemoConfig(seed, steps, variant)
        console = Console(quiet=True)
        with tempfile.TemporaryDirectory() as folder:
            return job.train(
                config, "plain", tokenizer, Path(folder), console, adapter=adapter, learning_rate=learning_rate
            )

    return train


def on_contains(steps: int, model_path: str) -> Train:
    """A chat model on `contains`."""
    task = load_task("contains")

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        return task.ask("reward", prompts, completions, {name: columns[name] for name in task.columns})

    def train(adapter: peft.PeftConfig, learning_rate: float, seed: int) -> Trainer:
        model, tokenizer = load_model(model_path, dtype="float32")
        with tempfile.TemporaryDirectory() as folder:
            args = GRPOConfig(
                output_dir=folder,
                max_steps=steps,
                seed=seed,
                per_device_train_batch_size=32,
                num_generations=8,
                max_completion_length=24,
                temperature=1.0,
                beta=0.0,
                learning_rate=learning_rate,
                lr_scheduler_type="linear",
                bf16=False,
                gradient_checkpointing=False,
                dataloader_pin_memory=False,
                save_strategy="no",
                report_to="none",
                logging_steps=1,
                disable_tqdm=True,
            )
            trainer = GRPOTrainer(
                model=model,
                args=args,
                reward_funcs=reward,
                train_dataset=Dataset.from_list([dict(row) for row in task.train]),
                processing_class=tokenizer,
                peft_config=adapter,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return trainer

    return train


def curve(train: Train, adapter: peft.PeftConfig, learning_rate: float, seed: int) -> tuple[list[float], int]:
    """The mean reward of every step, and the number of trainable numbers."""
    with quiet():
        trainer = train(adapter, learning_rate, seed)
    log: list[dict[str, Any]] = trainer.state.log_history
    return [row["reward"] for row in log if "reward" in row], sum(p.numel() for p in trainable(trainer.model))


def last(curves: list[list[float]], window: int) -> float:
    """Mean reward of the last window, over the seeds."""
    return statistics.mean(statistics.mean(one[-window:]) for one in curves)


def measure(train: Train, name: str, seeds: list[int], explore_seeds: int, window: int) -> dict[str, Any]:
    """All runs of one adapter: those that choose the learning rate, and the other seeds at that rate."""
    adapter, rates = ADAPTERS[name]
    curves: dict[float, list[list[float]]] = {rate: [] for rate in rates}
    for rate in rates:
        for seed in seeds[:explore_seeds]:
            one, numbers = curve(train, adapter, rate, seed)
            curves[rate].append(one)
    best = max(rates, key=lambda rate: last(curves[rate], window))
    curves[best] += [curve(train, adapter, best, seed)[0] for seed in seeds[explore_seeds:]]
    return {"numbers": numbers, "best": best, "curves": {str(rate): runs for rate, runs in curves.items()}}


def draw(results: list[Path], to: Path) -> None:
    """Mean and range over the seeds of every adapter at its best learning rate, a panel for each result."""
    import matplotlib.pyplot as plt  # the extra `plots`; nothing else here needs it

    figure, panels = plt.subplots(1, len(results), figsize=(6.8 * len(results), 3.6), squeeze=False)
    for panel, path in zip(panels[0], results, strict=True):
        result = json.loads(path.read_text())
        window, _ = MARKS[result["task"]]
        for name, one in result["adapters"].items():
            runs = one["curves"][str(one["best"])]
            smooth = [[statistics.mean(run[max(0, s - window) : s]) for s in range(1, len(run) + 1)] for run in runs]
            steps, by_step = range(1, len(smooth[0]) + 1), list(zip(*smooth, strict=True))
            (line,) = panel.plot(
                steps, [statistics.mean(values) for values in by_step], label=f"{name} ({one['numbers']:,})"
            )
            panel.fill_between(steps, *zip(*((min(v), max(v)) for v in by_step), strict=True), alpha=0.15)
            line.set_linewidth(1.6)
        panel.set(title=result["title"], xlabel="step", ylabel=f"reward, mean of {window} steps")
        panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--explore-seeds", type=int, help="how many of them choose the learning rate; all")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--model", help="a chat model, on `contains`; without, the demo's task")
    parser.add_argument("--variant", choices=addition.VARIANTS, default="even", help="of the demo's task")
    parser.add_argument("--only", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    parser.add_argument("--json", type=Path, help="write every curve here")
    parser.add_argument("--draw", type=Path, nargs="+", help="draw these files instead of measuring")
    parser.add_argument("--to", type=Path, default=Path("learning.svg"))
    arguments = parser.parse_args()
    if arguments.draw:
        draw(arguments.draw, arguments.to)
        return
    task = "contains" if arguments.model else "demo"
    train = (
        on_contains(arguments.steps, arguments.model)
        if arguments.model
        else on_demo(arguments.steps, arguments.variant)
    )
    window, marks = MARKS[task]
    marks = tuple(step for step in marks if step <= arguments.steps)
    print("| adapter | numbers | best lr | " + " | ".join(f"step {step}" for step in marks) + " |")
    print("|---" * (3 + len(marks)) + "|")
    title = f"{Path(arguments.model).name} on contains" if arguments.model else f"the demo's task, {arguments.variant}"
    everything: dict[str, Any] = {"task": task, "title": title, "seeds": arguments.seeds, "adapters": {}}
    for name in arguments.only:
        result = measure(train, name, arguments.seeds, arguments.explore_seeds or len(arguments.seeds), window)
        cells = []
        for step in marks:
            values = [
                statistics.mean(one[max(0, step - window) : step]) for one in result["curves"][str(result["best"])]
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
