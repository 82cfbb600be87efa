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
    """Return the first characters of all words of a name, in upper case and with nothing between them. Words are
    separated by one or more spaces; there may be spaces at the ends too.

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
    """Replace every character of a code by a star, except for the last four characters, which stay as they are. A code
    of four or fewer characters is returned unchanged.

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
    """Return a copy of a list in which the first and the last item have changed places. A list with fewer than two
    items stays as it is.

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
    """Move the first item of a list to its end, as many times as steps says, and return the resulting list. The number
    of steps is never negative and may be larger than the length of the list; an empty list stays empty.

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
    """Keep only the first appearance of every name in a list, in the order of these first appearances. Names that
    differ in upper and lower case are different names.

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
    """Exchange the keys and the values of a dictionary. Where several keys have the same value, the alphabetically
    last of these keys is the one to keep.

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
    """Tell whether no character occurs twice in a word, where the lower and the upper case of a letter count as the
    same.

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
    """Write the time that is so many minutes after midnight as HH:MM on a 24-hour clock. The number may exceed one
    day, or be negative for a time before midnight: then the clock just goes round.

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
    """Collect the numbers in one column of a table from top to bottom. The column is counted from 0; rows that are too
    short to have it are skipped.

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
    """Say how many boxes are needed to pack a number of items, when a box holds at most per_box of them. There are 0
    or more items and a box holds at least one.

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
    """Tell whether no height in a list is smaller than the one just before it. This holds for lists with fewer than
    two heights.

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
    """Cut a list into rows of a given size (at least 1), from left to right; the last row may be shorter. An empty
    list gives no rows.

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
    """Return the part of a text that follows the last occurrence of a one-character mark. If the mark does not occur,
    return the whole text.

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
    """List the planned task numbers that are not among those done, in the order of the plan. A number that is planned
    several times stays in the list that often.

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
    """Turn the columns of a grid into rows: the first column becomes the first row, and so on. All rows of the grid
    have the same length of at least 1; a grid without rows gives a grid without rows.

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
    """Add up the numbers on the diagonal of a square grid that runs from its top left to its bottom right corner. The
    sum of an empty grid is 0.

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
    """Look up every key of a list in a table and return the values in the order of the keys. A key that the table
    lacks gets the default value.

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
    """Return the number of the day, counted from 0, with the highest temperature in a non-empty list. If several days
    share it, return the last of them.

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
    """Tell whether two texts consist of the same characters, each equally often, when spaces and the difference
    between lower and upper case are ignored.

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
    """Put the words of a sentence in reverse order, with exactly one space between them and none at the ends. The
    words themselves stay as they are.

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
    """Put the characters of a text alternately in upper and lower case, beginning with upper case. Characters without
    case, such as spaces, stay as they are but take their turn like all others.

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


# Level 2: a loop with a condition or two, or a small algorithm.


@problem(
    level=2,
    hidden=[("",), ("z",), ("abc",), ("aabbaa",), ("mississippi",), ("aaaaaaaaaaaa",), ("  x",), ("Aa",)],
    wrong='return "".join(letter + str(text.count(letter)) for letter in dict.fromkeys(text))',
)
def run_lengths(text: str) -> str:
    """Shorten a text that has no digits: write every run of equal characters as the character followed by the length
    of the run, also where that length is 1.

    >>> run_lengths("aaab")
    'a3b1'
    >>> run_lengths("noon")
    'n1o2n1'
    """
    parts: list[str] = []
    start = 0
    for place in range(1, len(text) + 1):
        if place == len(text) or text[place] != text[start]:
            parts.append(f"{text[start]}{place - start}")
            start = place
    return "".join(parts)


@problem(
    level=2,
    hidden=[
        ([],),
        (["Ann"],),
        (["a", "b", "c", "d", "e"],),
        (["x", "x"],),
        (["one", "two", "three", "four"],),
        (["salt and pepper", "oil"],),
    ],
    wrong='return ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else "".join(names)',
)
def spoken_list(names: list[str]) -> str:
    """Join names as one would say them: a comma and a space between them, but " and " without a comma before the last.
    One name stands alone, and no names give an empty text.

    >>> spoken_list(["tea", "milk", "jam"])
    'tea, milk and jam'
    >>> spoken_list(["Eva", "Tom"])
    'Eva and Tom'
    """
    if not names:
        return ""
    if len(names) == 1:
        return names[0]
    return ", ".join(names[:-1]) + " and " + names[-1]


@problem(
    level=2,
    hidden=[
        ([],),
        ([{}],),
        ([{"a": 1}, {}, {"a": -1}],),
        ([{"x": 1}, {"y": 2}, {"z": 3}],),
        ([{"k": 2, "m": 3}, {"m": 4}, {"k": 1, "m": 1}],),
        ([{"b": 0}],),
        ([{"p": 5}, {"p": 5}, {"p": 5}, {"q": 1}],),
    ],
    wrong="totals = {}\nfor sheet in sheets:\n    totals.update(sheet)\nreturn totals",
)
def add_up_sheets(sheets: list[dict[str, int]]) -> dict[str, int]:
    """Combine several tally sheets into one: for every name that is on any sheet, add up its numbers on all of them.
    Names whose sum is 0 stay in the result.

    >>> add_up_sheets([{"ann": 2, "bob": 1}, {"ann": 3}])
    {'ann': 5, 'bob': 1}
    >>> add_up_sheets([{"cat": 4}, {"dog": 4}])
    {'cat': 4, 'dog': 4}
    """
    totals: dict[str, int] = {}
    for sheet in sheets:
        for name, count in sheet.items():
            totals[name] = totals.get(name, 0) + count
    return totals


@problem(
    level=2,
    hidden=[(2, 2, 2), (5, 4, 3), (2, 3, 2), (1, 2, 3), (10, 1, 1), (4, 7, 7), (3, 8, 4), (0, 5, 5)],
    wrong='return ["equilateral", "isosceles", "scalene"][len({a, b, c}) - 1]',
)
def triangle_kind(a: int, b: int, c: int) -> str:
    """Name the kind of triangle with three given side lengths: "equilateral" if all sides are equal, "isosceles" if
    exactly two are, otherwise "scalene". Return "none" if the longest side is not shorter than the other two together,
    or if a side is not positive.

    >>> triangle_kind(3, 4, 5)
    'scalene'
    >>> triangle_kind(6, 6, 4)
    'isosceles'
    >>> triangle_kind(1, 1, 2)
    'none'
    """
    small, middle, large = sorted([a, b, c])
    if small <= 0 or small + middle <= large:
        return "none"
    if small == large:
        return "equilateral"
    return "isosceles" if small == middle or middle == large else "scalene"


@problem(
    level=2,
    hidden=[(1,), (2,), (3,), (7,), (16,), (27,), (12,)],
    wrong=(
        "steps = 0\n"
        "while number > 1:\n"
        "    number = number // 2 if number % 2 == 0 else number - 1\n"
        "    steps += 1\n"
        "return steps"
    ),
)
def hailstone_steps(number: int) -> int:
    """Starting from a positive number, halve it if it is even, and triple it and add 1 if it is odd; repeat this until
    it is 1. Return how many steps that takes; from 1 itself it takes none.

    >>> hailstone_steps(4)
    2
    >>> hailstone_steps(6)
    8
    """
    steps = 0
    while number != 1:
        number = number // 2 if number % 2 == 0 else 3 * number + 1
        steps += 1
    return steps


@problem(
    level=2,
    hidden=[
        ([],),
        ([8],),
        ([1, 2, 3],),
        ([5, 5, 5, 5],),
        ([1, 1, 2, 2, 2, 1, 1],),
        ([3, 3, 4, 3, 3, 3],),
        ([0, 0, 7, 0],),
    ],
    wrong="return max((items.count(item) for item in items), default=0)",
)
def longest_streak(items: list[int]) -> int:
    """Return the length of the longest unbroken row of equal numbers in a list; 0 for an empty list.

    >>> longest_streak([1, 1, 2])
    2
    >>> longest_streak([4, 6, 4, 4, 6, 6, 6])
    3
    >>> longest_streak([9, 5, 9])
    1
    """
    best = length = 0
    for place, item in enumerate(items):
        length = length + 1 if place and items[place - 1] == item else 1
        best = max(best, length)
    return best


@problem(
    level=2,
    hidden=[([],), ([5],), ([7, 7],), ([10, 1, 5],), ([-4, 4, 0],), ([100, 3, 50, 4, 49],), ([2, 1, 3, 2],)],
    wrong="return max((abs(marks[i + 1] - marks[i]) for i in range(len(marks) - 1)), default=0)",
)
def widest_gap(marks: list[int]) -> int:
    """Marks are drawn on a ruler at whole numbers, given in any order. Return the largest distance between two marks
    that have no other mark between them, or 0 if there are fewer than two marks.

    >>> widest_gap([1, 8, 3])
    5
    >>> widest_gap([20, 10, 12, 19])
    7
    """
    ordered = sorted(marks)
    widest = 0
    for place in range(1, len(ordered)):
        widest = max(widest, ordered[place] - ordered[place - 1])
    return widest


@problem(
    level=2,
    hidden=[("", 5), ("xyz", 3), ("Hello, World!", 13), ("abc", -1), ("Zz", 27), ("no change 1", 0), ("m", 52)],
    wrong='return "".join(chr(ord(letter) + shift) if letter.isalpha() else letter for letter in text)',
)
def shift_letters(text: str, shift: int) -> str:
    """Replace every letter from a to z by the one that stands shift places later in the alphabet, going on with a
    after z; a negative shift goes backwards. Upper case letters are treated likewise and stay upper case; all else
    stays as it is.

    >>> shift_letters("abc", 2)
    'cde'
    >>> shift_letters("Buzz!", 1)
    'Cvaa!'
    """
    shifted = ""
    for letter in text:
        if "a" <= letter.lower() <= "z":
            first = ord("a") if letter.islower() else ord("A")
            letter = chr(first + (ord(letter) - first + shift) % 26)
        shifted += letter
    return shifted


@problem(
    level=2,
    hidden=[("",), (")(",), ("((a)(b))",), ("(",), ("a)",), ("())(()",), ("(1+(2*3))-(4)",), ("((())",)],
    wrong='return text.count("(") == text.count(")")',
)
def parentheses_match(text: str) -> bool:
    """Tell whether the round parentheses in a text match: each closing one closes an earlier opening one, and none
    stays open at the end. Other characters do not matter.

    >>> parentheses_match("f(x, (y))")
    True
    >>> parentheses_match("a) + (b")
    False
    >>> parentheses_match("((z)")
    False
    """
    depth = 0
    for character in text:
        if character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
            if depth < 0:
                return False
    return depth == 0


@problem(
    level=2,
    hidden=[
        ([], 0),
        ([5], 10),
        ([5, 5], 10),
        ([3, 1, 4, 1, 5, 9], 10),
        ([0, -3, 3], 0),
        ([1, 2, 3], 7),
        ([2, 8, 8, 2], 10),
        ([6, 4, 3, 7], 10),
    ],
    wrong=(
        "for i in range(len(prices)):\n"
        "    for j in range(len(prices)):\n"
        "        if prices[i] + prices[j] == total:\n"
        "            return [i, j]\n"
        "return []"
    ),
)
def pair_for_total(prices: list[int], total: int) -> list[int]:
    """Find two different positions (counted from 0) whose prices add up to a total, and return them as a list with the
    smaller one first. If there are several such pairs, take the one with the smallest first position, and among these
    the one with the smallest second position; if there is none, return an empty list.

    >>> pair_for_total([3, 8, 12, 20], 23)
    [0, 3]
    >>> pair_for_total([5, 1, 9], 10)
    [1, 2]
    >>> pair_for_total([1, 2], 4)
    []
    """
    for first in range(len(prices)):
        for second in range(first + 1, len(prices)):
            if prices[first] + prices[second] == total:
                return [first, second]
    return []


@problem(
    level=2,
    hidden=[([],), ([0],), ([5, 5, 5],), ([6, 2, 4, 3, 5],), ([9, 1, 8, 10, 10, 11],), ([-5, -7, -4],), ([3, 2, 1],)],
    wrong="return sum(jumps[i] > jumps[i - 1] for i in range(1, len(jumps))) + 1 if jumps else 0",
)
def count_records(jumps: list[int]) -> int:
    """Count how often a new record is set in a list of jumps: a jump is a record if it is larger than all jumps before
    it. The first jump always is one.

    >>> count_records([400, 390, 410, 405])
    2
    >>> count_records([7, 5, 6, 7, 8])
    2
    """
    records = 0
    best: int | None = None
    for jump in jumps:
        if best is None or jump > best:
            best = jump
            records += 1
    return records


@problem(
    level=2,
    hidden=[(1,), (2,), (8,), (97,), (360,), (49,), (1001,), (1024,)],
    wrong=(
        "factors = []\n"
        "for divisor in range(2, number + 1):\n"
        "    if number % divisor == 0:\n"
        "        factors.append(divisor)\n"
        "        number //= divisor\n"
        "return factors"
    ),
)
def prime_factors(number: int) -> list[int]:
    """Split a positive whole number into prime factors and list them in rising order, each as often as it occurs. The
    number 1 has none.

    >>> prime_factors(15)
    [3, 5]
    >>> prime_factors(12)
    [2, 2, 3]
    """
    factors: list[int] = []
    divisor = 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


@problem(
    level=2,
    hidden=[(0,), (2,), (3,), (5,), (30,), (50,), (26,)],
    wrong="return [n for n in range(2, limit) if n == 2 or n % 2 == 1]",
)
def primes_below(limit: int) -> list[int]:
    """List all prime numbers that are smaller than a limit, in rising order.

    >>> primes_below(8)
    [2, 3, 5, 7]
    >>> primes_below(12)
    [2, 3, 5, 7, 11]
    """
    primes: list[int] = []
    for number in range(2, limit):
        if all(number % prime for prime in primes):
            primes.append(number)
    return primes


@problem(
    level=2,
    hidden=[(0, 2), (1, 9), (255, 2), (100, 10), (80, 3), (7, 8), (63, 8), (625, 5)],
    wrong=(
        'digits = ""\nwhile number > 0:\n    digits += str(number % base)\n    number //= base\nreturn digits or "0"'
    ),
)
def in_base(number: int, base: int) -> str:
    """Write a whole number that is not negative in the number system with a given base from 2 to 10.

    >>> in_base(5, 2)
    '101'
    >>> in_base(11, 3)
    '102'
    """
    digits = ""
    while number > 0:
        digits = str(number % base) + digits
        number //= base
    return digits or "0"


@problem(
    level=2,
    hidden=[
        ([],),
        (["Zoe"],),
        (["ant", "Ape", "ANT"],),
        (["b", "a", "b"],),
        (["Rome", "paris", "Riga", "oslo"],),
        (["x1", "x0", "Y2"],),
    ],
    wrong="groups = {}\nfor name in names:\n    groups.setdefault(name[0], []).append(name)\nreturn groups",
)
def by_first_letter(names: list[str]) -> dict[str, list[str]]:
    """Group names under the lower case of their first letter. Within a group the names are written as given and keep
    their order, repetitions included. No name is empty.

    >>> by_first_letter(["Ann", "bob", "al"])
    {'a': ['Ann', 'al'], 'b': ['bob']}
    >>> by_first_letter(["fig", "Fox", "fig"])
    {'f': ['fig', 'Fox', 'fig']}
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name[0].lower(), []).append(name)
    return groups


