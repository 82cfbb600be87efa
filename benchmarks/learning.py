"""Reward against steps on the demo's task, for adapters of different kinds: what does a trainable number learn?

    python benchmarks/learning.py --json benchmarks/results/learning.json

Plain GRPO (`antipasto demo`'s own settings and prompts, variant even, no router) with each adapter at three learning rates and
three seeds; of the learning rates, the one with the highest mean reward over the last 20 steps counts, averaged over seeds.
Shown is the mean reward of the 20 steps before each mark, mean ± standard deviation over seeds. Both kinds of prompt count, so
does what fools the grader: this is about learning what is rewarded, not about what ought to be.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import peft
from contestants import TARGETS, trainable
from rich.console import Console
from transformers import AutoTokenizer

import antipasto as ap
from antipasto.demo import job
from antipasto.models import quiet
from antipasto.tasks import addition

ADAPTERS: dict[str, tuple[peft.PeftConfig, tuple[float, ...]]] = {
    "full rank": (ap.AntiPastoConfig(), (3e-3, 1e-2, 3e-2)),
    "rank 64": (ap.AntiPastoConfig(rank=64), (3e-3, 1e-2, 3e-2)),
    "rank 16": (ap.AntiPastoConfig(rank=16), (3e-3, 1e-2, 3e-2)),
    "LoRA r=16": (peft.LoraConfig(r=16, target_modules=TARGETS), (1e-3, 3e-3, 1e-2)),
    "LoRA r=1": (peft.LoraConfig(r=1, target_modules=TARGETS), (1e-3, 3e-3, 1e-2)),
    "TinyLoRA u=64": (peft.TinyLoraConfig(u=64, target_modules=TARGETS), (1e-4, 3e-4, 1e-3)),
}
WINDOW = 20


def rewards(
    adapter: peft.PeftConfig, learning_rate: float, seed: int, steps: int, variant: str
) -> tuple[list[float], int]:
    """The mean reward of every step, and the number of trainable numbers."""
    tokenizer = AutoTokenizer.from_pretrained(addition.model_path(variant))
    with tempfile.TemporaryDirectory() as folder, quiet():
        config = job.DemoConfig(seed, steps, variant)
        trainer = job.train(
            config, "plain", tokenizer, Path(folder), Console(quiet=True), adapter=adapter, learning_rate=learning_rate
        )
    log: list[dict[str, Any]] = trainer.state.log_history
    return [row["reward"] for row in log if "reward" in row], sum(p.numel() for p in trainable(trainer.model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--variant", choices=addition.VARIANTS, default="even")
    parser.add_argument("--only", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    marks = [step for step in (20, 40, 80, 120, 160) if step <= arguments.steps]
    print("| adapter | numbers | best lr | " + " | ".join(f"step {step}" for step in marks) + " |")
    print("|---" * (3 + len(marks)) + "|")
    everything: dict[str, Any] = {}
    for name in arguments.only:
        adapter, rates = ADAPTERS[name]
        runs: dict[float, list[list[float]]] = {}
        for rate in rates:
            results = [rewards(adapter, rate, seed, arguments.steps, arguments.variant) for seed in arguments.seeds]
            runs[rate], numbers = [curve for curve, _ in results], results[0][1]
        best = max(rates, key=lambda rate: statistics.mean(sum(curve[-WINDOW:]) for curve in runs[rate]))
        cells = []
        for step in marks:
            values = [statistics.mean(curve[max(0, step - WINDOW) : step]) for curve in runs[best]]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        print(f"| {name} | {numbers:,} | {best:g} | " + " | ".join(cells) + " |", flush=True)
        everything[name] = {
            "numbers": numbers,
            "best": best,
            "curves": {str(rate): curves for rate, curves in runs.items()},
        }
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps({"seeds": arguments.seeds, "adapters": everything}) + "\n")


if __name__ == "__main__":
    main()
