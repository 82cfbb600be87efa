"""The training problems of the task `code`: small Python functions to write, in three levels.

Each has examples that a solver sees, tests that it does not see, a reference solution and a plausible wrong one.
"""

from antipasto.tasks.code.problems import Problem, collect

PROBLEMS: list[Problem] = []
problem = collect(PROBLEMS)


# Level 1: one idea, a few lines.


@problem(
    level=1,
    hidden=[("",), ("rhythm",), ("AEIOU",), ("Queue at noon",), ("xyz Y",), ("OoO",)],
    wrong='return sum(text.count(vowel) for vowel in "aeiou")',
)
def count_vowels(text: str) -> int:
    """Count the vowels in a text: the letters a, e, i, o and u, in lower or upper case.

    >>> count_vowels("banana")
    3
    >>> count_vowels("Apple")
    2
    """
    return sum(letter in "aeiou" for letter in text.lower())


@problem(
    level=1,
    hidden=[("",), ("   ",), ("grace brewster hopper",), ("Plato",), ("  alan   turing ",), ("e. e. cummings",)],
    wrong='return "".join(word[0] for word in name.split())',
)
def initials(name: str) -> str:
    """Return the first characters of all words of a name, in upper case and with nothing between them.
    Words are separated by one or more spaces; there may be spaces at the ends too.

    >>> initials("ada lovelace")
    'AL'
    >>> initials("Johann  Sebastian Bach")
    'JSB'
    """
    return "".join(word[0].upper() for word in name.split())


@problem(
    level=1,
    hidden=[([],), ([4],), ([9, 9, 9, 8],), ([-5, -2, -2, -9],), ([1, 2],), ([0, 0, -1, 0],), ([3, 3],)],
    wrong="return sorted(scores)[-2] if len(scores) > 1 else None",
)
def runner_up_score(scores: list[int]) -> int | None:
    """Return the second largest of the different values in a list of scores, so that a shared top score counts once.
    Return None if there are fewer than two different values.

    >>> runner_up_score([10, 30, 20])
    20
    >>> runner_up_score([5, 8, 8])
    5
    >>> runner_up_score([7, 4, 7, 6, 4])
    6
    """
    distinct = sorted(set(scores))
    return distinct[-2] if len(distinct) > 1 else None


@problem(
    level=1,
    hidden=[([],), ([1],), ([1, 2],), ([5, 5, 5, 5, 5, 5],), ([9, 8, 7, 6, 5, 4, 3, 2],), ([0, 3, 6, 9, 12],)],
    wrong="return [item for item in items if item % 3 != 0]",
)
def drop_every_third(items: list[int]) -> list[int]:
    """Leave out the third, the sixth, the ninth item of a list and so on, and keep the others in order.

    >>> drop_every_third([10, 20, 30, 40])
    [10, 20, 40]
    >>> drop_every_third([1, 2, 3, 4, 5, 6])
    [1, 2, 4, 5]
    >>> drop_every_third([6, 3, 1])
    [6, 3]
    """
    return [item for place, item in enumerate(items, start=1) if place % 3 != 0]


@problem(
    level=1,
    hidden=[([],), ([-3],), ([-10, -4],), ([2, 2, 2],), ([7, -7, 0],), ([100, 1, 50],)],
    wrong="return max(readings) - readings[0] if readings else 0",
)
def spread(readings: list[int]) -> int:
    """Return the difference between the largest and the smallest reading, or 0 if there are no readings.

    >>> spread([3, 9, 5])
    6
    >>> spread([4, 1, 6])
    5
    """
    return max(readings) - min(readings) if readings else 0


@problem(
    level=1,
    hidden=[
        ([],),
        (["x"],),
        (["to", "be", "or"],),
        (["pear", "plum", "fig"],),
        (["", ""],),
        (["a", "bbb", "cc", "ddd"],),
    ],
    wrong='return sorted(words, key=len)[-1] if words else ""',
)
def longest_word(words: list[str]) -> str:
    """Return the longest word of a list; the first one if several are equally long, and an empty text if the list is
    empty.

    >>> longest_word(["sun", "planet", "moon"])
    'planet'
    >>> longest_word(["red", "tan", "ox"])
    'red'
    """
    return max(words, key=len, default="")