@problem(
    level=2,
    hidden=[
        ([],),
        (["tea"],),
        (["b", "a"],),
        (["x", "y", "y", "x"],),
        (["a", "b", "b", "c", "c", "a", "c"],),
        (["Z", "z", "z"],),
        (["p", "r", "q", "r", "q"],),
    ],
    wrong="return max(sorted(set(orders)), key=orders.count) if orders else None",
)
def favourite(orders: list[str]) -> str | None:
    """Return the dish that was ordered most often. If several dishes were ordered equally often, return the one among
    them that was ordered first of all; without orders, return None.

    >>> favourite(["soup", "pie", "soup"])
    'soup'
    >>> favourite(["rice", "fish", "fish", "rice", "beans"])
    'rice'
    """
    counts: dict[str, int] = {}
    for dish in orders:
        counts[dish] = counts.get(dish, 0) + 1
    best: str | None = None
    for dish in counts:
        if best is None or counts[dish] > counts[best]:
            best = dish
    return best


@problem(
    level=2,
    hidden=[([], 1), ([4], 1), ([1, 2], 3), ([1, 2, 3, 4, 5], 3), ([0, -1, 1, 0], 2), ([5, 5, 5], 3), ([9, 8, 7], 1)],
    wrong="return [sum(rain[i : i + days]) for i in range(0, len(rain), days)]",
)
def rolling_totals(rain: list[int], days: int) -> list[int]:
    """Given the rain of each day, list the total rain of every stretch of so many days in a row (at least 1), from the
    first stretch to the last. If there are too few days for a stretch, the list is empty.

    >>> rolling_totals([1, 2, 3, 4], 2)
    [3, 5, 7]
    >>> rolling_totals([2, 0, 6], 3)
    [8]
    """
    totals: list[int] = []
    total = 0
    for day, amount in enumerate(rain):
        total += amount
        if day >= days:
            total -= rain[day - days]
        if day >= days - 1:
            totals.append(total)
    return totals


@problem(
    level=2,
    hidden=[([], []), ([1, 2], []), ([], [3]), ([1], [2, 3, 4]), ([1, 3, 5], [2, 4, 6]), ([9, 9, 9, 9], [0, 0])],
    wrong="woven = []\nfor i in range(min(len(left), len(right))):\n    woven += [left[i], right[i]]\nreturn woven",
)
def zip_lanes(left: list[int], right: list[int]) -> list[int]:
    """Two lanes of cars merge: they go one by one in turn, beginning with the first car of the left lane. When one
    lane is empty the rest of the other follows in order. Return the cars in the order in which they go.

    >>> zip_lanes([1, 2], [8, 9])
    [1, 8, 2, 9]
    >>> zip_lanes([1, 2, 3, 4], [7])
    [1, 7, 2, 3, 4]
    """
    merged: list[int] = []
    for place in range(max(len(left), len(right))):
        if place < len(left):
            merged.append(left[place])
        if place < len(right):
            merged.append(right[place])
    return merged


@problem(
    level=2,
    hidden=[
        ("",),
        ("x",),
        ("__init__",),
        ("get_HTTP_code",),
        ("a_b_c_d",),
        ("double__score",),
        ("ALL_CAPS",),
        ("_private",),
    ],
    wrong='head, *rest = name.split("_")\nreturn head + "".join(part.capitalize() for part in rest)',
)
def joined_name(name: str) -> str:
    """Remove all underscores from a name and turn each letter that directly follows an underscore into upper case,
    except that the first letter that remains becomes lower case. All other letters stay as they are.

    >>> joined_name("total_price")
    'totalPrice'
    >>> joined_name("_My_tax")
    'myTax'
    >>> joined_name("set_ID")
    'setID'
    """
    parts = [part for part in name.split("_") if part]
    joined = ""
    for part in parts:
        joined += part[0].upper() + part[1:] if joined else part[0].lower() + part[1:]
    return joined


@problem(
    level=2,
    hidden=[(0,), (1,), (3,), (5,), (7,), (6,)],
    wrong="row = [1]\nfor _ in range(number):\n    row = [1] + [2 * value for value in row[1:]] + [1]\nreturn row",
)
def number_triangle_row(number: int) -> list[int]:
    """In a triangle of numbers row 0 is just 1. Every later row begins and ends with 1, and between them stand the
    sums of each two neighbours of the row above. Return the row with a given number.

    >>> number_triangle_row(2)
    [1, 2, 1]
    >>> number_triangle_row(4)
    [1, 4, 6, 4, 1]
    """
    row = [1]
    for _ in range(number):
        middle = [row[place] + row[place + 1] for place in range(len(row) - 1)]
        row = [1, *middle, 1]
    return row


@problem(
    level=2,
    hidden=[([],), ([5],), ([1, 2, 3],), ([9, 4, 6],), ([-2, 2],), ([3, 3, 5, 5],), ([10, 1, 4, 8],)],
    wrong="return [number for number in range(1, max(tickets, default=0)) if number not in tickets]",
)
def lost_tickets(tickets: list[int]) -> list[int]:
    """Tickets are numbered in sequence. Given the numbers found, in any order and perhaps repeated, list in rising
    order the numbers between the smallest and the largest of them that are missing.

    >>> lost_tickets([2, 5])
    [3, 4]
    >>> lost_tickets([7, 4, 5, 9])
    [6, 8]
    """
    missing: list[int] = []
    ordered = sorted(tickets)
    for place in range(1, len(ordered)):
        missing.extend(range(ordered[place - 1] + 1, ordered[place]))
    return missing


@problem(
    level=2,
    hidden=[
        ([],),
        ([1],),
        ([1, 2],),
        ([1, 3, 2],),
        ([4, 4, 1],),
        ([1, 2, 2, 1],),
        ([0, 5, 0, 5, 0],),
        ([-3, -1, -2, -2, 4],),
    ],
    wrong="return [i for i in range(1, len(heights) - 1) if heights[i - 1] <= heights[i] >= heights[i + 1]]",
)
def hilltops(heights: list[int]) -> list[int]:
    """List the positions (counted from 0) of all heights that are larger than both of their neighbours. The first and
    the last height lack a neighbour and never count.

    >>> hilltops([1, 4, 2, 6, 3])
    [1, 3]
    >>> hilltops([5, 5, 5, 1])
    []
    """
    tops: list[int] = []
    for place in range(1, len(heights) - 1):
        if heights[place - 1] < heights[place] > heights[place + 1]:
            tops.append(place)
    return tops


@problem(
    level=2,
    hidden=[
        (0, []),
        (10, [-10]),
        (10, [-11, -3]),
        (5, [5, -10, -1]),
        (0, [-1, 4, -5, -4]),
        (100, [-60, -60, 30, -60]),
        (7, [0, 0]),
    ],
    wrong="balance = start\nfor change in changes:\n    balance = max(0, balance + change)\nreturn balance",
)
def final_balance(start: int, changes: list[int]) -> int:
    """An account starts with a balance of 0 or more. Positive changes are paid in; negative ones are taken out, but a
    change that would make the balance negative is refused and has no effect. Return the balance after all changes.

    >>> final_balance(50, [-20, 10])
    40
    >>> final_balance(10, [-30, 5, -15])
    0
    >>> final_balance(8, [-9, 3])
    11
    """
    balance = start
    for change in changes:
        if balance + change >= 0:
            balance += change
    return balance


@problem(
    level=2,
    hidden=[
        ([],),
        ([4],),
        ([1, 2],),
        ([1, 2, 3, 5, 6, 8],),
        ([10, 11, 12, 13],),
        ([1, 3, 5],),
        ([7, 9, 10, 11, 20, 21],),
    ],
    wrong='return f"{pages[0]}-{pages[-1]}" if len(pages) > 1 else "".join(str(page) for page in pages)',
)
def page_ranges(pages: list[int]) -> str:
    """Write a list of page numbers, which are different and in rising order, in short form: pages that follow each
    other become first-last, a single page stays alone, and the parts are joined by commas without spaces.

    >>> page_ranges([1, 2, 3, 7])
    '1-3,7'
    >>> page_ranges([4, 5, 9])
    '4-5,9'
    """
    parts: list[list[int]] = []
    for page in pages:
        if parts and parts[-1][-1] == page - 1:
            parts[-1].append(page)
        else:
            parts.append([page])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


@problem(
    level=2,
    hidden=[("0",), ("18",), ("27",), ("4242424242424242",), ("4242424242424241",), ("1203",), ("19",), ("59",)],
    wrong="return sum(int(digit) for digit in code) % 10 == 0",
)
def check_digits(code: str) -> bool:
    """Check a code made of digits. Going from its right end to the left, double every second digit (the second from
    the right, the fourth and so on), take 9 away from each doubled value above 9, and add up all the values. The code
    is good if this sum is a multiple of 10.

    >>> check_digits("42")
    True
    >>> check_digits("2618")
    True
    >>> check_digits("64")
    False
    """
    total = 0
    for place, digit in enumerate(reversed(code)):
        value = int(digit)
        if place % 2 == 1:
            value = value * 2 - 9 if value > 4 else value * 2
        total += value
    return total % 10 == 0


