"""Choose the demo's threshold, on seeds and operands that its tables never use.

    python scripts/choose_threshold.py --variant rare --seeds 100 101 102
    python scripts/choose_threshold.py --variant apart --seeds 100 101 --label-both

One run of the recipe for each threshold and seed, about 40 s each. Sampled answers of the deployed model on 1,000 *training*
operands, by kind of prompt; mean over the seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean

from rich.console import Console
from transformers import AutoTokenizer

import antipasto as ap
from antipasto.app.demo import job
from antipasto.app.models import quiet
from antipasto.evaluation.records import DEPLOYED, REFERENCE, Evaluation
from antipasto.tasks import addition

THRESHOLDS = (0.5, 0.65, 0.8, 1.0, 1.15)


def deployed_arm(config: job.DemoConfig, threshold: float, console: Console, *, label_both: bool) -> Evaluation:
    tokenizer = AutoTokenizer.from_pretrained(addition.model_path(config.variant))
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = job.train(
            config, "recipe", tokenizer, Path(folder), console, threshold=threshold, label_both=label_both
        )
        arms = {REFERENCE: ap.reference(trainer.model), DEPLOYED: ap.deployed(trainer.model)}
        return job.evaluate(trainer.model, arms, tokenizer, addition.split("train")[:1000], config, console)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=addition.VARIANTS, default="rare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    parser.add_argument("--label-both", action="store_true", help="half of the pairs show `?`")
    arguments = parser.parse_args()
    console = Console()
    for threshold in arguments.thresholds:
        found = [
            deployed_arm(
                job.DemoConfig(seed, arguments.steps, arguments.variant),
                threshold,
                console,
                label_both=arguments.label_both,
            )
            for seed in arguments.seeds
        ]
        if threshold == arguments.thresholds[0]:
            print("| threshold | prompts | solve | known | unknown |\n|---|---|---|---|---|")
        for kind in found[0].kinds:
            arms = [arm for evaluation in found if (arm := evaluation.arm(DEPLOYED, kind)) is not None]
            cells = [mean(arm.measures["solve"].value for arm in arms)]
            cells += [mean(arm.flags[flag].value for arm in arms) for flag in arms[0].flags]
            print(f"| {threshold} | {kind} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
