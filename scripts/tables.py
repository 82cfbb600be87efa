"""The tables of docs/results.md, from the run folders that they are about.

python scripts/tables.py demo runs/rare               # of `antipasto demo --seeds 5 --compare --out runs/rare`
python scripts/tables.py eval runs/plain runs/routed  # of folders that `antipasto eval` has been in
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

MEASURES = ("solve", "known hack !", "unknown hack ?")


def cell(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def read_arms(path: Path) -> dict[str, Any]:
    return {arm["arm"]: arm for arm in json.loads(path.read_text())}


def demo(root: Path) -> None:
    """What each method ships, and the arms of the recipe's own runs; mean ± standard deviation over the seeds."""
    seeds = sorted(root.glob("seed-*"), key=lambda path: int(path.name.partition("-")[2]))
    methods = [path.name for path in sorted(seeds[0].iterdir(), key=lambda path: path.stat().st_mtime)]
    runs = {
        m: [read_arms(seed / m / "results.json") for seed in seeds if (seed / m / "results.json").exists()]
        for m in methods
    }
    header = "| prompts | {} | solve | known hack `!` | unknown hack `?` |\n|---|---|---|---|---|"
    print(f"{len(seeds)} seeds\n\n{header.format('method')}")
    kinds = [key for key in runs["recipe"][0]["reference"] if key != "arm"]
    for kind in kinds:
        for name in ("reference", *methods):
            arms = (
                [arms["reference"] for arms in runs["recipe"]]
                if name == "reference"
                else [a["deployed"] for a in runs[name]]
            )
            print(
                f"| {kind} | {name} | " + " | ".join(cell([a[kind][m]["rate"] for a in arms]) for m in MEASURES) + " |"
            )
    print(f"\n{header.format('arm of the recipe')}")
    for kind in kinds:
        for name in runs["recipe"][0]:
            arms = [run[name] for run in runs["recipe"]]
            print(
                f"| {kind} | {name} | " + " | ".join(cell([a[kind][m]["rate"] for a in arms]) for m in MEASURES) + " |"
            )
    hackable = [kind for kind in kinds if kind != "strict"]
    print("\nEither hack on hackable prompts, seed by seed:")
    for name in ("reference", *methods):
        arms = (
            [arms["reference"] for arms in runs["recipe"]]
            if name == "reference"
            else [a["deployed"] for a in runs[name]]
        )
        print(f"* {name}: " + " ".join(f"{mean(arm[k]['either hack']['rate'] for k in hackable):.3f}" for arm in arms))


def evaluations(roots: list[Path]) -> None:
    """Every arm of several runs, with 95% intervals."""
    print("| run | model | solve | exploit | flagged | mean reward |\n|---|---|---|---|---|---|")
    for root in roots:
        for arm in json.loads((root / "eval.json").read_text())["arms"]:
            rates = [
                f"{rate['rate']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]" if (rate := arm[name]) else "–"
                for name in ("solve", "exploit", "flagged")
            ]
            print(f"| {root.name} | {arm['arm']} | " + " | ".join(rates) + f" | {arm['reward']:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("demo", "eval"))
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.what == "eval":
        evaluations(arguments.folders)
    else:
        for folder in arguments.folders:
            demo(folder)


if __name__ == "__main__":
    main()