@problem(
    level=2,
    hidden=[(0,), (30,), (31,), (61,), (120,), (121,), (400,), (421,), (1000,)],
    wrong="return 0 if minutes <= 30 else 3 + 2 * (minutes // 60)",
)
def parking_fee(minutes: int) -> int:
    """Compute a parking fee. Up to 30 minutes are free. A longer stay costs 3 for the first hour and 2 for every
    further hour that has begun, all counted from the arrival, but never more than 15.

    >>> parking_fee(20)
    0
    >>> parking_fee(60)
    3
    >>> parking_fee(150)
    7
    """
    if minutes <= 30:
        return 0
    hours = (minutes + 59) // 60
    fee = 3 + 2 * (hours - 1)
    return min(fee, 15)


@problem(
    level=2,
    hidden=[("",), ("NNNN",), ("NESW",), ("WWS",), ("SSEEN",), ("EWEWE",)],
    wrong='return [abs(moves.count("E") - moves.count("W")), abs(moves.count("N") - moves.count("S"))]',
)
def walk_end(moves: str) -> list[int]:
    """Somebody starts at [0, 0] and makes one step for each letter: N adds 1 to the second coordinate, S takes 1 from
    it, E adds 1 to the first one, W takes 1 from it. Return the final place as a list of the two coordinates.

    >>> walk_end("NNE")
    [1, 2]
    >>> walk_end("SWW")
    [-2, -1]
    """
    x, y = 0, 0
    for move in moves:
        if move in "EW":
            x += 1 if move == "E" else -1
        else:
            y += 1 if move == "N" else -1
    return [x, y]


@problem(
    level=2,
    hidden=[
        ([],),
        ([5],),
        ([1, 1],),
        ([0, 0, 0],),
        ([2, 3, -1, 5],),
        ([4, 1, 8, 3, 2],),
        ([5, -2, 2],),
        ([1, 2, 3, 4],),
    ],
    wrong=(
        "total = 0\n"
        "for place, weight in enumerate(weights):\n"
        "    total += weight\n"
        "    if total * 2 == sum(weights):\n"
        "        return place\n"
        "return -1"
    ),
)
def balance_point(weights: list[int]) -> int:
    """Find the smallest position, counted from 0, at which the sum of all weights before it equals the sum of all
    weights after it; the weight at the position itself counts on neither side, and an empty side has sum 0. Return -1
    if there is no such position.

    >>> balance_point([2, 9, 1, 1])
    1
    >>> balance_point([1, 2, 4])
    -1
    """
    before = 0
    after = sum(weights)
    for place, weight in enumerate(weights):
        after -= weight
        if before == after:
            return place
        before += weight
    return -1


@problem(
    level=2,
    hidden=[("",), ("a",), ("aa",), ("aaa",), ("abba",), ("abccbx",), ("xyzzyxx",), ("abcabc",)],
    wrong=(
        'kept = ""\nfor letter in text:\n    if not kept or kept[-1] != letter:\n        kept += letter\nreturn kept'
    ),
)
def cancel_pairs(text: str) -> str:
    """Remove two equal letters that stand next to each other, and go on like this, also with letters that have become
    neighbours by a removal, until no such pair is left. Return what remains.

    >>> cancel_pairs("book")
    'bk'
    >>> cancel_pairs("noon")
    ''
    >>> cancel_pairs("eee")
    'e'
    """
    kept: list[str] = []
    for letter in text:
        if kept and kept[-1] == letter:
            kept.pop()
        else:
            kept.append(letter)
    return "".join(kept)


@problem(
    level=2,
    hidden=[("",), ("abcdefgh",), ("Abcdefg1",), ("A1 b2 c3 d4",), ("PASSWORD",), ("12345678",), ("aB3",), ("a 1",)],
    wrong=(
        "faults = []\n"
        "if len(password) < 8:\n"
        '    faults.append("short")\n'
        "if not password.isalnum():\n"
        '    faults.append("digit")\n'
        "return faults"
    ),
)
def password_faults(password: str) -> list[str]:
    """List what is wrong with a password, in this order: "short" if it has fewer than 8 characters, "digit" if it
    contains no digit, "upper" if it contains no upper case letter, "space" if it contains a space.

    >>> password_faults("Secret99")
    []
    >>> password_faults("my cat")
    ['short', 'digit', 'upper', 'space']
    """
    faults: list[str] = []
    if len(password) < 8:
        faults.append("short")
    if not any(character.isdigit() for character in password):
        faults.append("digit")
    if not any(character.isupper() for character in password):
        faults.append("upper")
    if " " in password:
        faults.append("space")
    return faults


@problem(
    level=2,
    hidden=[
        ("",),
        (" ; ;",),
        ("a=1;a=2",),
        ("key = some value ; x=",),
        ("flag; y=2",),
        ("sum=1=1",),
        ("one=1;two=2;;three=3",),
    ],
    wrong='return {part.split("=")[0]: part.split("=")[-1] for part in line.split(";") if part}',
)
def read_settings(line: str) -> dict[str, str]:
    """Read settings of the form name=value that are separated by semicolons. Only the first = of a setting divides
    name and value, and spaces around either of them are dropped. A part without = is ignored; of equal names the last
    one counts.

    >>> read_settings("size=10; color = dark red")
    {'size': '10', 'color': 'dark red'}
    >>> read_settings("debug;rule=a=b;")
    {'rule': 'a=b'}
    """
    settings: dict[str, str] = {}
    for part in line.split(";"):
        name, mark, value = part.partition("=")
        if mark:
            settings[name.strip()] = value.strip()
    return settings


@problem(
    level=2,
    hidden=[
        ([], 5, 9),
        ([7, 7], 5, 9),
        ([4, 5, 9, 10], 5, 9),
        ([4, 10, 7, 4], 5, 9),
        ([1, 8, 8, 12, 8, 2], 3, 10),
        ([0, 1, 0, 1], 1, 1),
        ([6, 2, 6, 2, 6], 3, 6),
    ],
    wrong='return ["on" if reading < low else "off" for reading in readings]',
)
def heater_states(readings: list[int], low: int, high: int) -> list[str]:
    """A heater is off at first. At each temperature reading it goes on if the reading is below low, goes off if it is
    above high, and otherwise stays as it was. Return the state after each reading, "on" or "off".

    >>> heater_states([20, 17, 19, 23], 18, 22)
    ['off', 'on', 'on', 'off']
    >>> heater_states([5, 10], 8, 12)
    ['on', 'on']
    """
    states: list[str] = []
    state = "off"
    for reading in readings:
        if reading < low:
            state = "on"
        elif reading > high:
            state = "off"
        states.append(state)
    return states


@problem(
    level=2,
    hidden=[([],), ([5],), ([9, 7, 4, 1],), ([3, 8, 1, 5],), ([2, 1, 2, 0, 1],), ([1, 2, 3, 4],), ([10, 2, 11, 1, 9],)],
    wrong="return max(prices) - min(prices) if prices else 0",
)
def best_resale(prices: list[int]) -> int:
    """Given the price of a stamp on each day, return the largest profit from buying one on some day and selling it on
    a later day. Return 0 if no profit is possible.

    >>> best_resale([4, 2, 7, 3])
    5
    >>> best_resale([9, 3, 1])
    0
    """
    profit = 0
    lowest: int | None = None
    for price in prices:
        if lowest is not None:
            profit = max(profit, price - lowest)
        lowest = price if lowest is None else min(lowest, price)
    return profit


@problem(
    level=2,
    hidden=[
        ("", ""),
        ("", "a"),
        ("abc", ""),
        ("aabbc", "abcab"),
        ("abc", "aa"),
        ("letter", "tree"),
        ("tent", "nett"),
        ("hat", "hata"),
    ],
    wrong="return set(word) <= set(tiles)",
)
def can_lay(tiles: str, word: str) -> bool:
    """Tell whether a word can be laid with letter tiles, where each tile may be used at most once.

    >>> can_lay("garden", "range")
    True
    >>> can_lay("garden", "added")
    False
    >>> can_lay("ab", "b")
    True
    """
    left = list(tiles)
    for letter in word:
        if letter not in left:
            return False
        left.remove(letter)
    return True


@problem(
    level=2,
    hidden=[
        ([],),
        (["same"],),
        (["a", "b"],),
        (["inter", "internet", "interval"],),
        (["abc", "abd", ""],),
        (["xyx", "xyy", "xxx"],),
        (["go", "go"],),
        (["apple", "ape", "maple"],),
    ],
    wrong='return "".join(letter for letter in words[0] if all(letter in word for word in words)) if words else ""',
)
def common_start(words: list[str]) -> str:
    """Return the longest text with which all words of a list begin; an empty text if they share no beginning or if the
    list is empty.

    >>> common_start(["carpet", "car", "card"])
    'car'
    >>> common_start(["stone", "store", "stonage"])
    'sto'
    """
    if not words:
        return ""
    start = words[0]
    for word in words[1:]:
        while not word.startswith(start):
            start = start[:-1]
    return start


@problem(
    level=2,
    hidden=[("", ""), ("R", "R"), ("PPP", "RRR"), ("RSPR", "SPRP"), ("SSP", "RRS"), ("RPS", "SRP"), ("RRSS", "PPRR")],
    wrong='return sum(first[i] + second[i] in ("RS", "SP", "PR") for i in range(len(first)))',
)
def duel_result(first: str, second: str) -> int:
    """Two players play several rounds of rock, paper, scissors; the letters R, P and S in two equally long texts say
    what each of them shows. Rock beats scissors, scissors beat paper, paper beats rock. Return the number of rounds
    that the first player wins minus the number that the second one wins.

    >>> duel_result("RR", "SP")
    0
    >>> duel_result("PSR", "RPR")
    2
    >>> duel_result("S", "R")
    -1
    """
    score = 0
    for place, mine in enumerate(first):
        if mine + second[place] in ("RS", "SP", "PR"):
            score += 1
        elif mine != second[place]:
            score -= 1
    return score


@problem(
    level=2,
    hidden=[(0, [5, 1]), (18, [10, 5, 1]), (4, [5, 3]), (30, [10]), (9, [1, 7, 3]), (99, [50, 20, 20, 2]), (8, [3, 5])],
    wrong=(
        "used = []\n"
        "for coin in coins:\n"
        "    while amount >= coin:\n"
        "        used.append(coin)\n"
        "        amount -= coin\n"
        "return used"
    ),
)
def largest_coins(amount: int, coins: list[int]) -> list[int]:
    """Pay an amount with coins of the given positive values, each available without end, by always putting down the
    largest coin that does not exceed what is left. Stop when no coin fits any more, even if something stays unpaid.
    Return the coins in the order in which they are put down.

    >>> largest_coins(8, [5, 2, 1])
    [5, 2, 1]
    >>> largest_coins(7, [2, 5])
    [5, 2]
    """
    used: list[int] = []
    for coin in sorted(coins, reverse=True):
        while amount >= coin:
            used.append(coin)
            amount -= coin
    return used


@problem(
    level=2,
    hidden=[
        ([],),
        (["A 0 B 0"],),
        (["A 1 B 2", "B 0 A 4"],),
        (["X 10 Y 9", "Y 3 Z 3", "Z 1 X 0"],),
        (["P 2 Q 1", "P 2 R 1", "Q 0 R 0"],),
        (["K 0 L 5", "L 0 K 1", "K 2 L 2"],),
    ],
    wrong=(
        "points = {}\n"
        "for result in results:\n"
        "    home, scored, guest, got = result.split()\n"
        "    points[home] = points.get(home, 0) + int(scored)\n"
        "    points[guest] = points.get(guest, 0) + int(got)\n"
        "return points"
    ),
)
def league_points(results: list[str]) -> dict[str, int]:
    """Each result reads like "Owls 2 Bears 1": two teams, each followed by its goals. A win gives 3 points, a draw 1
    point to both teams, a defeat 0. Return the points of every team that has played.

    >>> league_points(["Owls 2 Bears 1"])
    {'Owls': 3, 'Bears': 0}
    >>> league_points(["Owls 1 Bears 1", "Bears 0 Cats 2"])
    {'Owls': 1, 'Bears': 1, 'Cats': 3}
    """
    points: dict[str, int] = {}
    for result in results:
        home, scored, guest, got = result.split()
        margin = int(scored) - int(got)
        points[home] = points.get(home, 0) + (3 if margin > 0 else 1 if margin == 0 else 0)
        points[guest] = points.get(guest, 0) + (3 if margin < 0 else 1 if margin == 0 else 0)
    return points


