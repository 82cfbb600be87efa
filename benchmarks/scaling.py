"""What one adapted layer costs against its width, its tokens and the rank: ratios to the bare layer, side by side.

    python benchmarks/scaling.py measured
    python benchmarks/scaling.py paper

Measured: a square Linear of each width and one of four times as many outputs, forward + backward with a gradient to the input;
the knobs move before every call, so that nothing is kept. Median of nine rounds in which bare and adapted layers take turns.

On paper, for whole models in bf16: what the basis takes, by rank; what goes between the machines in a step; the
multiplications that an adapted forward and backward adds to the bare one's; and those of a step of GRPO. Per
GPU: `replicated` is with the weights sharded by FSDP and the basis whole on each, `sharded` with the basis sharded too
(`save_basis=True`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import antipasto as ap
from antipasto.adapter.plans import Call, cheapest, execution_costs

ROUNDS = 9


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def make(width: int, times: int, rank: int | None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, times * width, bias=False))
    if rank == 0:
        return model.requires_grad_(False)
    ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"], rank=rank))
    return model


def step(model: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    knobs = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        for knob in knobs:
            knob.data.add_(1e-3)
        model(x).backward(grad)

    return run


def plan(width: int, times: int, rank: int, tokens: int) -> str:
    r = min(rank or width, width)
    square = times == 1
    execution, route = cheapest(Call(tokens, times * width, width, r, True, True, False, not square, True, 1))
    return f"merged, {route.value}" if execution.value == "merged" else execution.value


def measured(widths: list[int], token_counts: list[int]) -> None:
    ranks = (None, 256, 64)
    print("| layer | tokens | " + " | ".join("full rank" if rank is None else f"rank {rank}" for rank in ranks) + " |")
    print("|---" * (2 + len(ranks)) + "|")
    for width in widths:
        for times in (1, 4):
            models = {rank: make(width, times, rank) for rank in (0, *ranks)}
            for tokens in token_counts:
                x, grad = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, times * width)
                work = {rank: step(model, x, grad) for rank, model in models.items()}
                times_of: dict[int | None, list[float]] = {rank: [] for rank in models}
                for number in range(ROUNDS + 1):
                    for rank, run in work.items():
                        once = seconds(run)
                        if number:
                            times_of[rank].append(once)
                cells = []
                for rank in ranks:
                    ratio = statistics.median(a / b for a, b in zip(times_of[rank], times_of[0], strict=True))
                    cells.append(f"{ratio:.2f} ({plan(width, times, rank or width, tokens)})")
                print(f"| {times * width} x {width} | {tokens} | " + " | ".join(cells) + " |", flush=True)


# hidden, intermediate, kv width, layers
ON_PAPER = {
    "SmolLM2-135M": (576, 1536, 192, 30),
    "Qwen3-8B": (4096, 12288, 1024, 36),
    "Llama-3-70B": (8192, 28672, 1024, 80),
}
BF16 = 2
GIB = 2**30


def linears(hidden: int, intermediate: int, kv: int, layers: int) -> list[tuple[int, int]]:
    """(o, i) of q, o, k, v, gate, up, down in every layer."""
    one = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    return one * layers


def paper() -> None:
    heads = ["model", "rank", "trainable numbers", "all-reduced a step", "basis"]
    heads += [f"GPU of {n}, {how}" for n in (8, 64) for how in ("replicated", "sharded")]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for name, sizes in ON_PAPER.items():
        shapes = linears(*sizes)
        weights = BF16 * sum(o * i for o, i in shapes)
        for rank in (None, 256, 64):
            ranks = [min(rank or o, o, i) for o, i in shapes]
            basis = BF16 * sum(r * (o + i) for r, (o, i) in zip(ranks, shapes, strict=True))
            cells = [f"{(weights / n + basis / m) / GIB:,.1f} GiB" for n in (8, 64) for m in (1, n)]
            print(
                f"| {name} | {rank or 'full'} | {sum(ranks):,} | {4 * sum(ranks) / 2**20:.1f} MiB | {basis / GIB:,.1f} GiB | "
                + " | ".join(cells)
                + " |"
            )
        lora = 16 * sum(o + i for o, i in shapes)
        each = [f"{weights / n / GIB:,.1f} GiB" for n in (8, 8, 64, 64)]
        print(f"| {name} | LoRA r=16 | {lora:,} | {4 * lora / 2**20:.1f} MiB | | " + " | ".join(each) + " |")
    print(
        "\nMultiplications of forward and backward, added to the bare layers' 2 T o i, as a share; tokens of a step:\n"
    )
    heads = [
        "model",
        "tokens",
        "full rank, fp32",
        "full rank, bf16",
        "… factored",
        "rank 256, bf16",
        "rank 64, bf16",
        "LoRA r=16",
    ]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for name, sizes in ON_PAPER.items():
        shapes = linears(*sizes)
        for tokens in (1024, 16384):
            bare = sum(2 * tokens * o * i for o, i in shapes)
            shares = [
                sum(added(tokens, o, i, min(rank or o, o, i), low=low) for o, i in shapes) / bare
                for rank, low in ((None, False), (None, True), (256, True), (64, True))
            ]
            shares.insert(2, sum(2 * tokens * min(o, i) * (o + i) for o, i in shapes) / bare)
            lora_share = sum(3 * tokens * 16 * (o + i) for o, i in shapes) / bare
            numbers = " | ".join(f"{share:.2f}" for share in (*shares, lora_share))
            print(f"| {name} | {tokens} | {numbers} |")
    print("\nMultiplications of a GRPO step, sampling included, to those with LoRA r=16; sampled tokens of a step:\n")
    heads = [
        "model",
        "tokens",
        "full rank, fp32",
        "rank 256, fp32",
        "full rank, bf16",
        "rank 256, bf16",
        "rank 64, bf16",
    ]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    kinds = ((None, False), (256, False), (None, True), (256, True), (64, True))
    for name, sizes in ON_PAPER.items():
        shapes = linears(*sizes)
        for tokens in (256, 4096, 65536):
            lora_step = sum(3 * tokens * o * i + 4 * tokens * 16 * (o + i) for o, i in shapes)
            ratios = [
                sum(grpo(tokens, o, i, min(r or o, o, i), low=low) for o, i in shapes) / lora_step for r, low in kinds
            ]
            print(f"| {name} | {tokens} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


def grpo(T: int, o: int, i: int, r: int, *, low: bool) -> int:
    """Multiplications of a GRPO step in one layer: T tokens sampled, one after the other, then differentiated at once.

    Sampling builds W_θ once. In bf16 the same W_θ is differentiated. In fp32 the cheapest execution is chosen anew.
    """
    built = o * r * i
    return 3 * T * o * i + added(T, o, i, r, low=low) + (0 if low else built)


def added(T: int, o: int, i: int, r: int, *, low: bool) -> int:
    """Multiplications that the cheapest execution adds, as `antipasto.adapter.plans` counts them; in bf16 if ``low``."""
    exact = not low
    call = Call(T, o, i, r, True, True, False, exact and o != i, exact, 1, low=low)
    return min(execution_costs(call).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measured", "paper"))
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    arguments = parser.parse_args()
    if arguments.what == "paper":
        paper()
    else:
        measured(arguments.widths, arguments.tokens)


if __name__ == "__main__":
    main()
