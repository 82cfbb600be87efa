"""How many programs a second a sandbox runs, and what isolation costs: ratios measured side by side.

    python benchmarks/sandbox.py --programs 40 --rounds 5

Two programs: ``true``, which is nothing but the sandbox's own cost, and ``python3 main.py`` with a solution and a harness that
calls it, as a grader of code runs them by the thousand. `Bubblewrap` and `RlimitsOnly`, with one and with two workers, take
turns in every round. Each ratio is to `RlimitsOnly` with one worker in the same round; all are medians [min, max] over the
rounds. Needs Debian's bubblewrap.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

from antipasto.sandbox import Bubblewrap, NotASandboxWarning, Program, RlimitsOnly, Sandbox

SOLUTION = "def solve(numbers):\n    return sorted(numbers)[len(numbers) // 2]\n"
HARNESS = """from solution import solve
assert all(solve([*range(n)][::-1]) == n // 2 for n in range(1, 50))
print("passed")
"""
PROGRAMS = {
    "true": Program(["true"]),
    "python3 main.py": Program(["python3", "main.py"], files={"solution.py": SOLUTION, "main.py": HARNESS}),
}


def speed(sandbox: Sandbox, program: Program, number: int, workers: int) -> float:
    """Programs a second."""
    start = time.perf_counter()
    results = sandbox.run_many([program] * number, workers)
    seconds = time.perf_counter() - start
    assert all(result.ok for result in results), next(result for result in results if not result.ok)
    return number / seconds


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=40, help="in each turn")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotASandboxWarning)
        sandboxes: dict[str, Sandbox] = {"RlimitsOnly": RlimitsOnly(), "Bubblewrap": Bubblewrap()}
    turns = [(name, workers) for workers in (1, 2) for name in sandboxes]
    print("| program | sandbox | workers | programs a second | ratio |\n|---|---|---|---|---|")
    for title, program in PROGRAMS.items():
        found: dict[tuple[str, int], list[float]] = {turn: [] for turn in turns}
        for _ in range(arguments.rounds):
            for name, workers in turns:
                found[name, workers].append(speed(sandboxes[name], program, arguments.programs, workers))
        for (name, workers), speeds in found.items():
            ratios = [one / other for one, other in zip(speeds, found["RlimitsOnly", 1], strict=True)]
            print(f"| `{title}` | {name} | {workers} | {spread(speeds, 1)} | {spread(ratios, 2)} |")


if __name__ == "__main__":
    main()