@problem(
    level=2,
    hidden=[([],), ([3],), ([7, 3, 8, 2],), ([5, 5, 2, 2],), ([9, 1, 8, 2, 7, 3],), ([4, 4, 4],), ([2, 6, 1, 6, 3],)],
    wrong="return [house for i, house in enumerate(houses) if i == len(houses) - 1 or house > houses[i + 1]]",
)
def houses_with_view(houses: list[int]) -> list[int]:
    """Houses stand in a row, given by their heights from left to right, and the sea is to the right of the last one.
    List from left to right the heights of the houses that see it: those higher than every house to their right.

    >>> houses_with_view([4, 2, 3, 1])
    [4, 3, 1]
    >>> houses_with_view([2, 1, 5, 5])
    [5]
    """
    seen: list[int] = []
    highest = 0
    for house in reversed(houses):
        if house > highest:
            seen.append(house)
            highest = house
    return seen[::-1]


@problem(
    level=2,
    hidden=[(0,), (9,), (10,), (25,), (77,), (999,), (6788,), (39,)],
    wrong=(
        "rounds = 0\n"
        "while number > 9:\n"
        "    number = sum(int(digit) for digit in str(number))\n"
        "    rounds += 1\n"
        "return rounds"
    ),
)
def product_rounds(number: int) -> int:
    """Replace a number (0 or more) by the product of its decimal digits, and do so again until it has only one digit.
    Return how many replacements that takes.

    >>> product_rounds(5)
    0
    >>> product_rounds(34)
    2
    >>> product_rounds(68)
    3
    """
    rounds = 0
    while number > 9:
        product = 1
        for digit in str(number):
            product *= int(digit)
        number = product
        rounds += 1
    return rounds


@problem(
    level=2,
    hidden=[([],), ([1],), ([2, 1],), ([3, 2, 1],), ([5, 1, 5, 1],), ([4, 4, 4],), ([1, 9, 2, 8, 3],)],
    wrong="return sum(queue[i] > queue[i + 1] for i in range(len(queue) - 1))",
)
def wrong_order_pairs(queue: list[int]) -> int:
    """Count the pairs of numbers in a list, next to each other or not, in which the earlier number is larger than the
    later one.

    >>> wrong_order_pairs([1, 3, 2])
    1
    >>> wrong_order_pairs([4, 2, 3, 1])
    5
    """
    count = 0
    for later in range(len(queue)):
        for earlier in range(later):
            if queue[earlier] > queue[later]:
                count += 1
    return count


@problem(
    level=2,
    hidden=[
        ([], 4),
        ([4], 4),
        ([1, 1, 1, 1, 1], 2),
        ([3, 3, 3], 5),
        ([2, 3, 4, 1], 5),
        ([5, 1, 5, 1], 6),
        ([1, 2, 3, 4, 5], 5),
    ],
    wrong="return -(-sum(groups) // seats)",
)
def buses_needed(groups: list[int], seats: int) -> int:
    """Groups of people wait in a line for buses with a given number of seats; no group is empty or larger than a bus.
    Each bus takes groups from the front of the line, as long as the next whole group still fits, and then leaves.
    Return the number of buses needed for everyone.

    >>> buses_needed([3, 2, 4], 5)
    2
    >>> buses_needed([3, 3, 2], 4)
    3
    """
    buses = 0
    free = 0
    for group in groups:
        if group > free:
            buses += 1
            free = seats
        free -= group
    return buses


# Level 3: small parsing, dynamic programming, graphs, simulation, intervals, recursion.


@problem(
    level=3,
    hidden=[
        ("7",),
        ("10-2-3",),
        ("2*3*4",),
        ("1+2*3-4*5+6",),
        ("0*99+1",),
        ("100-7*11",),
        ("3-10*2*1+5",),
        ("12*12-144",),
    ],
    wrong=(
        "total = 0\n"
        'for term in text.split("+"):\n'
        "    product = 1\n"
        '    for factor in term.split("*"):\n'
        '        product *= int(factor.split("-")[0])\n'
        "    total += product\n"
        "return total"
    ),
)
def calculate(text: str) -> int:
    """Compute a sum such as "2+3*4-1": whole numbers of one or more digits, joined by the signs +, - and * without
    spaces. Multiplication comes before addition and subtraction; these two go from left to right.

    >>> calculate("2+3*4-1")
    13
    >>> calculate("8-5+1")
    4
    >>> calculate("6*7")
    42
    """
    total = 0
    sign, product, digits, times = 1, 1, "", False
    for character in text + "+":
        if character.isdigit():
            digits += character
            continue
        product = product * int(digits) if times else int(digits)
        digits = ""
        times = character == "*"
        if not times:
            total += sign * product
            sign = -1 if character == "-" else 1
    return total


@problem(
    level=3,
    hidden=[
        ("",),
        ("5",),
        ("1 2 - 3 -",),
        ("2 3 4 * +",),
        ("+",),
        ("4 5",),
        ("1 + 2",),
        ("10 2 8 * + 3 -",),
        ("0 7 -",),
    ],
    wrong=(
        "stack = []\n"
        "for token in text.split():\n"
        "    if token.isdigit():\n"
        "        stack.append(int(token))\n"
        "    elif len(stack) > 1:\n"
        "        a, b = stack.pop(), stack.pop()\n"
        '        stack.append(a + b if token == "+" else a - b if token == "-" else a * b)\n'
        "return stack[0] if stack else None"
    ),
)
def stack_calculator(text: str) -> int | None:
    """Work through a text of words separated by spaces, each a whole number or one of the signs +, - and *. A number
    is put on a stack; a sign takes the two topmost numbers off the stack and puts back the result of (lower one) sign
    (upper one). Return the number that remains; return None if a sign finds fewer than two numbers or if not exactly
    one number remains.

    >>> stack_calculator("3 4 +")
    7
    >>> stack_calculator("9 2 3 * -")
    3
    """
    stack: list[int] = []
    for word in text.split():
        if word not in ("+", "-", "*"):
            stack.append(int(word))
            continue
        if len(stack) < 2:
            return None
        upper = stack.pop()
        lower = stack.pop()
        if word == "+":
            stack.append(lower + upper)
        elif word == "-":
            stack.append(lower - upper)
        else:
            stack.append(lower * upper)
    return stack[0] if len(stack) == 1 else None


@problem(
    level=3,
    hidden=[
        ([],),
        ([[3, 4]],),
        ([[2, 8], [3, 4], [6, 9]],),
        ([[5, 6], [1, 2]],),
        ([[1, 10], [2, 3], [4, 5]],),
        ([[1, 2], [2, 3], [3, 4]],),
        ([[8, 9], [1, 4], [3, 8]],),
        ([[1, 2], [1, 2]],),
        ([[4, 6], [1, 3], [7, 9], [5, 7]],),
    ],
    wrong=(
        "merged = []\n"
        "for start, end in sorted(bookings):\n"
        "    if merged and start <= merged[-1][1]:\n"
        "        merged[-1][1] = end\n"
        "    else:\n"
        "        merged.append([start, end])\n"
        "return merged"
    ),
)
def occupied_times(bookings: list[list[int]]) -> list[list[int]]:
    """A room is booked from a start to an end hour by each pair [start, end], with start smaller than end. Bookings
    may overlap and come in any order. Return the times when the room is occupied as separate pairs in rising order;
    bookings that overlap or touch (one ends when the other starts) are joined into one pair.

    >>> occupied_times([[9, 11], [10, 12], [14, 15]])
    [[9, 12], [14, 15]]
    >>> occupied_times([[3, 5], [1, 3], [2, 4]])
    [[1, 5]]
    >>> occupied_times([[1, 9], [2, 5]])
    [[1, 9]]
    """
    occupied: list[list[int]] = []
    for start, end in sorted(bookings):
        if occupied and start <= occupied[-1][1]:
            last = occupied[-1]
            last[1] = max(last[1], end)
        else:
            occupied.append([start, end])
    return occupied


@problem(
    level=3,
    hidden=[
        (8, 18, []),
        (0, 10, [[0, 10]]),
        (0, 10, [[2, 4], [3, 5]]),
        (5, 6, [[1, 9]]),
        (0, 24, [[20, 22], [1, 2], [1, 12]]),
        (9, 17, [[7, 8], [17, 19]]),
        (9, 17, [[8, 10], [16, 20]]),
        (0, 10, [[1, 8], [2, 3], [9, 10]]),
    ],
    wrong=(
        "free = []\n"
        "for begin, end in sorted(meetings):\n"
        "    if begin > opening:\n"
        "        free.append([opening, begin])\n"
        "    opening = end\n"
        "if opening < closing:\n"
        "    free.append([opening, closing])\n"
        "return free"
    ),
)
def free_times(opening: int, closing: int, meetings: list[list[int]]) -> list[list[int]]:
    """Between an opening and a later closing hour, find all times without a meeting. Meetings are pairs [begin, end]
    with begin smaller than end, in any order; they may overlap each other and reach beyond the opening hours. Return
    the free times as pairs [begin, end] in rising order, each as long as possible and none of length 0.

    >>> free_times(9, 17, [[10, 11], [13, 15]])
    [[9, 10], [11, 13], [15, 17]]
    >>> free_times(8, 12, [[8, 9], [11, 13]])
    [[9, 11]]
    >>> free_times(0, 9, [[1, 6], [2, 4]])
    [[0, 1], [6, 9]]
    """
    free: list[list[int]] = []
    now = opening
    for begin, end in sorted(meetings):
        until = min(begin, closing)
        if until > now:
            free.append([now, until])
        now = max(now, end)
    if now < closing:
        free.append([now, closing])
    return free


@problem(
    level=3,
    hidden=[
        ([],),
        ([[1, 2]],),
        ([[1, 2], [2, 3]],),
        ([[1, 9], [2, 8], [3, 7], [8, 9]],),
        ([[5, 6], [5, 6], [5, 6]],),
        ([[1, 4], [4, 6], [6, 9], [3, 7]],),
        ([[10, 20], [1, 5], [4, 11]],),
    ],
    wrong="return max((sum(a <= other[0] <= b for other in visits) for a, b in visits), default=0)",
)
def most_visitors(visits: list[list[int]]) -> int:
    """Each visitor of a museum comes and leaves at the times of a pair [come, leave], with come smaller than leave.
    Return the largest number of visitors who are there at once; whoever leaves at the moment when another one comes is
    not there together with that one. Without visits the answer is 0.

    >>> most_visitors([[1, 5], [2, 6], [7, 8]])
    2
    >>> most_visitors([[1, 3], [3, 5]])
    1
    """
    events: list[list[int]] = []
    for come, leave in visits:
        events.append([come, 1])
        events.append([leave, -1])
    events.sort()
    most = inside = 0
    for _, change in events:
        inside += change
        most = max(most, inside)
    return most


@problem(
    level=3,
    hidden=[
        ("", "abc"),
        ("abc", "abc"),
        ("abc", "xyz"),
        ("abcd", "dcba"),
        ("aaaa", "aa"),
        ("kitchen", "chicken"),
        ("xaxbxc", "abc"),
        ("dabc", "abcd"),
    ],
    wrong="return sum(min(first.count(letter), second.count(letter)) for letter in set(first))",
)
def shared_letters_in_order(first: str, second: str) -> int:
    """Letters may be crossed out of two words, as many as one likes, while the others keep their order. Return how
    many letters can at most be left in each word if both are to become the same.

    >>> shared_letters_in_order("stone", "tone")
    4
    >>> shared_letters_in_order("bread", "beard")
    4
    >>> shared_letters_in_order("ab", "ba")
    1
    """
    above = [0] * (len(second) + 1)
    for letter in first:
        row = [0]
        for place, other in enumerate(second):
            if letter == other:
                row.append(above[place] + 1)
            else:
                row.append(max(above[place + 1], row[place]))
        above = row
    return above[-1]


