"""What one adapted layer costs against its width, its tokens and the rank: ratios to the bare layer, side by side.

    python benchmarks/scaling.py

A square Linear of each width and one of four times as many outputs, forward + backward with a gradient to the input; the knobs
move before every call, so that nothing is kept. Median of nine rounds in which bare and adapted layers take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import antipasto as ap
from antipasto.plans import Call, cheapest

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    arguments = parser.parse_args()
    ranks = (None, 256, 64)
    print(
        "| layer | tokens | "
        + " | ".join(f"{'full rank' if rank is None else f'rank {rank}'}" for rank in ranks)
        + " |"
    )
    print("|---" * (2 + len(ranks)) + "|")
    for width in arguments.widths:
        for times in (1, 4):
            models = {rank: make(width, times, rank) for rank in (0, *ranks)}
            for tokens in arguments.tokens:
                x, grad = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, times * width)
                work = {rank: step(model, x, grad) for rank, model in models.items()}
                measured: dict[int | None, list[float]] = {rank: [] for rank in models}
                for number in range(ROUNDS + 1):
                    for rank, run in work.items():
                        once = seconds(run)
                        if number:
                            measured[rank].append(once)
                cells = []
                for rank in ranks:
                    ratio = statistics.median(a / b for a, b in zip(measured[rank], measured[0], strict=True))
                    cells.append(f"{ratio:.2f} ({plan(width, times, rank or width, tokens)})")
                print(f"| {times * width} x {width} | {tokens} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
