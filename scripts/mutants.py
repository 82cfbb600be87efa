"""Break the library on purpose, one line at a time, and count how many breaks the tests catch.

    pip install pytest-cov
    pytest -n 2 --cov=antipasto --cov-context=test --cov-report=      # which test runs which line: .coverage
    python scripts/mutants.py --number 60 --seed 0 --json mutants.json

A *mutant* is the library with one change in one line of a function that some test runs: a comparison, an operator, a
condition, a constant or a returned value. Lines are drawn at random. A mutant is caught if one of the tests that run its line
fails, errors or takes too long. At most `MOST` are tried, and no more than `EACH` from a file. Some mutants compute the
same, and nobody can catch those: read what was not caught. A file with results is continued.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coverage import CoverageData

MOST, EACH = 40, 12
SECONDS = 300
COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
COMPARE |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
BINARY = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
}


def changed(node: ast.AST) -> ast.AST | None:
    """The same node with one change; None if this kind of node is not changed."""
    other: Any = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        other.ops[0] = COMPARE[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        other.op = BINARY[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        other.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        return other.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        other.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, ast.IfExp):
        other.body, other.orelse = node.orelse, node.body
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        other.value = ast.Constant(None)
    else:
        return None
    return other


def candidates(text: str) -> Iterator[tuple[int, ast.expr | ast.stmt]]:
    """Line and node of everything in functions that can be changed."""
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for statement in function.body:
                for node in ast.walk(statement):
                    if not isinstance(node, (ast.expr, ast.stmt)) or changed(node) is None:
                        continue
                    if node.lineno == node.end_lineno:
                        yield node.lineno, node


def mutants(root: Path, data: CoverageData, number: int, seed: int) -> Iterator[dict[str, Any]]:
    """Distinct lines, each with one change and the tests that run it."""
    found: dict[tuple[str, int], tuple[list[ast.expr | ast.stmt], list[str]]] = {}
    for file in sorted(data.measured_files()):
        path = Path(file)
        if root / "src" not in path.parents or path.suffix != ".py":
            continue
        tests = data.contexts_by_lineno(file)
        for line, node in candidates(path.read_text(encoding="utf-8")):
            ran = sorted(
                {name.partition("|")[0] for name in tests.get(line, []) if "::" in name}, key=lambda n: (len(n), n)
            )
            if ran:
                found.setdefault((file, line), ([], ran))[0].append(node)
    rng = random.Random(seed)
    for file, line in rng.sample(sorted(found), number):
        nodes, ran = found[file, line]
        node = rng.choice(nodes)
        files: Counter[str] = Counter()
        some = [t for t in ran if files.update([t.partition("::")[0]]) or files[t.partition("::")[0]] <= EACH]
        name = str(Path(file).relative_to(root))
        yield {"file": name, "line": line, "of": node, "was": ast.unparse(node), "tests": some[:MOST]}


def broken(text: str, mutant: dict[str, Any]) -> tuple[str, str]:
    """The file's text with the change, and the changed part."""
    node, other = mutant["of"], changed(mutant["of"])
    assert other is not None
    new = ast.unparse(other)
    lines = text.split("\n")
    line = lines[node.lineno - 1].encode()
    part = new if isinstance(node, ast.stmt) else f"({new})"
    lines[node.lineno - 1] = (line[: node.col_offset] + part.encode() + line[node.end_col_offset :]).decode()
    return "\n".join(lines), new


def is_caught(tree: Path, tests: list[str]) -> bool:
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=SECONDS).returncode != 0
    except subprocess.TimeoutExpired:
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    root = Path.cwd()
    data = CoverageData(".coverage")
    data.read()
    done: list[dict[str, Any]] = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
    for number, mutant in enumerate(mutants(root, data, arguments.number, arguments.seed)):
        if number < len(done):
            continue
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / "tree"
            shutil.copytree(
                root, tree, ignore=shutil.ignore_patterns(".venv*", ".git", "site", "build", "runs", "*.html")
            )
            path = tree / mutant["file"]
            text, now = broken(path.read_text(encoding="utf-8"), mutant)
            path.write_text(text, encoding="utf-8")
            caught = is_caught(tree, mutant["tests"])
        done.append({"file": mutant["file"], "line": mutant["line"], "was": mutant["was"], "is": now, "caught": caught})
        print(
            f"{'caught' if caught else 'NOT CAUGHT':10}  {mutant['file']}:{mutant['line']}  {mutant['was']}  →  {now}",
            flush=True,
        )
        arguments.json.write_text(json.dumps(done, indent=1))
    print(f"{sum(one['caught'] for one in done)} of {len(done)} caught")


if __name__ == "__main__":
    main()