@problem(
    level=3,
    hidden=[
        ("", ""),
        ("", "abc"),
        ("same", "same"),
        ("abc", "bcd"),
        ("table", "stapler"),
        ("crab", "rabe"),
        ("aaaa", "a"),
        ("abcdef", "fedcba"),
    ],
    wrong="return sum(a != b for a, b in zip(wrong, right)) + abs(len(wrong) - len(right))",
)
def corrections(wrong: str, right: str) -> int:
    """Return the smallest number of corrections that turn a wrong word into the right one, where a correction inserts
    one letter, deletes one letter, or replaces one letter by another.

    >>> corrections("hous", "house")
    1
    >>> corrections("xcat", "cart")
    2
    """
    above = list(range(len(right) + 1))
    for row, letter in enumerate(wrong, start=1):
        line = [row]
        for column, other in enumerate(right, start=1):
            replace = above[column - 1] + (letter != other)
            insert = line[column - 1] + 1
            delete = above[column] + 1
            line.append(min(replace, insert, delete))
        above = line
    return above[-1]


@problem(
    level=3,
    hidden=[
        (0, [5]),
        (6, [1, 3, 4]),
        (3, [2]),
        (7, []),
        (12, [9, 6, 1]),
        (23, [10, 7, 1]),
        (1, [2, 5]),
        (40, [25, 20, 1]),
        (14, [3, 5]),
    ],
    wrong=(
        "count = 0\n"
        "for value in sorted(values, reverse=True):\n"
        "    count += amount // value\n"
        "    amount %= value\n"
        "return -1 if amount else count"
    ),
)
def fewest_stamps(amount: int, values: list[int]) -> int:
    """Stamps of the given positive values are available without end. Return the smallest number of stamps whose values
    add up to exactly the amount (0 or more), or -1 if no choice of stamps does.

    >>> fewest_stamps(11, [5, 2])
    4
    >>> fewest_stamps(8, [6, 4, 1])
    2
    """
    fewest: list[int] = [0]
    for target in range(1, amount + 1):
        best = -1
        for value in values:
            if value <= target and fewest[target - value] >= 0:
                count = fewest[target - value] + 1
                if best < 0 or count < best:
                    best = count
        fewest.append(best)
    return fewest[amount]


@problem(
    level=3,
    hidden=[
        ([],),
        ([7],),
        ([5, 4, 3],),
        ([1, 2, 3, 4],),
        ([2, 2, 2],),
        ([9, 3, 8, 4, 7, 5, 6],),
        ([1, 5, 2, 3, 0, 4],),
        ([4, 8, 1, 9, 2, 3, 5],),
    ],
    wrong=(
        "best = length = 0\n"
        "for i, size in enumerate(lengths):\n"
        "    length = length + 1 if i and size > lengths[i - 1] else 1\n"
        "    best = max(best, length)\n"
        "return best"
    ),
)
def longest_train(lengths: list[int]) -> int:
    """Carriages of given lengths arrive one after the other. Each is either put at the end of the train or sent away,
    and it may be put there only if it is longer than the carriage that was put there last. Return the largest possible
    number of carriages in the train; any carriage may be sent away.

    >>> longest_train([3, 1, 4, 2, 5])
    3
    >>> longest_train([6, 6, 7])
    2
    """
    longest: list[int] = []
    for place, length in enumerate(lengths):
        best = 1
        for earlier in range(place):
            if lengths[earlier] < length:
                best = max(best, longest[earlier] + 1)
        longest.append(best)
    return max(longest, default=0)


@problem(
    level=3,
    hidden=[
        ([], 10),
        ([[5, 100]], 4),
        ([[5, 100]], 5),
        ([[2, 3], [2, 3], [2, 3]], 5),
        ([[3, 10], [4, 12], [5, 14], [6, 1]], 9),
        ([[6, 13], [5, 8], [5, 8]], 10),
        ([[1, 1], [2, 6], [3, 10], [5, 16]], 7),
        ([[4, 0], [3, 2]], 0),
    ],
    wrong=(
        "value = 0\n"
        "for weight, price in sorted(items, key=lambda item: -item[1] / item[0]):\n"
        "    if weight <= limit:\n"
        "        limit -= weight\n"
        "        value += price\n"
        "return value"
    ),
)
def best_backpack(items: list[list[int]], limit: int) -> int:
    """Each item [weight, value], both whole numbers with a positive weight, exists once. Choose items whose weights
    together do not exceed a limit, so that the sum of their values is as large as possible, and return this sum.

    >>> best_backpack([[3, 4], [4, 5], [2, 3]], 6)
    8
    >>> best_backpack([[5, 10], [3, 7], [3, 5]], 8)
    17
    >>> best_backpack([[4, 9], [3, 6], [3, 6]], 6)
    12
    """

    def best(place: int, room: int) -> int:
        if place == len(items):
            return 0
        weight, value = items[place]
        without = best(place + 1, room)
        if weight > room:
            return without
        return max(without, value + best(place + 1, room - weight))

    return best(0, limit)


@problem(
    level=3,
    hidden=[
        (["SE"],),
        (["S#E"],),
        (["S..", "##.", "E.."],),
        (["E#.", "..S"],),
        (["S.#.", "..#E", "...."],),
        (["#S#", "###", "#E#"],),
        (["S....", ".###.", "...#E"],),
    ],
    wrong=(
        "for y, row in enumerate(maze):\n"
        "    for x, cell in enumerate(row):\n"
        '        if cell == "S":\n'
        "            start = [y, x]\n"
        '        if cell == "E":\n'
        "            end = [y, x]\n"
        "return abs(start[0] - end[0]) + abs(start[1] - end[1])"
    ),
)
def maze_steps(maze: list[str]) -> int:
    """In a maze of equally long rows, # is a wall and everything else is free. Return the smallest number of steps up,
    down, left or right from the one S to the one E without entering a wall or leaving the maze, or -1 if there is no
    way.

    >>> maze_steps(["S.E"])
    2
    >>> maze_steps(["S#E", "..."])
    4
    >>> maze_steps(["S#", "#E"])
    -1
    """
    spots = {(y, x): cell for y, row in enumerate(maze) for x, cell in enumerate(row) if cell != "#"}
    border = [spot for spot, cell in spots.items() if cell == "S"]
    seen = set(border)
    steps = 0
    while border:
        following: list[tuple[int, int]] = []
        for y, x in border:
            if spots[y, x] == "E":
                return steps
            for spot in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if spot in spots and spot not in seen:
                    seen.add(spot)
                    following.append(spot)
        border = following
        steps += 1
    return -1


@problem(
    level=3,
    hidden=[
        ([],),
        (["..."],),
        (["~~", "~~"],),
        (["~.", ".~"],),
        (["~.~", "~~~"],),
        (["~~~", "~.~", "~~~"],),
        (["~.~.~", ".....", "~~..~"],),
        (["~", ".", "~"],),
    ],
    wrong='return sum(len([part for part in row.split(".") if part]) for row in meadow)',
)
def count_ponds(meadow: list[str]) -> int:
    """In a map of equally long rows, ~ is water and . is grass. Squares of water that touch along an edge belong to
    the same pond; touching at a corner is not enough. Return the number of ponds.

    >>> count_ponds(["~~.", "..~"])
    2
    >>> count_ponds(["~.~", "~~~", "..."])
    1
    """
    water = {(y, x) for y, row in enumerate(meadow) for x, cell in enumerate(row) if cell == "~"}
    ponds = 0
    while water:
        ponds += 1
        todo = [water.pop()]
        while todo:
            y, x = todo.pop()
            for spot in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if spot in water:
                    water.remove(spot)
                    todo.append(spot)
    return ponds


@problem(
    level=3,
    hidden=[
        ({},),
        ({"a": []},),
        ({"b": [], "a": []},),
        ({"a": ["b"], "b": ["a"]},),
        ({"a": ["a"]},),
        ({"d": ["b", "c"], "b": ["a"], "c": ["a"], "a": []},),
        ({"a": ["z"], "z": [], "m": []},),
        ({"x": ["y"], "y": ["z"], "z": ["y"], "w": []},),
    ],
    wrong=(
        "order = []\n"
        "for task in sorted(needs):\n"
        "    for other in sorted(needs[task]):\n"
        "        if other not in order:\n"
        "            order.append(other)\n"
        "    if task not in order:\n"
        "        order.append(task)\n"
        "return order"
    ),
)
def task_order(needs: dict[str, list[str]]) -> list[str]:
    """For every task a dictionary lists the tasks that must be done before it; all of these are keys too. Again and
    again do the alphabetically first task that is not done yet and whose needed tasks are all done. Return the tasks
    in this order; stop when no task is possible any more, so that tasks which need each other in a circle are left
    out.

    >>> task_order({"eat": ["cook"], "cook": ["buy"], "buy": []})
    ['buy', 'cook', 'eat']
    >>> task_order({"b": [], "c": [], "a": ["c"]})
    ['b', 'c', 'a']
    >>> task_order({"p": ["q"], "q": ["p"], "r": []})
    ['r']
    """
    order: list[str] = []
    while True:
        possible: list[str] = []
        for task, needed in needs.items():
            if task not in order and all(other in order for other in needed):
                possible.append(task)
        if not possible:
            return order
        order.append(min(possible))


@problem(
    level=3,
    hidden=[
        ([], []),
        (["a", "b", "c", "d", "e"], [["d", "e"], ["c", "d"], ["b", "c"], ["a", "b"]]),
        (["a"], []),
        (["c", "a", "b"], [["a", "b"]]),
        (["a", "b", "c", "d"], [["a", "d"], ["b", "c"], ["c", "d"]]),
        (["z", "y", "x"], []),
        (["p", "q"], [["q", "p"], ["p", "q"]]),
        (["e", "d", "c", "b", "a"], [["e", "a"], ["b", "d"]]),
    ],
    wrong=(
        "groups = []\n"
        "for name in sorted(names):\n"
        "    group = {name}\n"
        "    for a, b in friends:\n"
        "        if name in (a, b):\n"
        "            group |= {a, b}\n"
        "    if sorted(group) not in groups and not any(name in other for other in groups):\n"
        "        groups.append(sorted(group))\n"
        "return groups"
    ),
)
def friend_groups(names: list[str], friends: list[list[str]]) -> list[list[str]]:
    """Each pair in friends means that these two different people, who are among the given names, know each other. No
    name is given twice. People belong to the same group if they are linked by a chain of such pairs; somebody without
    friends is a group alone. Return the groups, each sorted alphabetically, and order the groups alphabetically by the
    first name in each.

    >>> friend_groups(["tom", "ann", "eva"], [["tom", "eva"]])
    [['ann'], ['eva', 'tom']]
    >>> friend_groups(["a", "b", "c", "d"], [["c", "a"], ["d", "c"]])
    [['a', 'c', 'd'], ['b']]
    """
    groups: list[list[str]] = []
    left = sorted(names)
    while left:
        group = [left.pop(0)]
        for person in group:
            for first, second in friends:
                for friend in (first, second):
                    if person in (first, second) and friend not in group:
                        group.append(friend)
                        left.remove(friend)
        groups.append(sorted(group))
    return groups


@problem(
    level=3,
    hidden=[
        ([], "a", "a"),
        ([], "a", "b"),
        (["a b 5"], "b", "a"),
        (["a b 9", "a c 2", "c d 2", "d b 2"], "a", "b"),
        (["a b 1", "c d 1"], "a", "d"),
        (["x y 4", "x y 3"], "y", "x"),
        (["a b 2", "b c 2", "a c 5", "c d 1", "b d 4"], "a", "d"),
        (["Rome Pisa 30", "Pisa Turin 12"], "Turin", "Rome"),
    ],
    wrong=(
        "best = -1\n"
        "for road in roads:\n"
        "    first, second, toll = road.split()\n"
        "    if {first, second} == {start, goal} and (best < 0 or int(toll) < best):\n"
        "        best = int(toll)\n"
        "return best"
    ),
)
def cheapest_route(roads: list[str], start: str, goal: str) -> int:
    """Each road reads like "Rome Pisa 12": two towns, and the toll (1 or more) for driving between them in either
    direction. Return the smallest sum of tolls for a route from the start to the goal: 0 if they are the same town, -1
    if there is no route.

    >>> cheapest_route(["a b 7", "a c 2", "c b 3"], "a", "b")
    5
    >>> cheapest_route(["a b 1"], "a", "c")
    -1
    """
    cost: dict[str, int] = {start: 0}
    changed = True
    while changed:
        changed = False
        for road in roads:
            first, second, toll = road.split()
            for town, other in ((first, second), (second, first)):
                if town not in cost:
                    continue
                total = cost[town] + int(toll)
                if other not in cost or total < cost[other]:
                    cost[other] = total
                    changed = True
    return cost.get(goal, -1)


