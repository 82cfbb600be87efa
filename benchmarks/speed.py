"""Speed, memory, start-up and size of every contestant (`contestants.py`), as ratios measured side by side in one run.

    make bench                                        # all of it, into benchmarks/results/
    python benchmarks/speed.py time --model trunk     # one part

    time      forward without grad, forward + backward + fused AdamW, generation: models take turns in every round; ratios are
              to lora-16 and to bare of the same round, median [min, max] over the rounds
    memory    peak resident memory of a training step, each contestant in a process of its own, less what the imports take
    start     seconds to adapt a loaded model, with an empty cache and with a full one; size of the saved adapter

Models: ``whole`` has SmolLM2-135M's shapes, 8 x 128 tokens; ``trunk`` the same with an 18-token head; ``4b`` and ``8b`` one
layer of those shapes, 1 x 512 tokens. Random weights. On a GPU the same runs in bf16.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from contestants import CONTESTANTS, loss_of, make, make_model, trainable
from torch import Tensor, nn

import antipasto as ap

MODELS: dict[str, dict[str, Any]] = {
    "whole": {"shape": "135m", "vocabulary": 49152, "tokens": (8, 128)},
    "trunk": {"shape": "135m", "vocabulary": 18, "tokens": (8, 128)},
    "4b": {"shape": "4b", "vocabulary": 18, "tokens": (1, 512)},
    "8b": {"shape": "8b", "vocabulary": 18, "tokens": (1, 512)},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
NEW_TOKENS = 16
Work = Callable[[], Any]


def build(name: str, model: str, layers: int | None) -> nn.Module:
    options = MODELS[model]
    adapted = make(name, options["shape"], vocabulary=options["vocabulary"], layers=layers)
    return adapted.to(DEVICE, DTYPE) if DEVICE == "cuda" else adapted


def tokens(model: str) -> Tensor:
    options = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, options["vocabulary"], options["tokens"], generator=generator).to(DEVICE)


def trainer(model: nn.Module, ids: Tensor) -> Work:
    """A training step. The knobs move in every one: nothing that depends on them can be kept."""
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None

    def step() -> None:
        loss_of(model, ids).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def forward(model: nn.Module, ids: Tensor) -> Work:
    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids, use_cache=False)

    return run


def generation(model: nn.Module, ids: Tensor) -> Work:
    """Of 16 tokens after 16, batch 8."""
    prompts = ids[:, :16] if len(ids) == 8 else ids[:1, :16].expand(8, -1)

    def run() -> None:
        model.generate(  # type: ignore[operator]
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
        )

    return run


WORK: dict[str, Callable[[nn.Module, Tensor], Work]] = {
    "forward + backward": trainer,
    "forward without grad": forward,
    "generation": generation,
}


@contextmanager
def merged(name: str, model: nn.Module) -> Iterator[None]:
    """For `NAME, merged`: what PEFT calls a merged adapter, without the time of merging."""
    if name.endswith(", merged"):
        model.merge_adapter()  # type: ignore[operator]
    yield
    if name.endswith(", merged"):
        model.unmerge_adapter()  # type: ignore[operator]


def clock(work: Work) -> tuple[float, float]:
    """Seconds by the wall and of this process's CPU."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu


