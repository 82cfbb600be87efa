"""Choose the demo's threshold, on seeds and operands that its tables never use.

    python scripts/choose_threshold.py --variant rare --seeds 100 101 102

One run of the recipe for each threshold and seed, about 40 s each. Sampled answers of the deployed model on 1,000 *training*
operands, hackable and strict; mean over the seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean

from rich.console import Console
from transformers import AutoTokenizer

import antipasto as ap
from antipasto.demo import job
from antipasto.demo.story import MEASURES, Arm
from antipasto.models import quiet
from antipasto.tasks import addition

THRESHOLDS = (0.5, 0.65, 0.8, 1.0, 1.15)


def deployed_arm(config: job.DemoConfig, threshold: float, console: Console) -> Arm:
    tokenizer = AutoTokenizer.from_pretrained(addition.model_path(config.variant))
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = job.train(config, "recipe", tokenizer, Path(folder), console, threshold=threshold)
        with ap.deployed(trainer.model):
            return job.measure(f"{threshold}", trainer.model, tokenizer, addition.split("train")[:1000], config.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=addition.VARIANTS, default="rare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    arguments = parser.parse_args()
    console = Console()
    print("| threshold | solve, hackable | known | unknown | solve, strict |\n|---|---|---|---|---|")
    for threshold in arguments.thresholds:
        arms = [
            deployed_arm(job.DemoConfig(seed, arguments.steps, arguments.variant), threshold, console)
            for seed in arguments.seeds
        ]
        cells = [
            mean(arm.rates[kind][what].value for arm in arms)
            for kind, what in [*(("hackable", what) for what in MEASURES), ("strict", "solve")]
        ]
        print(f"| {threshold} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