@problem(
    level=3,
    hidden=[
        ([],),
        ([[5]],),
        ([[1, 2, 3]],),
        ([[1], [2], [3]],),
        ([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]],),
        ([[1, 2], [3, 4], [5, 6]],),
        ([[7, 7], [8, 9]],),
    ],
    wrong="order = []\nfor y, row in enumerate(grid):\n    order += row[::-1] if y % 2 else row\nreturn order",
)
def snail_walk(grid: list[list[int]]) -> list[int]:
    """Read the numbers of a grid with equally long, non-empty rows as a snail walks: along the top row to the right,
    down the right edge, along the bottom row to the left, up the left edge to below the start, and then inwards in the
    same way.

    >>> snail_walk([[1, 2], [4, 3]])
    [1, 2, 3, 4]
    >>> snail_walk([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    [1, 2, 3, 6, 9, 8, 7, 4, 5]
    """
    order: list[int] = []
    rest = [list(row) for row in grid]
    while rest:
        order.extend(rest[0])
        rest = rest[1:]
        turned: list[list[int]] = []
        if rest:
            for column in range(len(rest[0]) - 1, -1, -1):
                turned.append([row[column] for row in rest])
        rest = turned
    return order


@problem(
    level=3,
    hidden=[
        ([],),
        (["."],),
        (["###"],),
        (["##", "##"],),
        (["#.#", "...", "#.#"],),
        (["....", ".###", "###.", "...."],),
        (["#..", ".#.", "..#"],),
        (["###", "###", "###"],),
    ],
    wrong=(
        "result = []\n"
        "for y, row in enumerate(field):\n"
        '    line = ""\n'
        "    for x, cell in enumerate(row):\n"
        "        near = field[max(y - 1, 0) : y + 2]\n"
        '        plants = sum(other[max(x - 1, 0) : x + 2].count("#") for other in near)\n'
        '        line += "#" if plants == 3 or (plants == 2 and cell == "#") else "."\n'
        "    result.append(line)\n"
        "return result"
    ),
)
def next_generation(field: list[str]) -> list[str]:
    """On a field of equally long rows, # is a plant and . is bare. Each square has up to eight neighbours, the corners
    included; outside the field nothing grows. In the next year a plant is left where there was a plant with two or
    three plants as neighbours, and a new one grows on a bare square with exactly three; all other squares are bare.
    Return the field of the next year.

    >>> next_generation(["...", "###", "..."])
    ['.#.', '.#.', '.#.']
    >>> next_generation(["##.", "#..", "..."])
    ['##.', '##.', '...']
    """
    result: list[str] = []
    for y, row in enumerate(field):
        line = ""
        for x, cell in enumerate(row):
            plants = -1 if cell == "#" else 0
            for near_row in field[max(y - 1, 0) : y + 2]:
                plants += near_row[max(x - 1, 0) : x + 2].count("#")
            line += "#" if plants == 3 or (plants == 2 and cell == "#") else "."
        result.append(line)
    return result


@problem(
    level=3,
    hidden=[("",), ("no brackets",), ("([{}])",), ("([)]",), ("}",), ("((x)",), ("{[a](b)}[",), ("(]) (",), ("[[[",)],
    wrong=(
        "for place, letter in enumerate(text):\n"
        '    if letter in ")]}" and text[: place + 1].count(letter) > text[:place].count("([{"[")]}".index(letter)]):\n'
        "        return place\n"
        "return -1"
    ),
)
def bracket_fault(text: str) -> int:
    """A text may contain the brackets (), [] and {}. Return the position (counted from 0) of the first closing bracket
    that does not fit the last opened bracket that is still open, or finds none open. If there is none, return the
    position of the first bracket that never gets closed, and -1 if all brackets are in order.

    >>> bracket_fault("f(a[1]) + {2}")
    -1
    >>> bracket_fault("(a]")
    2
    >>> bracket_fault("x{ [y] (")
    1
    """
    partner = {")": "(", "]": "[", "}": "{"}
    waiting: list[int] = []
    for place, character in enumerate(text):
        if character in "([{":
            waiting.append(place)
        elif character in partner:
            if not waiting or text[waiting[-1]] != partner[character]:
                return place
            waiting.pop()
    return waiting[0] if waiting else -1


@problem(
    level=3,
    hidden=[(1,), (4,), (9,), (40,), (58,), (1949,), (3999,), (444,)],
    wrong=(
        'symbols = [[1000, "M"], [500, "D"], [100, "C"], [50, "L"], [10, "X"], [5, "V"], [1, "I"]]\n'
        'text = ""\n'
        "for value, symbol in symbols:\n"
        "    text += symbol * (number // value)\n"
        "    number %= value\n"
        "return text"
    ),
)
def roman(number: int) -> str:
    """Write a number from 1 to 3999 in Roman numerals: M is 1000, D 500, C 100, L 50, X 10, V 5 and I 1, the largest
    first. Four of I, X or C in a row are avoided by putting one before a larger sign, so 4 is IV, 9 is IX, 40 is XL,
    90 is XC, 400 is CD and 900 is CM.

    >>> roman(12)
    'XII'
    >>> roman(2019)
    'MMXIX'
    """
    text = ""
    ones, fives = "IXCM", "VLD"
    for place in range(3, -1, -1):
        digit = number // 10**place % 10
        one = ones[place]
        if digit == 9:
            text += one + ones[place + 1]
        elif digit == 4:
            text += one + fives[place]
        else:
            if digit >= 5:
                text += fives[place]
            text += one * (digit % 5)
    return text


@problem(
    level=3,
    hidden=[
        ("", 5),
        ("word", 4),
        ("one two three", 3),
        ("a b c d e", 3),
        ("aa bb cc", 5),
        ("  extra   spaces here ", 12),
        ("verylongword ok", 6),
        ("ab cd", 4),
    ],
    wrong="return [text[i : i + width].strip() for i in range(0, len(text), width)]",
)
def break_lines(text: str, width: int) -> list[str]:
    """Break a text into lines of at most width characters, putting as many words as possible on each line from the
    first on, with one space between words and none at the ends. A word that is longer than width stands alone on a
    line of its own, uncut. A text without words gives no lines.

    >>> break_lines("the quick brown fox", 10)
    ['the quick', 'brown fox']
    >>> break_lines("to be or not", 5)
    ['to be', 'or', 'not']
    """
    lines: list[str] = []
    line = ""
    for word in text.split():
        if not line:
            line = word
        elif len(line) + 1 + len(word) <= width:
            line += " " + word
        else:
            lines.append(line)
            line = word
    if line:
        lines.append(line)
    return lines


@problem(
    level=3,
    hidden=[("",), ("abc",), ("0(x)y",), ("12(z)",), ("2(a2(b)c)",), ("3(2(1(q)))",), ("a2()b",), ("2(x)3(yz)w",)],
    wrong='import re\nreturn re.sub(r"(\\d)\\(([a-z]*)\\)", lambda match: int(match[1]) * match[2], code)',
)
def unpack(code: str) -> str:
    """In a code of lower case letters, a number followed by parentheses stands for the content of the parentheses
    repeated that often. Parentheses always follow a number, always match, and may be nested. Return the text that a
    code stands for.

    >>> unpack("a3(bc)")
    'abcbcbc'
    >>> unpack("2(x2(y))z")
    'xyyxyyz'
    """
    texts = [""]
    counts: list[int] = []
    number = ""
    for character in code:
        if character.isdigit():
            number += character
        elif character == "(":
            counts.append(int(number))
            texts.append("")
            number = ""
        elif character == ")":
            inner = texts.pop()
            texts[-1] += inner * counts.pop()
        else:
            texts[-1] += character
    return texts[0]


@problem(
    level=3,
    hidden=[
        (["..."] * 3,),
        (["XO.", "XO.", "X.."],),
        (["OX.", "XOX", "..O"],),
        (["XXO", "OOX", "XOX"],),
        (["XX.", "OOO", "X.."],),
        (["..X", ".X.", "X.."],),
        (["X.O", ".X.", "O.."],),
        (["OXX", "X.O", "OX."],),
    ],
    wrong=(
        'for player in "XO":\n'
        "    if any(row == player * 3 for row in board):\n"
        "        return player\n"
        'return "draw" if not any("." in row for row in board) else "open"'
    ),
)
def board_state(board: list[str]) -> str:
    """On a 3 by 3 board, given as three texts, players put X and O on empty squares, written as a dot. Return "X" or
    "O" if that player has three in a row, in a column or on a diagonal (never both players do); otherwise "open" if a
    square is empty, and "draw" if none is.

    >>> board_state(["XXX", "OO.", "..."])
    'X'
    >>> board_state(["X.O", ".O.", "O.X"])
    'O'
    >>> board_state(["XO.", "...", "..."])
    'open'
    """
    lines = list(board)
    for place in range(3):
        lines.append(board[0][place] + board[1][place] + board[2][place])
    lines.append(board[0][0] + board[1][1] + board[2][2])
    lines.append(board[0][2] + board[1][1] + board[2][0])
    for player in "XO":
        if player * 3 in lines:
            return player
    if any("." in row for row in board):
        return "open"
    return "draw"


@problem(
    level=3,
    hidden=[
        ([0] * 20,),
        ([1] * 20,),
        ([10] * 12,),
        ([5] * 21,),
        ([10, 3, 4] + [0] * 16,),
        ([9, 1] * 10 + [9],),
        ([0, 10, 3] + [0] * 17,),
        ([0] * 18 + [10, 7, 2],),
        ([10, 10, 1, 2] + [0] * 14,),
    ],
    wrong="return sum(rolls[:20])",
)
def bowling_score(rolls: list[int]) -> int:
    """Score a complete game of bowling from the pins that each roll knocks down. The game has ten frames. A frame is
    one roll if it knocks down all 10 pins, otherwise two rolls, and scores the pins of its rolls. If its one roll
    knocks down 10, the next two rolls are added to its score; if its two rolls together knock down 10, the next one
    roll is. Rolls that follow the tenth frame count only as such additions.

    >>> bowling_score([3, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    7
    >>> bowling_score([6, 4, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    20
    >>> bowling_score([10, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    20
    """
    score = 0
    place = 0
    for _ in range(10):
        if rolls[place] == 10:
            score += sum(rolls[place : place + 3])
            place += 1
        else:
            frame = rolls[place] + rolls[place + 1]
            score += frame
            if frame == 10:
                score += rolls[place + 2]
            place += 2
    return score


@problem(
    level=3,
    hidden=[
        ("", []),
        ("LLLL", []),
        ("FFF", [[0, 2]]),
        ("RFLF", [[1, 0]]),
        ("FRFRFRF", []),
        ("LFFRF", [[-2, 0]]),
        ("RRFFF", [[0, -3], [0, 3]]),
        ("FLFLF", [[-1, 1], [0, 0]]),
    ],
    wrong=(
        "x, y, dx, dy = 0, 0, 0, 1\n"
        "for order in orders:\n"
        '    if order == "L":\n'
        "        dx, dy = dy, -dx\n"
        '    elif order == "R":\n'
        "        dx, dy = -dy, dx\n"
        "    elif [x + dx, y + dy] not in walls:\n"
        "        x, y = x + dx, y + dy\n"
        "return [x, y]"
    ),
)
def robot_stop(orders: str, walls: list[list[int]]) -> list[int]:
    """A robot starts at [0, 0] and looks along the second coordinate, upwards, so that a step makes it [0, 1]. It
    obeys the letters of its orders: F is a step forward, L a quarter turn to the left, R one to the right (after which
    a step adds 1 to the first coordinate). A step onto one of the squares listed in walls is left out. Return where it
    ends.

    >>> robot_stop("FFRF", [])
    [1, 2]
    >>> robot_stop("FFLF", [[0, 2]])
    [-1, 1]
    """
    x, y = 0, 0
    dx, dy = 0, 1
    for order in orders:
        if order == "L":
            dx, dy = -dy, dx
        elif order == "R":
            dx, dy = dy, -dx
        elif [x + dx, y + dy] not in walls:
            x += dx
            y += dy
    return [x, y]


