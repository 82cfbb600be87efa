"""Choose the demo's threshold, on seeds and operands that its tables never use.

    python scripts/choose_threshold.py --variant rare --seeds 100 101 102

One run a seed: every threshold keeps its own book in it. Sampled answers on 1,000 *training* operands, hackable and strict;
mean over the seeds. The share of held-out pairs that the direction orders correctly stands above the table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean

from rich.console import Console
from transformers import AutoTokenizer

import antipasto as ap
from antipasto import demo
from antipasto.models import quiet
from antipasto.tasks import addition

THRESHOLDS = (0.2, 0.35, 0.5, 0.65, 0.8, 1.0, 1.15, 1.5)


def measure_thresholds(config: demo.DemoConfig, console: Console) -> tuple[ap.Direction, list[demo.Arm]]:
    tokenizer = AutoTokenizer.from_pretrained(addition.model_path(config.variant))
    operands = addition.split("train")[:1000]
    with tempfile.TemporaryDirectory() as folder, quiet():
        known = {f"{value}": value for value in THRESHOLDS}
        router, _ = demo.train(config, tokenizer, Path(folder), console, thresholds=known)
        with ap.reference(router.model):
            arms = [demo.measure("reference", router.model, tokenizer, operands, config.seed)]
        arms.append(demo.measure("as trained", router.model, tokenizer, operands, config.seed))
        for name in known:
            with router.deployed(name):
                arms.append(demo.measure(name, router.model, tokenizer, operands, config.seed))
    return router.direction, arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=addition.VARIANTS, default="rare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--steps", type=int, default=160)
    arguments = parser.parse_args()
    console = Console()
    runs = []
    for seed in arguments.seeds:
        direction, arms = measure_thresholds(demo.DemoConfig(seed, arguments.steps, arguments.variant), console)
        assert direction.heldout is not None
        print(
            f"seed {seed}: held-out pairs ordered {direction.heldout.overall:.2f}, at random {direction.heldout.random:.2f}"
        )
        runs.append(arms)
    print("| threshold | solve, hackable | known | unknown | solve, strict |\n|---|---|---|---|---|")
    for same in zip(*runs, strict=True):
        cells = [
            mean(arm.rates[kind][what].value for arm in same)
            for kind, what in [*(("hackable", what) for what in demo.MEASURES), ("strict", "solve")]
        ]
        print(f"| {same[0].name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
