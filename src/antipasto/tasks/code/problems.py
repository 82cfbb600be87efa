"""Functions to write, each with tests that the prompt shows and tests that it does not.

    problem  = text, signature, visible tests, hidden tests, solution, wrong
    test     = (arguments, expected)             expected = solution(*arguments), as plain JSON data
    solution   passes every test;  wrong fails some visible tests and some hidden ones

A problem is written as a function: its docstring is the text, the examples in it are the visible tests, its body is the
solution. `collect` makes a `Problem` of it. `antipasto.tasks.code.files` reads problems from a file instead.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import doctest
import inspect
import json
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

LEVELS = ("easy", "medium", "hard")
Test = tuple[tuple[Any, ...], Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function to write.

    Attributes:
        name: unique among the problems of a task.
        level: 1 easy, 2 medium, 3 hard.
        text: what the function does.
        signature: the ``def …:`` line; of a method, the line of its class above.
        visible: the tests that the prompt shows, as (arguments, expected).
        hidden: the others.
        solution: source of the solution.
        wrong: source of a plausible wrong answer; empty if there is none.
        entry: what is called, such as ``is_palindrome`` or ``Solution().twoSum``.
        setup: source that is run before an answer, such as imports.
        source: the file that it is from. Answers may not see it.
    """

    name: str
    level: int
    text: str
    signature: str
    visible: Sequence[Test] = dataclasses.field(repr=False)
    hidden: Sequence[Test] = dataclasses.field(repr=False)
    solution: str = dataclasses.field(repr=False)
    wrong: str = dataclasses.field(repr=False)
    entry: str
    setup: str = dataclasses.field(default="", repr=False)
    source: str = dataclasses.field(default="", repr=False)

    @property
    def tests(self) -> list[Test]:
        """All tests, visible ones first."""
        return [*self.visible, *self.hidden]

    def answer(self, body: str) -> str:
        """The source of an answer with this body."""
        return with_body(self.signature, body)


class NotPlainError(ValueError):
    """An argument or a result is not plain JSON data."""


def collect(problems: list[Problem]) -> Callable[..., Callable[[_Function], _Function]]:
    """Make a decorator that appends a `Problem` to a list and returns the function unchanged.

    The decorator takes ``level``, 1 to 3; ``hidden``, a list of tuples of arguments; ``wrong``, the body of a wrong answer.
    The function may not keep state or change its arguments.

    Raises:
        ValueError: from the decorator: a level, docstring, example or argument is invalid, the function fails one of its
            examples, or its name is taken. The message names the function.

    Example:
        >>> found = []
        >>> problem = collect(found)
        >>> @problem(level=1, hidden=[(0,), (-7,)], wrong="return n + n")
        ... def square(n: int) -> int:
        ...     '''The square of a number.
        ...
        ...     >>> square(3)
        ...     9
        ...     '''
        ...     return n * n
        >>> found[0].text, found[0].visible, found[0].hidden
        ('The square of a number.', [((3,), 9)], [((0,), 0), ((-7,), 49)])
        >>> print(found[0].wrong)
        def square(n: int) -> int:
            return n + n
    """

    def problem(*, level: int, hidden: Sequence[tuple[Any, ...]], wrong: str) -> Callable[[_Function], _Function]:
        def decorate(function: _Function) -> _Function:
            name = function.__name__
            try:
                found = _from_function(function, level, hidden, wrong)
            except ValueError as error:
                raise ValueError(f"Problem {name!r}: {error}") from error
            if any(name == other.name for other in problems):
                raise ValueError(f"Problem {name!r}: there is one of this name; give it another.")
            problems.append(found)
            return function

        return decorate

    return problem