@problem(
    level=3,
    hidden=[
        ([],),
        (["set a 5"],),
        (["set a 3", "add b a", "add b a"],),
        (["set n 3", "add s n", "add n -1", "jump n -2"],),
        (["jump x 5", "add x 1"],),
        (["set a 1", "jump a 2", "set a 9", "add a 10"],),
        (["set k 4", "add t 2", "add k -2", "jump k -2", "set k t"],),
    ],
    wrong=(
        "values = {}\n"
        "for line in program:\n"
        "    word, name, what = line.split()\n"
        "    amount = values.get(what, 0) if what.isalpha() else int(what)\n"
        '    values[name] = amount if word == "set" else values.get(name, 0) + (amount if word == "add" else 0)\n'
        "return values"
    ),
)
def run_program(program: list[str]) -> dict[str, int]:
    """Run a program line by line from the top; every line has three words. "set x 5" makes x equal to 5, "add x 5"
    adds 5 to x, and "jump x 2" goes on with the second line after this one (with -2: the second line before it) if x
    is not 0, and with the next line otherwise. The last word of set and add may also be a name and then means its
    value; the one of jump is always a number. Names are in lower case letters, and a name that was never set or added
    to has value 0. The run ends behind the last line. Return the values of all names that were the second word of a
    set or add line that was run.

    >>> run_program(["set a 2", "add a 5", "set b a"])
    {'a': 7, 'b': 7}
    >>> run_program(["set i 3", "add sum 10", "add i -1", "jump i -2"])
    {'i': 0, 'sum': 30}
    """
    values: dict[str, int] = {}
    line = 0
    while line < len(program):
        word, name, what = program[line].split()
        if word == "jump":
            line += int(what) if values.get(name, 0) != 0 else 1
            continue
        amount = values.get(what, 0) if what.isalpha() else int(what)
        if word == "add":
            amount += values.get(name, 0)
        values[name] = amount
        line += 1
    return values


@problem(
    level=3,
    hidden=[
        ("",),
        (",",),
        ("'a'",),
        ("'a,b','c'",),
        ("x,'',y",),
        ("'it''s',fine",),
        ("a b, c ",),
        ("'''',1",),
        ("1,'2,3',,'4'",),
    ],
    wrong='return [field.strip("\'") for field in line.split(",")]',
)
def split_fields(line: str) -> list[str]:
    """Split a line into fields at its commas. A field may be enclosed in single quotes: the enclosing quotes do not
    belong to the field, commas within them do not divide, and two single quotes within them stand for one. All other
    characters, spaces too, are kept. An empty line is one empty field.

    >>> split_fields("red,green")
    ['red', 'green']
    >>> split_fields("1,'a,b',2")
    ['1', 'a,b', '2']
    """
    fields = [""]
    inside = False
    place = 0
    while place < len(line):
        character = line[place]
        if character == "'" and inside and line[place + 1 : place + 2] == "'":
            fields[-1] += "'"
            place += 1
        elif character == "'":
            inside = not inside
        elif character == "," and not inside:
            fields.append("")
        else:
            fields[-1] += character
        place += 1
    return fields


@problem(
    level=3,
    hidden=[
        ("", ""),
        ("", "a"),
        ("*", ""),
        ("?", ""),
        ("a*a", "a"),
        ("*ab*", "xxabyy"),
        ("a?c", "abbc"),
        ("*a*b*c", "xaybzbc"),
        ("**?", "q"),
        ("a*c?", "abcbcd"),
    ],
    wrong='return len(pattern) == len(name) and all(p in ("?", "*", n) for p, n in zip(pattern, name))',
)
def fits_pattern(pattern: str, name: str) -> bool:
    """Tell whether a whole name fits a pattern, in which ? stands for exactly one character, * for any number of
    characters (also none), and every other character for itself.

    >>> fits_pattern("*.txt", "notes.txt")
    True
    >>> fits_pattern("p?n", "plan")
    False
    >>> fits_pattern("b*d", "bread")
    True
    """
    fits = [True] + [False] * len(name)
    for sign in pattern:
        row = [fits[0] and sign == "*"]
        for place, letter in enumerate(name):
            if sign == "*":
                row.append(row[place] or fits[place + 1])
            else:
                row.append(fits[place] and sign in ("?", letter))
        fits = row
    return fits[-1]


@problem(
    level=3,
    hidden=[
        ([], 0),
        ([], 3),
        ([5, 5, 5], 10),
        ([1, 2, 3, 4], 5),
        ([10], 3),
        ([1, 1, 1, 1], 2),
        ([2, 4, 6], 5),
        ([3, 1, 2, 6], 6),
    ],
    wrong=(
        "sums = {0}\nfor weight in weights:\n    sums |= {weight + old for old in sums}\nreturn int(target in sums)"
    ),
)
def ways_to_balance(weights: list[int], target: int) -> int:
    """Return the number of ways to choose weights from a list so that their sum is exactly a target. Each weight (1 or
    more) can be used once; equal weights at different positions make different choices; choosing nothing has sum 0.

    >>> ways_to_balance([1, 2, 3], 3)
    2
    >>> ways_to_balance([4, 4], 4)
    2
    >>> ways_to_balance([7, 2], 0)
    1
    """
    ways: dict[int, int] = {0: 1}
    for weight in weights:
        following = dict(ways)
        for total, count in ways.items():
            reached = total + weight
            following[reached] = following.get(reached, 0) + count
        ways = following
    return ways.get(target, 0)


@problem(
    level=3,
    hidden=[
        ([],),
        ([[]],),
        ([[[4]]],),
        ([1, 2, 3],),
        ([1, [2, [3, [4]]]],),
        ([[1, -1], [[5], 0]],),
        ([[[[2]]], 7, [1]],),
    ],
    wrong=(
        "total = 0\n"
        "for item in boxes:\n"
        "    if isinstance(item, list):\n"
        "        total += 2 * depth_sum(item)\n"
        "    else:\n"
        "        total += item\n"
        "return total"
    ),
)
def depth_sum(boxes: list[object]) -> int:
    """A list contains whole numbers and further lists of the same kind. Add up all numbers, each multiplied by the
    number of lists that enclose it: 1 for the numbers that stand directly in the outermost list, 2 for those in a list
    within it, and so on.

    >>> depth_sum([5, [1, 2]])
    11
    >>> depth_sum([[3], 1, []])
    7
    >>> depth_sum([[[2]]])
    6
    """
    total = 0
    depth = 1
    level = list(boxes)
    while level:
        following: list[object] = []
        for item in level:
            if isinstance(item, list):
                following.extend(item)
            elif isinstance(item, int):
                total += depth * item
        level = following
        depth += 1
    return total


