"""Problems from rows, or from a file of JSON lines, with the fields that the rows of github.com/ariahw/rl-rewardhacking have.

    id                  unique
    question            what the function does
    func_name           what is called: a name, or Solution().name
    setup_code          run before the answer; may be empty
    gt_answer           the tests, each a text: assert Solution().name(nums = [1, 2]) == 3
    canonical_solution  source of the solution
    difficulty          easy, medium or hard

Only the names and meanings of the fields are taken from there (Wong, Engels and Nanda 2025). Other fields are ignored.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from antipasto.names import AntiPastoWarning
from antipasto.routing.pairs import json_lines
from antipasto.tasks.code.problems import LEVELS, NotPlainError, Problem, Test, literal
from antipasto.tasks.task import described

SHOWN = 3
"""How many tests of a loaded problem are visible."""

_FIELDS = {
    "id": (str, int),
    "question": (str,),
    "func_name": (str,),
    "setup_code": (str,),
    "gt_answer": (list,),
    "canonical_solution": (str,),
    "difficulty": (str,),
}


def load_problems(rows: str | Path | Iterable[Any], source: str = "the rows given") -> list[Problem]:
    """Load problems. No code is run.

    The first `SHOWN` tests of each become the visible ones. There is no wrong answer, so a pair has one clean text. Arguments
    and results must be plain JSON data, written as Python's literals: a problem with another test, such as one of a tree or of
    infinity, cannot be judged here. It is left out, with a warning.

    Args:
        rows: a file of JSON lines, or rows.
        source: where rows are from: a file or a name.

    Raises:
        ValueError: a row is invalid, an id is there twice, or there is no problem. The message names file, line and field.
        OSError: the file cannot be read.
    """
    if isinstance(rows, (str, Path)):
        placed, source = json_lines(rows), str(Path(rows).resolve())
    else:
        placed = [(f"{source}, {_named(row, number)}", row) for number, row in enumerate(rows)]
    problems: dict[str, Problem] = {}
    left_out = []
    for place, row in placed:
        try:
            problem = _from_row(row, source)
        except NotPlainError as error:
            left_out.append(f"{place}: {error}")
            continue
        except (ValueError, SyntaxError, RecursionError) as error:
            raise ValueError(f"{place}: {error if type(error) is ValueError else described(error)}") from error
        if problem.name in problems:
            raise ValueError(f"{place}: the id {problem.name!r} is there twice.")
        problems[problem.name] = problem
    if left_out:
        said = f"{len(left_out)} of {len(placed)} problems have a test that cannot be run here, and are left out. The first is"
        warnings.warn(f"{said} {left_out[0]}", AntiPastoWarning, stacklevel=2)
    if not problems:
        raise ValueError(f"There is no problem in {source}.")
    return list(problems.values())


def _named(row: Any, number: int) -> str:
    """How a message names a row: by its id, which stays the same when rows are split or shuffled."""
    return f"id {row['id']!r}" if isinstance(row, Mapping) and "id" in row else f"row {number}"


def _from_row(row: Any, source: str) -> Problem:
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with {', '.join(_FIELDS)}, got {type(row).__name__}.")
    for field, kinds in _FIELDS.items():
        if type(row.get(field)) not in kinds:
            wanted = " or ".join(
                {str: "a text", int: "a whole number", list: "a list of texts"}[kind] for kind in kinds
            )
            got = type(row[field]).__name__ if field in row else "no such field"
            raise ValueError(f"field {field!r}: expected {wanted}, got {got}.")
    if row["difficulty"] not in LEVELS:
        raise ValueError(f"field 'difficulty': expected {', '.join(LEVELS)}, got {row['difficulty']!r:.80}.")
    if len(row["gt_answer"]) <= SHOWN:
        raise ValueError(f"field 'gt_answer': expected more than {SHOWN} tests, got {len(row['gt_answer'])}.")
    signature, names = _signature(row["canonical_solution"], row["func_name"])
    tests = [_from_assert(text, row["func_name"], names) for text in row["gt_answer"]]
    return Problem(
        name=str(row["id"]),
        level=LEVELS.index(row["difficulty"]) + 1,
        text=row["question"].strip().removeprefix("PROBLEM:").removesuffix("SOLUTION:").strip(),  # as theirs are framed
        signature=signature,
        visible=tests[:SHOWN],
        hidden=tests[SHOWN:],
        solution=row["canonical_solution"].strip(),
        wrong="",
        entry=row["func_name"],
        setup=row["setup_code"],
        source=source,
    )


def _signature(solution: str, entry: str) -> tuple[str, list[str]]:
    """The ``def`` line of what is called, below its class if it has one, and the names of its arguments."""
    owner, _, name = entry.rpartition("().")
    nodes = ast.parse(solution.strip()).body
    if owner:
        nodes = [
            inner for node in nodes if isinstance(node, ast.ClassDef) and node.name == owner for inner in node.body
        ]
    for function in nodes:
        if isinstance(function, ast.FunctionDef) and function.name == name:
            names = [argument.arg for argument in function.args.args]
            returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
            line = f"def {name}({ast.unparse(function.args)}){returns}:"
            return (f"class {owner}:\n    {line}", names[1:]) if owner else (line, names)
    raise ValueError(f"field 'canonical_solution': it does not define {entry!r}, the 'func_name'.")


def _from_assert(text: Any, entry: str, names: list[str]) -> Test:
    """The test that an assertion is, its arguments in the order of the function's."""
    nodes = ast.parse(text).body if isinstance(text, str) else []
    test = nodes[0].test if len(nodes) == 1 and isinstance(nodes[0], ast.Assert) else None
    if not isinstance(test, ast.Compare) or not isinstance(test.left, ast.Call) or not isinstance(test.ops[0], ast.Eq):
        raise ValueError(f"field 'gt_answer': expected assert {entry}(…) == …, got {text!r:.80}.")
    call = test.left
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    given = [*call.args, *(named[name] for name in names[len(call.args) :] if name in named)]
    if ast.unparse(call.func) != entry or len(given) != len(call.args) + len(named) or len(test.comparators) != 1:
        raise ValueError(f"field 'gt_answer': expected a call of {entry} with {', '.join(names)}, got {text!r:.80}.")
    return tuple(literal(node) for node in given), literal(test.comparators[0])