@problem(
    level=1,
    hidden=[("",), ("123",), ("12345",), ("abcd",), ("77 7777 7",), ("abcdefghijkl",)],
    wrong='return "****" + code[-4:]',
)
def mask_code(code: str) -> str:
    """Replace every character of a code by a star, except for the last four characters, which stay as they are.
    A code of four or fewer characters is returned unchanged.

    >>> mask_code("98765432")
    '****5432'
    >>> mask_code("A1B2C3")
    '**B2C3'
    >>> mask_code("42")
    '42'
    """
    return "*" * (len(code) - 4) + code[-4:]


@problem(
    level=1,
    hidden=[([],), ([5],), ([5, 6],), ([1, 2, 3, 4, 5],), ([7, 7, 8],), ([0, -1, -2, -3],)],
    wrong="return items[::-1]",
)
def swap_ends(items: list[int]) -> list[int]:
    """Return a copy of a list in which the first and the last item have changed places.
    A list with fewer than two items stays as it is.

    >>> swap_ends([1, 2, 3])
    [3, 2, 1]
    >>> swap_ends([10, 20, 30, 40])
    [40, 20, 30, 10]
    """
    return [items[-1], *items[1:-1], items[0]] if len(items) > 1 else list(items)


@problem(
    level=1,
    hidden=[(0,), (7,), (-9,), (-1234,), (1000001,), (99999,)],
    wrong="return 1 + (number - 1) % 9",
)
def digit_sum(number: int) -> int:
    """Add up the decimal digits of a whole number, ignoring its sign.

    >>> digit_sum(305)
    8
    >>> digit_sum(-81)
    9
    >>> digit_sum(999)
    27
    """
    return sum(int(digit) for digit in str(abs(number)))


@problem(
    level=1,
    hidden=[([], 3), ([1], 5), ([1, 2, 3], 0), ([1, 2, 3], 3), ([1, 2, 3], 4), ([4, 3, 2, 1], 7), ([5, 6], 1)],
    wrong="return items[steps:] + items[:steps]",
)
def rotate_left(items: list[int], steps: int) -> list[int]:
    """Move the first item of a list to its end, as many times as steps says, and return the resulting list.
    The number of steps is never negative and may be larger than the length of the list; an empty list stays empty.

    >>> rotate_left([1, 2, 3, 4], 1)
    [2, 3, 4, 1]
    >>> rotate_left([7, 8, 9], 5)
    [9, 7, 8]
    """
    shift = steps % len(items) if items else 0
    return items[shift:] + items[:shift]


@problem(
    level=1,
    hidden=[([],), (["a"],), (["b", "a", "b", "a"],), (["x", "x", "x"],), (["A", "a", "A"],), (["z", "y", "x", "y"],)],
    wrong="return sorted(set(names))",
)
def without_repeats(names: list[str]) -> list[str]:
    """Keep only the first appearance of every name in a list, in the order of these first appearances.
    Names that differ in upper and lower case are different names.

    >>> without_repeats(["ann", "bob", "ann"])
    ['ann', 'bob']
    >>> without_repeats(["zoe", "amy", "zoe", "ben"])
    ['zoe', 'amy', 'ben']
    """
    return list(dict.fromkeys(names))


@problem(
    level=1,
    hidden=[
        ({},),
        ({"a": "a"},),
        ({"k": "v", "v": "k"},),
        ({"x": "1", "y": "1", "z": "1"},),
        ({"p": "2", "q": "3", "r": "2"},),
        ({"b": "t", "a": "t"},),
    ],
    wrong="return {value: key for key, value in sorted(owners.items(), reverse=True)}",
)
def invert(owners: dict[str, str]) -> dict[str, str]:
    """Exchange the keys and the values of a dictionary. Where several keys have the same value, the alphabetically last
    of these keys is the one to keep.

    >>> invert({"car": "Eva", "bike": "Tom"})
    {'Tom': 'bike', 'Eva': 'car'}
    >>> invert({"hat": "Eva", "tie": "Eva", "cap": "Eva"})
    {'Eva': 'tie'}
    """
    return {value: key for key, value in sorted(owners.items())}


