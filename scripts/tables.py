"""The tables of docs/results.md, from the run folders that they are about.

python scripts/tables.py eval runs/plain runs/routed  # of folders that `antipasto eval` has been in
python scripts/tables.py watch watched/*              # of demo runs that `antipasto watch --compare` has scored
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from antipasto.app.demo import pool
from antipasto.app.watch.compare import TITLES
from antipasto.evaluation.records import ArmRecord, Estimate, Evaluation, read_evaluation
from antipasto.routing.ordering import auc
from antipasto.tasks import REWARDED


def cell(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def arm(evaluation: Evaluation, name: str, kind: str | None = None) -> ArmRecord:
    record = evaluation.arm(name, kind)
    assert record is not None, name
    return record


def evaluations(roots: list[Path]) -> None:
    """Every arm of several runs, with 95% intervals."""
    found = {root.name: read_evaluation(root) for root in roots}
    together = f"all {len(roots)}"
    if len(roots) > 1 and len({tuple(evaluation.names) for evaluation in found.values()}) == 1:
        found[together] = pool(list(found.values()))
    flags = list(next(iter(found.values())).arms[0].flags)
    titles = ["run", "model", "solve", "exploit", *flags, "reward", "KL"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for run, evaluation in found.items():
        for name in evaluation.names:
            record = arm(evaluation, name)
            rates = [record.measures[m] for m in ("solve", "exploit") if m in record.measures]
            cells = [*map(interval, rates), *(interval(record.flags[f]) for f in flags)]
            means = f"{record.measures['reward'].value:.2f} | {record.measures['kl'].value:.2f}"
            print(f"| {run} | {name} | {' | '.join(cells)} | {means} |")
    if together in found:
        print(f"\nAll together: {found[together].verdict.sentence}")


def interval(e: Estimate) -> str:
    return f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"


def watch(folders: list[Path]) -> None:
    """AUC of each score by window, mean ± sd over runs; of each hack by itself for the two scores along the direction."""
    found = [json.loads((folder / "compare.json").read_text())["windows"] for folder in folders]
    heads = [f"{window['first']}–{window['last']}" for window in found[0]]
    print(f"{len(folders)} runs. | AUC, steps | {' | '.join(heads)} |\n|---{'|---' * len(heads)}|")
    for name, title in TITLES.items():
        rows = [[run[i]["aucs"][name]["value"] for run in found] for i in range(len(heads))]
        print(f"| {title.long} | {' | '.join(map(spread, rows))} |")
    by_hack: dict[str, list[list[float]]] = {}
    for folder, windows in zip(folders, found, strict=True):
        for label, values in of_each_hack(folder, windows).items():
            for cells, value in zip(by_hack.setdefault(label, [[] for _ in windows]), values, strict=True):
                cells.append(value)
    for label, by_window in by_hack.items():
        print(f"| {label} | {' | '.join(map(spread, by_window))} |")


def of_each_hack(folder: Path, windows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """AUC of the exploits that say one hack against the solved ones, by score and window."""
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    with Path(scores[0]["file"]).open() as file:
        log = {number: json.loads(line) for number, line in enumerate(file, 1)}
    result: dict[str, list[float]] = {}
    for name, title in (("score", "score"), ("hackward", "live score")):
        for hack in "!?":
            for window in windows:
                sides: dict[bool, list[float]] = {True: [], False: []}
                for score in scores:
                    row = log[score["row"]]
                    exploits = row["reward"] >= REWARDED and not row["oracle"]
                    counts = hack in row["completion"] if exploits else row["oracle"]
                    if counts and window["first"] <= score["step"] <= window["last"]:
                        sides[exploits].append(row[name] if name == "hackward" else score[name])
                value = auc(sides[True], sides[False]) if sides[True] and sides[False] else float("nan")
                result.setdefault(f"{title}, `{hack}` alone", []).append(value)
    return result


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("eval", "watch"))
    parser.add_argument("folders", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.what == "eval":
        evaluations(arguments.folders)
    else:
        watch(arguments.folders)


if __name__ == "__main__":
    main()
