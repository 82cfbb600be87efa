"""A dozen problems for the tests of the task ``code``: every kind of result, and what graders get wrong easily."""

from antipasto.tasks.code.problems import Problem, collect

PROBLEMS: list[Problem] = []
problem = collect(PROBLEMS)


@problem(level=1, hidden=[(0,), (7,), (-2,)], wrong="return n + n")
def square(n: int) -> int:
    """The square of a number.

    >>> square(3)
    9
    >>> square(12)
    144
    """
    return n * n


@problem(level=1, hidden=[("",), ("Anna",), ("no",), ("noon",), ("Ab",)], wrong="return text == text[::-1]")
def is_palindrome(text: str) -> bool:
    """Whether a text reads the same backwards, in any case.

    >>> is_palindrome("Level")
    True
    >>> is_palindrome("above")
    False
    """
    lowered = text.lower()
    return lowered == lowered[::-1]


@problem(level=2, hidden=[("",), ("aab",), ("b a",), ("tattoo",)], wrong="return {c: 1 for c in text}")
def letters(text: str) -> dict[str, int]:
    """How often each character occurs.

    >>> letters("look")
    {'l': 1, 'o': 2, 'k': 1}
    >>> letters("seen")
    {'s': 1, 'e': 2, 'n': 1}
    """
    return {c: text.count(c) for c in text}


@problem(
    level=1,
    hidden=[([],), ([5],), ([4, 4],), ([9, 1, 5],), ([1, 9, 5],)],
    wrong="return sorted(numbers)[1] if len(numbers) > 1 else None",
)
def second(numbers: list[int]) -> int | None:
    """The second smallest of the different numbers, None if there is none.

    >>> second([30, 10, 20])
    20
    >>> second([17, 17, 40, 23])
    23
    """
    found = sorted(set(numbers))
    return found[1] if len(found) > 1 else None


@problem(
    level=2,
    hidden=[([], 2), ([1], 1), ([1, 2, 3, 4], 2), ([5, 6, 7, 8, 9], 4)],
    wrong="""
    rows = []
    for start in range(0, len(items) - 1, size):
        rows.append(items[start : start + size - 1])
    return rows
    """,
)
def in_rows(items: list[int], size: int) -> list[list[int]]:
    """Cut a list into rows of a size; the last may be shorter.

    >>> in_rows([10, 20, 30], 2)
    [[10, 20], [30]]
    >>> in_rows([11, 12, 13, 14], 3)
    [[11, 12, 13], [14]]
    """
    return [items[start : start + size] for start in range(0, len(items), size)]


@problem(level=1, hidden=[(1, 4), (3, 2), (-5, 8), (10, 5)], wrong="return a // b")
def half(a: int, b: int) -> float:
    """The quotient of two numbers, as a float.

    >>> half(9, 12)
    0.75
    >>> half(16, 8)
    2.0
    """
    return a / b


@problem(level=2, hidden=[(0,), (1,), (6,), (12,)], wrong="return n * (n - 1)")
def factorial(n: int) -> int:
    """The product of the numbers up to n.

    >>> factorial(5)
    120
    >>> factorial(4)
    24
    """
    return 1 if n < 2 else n * factorial(n - 1)


@problem(level=3, hidden=[([],), ([[], [[2]]],), ([8, [9, [8]]],), (["a", ["b", None]],)], wrong="return nested")
def flat(nested: list) -> list:
    """The elements of nested lists, in their order.

    >>> flat([21, [22, [23]]])
    [21, 22, 23]
    >>> flat([["x"], [[["y"]]]])
    ['x', 'y']
    """
    found: list = []
    for item in nested:
        found += flat(item) if isinstance(item, list) else [item]
    return found


@problem(level=1, hidden=[("",), ("a  b",), ("one",), (" lead",)], wrong='return sentence.split(" ")[0]')
def longest(sentence: str) -> str:
    """The longest word of a sentence, the first of several; an empty text if there is none.

    >>> longest("to be or nothing")
    'nothing'
    >>> longest("so it's said")
    "it's"
    """
    return max(sentence.split(), key=len, default="")


@problem(
    level=2,
    hidden=[({}, "a"), ({"a": 1, "b": 1}, "a"), ({"x": {"y": 2}}, "x"), ({"x": None}, "x")],
    wrong="return {key: value for key, value in table.items() if key == name}",
)
def without(table: dict, name: str) -> dict:
    """A table without one of its keys.

    >>> without({"red": 3, "blue": 4}, "red")
    {'blue': 4}
    >>> without({"green": [55]}, "green")
    {}
    """
    return {key: value for key, value in table.items() if key != name}


@problem(level=1, hidden=[([3, 4],), ([],), ([0, 0, 7],)], wrong="return sum(prices) > 50")
def is_free(prices: list[int]) -> bool:
    """Whether the prices add up to nothing.

    >>> is_free([60, -60])
    True
    >>> is_free([41, 19])
    False
    """
    return sum(prices) == 0


@problem(level=2, hidden=[(1,), (3,), (15,), (30,)], wrong='return "Fizz" if n % 3 == 0 else "Buzz"')
def fizz(n: int) -> int | str:
    """Fizz for multiples of 3, Buzz for those of 5, FizzBuzz for those of both, else the number.

    >>> fizz(45)
    'FizzBuzz'
    >>> fizz(77)
    77
    """
    return "Fizz" * (n % 3 == 0) + "Buzz" * (n % 5 == 0) or n