def measure_time(model: str, names: list[str], rounds: int, layers: int | None) -> dict[str, Any]:
    models = {name: build(name, model, layers) for name in names}
    ids = tokens(model)
    result: dict[str, Any] = {}
    for what, make_work in WORK.items():
        entrants = list(names)
        if what != "forward + backward":
            entrants += [f"{name}, merged" for name in names if name in ("lora-16", "full")]
        if what == "generation" and "rebuild" in entrants:
            entrants.remove("rebuild")  # at every token: some twenty times the bare model's time
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in entrants}
        work = {name: make_work(models[name.partition(",")[0]], ids) for name in entrants}
        for number in range(rounds + 1):
            start = number % len(entrants)
            for name in entrants[start:] + entrants[:start]:  # nobody is always first
                with merged(name, models[name.partition(",")[0]]):
                    if what != "forward + backward":
                        work[name]()  # the second of two: the knobs are what they were, as in evaluation or decoding
                    times = clock(work[name])
                if number:  # the first warms up
                    seconds[name].append(times)
        result[what] = seconds
        print(table(f"{model}: {what}", seconds), flush=True)
    return result


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def table(title: str, seconds: dict[str, list[tuple[float, float]]]) -> str:
    lines = [
        f"\n**{title}**\n",
        "| contestant | median s | to lora-16, wall | to lora-16, CPU | to bare, CPU |",
        "|---" * 5 + "|",
    ]
    for name, times in seconds.items():
        cells = [f"{statistics.median(t[0] for t in times):.3f}"]
        for other, which in (("lora-16", 0), ("lora-16", 1), ("bare", 1)):
            ratios = [t[which] / o[which] for t, o in zip(times, seconds.get(other, []), strict=False)]
            cells.append(spread(ratios) if ratios else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def peak_of_one(name: str, model: str, layers: int | None) -> None:
    """In a process of its own: peak resident memory of three training steps, above the imports, in MB, to stdout."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    adapted, ids = build(name, model, layers), tokens(model)
    step = trainer(adapted, ids)
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    built = resident()
    for _ in range(3):
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if DEVICE == "cuda":
        print(json.dumps({"peak": torch.cuda.max_memory_allocated() / 2**20, "built": 0.0}))
    else:
        print(json.dumps({"peak": peak - before, "built": built - before}))


def resident() -> float:
    """MB in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_memory(model: str, names: list[str], layers: int | None) -> dict[str, Any]:
    result = {}
    for name in names:
        command = [sys.executable, __file__, "peak-of-one", "--model", model, "--only", name]
        command += ["--layers", str(layers)] if layers else []
        result[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"\n**{model}: peak memory of a training step, above the imports**\n")
    print("| contestant | MB | to lora-16 |\n|---|---|---|")
    for name, one in result.items():
        print(f"| {name} | {one['peak']:.0f} | {one['peak'] / result['lora-16']['peak']:.3f} |", flush=True)
    return result


# ── start-up ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure_start(model: str, layers: int | None) -> dict[str, Any]:
    """Adapting a loaded model: nothing cached, all cached; the bare SVDs; how large the cache and a saved adapter are."""
    options = MODELS[model]
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        linears = [
            m
            for n, m in make_model(options["shape"], layers=layers, vocabulary=options["vocabulary"]).named_modules()
            if isinstance(m, nn.Linear) and n != "lm_head"
        ]
        result["bare SVDs (torch.linalg.svd, fp32)"] = clock(
            lambda: [torch.linalg.svd(m.weight.detach(), full_matrices=False) for m in linears]
        )[0]
        for what, rank, cache in (
            ("cold", None, "full"),
            ("cached", None, "full"),
            ("rank 64, from that cache", 64, "full"),
            ("rank 64, cold", 64, "64"),
            ("rank 64, cached", 64, "64"),
        ):
            fresh = make_model(options["shape"], layers=layers, vocabulary=options["vocabulary"])
            config = ap.AntiPastoConfig(rank=rank, cache_dir=f"{folder}/cache-{cache}")
            result[what] = clock(lambda fresh=fresh, config=config: ap.wrap(fresh, config))[0]  # type: ignore[misc]
        caches = {
            cache: sum(file.stat().st_size for file in Path(f"{folder}/cache-{cache}").iterdir())
            for cache in ("full", "64")
        }
        sizes = {}
        for name in ("lora-16", "lora-1", "tinylora", "full", "256", "64"):
            adapted = build(name, model, layers)
            assert isinstance(adapted, peft.PeftModel)
            adapted.save_pretrained(f"{folder}/{name}")
            sizes[name] = {
                "bytes": Path(f"{folder}/{name}/adapter_model.safetensors").stat().st_size,
                "numbers": sum(p.numel() for p in trainable(adapted)),
            }
        result["cache"], result["adapter"] = caches, sizes
    print(f"\n**{model}: start-up**\n\n| what | seconds |\n|---|---|")
    for what, seconds in result.items():
        if what not in ("cache", "adapter"):
            print(f"| {what} | {seconds:.2f} |")
    print("\n| cache | bytes |\n|---|---|")
    for name, stored in caches.items():
        print(f"| {name} | {stored:,} |")
    print("\n| saved adapter | bytes | trainable numbers |\n|---|---|---|")
    for name, size in sizes.items():
        print(f"| {name} | {size['bytes']:,} | {size['numbers']:,} |", flush=True)
    return result


def machine() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(DTYPE),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "machine": platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("time", "memory", "start", "peak-of-one"))
    parser.add_argument("--model", choices=sorted(MODELS), default="whole")
    parser.add_argument("--only", nargs="+", choices=sorted(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--json", type=Path, help="write everything measured here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.part == "peak-of-one":
        peak_of_one(arguments.only[0], arguments.model, arguments.layers)
        return
    facts = machine()
    print(f"{arguments.part}, {arguments.model}:", ", ".join(f"{name} {value}" for name, value in facts.items()))
    if arguments.part == "time":
        result = measure_time(arguments.model, arguments.only, arguments.rounds, arguments.layers)
    elif arguments.part == "memory":
        result = measure_memory(arguments.model, arguments.only, arguments.layers)
    else:
        result = measure_start(arguments.model, arguments.layers)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        everything = {"machine": facts, "model": arguments.model, arguments.part: result}
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
