"""What routing and per-rollout gradients add to a training step: ratios measured side by side.

    python benchmarks/routing_cost.py --rounds 7

A model of SmolLM2-135M's shapes with random weights, fp32, all 210 Linears adapted at full rank; one step is forward, backward
and fused AdamW on 8 x 128 tokens, the whole model with its head. Variants take turns in every round, on one model and one
optimizer; each ratio is to the plain step of the same round, given as median [min, max] over the rounds, by the wall clock and
by the process's own CPU time, which other work on the machine disturbs less. The time spent inside the router's two hooks is
measured by itself as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from contestants import make_model

import antipasto as ap


def make_direction(layers: dict[str, ap.LayerKnobs], seed: int) -> ap.Direction:
    generator = torch.Generator().manual_seed(seed)
    effect = {name: torch.randn(layer.r, generator=generator) for name, layer in layers.items()}
    return ap.Direction({name: t / t.norm() for name, t in effect.items()}, effect=effect)


def timed(function: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        into.append(time.perf_counter() - start)
        return result

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the raw seconds here")
    arguments = parser.parse_args()

    model = make_model(layers=arguments.layers)
    layers = ap.wrap(model)
    optimizer = torch.optim.AdamW([layer.delta_s for layer in layers.values()], lr=1e-3, weight_decay=0.0, fused=True)
    v = make_direction(layers, 0)
    controls: dict[str, ap.Direction | ap.Control] = {
        "random": v.random(1),
        "permuted": v.permuted(1),
        "higher": ap.Control(v, threshold=1.0),
        "one_sided": ap.Control(v, gate="one_sided"),
    }
    router = ap.Router(model, v, controls=controls)
    ids = torch.randint(0, 49152, (8, 128))

    hooks: list[float] = []
    router._on_step, router._after_step = timed(router._on_step, hooks), timed(router._after_step, hooks)  # type: ignore[method-assign]

    def step(around: AbstractContextManager[object]) -> tuple[float, float]:
        start, cpu = time.perf_counter(), time.process_time()
        with around:
            optimizer.zero_grad()
            (-ap.token_logprobs(model(input_ids=ids, use_cache=False).logits, ids).mean()).backward()
            optimizer.step()
        return time.perf_counter() - start, time.process_time() - cpu

    variants: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "plain": nullcontext,
        "router, four controls": lambda: router.attach(optimizer),
        "rollout_grads": lambda: ap.rollout_grads(model),
    }
    for around in variants.values():
        step(around())  # warm-up
    hooks.clear()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for number in range(arguments.rounds):
        names = list(variants)
        for name in names[number % len(names) :] + names[: number % len(names)]:  # nobody is always first
            seconds[name].append(step(variants[name]()))
    print(
        f"{len(layers)} layers, {sum(layer.r for layer in layers.values()):,} numbers, {torch.get_num_threads()} threads"
    )
    print("| step | median s | ratio to plain, wall clock | ratio to plain, CPU time |\n|---|---|---|---|")
    for name, times in seconds.items():
        ratios = [[t[clock] / p[clock] for t, p in zip(times, seconds["plain"], strict=True)] for clock in (0, 1)]
        spreads = [f"{statistics.median(r):.3f} [{min(r):.3f}, {max(r):.3f}]" for r in ratios]
        print(f"| {name} | {statistics.median(t[0] for t in times):.2f} | {' | '.join(spreads)} |")
    inside = sum(hooks) / arguments.rounds
    plain = statistics.median(t[0] for t in seconds["plain"])
    print(f"inside the router's hooks: {inside * 1e3:.1f} ms a step, {inside / plain:.2%} of the plain one")
    if arguments.json:
        arguments.json.write_text(json.dumps(seconds, indent=2) + "\n")


if __name__ == "__main__":
    main()