@problem(
    level=3,
    hidden=[(0,), (7,), (10,), (13,), (20,), (45,), (100,), (312,), (805,), (999,)],
    wrong=(
        'tens = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()\n'
        'ones = "zero one two three four five six seven eight nine".split()\n'
        "parts = []\n"
        "if number >= 100:\n"
        '    parts += [ones[number // 100], "hundred"]\n'
        "if number % 100 >= 10:\n"
        "    parts.append(tens[number // 10 % 10])\n"
        "if number % 10 or not parts:\n"
        "    parts.append(ones[number % 10])\n"
        'return " ".join(parts)'
    ),
)
def in_words(number: int) -> str:
    """Write a number from 0 to 999 in English words, all in lower case and separated by single spaces, without hyphens
    and without "and", such as "three hundred forty two".

    >>> in_words(342)
    'three hundred forty two'
    >>> in_words(15)
    'fifteen'
    >>> in_words(600)
    'six hundred'
    """
    low = "zero one two three four five six seven eight nine ten eleven twelve"
    low += " thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
    high = "twenty thirty forty fifty sixty seventy eighty ninety"
    small, tens = low.split(), high.split()
    words: list[str] = []
    rest = number % 100
    if number >= 100:
        words += [small[number // 100], "hundred"]
    if rest >= 20:
        words.append(tens[rest // 10 - 2])
        rest %= 10
    if rest or not words:
        words.append(small[rest])
    return " ".join(words)


@problem(
    level=3,
    hidden=[
        ({}, "ann"),
        ({"bob": "ann"}, "bob"),
        ({"b": "a", "c": "a", "d": "c"}, "a"),
        ({"b": "a", "c": "b", "d": "c", "e": "d"}, "b"),
        ({"x": "y", "z": "w"}, "y"),
        ({"c": "b", "b": "a", "e": "b", "f": "e", "g": "a"}, "b"),
        ({"f": "e", "e": "d", "d": "c", "c": "b", "b": "a", "g": "c"}, "a"),
    ],
    wrong="return sum(other == boss for other in bosses.values())",
)
def people_below(bosses: dict[str, str], boss: str) -> int:
    """A dictionary gives the direct boss of each person in a firm who has one; nobody is above themselves. Return how
    many people work below a certain boss, directly or through others in between.

    >>> people_below({"bob": "ann", "cid": "bob", "dee": "bob"}, "ann")
    3
    >>> people_below({"bob": "ann", "cid": "ann"}, "cid")
    0
    """
    count = 0
    for person in bosses:
        above = person
        while above in bosses:
            above = bosses[above]
            if above == boss:
                count += 1
                break
    return count


@problem(
    level=3,
    hidden=[
        (2, []),
        (1, ["a", "a", "b", "a"]),
        (2, ["a", "b", "a", "c", "a"]),
        (3, ["a", "b", "c", "d", "a", "b"]),
        (2, ["x", "x", "x"]),
        (2, ["a", "b", "a", "c", "b", "a", "a"]),
        (3, ["p", "q", "r", "p", "s", "p", "q"]),
    ],
    wrong=(
        "desk, trips = [], 0\n"
        "for book in requests:\n"
        "    if book not in desk:\n"
        "        trips += 1\n"
        "        desk.append(book)\n"
        "        desk = desk[-places:]\n"
        "return trips"
    ),
)
def shelf_trips(places: int, requests: list[str]) -> int:
    """A reader's desk has places for so many books (at least 1) and is empty at first. Each requested book that is not
    on the desk must be fetched from the shelf; if the desk is full, the book whose last use lies back longest is
    brought back then. Using a book means requesting it, whether it was on the desk or not. Return how many books must
    be fetched.

    >>> shelf_trips(2, ["a", "b", "a", "c", "b"])
    4
    >>> shelf_trips(2, ["a", "b", "a", "c", "a", "b"])
    4
    """
    desk: list[str] = []
    trips = 0
    for book in requests:
        if book in desk:
            desk.remove(book)
        else:
            trips += 1
            if len(desk) == places:
                desk.pop(0)
        desk.append(book)
    return trips


@problem(
    level=3,
    hidden=[
        ({}, 3),
        ({"a": 5}, 2),
        ({"a": 1, "b": 1}, 1),
        ({"a": 2, "b": 4, "c": 3}, 2),
        ({"x": 9, "y": 1, "z": 5}, 4),
        ({"b": 3, "a": 3}, 3),
        ({"m": 7, "l": 2, "k": 6, "j": 4}, 3),
    ],
    wrong=(
        "minute = 0\n"
        "done = []\n"
        "for name in sorted(jobs):\n"
        "    minute += jobs[name]\n"
        '    done.append(f"{name} {minute}")\n'
        "return done"
    ),
)
def finish_times(jobs: dict[str, int], turn: int) -> list[str]:
    """Jobs, given by name with the minutes of work they need (1 or more), wait in line in alphabetical order. The
    first job in the line is worked on for one turn of so many minutes, or less if it is done sooner; if it is not done
    then, it goes to the end of the line; this goes on until all jobs are done. Return for each job a text "name
    minutes", with the number of minutes from the start of the work until it was done, in the order in which the jobs
    get done.

    >>> finish_times({"a": 3, "b": 1}, 2)
    ['b 3', 'a 4']
    >>> finish_times({"long": 5, "short": 2}, 3)
    ['short 5', 'long 7']
    """
    line = sorted(jobs)
    left = dict(jobs)
    minute = 0
    done: list[str] = []
    while line:
        name = line.pop(0)
        worked = min(turn, left[name])
        minute += worked
        left[name] -= worked
        if left[name]:
            line.append(name)
        else:
            done.append(f"{name} {minute}")
    return done


@problem(
    level=3,
    hidden=[
        ("",),
        ("x",),
        ("abc",),
        ("abba",),
        ("xlevelradary",),
        ("bananas",),
        ("kayakmadam",),
        ("xabay",),
        ("abcdcbe",),
    ],
    wrong=(
        "for size in range(len(text), 0, -1):\n"
        "    if text[:size] == text[:size][::-1]:\n"
        "        return text[:size]\n"
        "return text"
    ),
)
def longest_mirror(text: str) -> str:
    """Return the longest part of a text, of characters that stand next to each other, that reads the same forwards and
    backwards. Among equally long parts return the one that begins first. An empty text has only the empty part.

    >>> longest_mirror("tracecars")
    'racecar'
    >>> longest_mirror("goodbook")
    'oo'
    """
    best = ""
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            if end - start <= len(best):
                continue
            part = text[start:end]
            if part == part[::-1]:
                best = part
    return best


@problem(
    level=3,
    hidden=[
        ("/",),
        ("/a/b/",),
        ("/../..",),
        ("/a/./b//c",),
        ("/a/b/../../c",),
        ("/x/../y/../z",),
        ("/.../a",),
        ("/a/../../b/.",),
    ],
    wrong='return "/" + "/".join(part for part in path.split("/") if part not in ("", ".", ".."))',
)
def tidy_path(path: str) -> str:
    """A path begins with / and consists of names separated by one or more /. The name . means the folder itself, and
    .. the folder above (of the topmost folder /, that is / again). Return the shortest path to the same place: with
    single slashes, without . and .., and without / at its end unless it is just /.

    >>> tidy_path("/home/ann/../bob")
    '/home/bob'
    >>> tidy_path("/a//b/./")
    '/a/b'
    """
    parts: list[str] = []
    for part in path.split("/"):
        if part in ("", "."):
            continue
        if part == "..":
            if parts:
                parts.pop()
        else:
            parts.append(part)
    return "/" + "/".join(parts)


@problem(
    level=3,
    hidden=[
        ({},),
        ({"a": 1},),
        ({"a": {}},),
        ({"a": {"b": {"c": 3}}},),
        ({"x": {"y": 1, "z": {}}, "w": 2},),
        ({"p": {"q": {"r": {"s": 0}}, "t": -1}},),
        ({"a": {"b": {}}, "c": {"d": 4}},),
    ],
    wrong=(
        "flat = {}\n"
        "for name, value in tree.items():\n"
        "    if isinstance(value, dict):\n"
        '        flat.update({name + "." + inner: number for inner, number in value.items()})\n'
        "    else:\n"
        "        flat[name] = value\n"
        "return flat"
    ),
)
def dotted_names(tree: dict[str, object]) -> dict[str, int]:
    """The values of a dictionary are whole numbers or further dictionaries of the same kind, to any depth. Return one
    flat dictionary with all the numbers, each under the names on the way to it, joined by dots. Empty dictionaries
    vanish.

    >>> dotted_names({"a": 1, "b": {"c": 2, "d": {"e": 3}}})
    {'a': 1, 'b.c': 2, 'b.d.e': 3}
    >>> dotted_names({"size": {"width": 4, "height": 5}})
    {'size.width': 4, 'size.height': 5}
    """
    flat: dict[str, int] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            for inner, number in dotted_names(value).items():
                flat[f"{name}.{inner}"] = number
        elif isinstance(value, int):
            flat[name] = value
    return flat


@problem(
    level=3,
    hidden=[
        ("", {}),
        ("no names", {"a": "b"}),
        ("{x}{x}", {"x": "1"}),
        ("{a", {"a": "z"}),
        ("a}b", {"a": "z"}),
        ("{missing} and {here}", {"here": "ok"}),
        ("{a}", {"a": "{b}", "b": "c"}),
        ("{b}}{b", {"b": "c"}),
        ("{a}{b}{c}", {"a": "1", "c": "3"}),
    ],
    wrong='for name, value in values.items():\n    text = text.replace("{" + name + "}", value)\nreturn text',
)
def fill_in(text: str, values: dict[str, str]) -> str:
    """Replace every name in curly braces in a text by its value. A name without a value becomes a question mark,
    without the braces; braces in a value that was put in are not looked at again. An opening brace that is never
    closed, and a closing one that closes nothing, stay in the text as they are. Braces are never nested.

    >>> fill_in("Dear {name}!", {"name": "Eva"})
    'Dear Eva!'
    >>> fill_in("{a}-{b}", {"a": "1"})
    '1-?'
    """
    result = ""
    place = 0
    while place < len(text):
        end = text.find("}", place)
        if text[place] == "{" and end >= 0:
            result += values.get(text[place + 1 : end], "?")
            place = end + 1
        else:
            result += text[place]
            place += 1
    return result


@problem(
    level=3,
    hidden=[
        ([],),
        ([0],),
        ([0, 0],),
        ([-5],),
        ([0, 1],),
        ([3, -1, 0, 2],),
        ([1, 1, 1],),
        ([0, 0, -4],),
        ([-1, 0, -1],),
    ],
    wrong='return " + ".join(f"{number}x^{power}" for power, number in enumerate(numbers) if number)',
)
def polynomial_text(numbers: list[int]) -> str:
    """Write a polynomial whose coefficients of 1, x, x^2, x^3 and so on are given in this order. Begin with the
    highest power; leave out terms with coefficient 0, the coefficient 1 or -1 before a power of x (keeping the minus
    sign), and the exponent of x^1. Put " + " or " - " between terms, and "-" directly before the first one if it is
    negative. Without terms, write "0".

    >>> polynomial_text([4, -3, 2])
    '2x^2 - 3x + 4'
    >>> polynomial_text([7, 0, -1])
    '-x^2 + 7'
    """
    text = ""
    for power in range(len(numbers) - 1, -1, -1):
        number = numbers[power]
        if number == 0:
            continue
        if text:
            text += " - " if number < 0 else " + "
        elif number < 0:
            text += "-"
        if abs(number) != 1 or power == 0:
            text += str(abs(number))
        if power > 0:
            text += "x" if power == 1 else f"x^{power}"
    return text or "0"


@problem(
    level=3,
    hidden=[
        (2023, 1, 1),
        (2023, 12, 31),
        (2024, 12, 31),
        (2024, 2, 29),
        (1900, 3, 1),
        (2000, 3, 1),
        (2100, 7, 4),
        (2019, 10, 15),
    ],
    wrong="return sum([31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][: month - 1]) + day",
)
def day_of_year(year: int, month: int, day: int) -> int:
    """Return the number of a date within its year, where January 1st is day 1. A year is a leap year, with a February
    of 29 days, if it can be divided by 4, but not if it can be divided by 100, except that it is one if it can be
    divided by 400.

    >>> day_of_year(2023, 2, 1)
    32
    >>> day_of_year(2024, 3, 1)
    61
    """
    days = day
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    for number in range(1, month):
        if number == 2:
            days += 29 if leap else 28
        elif number in (4, 6, 9, 11):
            days += 30
        else:
            days += 31
    return days


@problem(
    level=3,
    hidden=[
        ([],),
        (["."],),
        (["o", "."],),
        (["oo", "#.", ".."],),
        (["o.", "o.", ".."],),
        (["o", "#", "o", ".", "#"],),
        (["ooo", ".o.", "..#"],),
        (["o", ".", "o", ".", "."],),
    ],
    wrong=(
        "rows = [list(row) for row in shaft]\n"
        "for y in range(len(rows) - 2, -1, -1):\n"
        "    for x, cell in enumerate(rows[y]):\n"
        '        if cell == "o" and rows[y + 1][x] == ".":\n'
        '            rows[y][x], rows[y + 1][x] = ".", "o"\n'
        'return ["".join(row) for row in rows]'
    ),
)
def let_fall(shaft: list[str]) -> list[str]:
    """The rows of a picture, all of the same length and listed from top to bottom, show stones (o), beams (#) and air
    (.). Beams stay in place; every stone falls straight down until it lies on a beam, on another stone or on the
    bottom row. Return the rows of the picture when nothing falls any more.

    >>> let_fall(["o.", "..", ".#"])
    ['..', '..', 'o#']
    >>> let_fall(["oo", "o.", "#."])
    ['o.', 'o.', '#o']
    """
    rows = [list(row) for row in shaft]
    for column in range(len(rows[0]) if rows else 0):
        floor = len(rows) - 1
        for y in range(len(rows) - 1, -1, -1):
            if rows[y][column] == "#":
                floor = y - 1
            elif rows[y][column] == "o":
                rows[y][column] = "."
                rows[floor][column] = "o"
                floor -= 1
    return ["".join(row) for row in rows]


@problem(
    level=3,
    hidden=[
        ("a", "a"),
        ("a", "b"),
        ("aabb", "bbaa"),
        ("speed", "erase"),
        ("llama", "label"),
        ("abcde", "abcde"),
        ("eerie", "there"),
        ("eagle", "geese"),
        ("abcde", "aaaba"),
    ],
    wrong=(
        'marks = ""\n'
        "for place, letter in enumerate(guess):\n"
        "    if secret[place] == letter:\n"
        '        marks += "!"\n'
        "    else:\n"
        '        marks += "?" if letter in secret else "."\n'
        "return marks"
    ),
)
def guess_marks(secret: str, guess: str) -> str:
    """Mark each letter of a guess at a secret word of the same length: with ! if the secret has that letter at that
    place. The other letters are treated from left to right: with ? if the letter occurs among the letters of the
    secret that have neither been matched by a ! nor used for an earlier ?, each of which serves for only one mark;
    otherwise with a dot.

    >>> guess_marks("crane", "trace")
    '.!!?!'
    >>> guess_marks("abbey", "babes")
    '??!!.'
    >>> guess_marks("plane", "allee")
    '?!..!'
    """
    left: list[str] = []
    for place, letter in enumerate(secret):
        if guess[place] != letter:
            left.append(letter)
    marks = ""
    for place, letter in enumerate(guess):
        if secret[place] == letter:
            marks += "!"
        elif letter in left:
            marks += "?"
            left.remove(letter)
        else:
            marks += "."
    return marks


@problem(
    level=3,
    hidden=[
        ([1, 1, 1, 1, 1],),
        ([4, 4, 1, 4, 4],),
        ([2, 3, 2, 3, 2],),
        ([6, 5, 4, 3, 2],),
        ([1, 2, 3, 4, 6],),
        ([5, 5, 6, 6, 1],),
        ([3, 1, 3, 6, 3],),
        ([2, 2, 1, 4, 6],),
        ([1, 3, 4, 5, 2],),
    ],
    wrong='return {1: "five", 2: "four", 3: "three", 4: "pair", 5: "nothing"}[len(set(dice))]',
)
def dice_hand(dice: list[int]) -> str:
    """Name a throw of five dice: "five" if all show the same number, "four" if exactly four do, "house" for three of
    one number and two of another, "three" for exactly three equal ones otherwise, "pairs" for two different pairs,
    "pair" for a single pair, "street" if the dice show five numbers that follow each other (in any order), and else
    "nothing".

    >>> dice_hand([3, 3, 5, 3, 5])
    'house'
    >>> dice_hand([2, 6, 2, 6, 1])
    'pairs'
    >>> dice_hand([6, 1, 2, 3, 5])
    'nothing'
    """
    counts: dict[int, int] = {}
    for number in dice:
        counts[number] = counts.get(number, 0) + 1
    sizes = sorted(counts.values(), reverse=True)
    if sizes[0] > 3:
        return "five" if sizes[0] == 5 else "four"
    if sizes[0] == 3:
        return "house" if sizes[1] == 2 else "three"
    if sizes[0] == 2:
        return "pairs" if sizes[1] == 2 else "pair"
    return "street" if max(dice) - min(dice) == 4 else "nothing"