def _from_function(function: Callable[..., Any], level: int, hidden: Sequence[tuple[Any, ...]], wrong: str) -> Problem:
    if level not in (1, 2, 3):
        raise ValueError(f"level must be 1, 2 or 3, got {level!r}.")
    parts = doctest.DocTestParser().parse(inspect.getdoc(function) or "")
    visible = [_from_example(part, function.__name__) for part in parts if isinstance(part, doctest.Example)]
    text = " ".join(" ".join(part for part in parts if isinstance(part, str)).split())
    if not text or not visible or not hidden:
        raise ValueError("expected a docstring of text and examples (>>>), and hidden arguments.")
    function.__globals__[function.__name__] = function  # one that calls itself does so below
    tests = []
    for arguments in [arguments for arguments, _ in visible] + list(hidden):
        if not isinstance(arguments, tuple):
            raise ValueError(f"hidden arguments must be tuples, one for each call, got {arguments!r:.80}.")
        given = copy.deepcopy(arguments)
        tests.append((arguments, function(*given)))
        if not is_plain([*arguments]) or not is_plain(tests[-1][1]):
            raise ValueError(f"expected plain JSON data, got {tests[-1]!r:.200}.")
        if given != arguments:
            raise ValueError(f"it changes its arguments {arguments!r:.80}.")
    for (arguments, said), (_, found) in zip(visible, tests, strict=False):
        if not same(found, said):
            raise ValueError(
                f"its docstring says {said!r:.80} for the arguments {arguments!r:.80}, it returns {found!r:.80}."
            )
    signature, solution = _split(textwrap.dedent(inspect.getsource(function)))
    return Problem(
        name=function.__name__,
        level=level,
        text=text,
        signature=signature,
        visible=tests[: len(visible)],
        hidden=tests[len(visible) :],
        solution=solution,
        wrong=with_body(signature, wrong),
        entry=function.__name__,
        source=inspect.getfile(function),
    )


def _from_example(example: doctest.Example, name: str) -> Test:
    """The test that a docstring's example is."""
    call = ast.parse(example.source.strip(), mode="eval").body
    if not isinstance(call, ast.Call) or call.keywords or ast.unparse(call.func) != name:
        raise ValueError(f"expected examples such as {name}(1, 2), got {example.source.strip()!r}.")
    arguments = eval(ast.unparse(ast.Tuple(call.args, ast.Load())), {})  # such as [0] * 20
    return arguments, literal(ast.parse(example.want.strip() or "None", mode="eval").body)


def _split(source: str) -> tuple[str, str]:
    """A function's ``def …:`` lines, and its source without decorators and docstring."""
    lines, function = source.splitlines(), ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    docstring, *rest = function.body
    if not rest:
        raise ValueError("there is nothing after its docstring.")
    signature = "\n".join(lines[function.lineno - 1 : docstring.lineno - 1])
    return signature, "\n".join([signature, *lines[docstring.end_lineno :]])


def with_body(signature: str, body: str) -> str:
    r"""A function of this signature with another body.

    Example:
        >>> with_body("class A:\n    def f(self):", "return 1").splitlines()
        ['class A:', '    def f(self):', '        return 1']
    """
    last = signature.splitlines()[-1]
    indent = " " * (len(last) - len(last.lstrip()) + 4) if not last.startswith(")") else "    "
    return f"{signature}\n{textwrap.indent(textwrap.dedent(body).strip(), indent)}"


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def same(found: Any, expected: Any) -> bool:
    """Whether plain JSON data is the same, types included.

    Example:
        >>> same([1, {"a": None}], [1, {"a": None}]), same(True, 1), same(1.0, 1), same([1], [1, 2])
        (True, False, False, False)
    """
    if type(found) is not type(expected):
        return False
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    return bool(found == expected)


def is_plain(value: Any) -> bool:
    """Whether a value is the same after a way through JSON.

    Example:
        >>> is_plain([1, "a", None]), is_plain((1, 2)), is_plain({1: 2}), is_plain(float("nan"))
        (True, False, False, False)
    """
    try:
        return same(json.loads(json.dumps(value, allow_nan=False)), value)
    except (TypeError, ValueError, RecursionError):
        return False


def literal(node: ast.expr) -> Any:
    """The plain data that an expression writes down."""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        value = None
        plain = False
    else:
        plain = is_plain(value)
    if not plain:
        raise NotPlainError(f"expected plain JSON data as a literal, got {ast.unparse(node):.80}.")
    return value