@problem(
    level=1,
    hidden=[("",), ("a",), ("aA",), ("abca",), ("abcdefg",), ("12321",), ("Zz Top",), ("no w",)],
    wrong="return len(set(word)) == len(word)",
)
def all_different(word: str) -> bool:
    """Tell whether no character occurs twice in a word, where the lower and the upper case of a letter count as the same.

    >>> all_different("plum")
    True
    >>> all_different("Dad")
    False
    >>> all_different("noon")
    False
    """
    return len(set(word.lower())) == len(word)


@problem(
    level=1,
    hidden=[(0,), (1439,), (1440,), (1501,), (-1,), (-1441,), (60,), (9,)],
    wrong='return f"{minutes // 60:02}:{minutes % 60:02}"',
)
def clock_face(minutes: int) -> str:
    """Write the time that is so many minutes after midnight as HH:MM on a 24-hour clock.
    The number may exceed one day, or be negative for a time before midnight: then the clock just goes round.

    >>> clock_face(75)
    '01:15'
    >>> clock_face(1450)
    '00:10'
    >>> clock_face(-30)
    '23:30'
    """
    return f"{minutes // 60 % 24:02}:{minutes % 60:02}"


@problem(
    level=1,
    hidden=[
        ([], 0, 5),
        ([0, 5], 0, 5),
        ([-1, 6], 0, 5),
        ([3, 3, 3], 3, 3),
        ([1, 2, 3], 4, 2),
        ([-7, -5, -3, -1], -5, -1),
    ],
    wrong="return sum(low < value < high for value in values)",
)
def count_within(values: list[int], low: int, high: int) -> int:
    """Count the values that are at least low and at most high.

    >>> count_within([1, 5, 10], 2, 9)
    1
    >>> count_within([4, 6, 8, 8], 6, 8)
    3
    """
    return sum(low <= value <= high for value in values)


@problem(
    level=1,
    hidden=[
        ({},),
        ({"tea": 3},),
        ({"b": 1, "a": 1},),
        ({"x": 5, "y": 4, "z": 4},),
        ({"q": 0, "r": -1},),
        ({"pie": 7, "jam": 7, "ham": 9},),
    ],
    wrong="return min(prices, key=lambda name: prices[name]) if prices else None",
)
def cheapest(prices: dict[str, int]) -> str | None:
    """Return the name of the product with the lowest price. Among equal prices the alphabetically first name wins;
    without any products the answer is None.

    >>> cheapest({"pen": 2, "pad": 5})
    'pen'
    >>> cheapest({"nut": 4, "bolt": 4, "saw": 9})
    'bolt'
    """
    return min(prices, key=lambda name: (prices[name], name), default=None)


@problem(
    level=1,
    hidden=[([], 1), ([1, 1, 1], 1), ([2, 3], 1), ([0, 4, 0], 0), ([5, 6, 7], 7), ([9, 8, 9, 8], 8)],
    wrong="return [items.index(wanted)] if wanted in items else []",
)
def places_of(items: list[int], wanted: int) -> list[int]:
    """List all positions, counted from 0 and in rising order, at which a wanted number stands in a list.

    >>> places_of([7, 3, 7], 7)
    [0, 2]
    >>> places_of([1, 2], 5)
    []
    """
    return [place for place, item in enumerate(items) if item == wanted]


@problem(
    level=1,
    hidden=[
        ([], 0),
        ([[1], [2, 3], []], 1),
        ([[], []], 0),
        ([[5, 6, 7]], 2),
        ([[1, 2], [3], [4, 5]], 1),
        ([[9], [8], [7]], 0),
    ],
    wrong="return [row[index] if index < len(row) else 0 for row in table]",
)
def column(table: list[list[int]], index: int) -> list[int]:
    """Collect the numbers in one column of a table from top to bottom. The column is counted from 0;
    rows that are too short to have it are skipped.

    >>> column([[1, 2], [3, 4]], 1)
    [2, 4]
    >>> column([[1, 2, 3], [4], [5, 6, 7]], 2)
    [3, 7]
    """
    return [row[index] for row in table if index < len(row)]


