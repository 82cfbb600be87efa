"""A step of TRL's GRPO by every contestant, and what deployed sampling with a direction, and a monitor, add: ratios.

    python benchmarks/grpo_cost.py --rounds 5

The trunk of SmolLM2-135M's shapes with random weights and the demo's 18-token head, fp32, all 210 Linears adapted at full
rank unless the variant is another contestant (`contestants.py`); one step samples 16 rollouts of 16 tokens for 2 prompts
and trains on them, by TRL's own loop, generation included.
Variants take turns in every round; each ratio is to the plain step of the same round, with a KL term where the variant has
one, given as median [min, max] over the rounds, by the wall clock and by the process's own CPU time, which other work on
the machine disturbs less. The monitor scores every rollout at the reference, and its flags cost a rollout its reward.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from typing import Any

import torch
from contestants import CONTESTANTS, make_model
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

import antipasto as ap
from antipasto.app.models import quiet
from antipasto.tasks import addition
from antipasto.trl import GRPOConfig, GRPOTrainer, RoutedGRPOTrainer

STEPS = 3  # of which the first warms up
OTHERS = [name for name in CONTESTANTS if name not in ("bare", "full")]
VARIANTS = ["plain", *OTHERS, "direction, deployed sampling", "monitor"]
VARIANTS += ["plain, KL term", "monitor, KL term"]


class Clock(TrainerCallback):
    """Seconds of every step but the first: wall clock and CPU."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append((time.perf_counter() - self._start[0], time.process_time() - self._start[1]))


def random_direction(model: nn.Module) -> ap.Direction:
    generator = torch.Generator().manual_seed(0)
    effect = {name: torch.randn(layer.r, generator=generator) for name, layer in ap.knobs(model).items()}
    return ap.Direction({name: t / t.norm() for name, t in effect.items()}, effect=effect)


def make_router(model: nn.Module) -> ap.Router:
    v = random_direction(model)
    return ap.Router(model, v, controls={"random": v.random(1), "permuted": v.permuted(1)})


def seconds(variant: str, layers: int, folder: str) -> tuple[float, float]:
    """Medians of a short run."""
    args = GRPOConfig(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=16,
        beta=0.04 if variant.endswith("KL term") else 0.0,
        learning_rate=1e-3,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    draws = itertools.count()
    options: dict[str, Any] = {
        "model": CONTESTANTS[variant if variant in OTHERS else "full"](make_model(layers=layers, vocabulary=18)),
        "args": args,
        # right and wrong in every group: no rollout is without an advantage
        "reward_funcs": lambda completions, **_: [float(next(draws) % 3 == 0) for _ in completions],
        "train_dataset": Dataset.from_list([{"prompt": addition.prompt("h", p)} for p in addition.split("train")[:64]]),
        "processing_class": AutoTokenizer.from_pretrained(addition.model_path()),
    }
    trainer: GRPOTrainer
    if variant.startswith("plain") or variant in OTHERS:
        trainer = GRPOTrainer(**options)
    elif variant.startswith("monitor"):
        trainer = RoutedGRPOTrainer(
            **options,
            monitor=lambda model: ap.Monitor(
                model, options["processing_class"], random_direction(model), threshold=0.0
            ),
            flagged="penalty",
        )
    else:
        trainer = RoutedGRPOTrainer(**options, router=make_router)
    trainer.remove_callback(PrinterCallback)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    wall, cpu = zip(*clock.steps[1:], strict=True)
    return statistics.median(wall), statistics.median(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, help="'plain' is always measured")
    arguments = parser.parse_args()
    variants = [v for v in VARIANTS if v in arguments.only or v.startswith("plain")]
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder, quiet():
        for number in range(arguments.rounds):
            start = number % len(variants)
            for variant in variants[start:] + variants[:start]:  # nobody is always first
                times[variant].append(seconds(variant, arguments.layers, folder))
    print(f"{torch.get_num_threads()} threads, {arguments.rounds} rounds")
    print("| step | median s | ratio to plain, wall clock | ratio to plain, CPU time |\n|---|---|---|---|")
    for variant, measured in times.items():
        plain = times["plain, KL term" if variant.endswith("KL term") else "plain"]
        ratios = [[t[clock] / p[clock] for t, p in zip(measured, plain, strict=True)] for clock in (0, 1)]
        spreads = [f"{statistics.median(r):.3f} [{min(r):.3f}, {max(r):.3f}]" for r in ratios]
        print(f"| {variant} | {statistics.median(t[0] for t in measured):.2f} | {' | '.join(spreads)} |")


if __name__ == "__main__":
    main()