@problem(
    level=1,
    hidden=[(0, 6), (6, 6), (7, 6), (13, 12), (1, 1), (99, 10), (100, 10)],
    wrong="return items // per_box + 1",
)
def boxes_needed(items: int, per_box: int) -> int:
    """Say how many boxes are needed to pack a number of items, when a box holds at most per_box of them.
    There are 0 or more items and a box holds at least one.

    >>> boxes_needed(10, 4)
    3
    >>> boxes_needed(8, 4)
    2
    """
    return -(-items // per_box)


@problem(
    level=1,
    hidden=[([],), ([2, 4],), ([1, 3],), ([3, 2, 1, 0],), ([-1, -2, -3, -4],), ([9, 6, 7, 6, 9],)],
    wrong="return sorted(numbers, key=lambda number: (number % 2, number))",
)
def evens_first(numbers: list[int]) -> list[int]:
    """Rearrange a list so that all even numbers come before all odd ones, and otherwise keep the order they had.

    >>> evens_first([1, 2, 3, 4])
    [2, 4, 1, 3]
    >>> evens_first([5, 8, 3, 6])
    [8, 6, 5, 3]
    """
    return sorted(numbers, key=lambda number: number % 2)


@problem(
    level=1,
    hidden=[([],), ([2, 4, 6],), ([-3],), ([1, 1, 2],), ([10, 9, -1],), ([0, 7, 5],)],
    wrong="return sum(number for number in numbers if number % 2) ** 2",
)
def odd_squares(numbers: list[int]) -> int:
    """Add up the squares of all odd numbers in a list, and leave the even ones out.

    >>> odd_squares([1, 2, 3])
    10
    >>> odd_squares([4, 5])
    25
    """
    return sum(number * number for number in numbers if number % 2)


@problem(
    level=1,
    hidden=[([8],), ([2, 1],), ([4, 4, 1, 1],), ([-1, -9, -5],), ([10, 2, 8, 6, 4, 0],), ([3, 3, 3, 9, 1],)],
    wrong="return numbers[(len(numbers) - 1) // 2]",
)
def lower_median(numbers: list[int]) -> int:
    """Return the number in the middle of a non-empty list once it is sorted. If the count is even there are two middle
    numbers: return the smaller of them.

    >>> lower_median([9, 1, 5])
    5
    >>> lower_median([7, 2, 4, 8])
    4
    """
    return sorted(numbers)[(len(numbers) - 1) // 2]


@problem(
    level=1,
    hidden=[("", 3), ("x", 0), ("no!", 3), ("aab", 2), (" ", 4), ("Hi", 1)],
    wrong="return text * times",
)
def stretch(text: str, times: int) -> str:
    """Write every character of a text so many times in a row; with 0 times nothing is left.

    >>> stretch("abc", 2)
    'aabbcc'
    >>> stretch("ok", 3)
    'oookkk'
    """
    return "".join(character * times for character in text)


@problem(
    level=1,
    hidden=[
        ("",),
        ("    ",),
        ("one",),
        ("  leading and trailing  ",),
        ("a  b",),
        ("tabs\tcount too",),
        ("well-known don't",),
    ],
    wrong='return text.count(" ") + 1',
)
def word_count(text: str) -> int:
    """Count the words of a text, where a word is any run of characters other than spaces and tabs.

    >>> word_count("the cat sat")
    3
    >>> word_count("so   far  away")
    3
    """
    return len(text.split())


@problem(
    level=1,
    hidden=[
        ([],),
        ([4],),
        ([1, 1, 1],),
        ([3, 2],),
        ([1, 3, 2, 4],),
        ([-5, -5, 0],),
        ([1, 2, 3, 4, 3],),
        ([2, 5, 5, 9],),
    ],
    wrong="return all(heights[i] < heights[i + 1] for i in range(len(heights) - 1))",
)
def never_falls(heights: list[int]) -> bool:
    """Tell whether no height in a list is smaller than the one just before it.
    This holds for lists with fewer than two heights.

    >>> never_falls([1, 4, 6])
    True
    >>> never_falls([2, 2, 3])
    True
    >>> never_falls([5, 3, 9])
    False
    """
    return heights == sorted(heights)


@problem(
    level=1,
    hidden=[
        ([],),
        (["bb", "a", "aa"],),
        (["c", "b", "a"],),
        (["fig", "", "kiwi"],),
        (["no", "on", "oh", "a"],),
        (["xyz", "xy", "xyy", "x"],),
    ],
    wrong="return sorted(words, key=len)",
)
def shortest_first(words: list[str]) -> list[str]:
    """Sort words from short to long, and words of the same length alphabetically. All words are in lower case.

    >>> shortest_first(["pear", "fig", "apple"])
    ['fig', 'pear', 'apple']
    >>> shortest_first(["tea", "ham", "egg"])
    ['egg', 'ham', 'tea']
    """
    return sorted(words, key=lambda word: (len(word), word))


@problem(
    level=1,
    hidden=[([], 2), ([1], 1), ([1, 2, 3, 4], 2), ([1, 2, 3, 4, 5, 6, 7], 3), ([9, 8], 5), ([4, 5, 6], 1)],
    wrong="return [items[i : i + size] for i in range(0, len(items) - size + 1, size)]",
)
def in_rows(items: list[int], size: int) -> list[list[int]]:
    """Cut a list into rows of a given size (at least 1), from left to right; the last row may be shorter.
    An empty list gives no rows.

    >>> in_rows([1, 2, 3, 4, 5], 2)
    [[1, 2], [3, 4], [5]]
    >>> in_rows([7, 8, 9], 3)
    [[7, 8, 9]]
    """
    return [items[start : start + size] for start in range(0, len(items), size)]


@problem(
    level=1,
    hidden=[("", "/"), ("a/b/c", "/"), ("plain", "."), ("end.", "."), ("::x", ":"), ("a.b/c", "."), ("1-2-3-", "-")],
    wrong="return text.split(mark, 1)[-1]",
)
def after_last(text: str, mark: str) -> str:
    """Return the part of a text that follows the last occurrence of a one-character mark.
    If the mark does not occur, return the whole text.

    >>> after_last("notes.old.txt", ".")
    'txt'
    >>> after_last("readme", ".")
    'readme'
    >>> after_last("key=value", "=")
    'value'
    """
    return text.split(mark)[-1]


@problem(
    level=1,
    hidden=[([], [1]), ([1, 2], []), ([1, 1, 2], [2]), ([3, 2, 1], [1, 3]), ([5, 4, 5, 4], [4]), ([9, 7, 8], [6])],
    wrong="return sorted(set(planned) - set(done))",
)
def still_open(planned: list[int], done: list[int]) -> list[int]:
    """List the planned task numbers that are not among those done, in the order of the plan.
    A number that is planned several times stays in the list that often.

    >>> still_open([4, 2, 9], [2])
    [4, 9]
    >>> still_open([6, 6, 1], [1, 3])
    [6, 6]
    """
    return [task for task in planned if task not in done]


@problem(
    level=1,
    hidden=[([],), ([5],), ([1, -1],), ([0, 0, 0],), ([2, 4, 8, 16],), ([-3, 5, -7],)],
    wrong="return [numbers[i] + numbers[i + 1] for i in range(0, len(numbers) - 1, 2)]",
)
def neighbour_sums(numbers: list[int]) -> list[int]:
    """List the sums of every two numbers that stand next to each other: first and second, second and third, and so on.
    With fewer than two numbers the result is empty.

    >>> neighbour_sums([1, 2, 3, 4])
    [3, 5, 7]
    >>> neighbour_sums([10, 5])
    [15]
    """
    return [numbers[place] + numbers[place + 1] for place in range(len(numbers) - 1)]


@problem(
    level=1,
    hidden=[(0,), (1,), (2,), (-4,), (-9,), (100,), (10**12,), (10**12 + 1,)],
    wrong="return int(abs(number) ** 0.5) ** 2 == abs(number)",
)
def is_square(number: int) -> bool:
    """Tell whether a whole number is the square of a whole number. Negative numbers never are; 0 is.

    >>> is_square(49)
    True
    >>> is_square(48)
    False
    >>> is_square(-1)
    False
    """
    import math

    return number >= 0 and math.isqrt(number) ** 2 == number


@problem(
    level=1,
    hidden=[
        ([],),
        ([[1]],),
        ([[1, 2, 3]],),
        ([[1], [2], [3]],),
        ([[1, 2, 3], [4, 5, 6]],),
        ([[7, 8], [9, 0], [1, 2]],),
    ],
    wrong="return [list(reversed(row)) for row in reversed(grid)]",
)
def columns_to_rows(grid: list[list[int]]) -> list[list[int]]:
    """Turn the columns of a grid into rows: the first column becomes the first row, and so on.
    All rows of the grid have the same length of at least 1; a grid without rows gives a grid without rows.

    >>> columns_to_rows([[1, 2], [3, 4]])
    [[1, 3], [2, 4]]
    >>> columns_to_rows([[5, 6, 7]])
    [[5], [6], [7]]
    """
    return [list(line) for line in zip(*grid, strict=True)]


@problem(
    level=1,
    hidden=[
        ([],),
        ([[4]],),
        ([[1, 0], [0, 1]],),
        ([[0, 5], [5, 0]],),
        ([[2, 1, 1], [1, 3, 1], [1, 1, -5]],),
        ([[1, 2, 3], [4, 5, 6], [7, 8, 9]],),
    ],
    wrong="return sum(grid[i][len(grid) - 1 - i] for i in range(len(grid)))",
)
def diagonal_sum(grid: list[list[int]]) -> int:
    """Add up the numbers on the diagonal of a square grid that runs from its top left to its bottom right corner.
    The sum of an empty grid is 0.

    >>> diagonal_sum([[1, 2], [3, 4]])
    5
    >>> diagonal_sum([[1, 9, 9], [9, 1, 9], [9, 9, 1]])
    3
    """
    return sum(row[place] for place, row in enumerate(grid))


@problem(
    level=1,
    hidden=[
        ([], {"a": 1}, 0),
        (["a", "b"], {}, 7),
        (["a", "a"], {"a": 0}, 9),
        (["x", "y", "z"], {"y": 4}, -1),
        (["A"], {"a": 1}, 5),
        (["q", "p"], {"p": 1, "q": 2}, 0),
    ],
    wrong="return [table.get(key) or default for key in keys if key in table]",
)
def look_up_all(keys: list[str], table: dict[str, int], default: int) -> list[int]:
    """Look up every key of a list in a table and return the values in the order of the keys.
    A key that the table lacks gets the default value.

    >>> look_up_all(["a", "c"], {"a": 1, "b": 2}, 0)
    [1, 0]
    >>> look_up_all(["b", "b", "a"], {"a": 5, "b": 6}, 3)
    [6, 6, 5]
    """
    return [table.get(key, default) for key in keys]


@problem(
    level=1,
    hidden=[([3],), ([1, 1, 1],), ([-5, -2, -2, -8],), ([9, 0, 9, 0],), ([0, 4, 2],), ([7, 6, 5, 7, 4],)],
    wrong="return temperatures.index(max(temperatures))",
)
def last_hottest_day(temperatures: list[int]) -> int:
    """Return the number of the day, counted from 0, with the highest temperature in a non-empty list.
    If several days share it, return the last of them.

    >>> last_hottest_day([18, 25, 21])
    1
    >>> last_hottest_day([30, 28, 30, 27])
    2
    """
    return max(range(len(temperatures)), key=lambda day: (temperatures[day], day))


@problem(
    level=1,
    hidden=[
        ("", ""),
        ("Tea", "Eat"),
        ("a b", "ba"),
        ("aab", "abb"),
        ("listen to", "tin stole"),
        ("abc", "abcd"),
        ("Race", "CAR E"),
        ("oo", "o"),
    ],
    wrong="return set(first.lower()) == set(second.lower())",
)
def same_letters(first: str, second: str) -> bool:
    """Tell whether two texts consist of the same characters, each equally often, when spaces and the difference between
    lower and upper case are ignored.

    >>> same_letters("dirty room", "Dormitory")
    True
    >>> same_letters("moon", "mono")
    True
    >>> same_letters("see", "sse")
    False
    """
    return sorted(first.lower().replace(" ", "")) == sorted(second.lower().replace(" ", ""))


@problem(
    level=1,
    hidden=[("",), ("hello",), ("a b a",), ("  keep   calm ",), ("Stop, look",), ("one two three four",)],
    wrong="return sentence[::-1]",
)
def words_backwards(sentence: str) -> str:
    """Put the words of a sentence in reverse order, with exactly one space between them and none at the ends.
    The words themselves stay as they are.

    >>> words_backwards("we are here")
    'here are we'
    >>> words_backwards("up  and   down")
    'down and up'
    """
    return " ".join(reversed(sentence.split()))


@problem(
    level=1,
    hidden=[
        ({}, 5),
        ({"a": 5}, 5),
        ({"z": 1, "y": 2, "x": 3}, 2),
        ({"pen": 3, "cup": 3}, 2),
        ({"c": 0, "b": -1, "a": 9}, 0),
        ({"oil": 8, "ale": 9, "rum": 10}, 9),
    ],
    wrong="return [name for name, price in prices.items() if price < limit]",
)
def affordable(prices: dict[str, int], limit: int) -> list[str]:
    """List in alphabetical order the names of the products that cost no more than a limit.

    >>> affordable({"soap": 3, "comb": 2, "robe": 40}, 10)
    ['comb', 'soap']
    >>> affordable({"tent": 80, "rope": 15}, 15)
    ['rope']
    """
    return sorted(name for name, price in prices.items() if price <= limit)


@problem(
    level=1,
    hidden=[(0, 5), (1, 5), (-1, 5), (-12, 10), (15, 5), (99, 100), (101, 100), (7, 1)],
    wrong="return number + step - number % step",
)
def round_up(number: int, step: int) -> int:
    """Return the smallest multiple of a positive step that is not smaller than the number.

    >>> round_up(13, 5)
    15
    >>> round_up(20, 10)
    20
    >>> round_up(-7, 3)
    -6
    """
    return number + -number % step


@problem(
    level=1,
    hidden=[("",), ("a",), ("AB CD",), ("12ab",), ("hELLO wORLD",), ("x-y-z",)],
    wrong='return "".join(c.upper() if i % 2 else c.lower() for i, c in enumerate(text))',
)
def wavy(text: str) -> str:
    """Put the characters of a text alternately in upper and lower case, beginning with upper case.
    Characters without case, such as spaces, stay as they are but take their turn like all others.

    >>> wavy("banana")
    'BaNaNa'
    >>> wavy("go on")
    'Go oN'
    """
    return "".join(letter.lower() if place % 2 else letter.upper() for place, letter in enumerate(text))


@problem(
    level=1,
    hidden=[([],), ([[]],), ([[1], [2, 3]],), ([[], [], [0]],), ([[5, 5, 5], [5]],), ([[1, 2], [], [3, 4], [5]],)],
    wrong="return sum(sum(shelf) for shelf in shelves)",
)
def total_books(shelves: list[list[int]]) -> int:
    """Count the books on all shelves together. Every shelf is a list with one number (the book's code) for each book.

    >>> total_books([[11, 12], [13]])
    3
    >>> total_books([[7, 7, 7], []])
    3
    """
    return sum(len(shelf) for shelf in shelves)


@problem(
    level=1,
    hidden=[
        ("", "x"),
        ("x", "x"),
        ("xx", "x"),
        ("abcabc", "abc"),
        ("data.csv", ".txt"),
        ("photo.jpg.jpg", ".jpg"),
        ("aba", "a"),
        ("end", "send"),
    ],
    wrong='return name.replace(ending, "")',
)
def without_ending(name: str, ending: str) -> str:
    """Remove a non-empty ending from a name, once, if the name ends with it; otherwise return the name as it is.

    >>> without_ending("report.txt", ".txt")
    'report'
    >>> without_ending("papa", "pa")
    'pa'
    >>> without_ending("team", "te")
    'team'
    """
    return name[: -len(ending)] if name.endswith(ending) else name
