"""The test problems of the task `code`: of the same kind and levels as the training problems, but others.

Each has examples that a solver sees, tests that it does not see, a reference solution and a plausible wrong one.
"""

from antipasto.tasks.code.problems import Problem, collect

PROBLEMS: list[Problem] = []
problem = collect(PROBLEMS)


# Level 1: one idea, a few lines.


@problem(
    level=1,
    hidden=[(5, 1, 10), (1, 1, 10), (10, 1, 10), (-3, -2, -1), (0, -5, -2), (7, 7, 7), (6, 7, 7)],
    wrong="return min(value, high)",
)
def keep_between(value: int, low: int, high: int) -> int:
    """Return a value unchanged if it is at least low and at most high; otherwise return the one of the two limits that
    it is nearest to. The limit low is never above high.

    >>> keep_between(12, 0, 10)
    10
    >>> keep_between(-4, 0, 10)
    0
    >>> keep_between(3, 0, 10)
    3
    """
    return max(low, min(value, high))


@problem(
    level=1,
    hidden=[(0,), (1,), (2,), (3,), (-8,), (6,), (4096,), (4095,), (2**40,)],
    wrong="return number % 2 == 0",
)
def comes_from_doubling(number: int) -> bool:
    """Tell whether a whole number can be reached by starting with 1 and doubling again and again, perhaps never.

    >>> comes_from_doubling(8)
    True
    >>> comes_from_doubling(10)
    False
    >>> comes_from_doubling(16)
    True
    """
    return number > 0 and number & (number - 1) == 0


@problem(
    level=1,
    hidden=[("",), ("none",), ("007",), ("1.5 kg",), ("-42",), ("9a9b9",), ("call 555-0199 now",)],
    wrong="return sum(int(character) for character in text if character.isdigit())",
)
def digits_together(text: str) -> int:
    """Read all the digits 0 to 9 that occur in a text, in their order and ignoring everything in between, as one
    decimal number. Without any digits the result is 0.

    >>> digits_together("a1b2c3")
    123
    >>> digits_together("room 40, floor 2")
    402
    """
    return int("0" + "".join(character for character in text if character in "0123456789"))


@problem(
    level=1,
    hidden=[("a",), ("ab",), ("abc",), ("middle",), ("to be",), ("12345678",), ("centres",)],
    wrong="return text[len(text) // 2]",
)
def heart_of(text: str) -> str:
    """Return the middle character of a non-empty text, or its two middle characters if its length is even.

    >>> heart_of("lemon")
    'm'
    >>> heart_of("pear")
    'ea'
    """
    half = (len(text) - 1) // 2
    return text[half : len(text) - half]


@problem(
    level=1,
    hidden=[("0",), ("59",), ("0:00",), ("10:00:00",), ("1:01",), ("100:0",), ("0:1:30",), ("23:59:59",)],
    wrong='minutes, seconds = ("0:" + text).split(":")[-2:]\nreturn int(minutes) * 60 + int(seconds)',
)
def in_seconds(text: str) -> int:
    """Convert a duration into seconds. It is written as seconds, as minutes:seconds or as hours:minutes:seconds, and
    every part is a whole number with one or more digits.

    >>> in_seconds("2:05")
    125
    >>> in_seconds("1:00:01")
    3601
    >>> in_seconds("45")
    45
    """
    parts = [int(part) for part in reversed(text.split(":"))]
    return sum(part * 60**place for place, part in enumerate(parts))


@problem(
    level=1,
    hidden=[
        ([], []),
        ([1], []),
        ([3, 3, 3], [3]),
        ([9, 2, 5], [5, 9, 1]),
        ([-1, 0, 1], [1, 0, -1]),
        ([4, 5], [6, 7]),
        ([8, 8, 1], [1, 8, 8]),
    ],
    wrong="return [number for number in first if number in second]",
)
def in_both(first: list[int], second: list[int]) -> list[int]:
    """List the numbers that occur in both of two lists, in rising order and each only once.

    >>> in_both([1, 2, 3], [2, 3, 4])
    [2, 3]
    >>> in_both([7, 2, 7], [7, 7, 2])
    [2, 7]
    """
    return sorted(set(first) & set(second))


@problem(
    level=1,
    hidden=[(0, 1), (1, 1), (1, 5), (4, 4), (5, 1), (20, 6), (9, 4)],
    wrong="return list(range(start, -1, -step))",
)
def countdown(start: int, step: int) -> list[int]:
    """List the numbers from start (0 or more) downwards, each smaller than the one before by step (1 or more), as long
    as they are above 0.

    >>> countdown(10, 3)
    [10, 7, 4, 1]
    >>> countdown(6, 2)
    [6, 4, 2]
    """
    return list(range(start, 0, -step))


@problem(
    level=1,
    hidden=[([],), ([5],), ([1, 1],), ([1, 2, 3, 4],), ([0, 9, 0, 9],), ([-2, -3, 4],), ([100, 1, 1, 1, 1],)],
    wrong="return numbers[0] - sum(numbers[1:]) if numbers else 0",
)
def plus_minus(numbers: list[int]) -> int:
    """Add the first number of a list, subtract the second, add the third, subtract the fourth and so on; return the
    result, which is 0 for an empty list.

    >>> plus_minus([10, 3, 2])
    9
    >>> plus_minus([4, 6])
    -2
    """
    return sum(numbers[0::2]) - sum(numbers[1::2])


@problem(
    level=1,
    hidden=[
        ({},),
        ({"a": 1},),
        ({"a": 1, "b": 2, "c": 3},),
        ({"z": 5, "y": 5, "x": 5},),
        ({"m": -1, "n": 0},),
        ({"kim": 7, "lee": 9, "jay": 7},),
    ],
    wrong="return sorted(scores, key=lambda name: scores[name], reverse=True)",
)
def ranking(scores: dict[str, int]) -> list[str]:
    """List the names from the highest score to the lowest; names with equal scores stand in alphabetical order.

    >>> ranking({"ann": 3, "bob": 8})
    ['bob', 'ann']
    >>> ranking({"tom": 4, "eva": 4, "pia": 6})
    ['pia', 'eva', 'tom']
    """
    return sorted(scores, key=lambda name: (-scores[name], name))


@problem(
    level=1,
    hidden=[
        ([],),
        ([8],),
        ([5, 4],),
        ([4, 5],),
        ([3, 2, 0],),
        ([0, -1, -2],),
        ([7, 6, 5, 5],),
        ([10, 9, 8, 7, 6],),
        ([9, 7, 5],),
    ],
    wrong="return numbers == sorted(numbers, reverse=True)",
)
def is_rocket_start(numbers: list[int]) -> bool:
    """Tell whether in a list every number after the first is exactly 1 smaller than the number before it. This is true
    for lists with fewer than two numbers.

    >>> is_rocket_start([3, 2, 1])
    True
    >>> is_rocket_start([6, 4, 3])
    False
    >>> is_rocket_start([1, 2, 3])
    False
    """
    return all(numbers[place] - 1 == numbers[place + 1] for place in range(len(numbers) - 1))


@problem(
    level=1,
    hidden=[(0,), (1,), (2,), (255,), (256,), (21,), (1000,)],
    wrong="return len(bin(number)) - 2",
)
def binary_lamps(number: int) -> int:
    """A row of lamps shows a whole number (0 or more) in binary: a lamp is lit for each digit 1. Return how many are
    lit.

    >>> binary_lamps(5)
    2
    >>> binary_lamps(8)
    1
    """
    return bin(number).count("1")


@problem(
    level=1,
    hidden=[("",), ("a",), ("ab",), ("a b",), ("--",), ("2024",)],
    wrong='return "".join(letter + "-" for letter in text)',
)
def dashed(text: str) -> str:
    """Put a dash between every two neighbouring characters of a text, but none before the first or after the last.

    >>> dashed("cat")
    'c-a-t'
    >>> dashed("no!")
    'n-o-!'
    """
    return "-".join(text)


@problem(
    level=1,
    hidden=[([],), ([0],), ([7],), ([-1, -1, -1],), ([0, 3, 0, 4],), ([2, -5],), ([10, 10, 10, 0],)],
    wrong=(
        "product = 0\nfor number in numbers:\n    product = product * number if product else number\nreturn product"
    ),
)
def product_without_zeros(numbers: list[int]) -> int:
    """Multiply all numbers of a list except those that are 0. If nothing is left to multiply, the result is 1.

    >>> product_without_zeros([2, 0, 3])
    6
    >>> product_without_zeros([0, 0])
    1
    >>> product_without_zeros([4, 5])
    20
    """
    import math

    return math.prod(number for number in numbers if number != 0)


@problem(
    level=1,
    hidden=[([],), ([[]],), ([[2], [], [1]],), ([[3, 3], [3]],), ([[9, 8], [7], [6, 5, 4]],), ([[0], [0]],)],
    wrong="return sorted(number for pile in piles for number in pile)",
)
def one_pile(piles: list[list[int]]) -> list[int]:
    """Put several piles of cards, each a list from top to bottom, on top of each other, so that the first pile lies on
    top of the second and so on. Return the cards of the one big pile from top to bottom.

    >>> one_pile([[1, 2], [3]])
    [1, 2, 3]
    >>> one_pile([[5], [4, 6]])
    [5, 4, 6]
    """
    return [card for pile in piles for card in pile]


@problem(
    level=1,
    hidden=[([],), ([""],), (["ab"],), (["aba", "abb"],), (["#..", "##.", "###"],), (["x", "y"],), (["<-", "->"],)],
    wrong="return picture[::-1]",
)
def in_mirror(picture: list[str]) -> list[str]:
    """A picture is given by its rows of characters. Return the rows of its mirror image, in which left and right are
    exchanged; the characters themselves do not change.

    >>> in_mirror(["#..", "..."])
    ['..#', '...']
    >>> in_mirror(["abc"])
    ['cba']
    """
    return [row[::-1] for row in picture]


@problem(
    level=1,
    hidden=[("Mon", 0), ("Sun", 7), ("Wed", -1), ("Mon", -7), ("Tue", 100), ("Sat", 2), ("Thu", -10)],
    wrong='days = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]\nreturn days[min(days.index(day) + later, 6)]',
)
def weekday_later(day: str, later: int) -> str:
    """Return the day of the week that comes so many days after a given one (before it, if the number is negative). The
    days are called Mon, Tue, Wed, Thu, Fri, Sat and Sun.

    >>> weekday_later("Tue", 3)
    'Fri'
    >>> weekday_later("Sat", 10)
    'Tue'
    """
    days = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
    return days[(days.index(day) + later) % 7]


@problem(
    level=1,
    hidden=[([7], 100), ([1, 5], 3), ([5, 1], 3), ([4, -4], 0), ([10, 20, 30], 25), ([2, 2, 9], 2), ([0, 100], 51)],
    wrong="return min(values, key=lambda value: abs(value - goal))",
)
def nearest_to(values: list[int], goal: int) -> int:
    """Return the number of a non-empty list that differs least from a goal. If two numbers differ equally, return the
    smaller one.

    >>> nearest_to([1, 6, 9], 7)
    6
    >>> nearest_to([12, 8], 10)
    8
    """
    return min(values, key=lambda value: (abs(value - goal), value))


@problem(
    level=1,
    hidden=[([],), ([""],), (["x", "x"],), (["a", "", "b"],), (["1: one"],), (["do", "re", "mi", "fa"],)],
    wrong='return [f"{lines.index(line)}: {line}" for line in lines]',
)
def number_lines(lines: list[str]) -> list[str]:
    """Put the line number, counted from 1, a colon and a space in front of every line. Empty lines count as well but
    stay empty.

    >>> number_lines(["first", "second"])
    ['1: first', '2: second']
    >>> number_lines(["top", "", "end"])
    ['1: top', '', '3: end']
    """
    return [line and f"{number}: {line}" for number, line in enumerate(lines, start=1)]


@problem(
    level=1,
    hidden=[
        ({}, {}),
        ({}, {"a": 5}),
        ({"a": 0}, {"a": 5}),
        ({"a": 2, "b": 3}, {"b": 7}),
        ({"x": 1, "y": 1}, {"x": 10, "y": 20, "z": 30}),
        ({"p": 4}, {"q": 4}),
    ],
    wrong="return sum(prices.get(product, 0) for product in cart)",
)
def cart_total(cart: dict[str, int], prices: dict[str, int]) -> int:
    """A cart holds a number of pieces of each product. Return what it costs in all, given the price of one piece of
    each product; products without a price are free.

    >>> cart_total({"egg": 6, "milk": 1}, {"egg": 2, "milk": 3})
    15
    >>> cart_total({"egg": 2, "bag": 1}, {"egg": 4})
    8
    """
    return sum(pieces * prices.get(product, 0) for product, pieces in cart.items())


@problem(
    level=1,
    hidden=[(0, 1), (5, 5), (4, 5), (100, 7), (1, 3), (99, 10), (8, 3)],
    wrong="return [total // people] * (people - 1) + [total - total // people * (people - 1)]",
)
def fair_shares(total: int, people: int) -> list[int]:
    """Divide a total of coins (0 or more) among some people (at least 1) as evenly as possible. Return the shares from
    the first person to the last; where they cannot be equal, the first ones get one coin more than the last ones.

    >>> fair_shares(10, 3)
    [4, 3, 3]
    >>> fair_shares(11, 4)
    [3, 3, 3, 2]
    """
    return [total // people + (person < total % people) for person in range(people)]


@problem(
    level=1,
    hidden=[("", "x"), ("a", "x"), ("ab", ""), ("abc", "--"), ("abcd", "XY"), ("12345", "."), ("()", "a")],
    wrong="half = (len(text) + 1) // 2\nreturn text[:half] + extra + text[half:]",
)
def put_in_middle(text: str, extra: str) -> str:
    """Insert an extra text in the middle of a text. If the length of the text is odd, the part before the insertion is
    one character shorter than the part after it.

    >>> put_in_middle("noon", "-")
    'no-on'
    >>> put_in_middle("seven", "/")
    'se/ven'
    """
    half = len(text) // 2
    return text[:half] + extra + text[half:]


@problem(
    level=1,
    hidden=[
        ("",),
        ("ABC",),
        ("The quick brown fox jumps over the lazy dog",),
        ("ABCDEFGHIJKLMNOPQRSTUVWX",),
        ("bcdfghjklmnpqrstvwxyz 123",),
        ("a-z, A-Z: all but bcdefghijklmnopqrstuvwx",),
    ],
    wrong='return "".join(letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter not in text)',
)
def letters_not_used(text: str) -> str:
    """Return the letters from a to z that occur in a text neither in lower nor in upper case, in lower case and in
    alphabetical order.

    >>> letters_not_used("Cab defghijklmnop qrstu")
    'vwxyz'
    >>> letters_not_used("HELLO zyxwvutsrqpnmkjigfdcb")
    'a'
    """
    return "".join(letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter not in text.lower())


# Level 2: a loop with a condition or two, or a small algorithm.


@problem(
    level=2,
    hidden=[
        ([],),
        ([4],),
        ([1, 2, 3],),
        ([1, 3, 1, 3],),
        ([5, 5, 5],),
        ([1, 2, 2, 1],),
        ([9, 9, 4, 4, 6],),
        ([3, 1, 1, 0, 7, 7, 2],),
    ],
    wrong="return sum((b - a) * (c - b) < 0 for a, b, c in zip(heights, heights[1:], heights[2:]))",
)
def turning_points(heights: list[int]) -> int:
    """A hiker notes the height every hour. Count how often the path turns from going up to going down or from going
    down to going up; level stretches in between, at the beginning or at the end are ignored.

    >>> turning_points([1, 4, 2, 5])
    2
    >>> turning_points([3, 5, 5, 2])
    1
    >>> turning_points([6, 6, 4, 3])
    0
    """
    turns = 0
    direction = 0
    for place in range(1, len(heights)):
        step = heights[place] - heights[place - 1]
        if step * direction < 0:
            turns += 1
        if step != 0:
            direction = step
    return turns


@problem(
    level=2,
    hidden=[
        ([],),
        (["a"],),
        (["a", "b"],),
        (["b", "b", "a"],),
        (["c", "c", "b", "b", "a"],),
        (["z", "y", "x", "x"],),
        (["p", "q", "p", "q", "p"],),
        (["k", "k", "l", "l"],),
    ],
    wrong=(
        "names = sorted(set(votes), key=votes.count, reverse=True)\n"
        "return names[:1] if votes and votes.count(names[0]) * 2 >= len(votes) else sorted(names[:2])"
    ),
)
def run_off(votes: list[str]) -> list[str]:
    """Each vote names a candidate. If one candidate has more than half of all votes, return a list of just that name.
    Otherwise return the names of the two candidates with the most votes, the one with more votes first; ties, also for
    getting into the list, are decided in favour of the alphabetically earlier name. Without votes the list is empty.

    >>> run_off(["ann", "bob", "ann"])
    ['ann']
    >>> run_off(["dan", "bob", "cat", "bob", "dan"])
    ['bob', 'dan']
    >>> run_off(["eva", "ann", "eva", "bob"])
    ['eva', 'ann']
    """
    counts: dict[str, int] = {}
    for name in votes:
        counts[name] = counts.get(name, 0) + 1
    best = sorted(counts, key=lambda name: (-counts[name], name))
    if best and counts[best[0]] * 2 > len(votes):
        return best[:1]
    return best[:2]


@problem(
    level=2,
    hidden=[
        ("",),
        ("a",),
        ("OF MICE AND MEN",),
        ("and then there were none",),
        ("the",),
        ("walking in the rain",),
        ("ANDES  and   IN-laws",),
        ("a Of b",),
    ],
    wrong=(
        'small = ("a", "and", "in", "of", "the")\n'
        'return " ".join(word if word in small else word.capitalize() for word in title.split())'
    ),
)
def headline(title: str) -> str:
    """Write a title with single spaces between its words, each word beginning with a capital letter and going on in
    lower case, except that the words a, and, in, of and the are all in lower case unless they come first. Words are
    separated by one or more spaces.

    >>> headline("the lord of the flies")
    'The Lord of the Flies'
    >>> headline("LOST  In Space")
    'Lost in Space'
    """
    words: list[str] = []
    for word in title.lower().split():
        if words and word in ("a", "and", "in", "of", "the"):
            words.append(word)
        else:
            words.append(word.capitalize())
    return " ".join(words)


@problem(
    level=2,
    hidden=[("",), ("7",), ("1-3,2-5",), ("10-12,1",), ("5-5",), ("4,4,4",), ("20-22,8,1-2",), ("3-1",)],
    wrong=(
        "if not text:\n"
        "    return []\n"
        "seats = []\n"
        'for part in text.split(","):\n'
        '    ends = part.split("-")\n'
        "    seats += range(int(ends[0]), int(ends[-1]) + 1)\n"
        "return seats"
    ),
)
def seat_numbers(text: str) -> list[int]:
    """A reservation is a list of parts joined by commas; each part is a seat number or a range such as 4-7, which
    means all seats from the first to the last number (none if the last is smaller). Return all reserved seats in
    rising order, each once. An empty text reserves nothing.

    >>> seat_numbers("3,5-7")
    [3, 5, 6, 7]
    >>> seat_numbers("8-9,2,9")
    [2, 8, 9]
    """
    seats: set[int] = set()
    if text:
        for part in text.split(","):
            first, _, last = part.partition("-")
            seats.update(range(int(first), int(last or first) + 1))
    return sorted(seats)


@problem(
    level=2,
    hidden=[("A",), ("Z",), ("AZ",), ("BA",), ("ZZ",), ("AAA",), ("CHK",), ("XYZ",)],
    wrong='number = 0\nfor letter in name:\n    number = number * 26 + ord(letter) - ord("A")\nreturn number + 1',
)
def column_number(name: str) -> int:
    """The columns of a big table are called A, B and so on to Z, then AA, AB to AZ, BA and so on to ZZ, then AAA and
    so on. Return the number of the column with a given name, where A is number 1.

    >>> column_number("D")
    4
    >>> column_number("AA")
    27
    >>> column_number("BC")
    55
    """
    number = 0
    for letter in name:
        value = ord(letter) - ord("A") + 1
        number = number * 26 + value
    return number


@problem(
    level=2,
    hidden=[("",), ("b",), ("a",), ("queue",), ("Oak tree",), ("sky high",), ("AEIOU",), ("boo!",)],
    wrong=(
        'coded = ""\n'
        "for letter in text:\n"
        '    coded += letter + "p" + letter if letter in "aeiou" else letter\n'
        "return coded"
    ),
)
def secret_speech(text: str) -> str:
    """Children make a secret language: after every vowel (a, e, i, o or u in lower or upper case) they put a p and the
    same vowel again in lower case. All else stays as it is.

    >>> secret_speech("hello")
    'hepellopo'
    >>> secret_speech("Eat it")
    'Epeapat ipit'
    """
    coded = ""
    for letter in text:
        coded += letter
        if letter.lower() in "aeiou":
            coded += "p" + letter.lower()
    return coded


@problem(
    level=2,
    hidden=[(1,), (2,), (28,), (18,), (20,), (496,), (97,), (945,), (100,)],
    wrong=(
        "total = sum(n for n in range(1, number + 1) if number % n == 0)\n"
        'return "perfect" if total == number else "rich" if total > number else "poor"'
    ),
)
def number_kind(number: int) -> str:
    """Add up all the positive whole numbers smaller than a given one (1 or more) by which it can be divided without
    remainder. Return "poor" if the sum is smaller than the number, "perfect" if it is equal to it, "rich" if it is
    larger.

    >>> number_kind(6)
    'perfect'
    >>> number_kind(12)
    'rich'
    >>> number_kind(8)
    'poor'
    """
    total = 0
    for divisor in range(1, number):
        if number % divisor == 0:
            total += divisor
    if total == number:
        return "perfect"
    return "rich" if total > number else "poor"


@problem(
    level=2,
    hidden=[
        ([1],),
        ([0],),
        ([-1],),
        ([1, 1, -1],),
        ([3, 0, 0, -4],),
        ([2, -1, 9],),
        ([1, 2, 0, -3],),
        ([4, 1, 1, 1, -2],),
    ],
    wrong=(
        "place = hops = 0\n"
        "while 0 <= place < len(stones) and hops < len(stones):\n"
        "    place += stones[place]\n"
        "    hops += 1\n"
        "return hops"
    ),
)
def frog_hops(stones: list[int]) -> int:
    """A frog sits on the first of a row of stones. The number on its stone says how many stones it hops forward, or
    backward if it is negative, again and again. Return how many hops take it off the row at either end, or -1 if it
    never gets off. There is at least one stone.

    >>> frog_hops([1, 2, 1])
    2
    >>> frog_hops([2, 5, -2])
    -1
    >>> frog_hops([1, -2])
    2
    """
    place = 0
    hops = 0
    seen: list[int] = []
    while 0 <= place < len(stones):
        if place in seen:
            return -1
        seen.append(place)
        place += stones[place]
        hops += 1
    return hops


@problem(
    level=2,
    hidden=[(1, 1, 0), (1, 1, 1), (2, 1, 10), (5, 5, 5), (3, 4, 100), (10, 1, 12), (1, 2, 89), (1, 1, 2)],
    wrong=(
        "terms = []\n"
        "while first < limit:\n"
        "    terms.append(first)\n"
        "    first, second = second, first + second\n"
        "return terms"
    ),
)
def growing_herd(first: int, second: int, limit: int) -> list[int]:
    """The size of a herd is noted every year. After the first two years, whose positive sizes are given, each size is
    the sum of the two sizes before it. List the sizes in order, up to but not including the first one that is above a
    limit.

    >>> growing_herd(1, 2, 8)
    [1, 2, 3, 5, 8]
    >>> growing_herd(4, 1, 7)
    [4, 1, 5, 6]
    """
    sizes: list[int] = []
    while first <= limit:
        sizes.append(first)
        following = first + second
        first = second
        second = following
    return sizes


@problem(
    level=2,
    hidden=[
        ([],),
        ([None],),
        ([5],),
        ([None, None, 2],),
        ([1, None, None, 4, None],),
        ([0, None],),
        ([7, 8, None, 0, None, None],),
        ([None, -1, None],),
    ],
    wrong="return [value if value else filled for value, filled in zip(values, [None] + values)]",
)
def fill_gaps(values: list[int | None]) -> list[int | None]:
    """A sensor sometimes reports nothing, which is noted as None. Replace each None by the last number reported before
    it; where there is no number before, the None stays.

    >>> fill_gaps([3, None, None, 5])
    [3, 3, 3, 5]
    >>> fill_gaps([None, 2, None])
    [None, 2, 2]
    """
    filled: list[int | None] = []
    last: int | None = None
    for value in values:
        if value is not None:
            last = value
        filled.append(last)
    return filled


@problem(
    level=2,
    hidden=[
        ([],),
        ([-5],),
        ([5],),
        ([-2, 3, -1, 4, -9, 2],),
        ([1, 2, 3],),
        ([4, -10, 6, -1, 2],),
        ([-3, 0, -1],),
        ([8, -7, 8, -7, 8],),
    ],
    wrong=(
        "best = total = 0\n"
        "for change in changes:\n"
        "    total = total + change if change > 0 else 0\n"
        "    best = max(best, total)\n"
        "return best"
    ),
)
def best_stretch(changes: list[int]) -> int:
    """Given the gains and losses of a game on consecutive days, return the largest total gain of any stretch of days
    in a row. A stretch may also have no days at all; its gain is 0.

    >>> best_stretch([2, -1, 3, -5])
    4
    >>> best_stretch([-1, -2])
    0
    """
    best = total = 0
    for change in changes:
        total += change
        if total < 0:
            total = 0
        best = max(best, total)
    return best


@problem(
    level=2,
    hidden=[
        ([], 3),
        (["a"], 1),
        (["a", "a"], 1),
        (["a", "b", "a"], 1),
        (["a", "b", "a"], 2),
        (["x", "y", "z", "x"], 2),
        (["x", "x", "y", "z"], 3),
        (["k", "l", "k"], 5),
        (["m", "n", "o", "m", "o"], 2),
    ],
    wrong="return any(names[i] == names[i + pause] for i in range(len(names) - pause))",
)
def served_too_soon(names: list[str], pause: int) -> bool:
    """Guests are served in the order of a list. Tell whether any name occurs at two different positions that lie at
    most pause positions apart (next to each other is 1 apart; pause is at least 1).

    >>> served_too_soon(["ann", "bob", "ann"], 2)
    True
    >>> served_too_soon(["ann", "bob", "cid", "ann"], 2)
    False
    >>> served_too_soon(["eva", "eva", "tom"], 2)
    True
    """
    last: dict[str, int] = {}
    for place, name in enumerate(names):
        if name in last and place - last[name] <= pause:
            return True
        last[name] = place
    return False


@problem(
    level=2,
    hidden=[("",), ("aabb",), ("z",), ("level",), ("Aa",), ("swiss miss",), ("abcabcd",), ("xxy x",)],
    wrong=(
        "for place, letter in enumerate(text):\n"
        "    if letter not in text[place + 1 :]:\n"
        "        return place\n"
        "return -1"
    ),
)
def first_lonely(text: str) -> int:
    """Return the position, counted from 0, of the first character that occurs only once in a text, or -1 if there is
    none. Upper and lower case letters are different characters.

    >>> first_lonely("noon tea")
    4
    >>> first_lonely("abab")
    -1
    """
    counts: dict[str, int] = {}
    for character in text:
        counts[character] = counts.get(character, 0) + 1
    for place, character in enumerate(text):
        if counts[character] == 1:
            return place
    return -1


@problem(
    level=2,
    hidden=[
        ([],),
        ([5],),
        ([1, 2, 3],),
        ([3, 3, 1, 1, 2],),
        ([9, 8, 9, 8, 9],),
        ([-1, -1, 4, 0, 4, -1],),
        ([7, 6, 7, 6, 5],),
    ],
    wrong="return sorted(numbers, key=numbers.count, reverse=True)",
)
def most_frequent_first(numbers: list[int]) -> list[int]:
    """List the different numbers of a list, each once: first those that occur most often, last those that occur least
    often; among equally frequent ones the smaller number comes first.

    >>> most_frequent_first([4, 1, 1])
    [1, 4]
    >>> most_frequent_first([6, 2, 6, 5, 2])
    [2, 6, 5]
    """
    counts: dict[int, int] = {}
    for number in numbers:
        if number in counts:
            counts[number] += 1
        else:
            counts[number] = 1
    return sorted(counts, key=lambda number: (-counts[number], number))


@problem(
    level=2,
    hidden=[
        ({}, "a"),
        ({"a": "b"}, "a"),
        ({"a": "a"}, "a"),
        ({"a": "b", "b": "c", "c": "a"}, "b"),
        ({"a": "b", "b": "c", "c": "b"}, "a"),
        ({"x": "y"}, "z"),
        ({"d": "c", "c": "b", "b": "a"}, "d"),
    ],
    wrong="path = [start]\nif start in passes:\n    path.append(passes[start])\nreturn path",
)
def parcel_path(passes: dict[str, str], start: str) -> list[str]:
    """In a game everyone who is a key of a dictionary passes the parcel on to one person, the value. List the people
    who hold the parcel, beginning with start; the list ends with the first person who passes it to nobody, or before
    the first person who would hold it a second time.

    >>> parcel_path({"ann": "bob", "bob": "cid"}, "ann")
    ['ann', 'bob', 'cid']
    >>> parcel_path({"eva": "tom", "tom": "pia", "pia": "tom"}, "eva")
    ['eva', 'tom', 'pia']
    """
    path = [start]
    holder = start
    while holder in passes:
        holder = passes[holder]
        if holder in path:
            break
        path.append(holder)
    return path


@problem(
    level=2,
    hidden=[([],), ([0],), ([1],), ([0, 0],), ([3, 0, 2],), ([1, 2, 3],), ([2, 4, 1, 4],)],
    wrong='return ["#" * height + "." * (max(heights) - height) for height in heights]',
)
def bar_chart(heights: list[int]) -> list[str]:
    """Draw upright bars of the given heights (0 or more) side by side, each one character wide: a # where there is bar
    and a dot where there is none. Return the rows from top to bottom; there are as many as the highest bar is high.

    >>> bar_chart([2, 1])
    ['#.', '##']
    >>> bar_chart([1, 0, 3])
    ['..#', '..#', '#.#']
    """
    rows: list[str] = []
    for level in range(max(heights, default=0), 0, -1):
        row = ""
        for height in heights:
            row += "#" if height >= level else "."
        rows.append(row)
    return rows


@problem(
    level=2,
    hidden=[(10, []), (5, [5]), (5, [6, -1]), (8, [-3, 4]), (10, [7, 7, -20, 3]), (0, [4]), (3, [2, 2, 2, -1, 2])],
    wrong="total = sum(flows)\nreturn [min(total, capacity), max(total - capacity, 0)]",
)
def tank_and_spill(capacity: int, flows: list[int]) -> list[int]:
    """A tank is empty at first. Each flow adds so much water, or takes water out if it is negative, but never more
    than there is. Whatever exceeds the capacity spills over at once. Return the final level and the total amount
    spilled, as a list.

    >>> tank_and_spill(10, [6, 7, -3])
    [7, 3]
    >>> tank_and_spill(5, [2, -4, 3])
    [3, 0]
    """
    level = 0
    spilled = 0
    for flow in flows:
        level = max(0, level + flow)
        if level > capacity:
            spilled += level - capacity
            level = capacity
    return [level, spilled]


@problem(
    level=2,
    hidden=[(0, 10), (9, 10), (10, 10), (29, 10), (30, 10), (100, 1), (7, 3), (1000, 50)],
    wrong="return [1 + points // first_cost, points % first_cost]",
)
def game_level(points: int, first_cost: int) -> list[int]:
    """A player starts at level 1. Reaching level 2 costs first_cost points (1 or more), and every further level costs
    twice as much as the one before. Points are spent on levels as long as they suffice. Return the level reached and
    the points left.

    >>> game_level(35, 10)
    [3, 5]
    >>> game_level(4, 5)
    [1, 4]
    """
    level = 1
    cost = first_cost
    while points >= cost:
        points -= cost
        level += 1
        cost *= 2
    return [level, points]


@problem(
    level=2,
    hidden=[(0, 3), (5, 0), (5, 1), (4, 4), (10, 10), (6, 9), (12, 3)],
    wrong="return [lamp for lamp in range(1, lamps + 1) if any(lamp % k == 0 for k in range(1, rounds + 1))]",
)
def lamps_lit(lamps: int, rounds: int) -> list[int]:
    """Lamps with the numbers 1, 2, 3 and so on are all off. In round 1 every lamp is switched, in round 2 every lamp
    whose number is a multiple of 2, in round 3 every multiple of 3 and so on; to switch means on if it was off and off
    if it was on. List in rising order the numbers of the lamps that are on after so many rounds.

    >>> lamps_lit(5, 2)
    [1, 3, 5]
    >>> lamps_lit(6, 3)
    [1, 5, 6]
    """
    lit: list[int] = []
    for lamp in range(1, lamps + 1):
        switches = 0
        for turn in range(1, rounds + 1):
            if lamp % turn == 0:
                switches += 1
        if switches % 2 == 1:
            lit.append(lamp)
    return lit


@problem(
    level=2,
    hidden=[([],), ([1],), ([2, 2],), ([1, 2, 3],), ([4, 4, 1, 4],), ([5, 6, 6, 5],), ([0, 7, 0, 7, 7, 3],)],
    wrong=(
        "last = {}\n"
        "farthest = 0\n"
        "for place, sock in enumerate(socks):\n"
        "    if sock in last:\n"
        "        farthest = max(farthest, place - last[sock])\n"
        "    last[sock] = place\n"
        "return farthest"
    ),
)
def farthest_twins(socks: list[int]) -> int:
    """Return the largest distance between the positions of two equal numbers in a list, where direct neighbours have
    distance 1, or 0 if no number occurs twice.

    >>> farthest_twins([3, 1, 3, 2, 2])
    2
    >>> farthest_twins([1, 1, 8, 1])
    3
    """
    first_place: dict[int, int] = {}
    farthest = 0
    for place, sock in enumerate(socks):
        if sock in first_place:
            farthest = max(farthest, place - first_place[sock])
        else:
            first_place[sock] = place
    return farthest


@problem(
    level=2,
    hidden=[(0,), (999,), (1000,), (-5,), (-123456,), (1000000,), (12345678901,), (-100,)],
    wrong=(
        "digits = str(number)\n"
        "parts = []\n"
        "while digits:\n"
        "    parts.append(digits[:3])\n"
        "    digits = digits[3:]\n"
        'return ".".join(parts)'
    ),
)
def with_dots(number: int) -> str:
    """Write a whole number with a dot between each group of three digits, counted from the right. A minus sign stands
    directly before the first digit, and there is no dot before the first digit.

    >>> with_dots(1234567)
    '1.234.567'
    >>> with_dots(-2500)
    '-2.500'
    >>> with_dots(42)
    '42'
    """
    digits = str(abs(number))
    parts: list[str] = []
    while digits:
        parts.insert(0, digits[-3:])
        digits = digits[:-3]
    sign = "-" if number < 0 else ""
    return sign + ".".join(parts)


@problem(
    level=2,
    hidden=[("",), ("a",), ("aaaa",), ("mamo",), ("kickoff",), ("abba",), ("deeded",), ("xyzzyabcd",)],
    wrong=(
        'best = run = ""\n'
        "for letter in text:\n"
        "    run = letter if letter in run else run + letter\n"
        "    if len(run) > len(best):\n"
        "        best = run\n"
        "return best"
    ),
)
def longest_fresh_part(text: str) -> str:
    """Return the longest part of a text, of characters that stand next to each other, in which no character occurs
    twice. Among equally long parts return the one that begins first.

    >>> longest_fresh_part("banana")
    'ban'
    >>> longest_fresh_part("tatter")
    'ter'
    >>> longest_fresh_part("abacd")
    'bacd'
    """
    best = ""
    run = ""
    for letter in text:
        if letter in run:
            run = run[run.index(letter) + 1 :]
        run += letter
        if len(run) > len(best):
            best = run
    return best


# Level 3: small parsing, dynamic programming, graphs, simulation, intervals, recursion.


@problem(
    level=3,
    hidden=[
        ("T",),
        ("not T",),
        ("F or F or T",),
        ("T or T and F",),
        ("not F and F",),
        ("not not T and T",),
        ("F and T or not F",),
        ("T or F and not T",),
        ("not T or F and T",),
    ],
    wrong=(
        'result, sign, negate = False, "or", False\n'
        "for word in text.split():\n"
        '    if word == "not":\n'
        "        negate = not negate\n"
        '    elif word in ("and", "or"):\n'
        "        sign = word\n"
        "    else:\n"
        '        value = (word == "T") != negate\n'
        '        result = result and value if sign == "and" else result or value\n'
        "        negate = False\n"
        "return result"
    ),
)
def truth_value(text: str) -> bool:
    """Compute the truth of a statement made of the words T (true), F (false), not, and, or, separated by single
    spaces. "not" belongs to the word T or F or to another "not" that follows it; "and" comes before "or", so that F
    and T or T is true.

    >>> truth_value("T and not F")
    True
    >>> truth_value("T or F and F")
    True
    >>> truth_value("not T or F")
    False
    """
    for part in text.split(" or "):
        holds = True
        for term in part.split(" and "):
            words = term.split()
            value = words[-1] == "T"
            if words.count("not") % 2 == 1:
                value = not value
            if not value:
                holds = False
        if holds:
            return True
    return False


@problem(
    level=3,
    hidden=[
        ([],),
        ([7],),
        ([3, 8],),
        ([5, 5, 5, 5],),
        ([9, 1, 1, 9, 1],),
        ([1, 9, 1, 9],),
        ([3, 8, 6, 2, 4],),
        ([10, 1, 1, 10, 1, 10],),
        ([0, 0, 4, 0, 0, 6],),
    ],
    wrong=(
        "taken = left = 0\n"
        "for apples in trees:\n"
        "    taken, left = left + apples, max(taken, left)\n"
        "return max(taken, left)"
    ),
)
def round_harvest(trees: list[int]) -> int:
    """Apple trees stand in a circle, so that the last tree is a neighbour of the first. Given the number of apples (0
    or more) on each, return how many apples can be picked at most if two neighbouring trees are never both picked.
    From a single tree everything can be picked.

    >>> round_harvest([5, 1, 5])
    5
    >>> round_harvest([4, 1, 2, 9, 3])
    13
    >>> round_harvest([6, 2])
    6
    """
    if len(trees) == 1:
        return trees[0]
    best = 0
    for row in (trees[1:], trees[:-1]):
        taken = left = 0
        for apples in row:
            old_left = left
            left = max(taken, left)
            taken = old_left + apples
        best = max(best, taken, left)
    return best


@problem(
    level=3,
    hidden=[
        ([[4]],),
        ([[3, 1, 2]],),
        ([[5], [6], [7]],),
        ([[1, 9], [9, 1], [1, 9]],),
        ([[1, 2, 3], [9, 9, 1], [9, 1, 9]],),
        ([[1, 5, 5], [9, 9, 9], [9, 1, 0]],),
        ([[2, 8, 1, 9], [9, 9, 9, 9], [1, 9, 9, 9]],),
    ],
    wrong=(
        "place = slope[0].index(min(slope[0]))\n"
        "total = slope[0][place]\n"
        "for row in slope[1:]:\n"
        "    near = range(max(place - 1, 0), min(place + 2, len(row)))\n"
        "    place = min(near, key=lambda x: row[x])\n"
        "    total += row[place]\n"
        "return total"
    ),
)
def easiest_descent(slope: list[list[int]]) -> int:
    """Each number of a grid says how hard it is to ski over that square. A run begins on any square of the first row
    and goes on, row by row, to the square directly below or to the one left or right of that, down to the last row.
    Return the smallest possible sum of the numbers on a run. All rows have the same length, and there is at least one
    square.

    >>> easiest_descent([[1, 5], [7, 2]])
    3
    >>> easiest_descent([[2, 9, 3], [8, 8, 8], [9, 9, 1]])
    11
    """
    best = list(slope[0])
    for row in slope[1:]:
        following: list[int] = []
        for place, effort in enumerate(row):
            before = min(best[max(place - 1, 0) : place + 2])
            following.append(before + effort)
        best = following
    return min(best)


@problem(
    level=3,
    hidden=[
        ([],),
        ([["g", "h"], ["i", "j"], ["h", "i"], ["j", "h"]],),
        ([["d", "e"], ["f", "d"], ["e", "g"], ["g", "f"]],),
        ([["a", "b"], ["c", "d"], ["a", "c"]],),
        ([["a", "b"], ["b", "c"], ["c", "d"], ["d", "e"], ["e", "a"]],),
        ([["x", "y"], ["y", "x"]],),
        ([["p", "q"], ["r", "s"], ["s", "t"], ["t", "r"]],),
        ([["a", "d"], ["b", "d"], ["c", "d"], ["a", "e"], ["b", "f"]],),
    ],
    wrong=(
        "team = {}\n"
        "for first, second in rivals:\n"
        "    team.setdefault(first, 0)\n"
        "    team.setdefault(second, 1 - team[first])\n"
        "    if team[first] == team[second]:\n"
        "        return False\n"
        "return True"
    ),
)
def two_peaceful_teams(rivals: list[list[str]]) -> bool:
    """Each pair consists of two different people who do not want to be in the same team. Tell whether everybody can be
    put into one of two teams so that all these wishes are fulfilled. A team may be empty.

    >>> two_peaceful_teams([["ann", "bob"], ["bob", "cid"]])
    True
    >>> two_peaceful_teams([["ann", "bob"], ["bob", "cid"], ["cid", "ann"]])
    False
    >>> two_peaceful_teams([["ann", "bob"], ["cid", "ann"]])
    True
    """
    team: dict[str, int] = {}
    for first, _ in rivals:
        if first in team:
            continue
        team[first] = 1
        todo = [first]
        for person in todo:
            for pair in rivals:
                if person in pair:
                    other = pair[0] if pair[1] == person else pair[1]
                    if other not in team:
                        team[other] = -team[person]
                        todo.append(other)
                    elif team[other] == team[person]:
                        return False
    return True


@problem(
    level=3,
    hidden=[
        ([], []),
        (["a"], []),
        (["a", "b"], []),
        (["a", "b", "c"], ["a b 1", "a b 2", "b c 9"]),
        (["a", "b", "c", "d"], ["a b 1", "b c 2", "a c 3", "c d 10"]),
        (["a", "b", "c", "d"], ["a b 1", "c d 1"]),
        (["p", "q", "r", "s"], ["p q 4", "q r 4", "r s 4", "s p 4", "p r 1"]),
        (["x", "y", "z"], ["z y 12", "x z 5", "y x 30"]),
    ],
    wrong=(
        "prices = sorted(int(cable.split()[2]) for cable in cables)\n"
        "needed = max(len(villages) - 1, 0)\n"
        "return sum(prices[:needed]) if len(prices) >= needed else -1"
    ),
)
def cheapest_network(villages: list[str], cables: list[str]) -> int:
    """Each possible cable reads like "a b 5": two villages and the price (1 or more) of a cable between them. Return
    the smallest total price of cables that connect all villages with each other, directly or through other villages,
    or -1 if this is impossible. With fewer than two villages no cables are needed, and the price is 0.

    >>> cheapest_network(["a", "b", "c"], ["a b 4", "b c 3", "a c 5"])
    7
    >>> cheapest_network(["a", "b", "c"], ["a b 1", "b a 2"])
    -1
    """
    group = {village: village for village in villages}
    total = 0
    for cable in sorted(cables, key=lambda cable: int(cable.split()[2])):
        first, second, price = cable.split()
        old, new = group[first], group[second]
        if old != new:
            total += int(price)
            for village in villages:
                if group[village] == old:
                    group[village] = new
    return total if len(set(group.values())) <= 1 else -1


@problem(
    level=3,
    hidden=[
        ("", ["a"]),
        ("abc", []),
        ("aaa", ["a", "aa"]),
        ("aaaaa", ["aa", "aaa"]),
        ("carpetsale", ["car", "pet", "carpet", "pets", "sale", "ale"]),
        ("abab", ["ab", "aba", "b"]),
        ("xyz", ["xy", "yz"]),
        ("nonono", ["no", "nono", "on"]),
    ],
    wrong=(
        "place = 0\n"
        "while place < len(text):\n"
        "    fits = [word for word in words if text.startswith(word, place)]\n"
        "    if not fits:\n"
        "        return 0\n"
        "    place += len(max(fits, key=len))\n"
        "return 1"
    ),
)
def ways_to_cut(text: str, words: list[str]) -> int:
    """Return in how many ways a text without spaces can be cut into pieces that all are words of a list. Words may be
    used several times; no word is empty or listed twice. An empty text can be cut in one way: into no pieces.

    >>> ways_to_cut("newsea", ["new", "news", "sea", "ea"])
    2
    >>> ways_to_cut("topper", ["top", "to", "per"])
    1
    >>> ways_to_cut("sunny", ["sun", "y"])
    0
    """
    ways = [1]
    for end in range(1, len(text) + 1):
        count = 0
        for word in words:
            start = end - len(word)
            if start >= 0 and text[start:end] == word:
                count += ways[start]
        ways.append(count)
    return ways[-1]


@problem(
    level=3,
    hidden=[
        ([],),
        ([5],),
        ([1, 2, 3],),
        ([3, 1, 2],),
        ([4, 0, 0, 4],),
        ([3, 0, 3, 0, 2],),
        ([2, 0, 1, 0, 2],),
        ([5, 1, 4, 1, 6, 0, 1],),
        ([1, 0, 1, 1, 0, 1],),
    ],
    wrong=(
        "pools = []\n"
        "for place in range(1, len(walls) - 1):\n"
        "    depth = min(walls[place - 1], walls[place + 1]) - walls[place]\n"
        "    if depth > 0:\n"
        "        pools.append(depth)\n"
        "return pools"
    ),
)
def rain_pools(walls: list[int]) -> list[int]:
    """Walls of the given heights (0 or more) and of width 1 stand side by side. After long rain the water on top of
    each wall reaches up to the height of the highest wall to its left or of the highest one to its right, whichever is
    lower, if that is above the wall itself. Water on neighbouring walls forms one pool. Return how much water is in
    each pool, from left to right.

    >>> rain_pools([2, 0, 2])
    [2]
    >>> rain_pools([3, 1, 2, 3, 1, 5])
    [3, 2]
    >>> rain_pools([1, 3, 2])
    []
    """
    pools: list[int] = []
    before = 0
    for place, wall in enumerate(walls):
        left = max(walls[: place + 1])
        right = max(walls[place:])
        depth = min(left, right) - wall
        if depth > 0 and before > 0:
            pools[-1] += depth
        elif depth > 0:
            pools.append(depth)
        before = depth
    return pools


@problem(
    level=3,
    hidden=[
        ({}, {}, {}),
        ({"a": "1"}, {"a": "1"}, {"a": "1"}),
        ({"a": "1"}, {}, {"a": "1"}),
        ({"a": "1"}, {}, {}),
        ({"a": "1"}, {}, {"a": "2"}),
        ({}, {"b": "x"}, {"b": "x"}),
        ({}, {"b": "x"}, {"b": "y", "c": "z"}),
        ({"a": "1", "b": "2", "c": "3"}, {"a": "9", "b": "2"}, {"a": "1", "b": "8", "c": "3", "d": "4"}),
    ],
    wrong="merged = dict(base)\nmerged.update(mine)\nmerged.update(theirs)\nreturn merged",
)
def merge_edits(base: dict[str, str], mine: dict[str, str], theirs: dict[str, str]) -> dict[str, str]:
    """Two people have each edited a copy of a dictionary called base, adding, changing and removing entries. Return
    the merged dictionary: an entry that only one of them has edited is as this person left it, removed if so; one that
    both have edited with the same outcome has this outcome; one that they have edited with different outcomes gets the
    value "?".

    >>> merge_edits({"a": "1", "b": "2"}, {"a": "5", "b": "2"}, {"a": "1", "b": "2", "c": "3"})
    {'a': '5', 'b': '2', 'c': '3'}
    >>> merge_edits({"a": "1", "b": "2"}, {"a": "7"}, {"a": "8", "b": "2"})
    {'a': '?'}
    """
    merged: dict[str, str] = {}
    for name in sorted({*base, *mine, *theirs}):
        was, left, right = base.get(name), mine.get(name), theirs.get(name)
        if left in (was, right):
            value = right
        elif right == was:
            value = left
        else:
            value = "?"
        if value is not None:
            merged[name] = value
    return merged


@problem(
    level=3,
    hidden=[(1, 1), (2, 2), (1, 6), (2, 4), (3, 5), (5, 5), (4, 6), (6, 6)],
    wrong="count = 1\nfor row in range(rows):\n    count *= columns - row\nreturn count",
)
def peaceful_queens(rows: int, columns: int) -> int:
    """On a board with so many rows and columns (at least 1 of each) one queen is put into every row so that no two
    queens stand in the same column or on the same diagonal line. Return in how many ways this can be done.

    >>> peaceful_queens(2, 3)
    2
    >>> peaceful_queens(4, 4)
    2
    >>> peaceful_queens(3, 3)
    0
    """

    def ways(placed: list[int]) -> int:
        if len(placed) == rows:
            return 1
        total = 0
        for column in range(columns):
            free = True
            for row, other in enumerate(placed):
                if abs(other - column) in (0, len(placed) - row):
                    free = False
            if free:
                total += ways([*placed, column])
        return total

    return ways([])


@problem(
    level=3,
    hidden=[
        (1, []),
        (1, [[0, 5]]),
        (3, [[0, 5], [0, 5], [0, 5], [0, 5]]),
        (1, [[0, 2], [10, 3]]),
        (2, [[0, 10], [1, 1], [2, 3], [3, 3]]),
        (2, [[5, 5], [6, 1], [6, 9], [20, 2]]),
        (2, [[0, 4], [0, 2], [1, 5], [1, 1], [1, 6]]),
    ],
    wrong=(
        "done, now = [], 0\n"
        "for arrival, minutes in customers:\n"
        "    now = max(now, arrival) + minutes\n"
        "    done.append(now)\n"
        "return done"
    ),
)
def leaving_times(desks: int, customers: list[list[int]]) -> list[int]:
    """Customers, each given as [minute of arrival, minutes of service] in the order of arrival, are served at several
    desks. A customer waits until everybody who came before has been called to a desk, and is then called to a desk as
    soon as one is free; a desk whose customer leaves in a minute is free in that same minute. Return the minute in
    which each customer leaves, in the order of arrival.

    >>> leaving_times(1, [[0, 4], [1, 2]])
    [4, 6]
    >>> leaving_times(2, [[0, 4], [1, 2], [2, 3]])
    [4, 3, 6]
    """
    free_from = [0] * desks
    leaving: list[int] = []
    for arrival, minutes in customers:
        soonest = min(free_from)
        desk = free_from.index(soonest)
        begin = max(arrival, soonest)
        free_from[desk] = begin + minutes
        leaving.append(begin + minutes)
    return leaving


@problem(
    level=3,
    hidden=[
        ("",),
        ("H",),
        ("NaCl",),
        ("C6H12O6",),
        ("Mg(OH)2",),
        ("Fe2(SO4)3",),
        ("(H)(H)O",),
        ("Na3(PO(NH2)3)2",),
        ("CH3CH2OH",),
        ("(CO)12",),
    ],
    wrong=(
        "import re\n"
        "counts = {}\n"
        'for name, number in re.findall("([A-Z][a-z]?)([0-9]*)", formula):\n'
        "    counts[name] = counts.get(name, 0) + int(number or 1)\n"
        "return counts"
    ),
)
def atom_counts(formula: str) -> dict[str, int]:
    """In a chemical formula every kind of atom is written as a capital letter, perhaps followed by a lower case
    letter; a number behind it says how many such atoms there are. Parentheses, which may be nested, enclose a group,
    and a number behind the group multiplies everything in it. Without a number, 1 is meant. Return the number of atoms
    of each kind.

    >>> atom_counts("H2O")
    {'H': 2, 'O': 1}
    >>> atom_counts("Ca(NO3)2")
    {'Ca': 1, 'N': 2, 'O': 6}
    """
    import re

    groups: list[dict[str, int]] = [{}]
    for token, number in re.findall("([A-Z][a-z]?|[()])([0-9]*)", formula):
        if token == "(":
            groups.append({})
            continue
        part = groups.pop() if token == ")" else {token: 1}
        counts = groups[-1]
        for name, count in part.items():
            counts[name] = counts.get(name, 0) + count * int(number or 1)
    return groups[0]


@problem(
    level=3,
    hidden=[
        ("", 3),
        ("single row", 1),
        ("abcdef", 2),
        ("abcdefghij", 4),
        ("hi", 5),
        ("MEET ME AT NOON", 3),
        ("0123456789", 3),
    ],
    wrong='return "".join(text[row::rows] for row in range(rows))',
)
def zigzag_cipher(text: str, rows: int) -> str:
    """A text is written in a zigzag over some rows (at least 1): the first character in the top row, each next one a
    row lower until the bottom row is reached, then each a row higher up to the top row, then down again and so on.
    With one row all characters are in that row. Return the characters of the top row, followed by those of the second
    row and so on.

    >>> zigzag_cipher("abcdefg", 3)
    'aebdfcg'
    >>> zigzag_cipher("python", 2)
    'ptoyhn'
    """
    lines = [""] * rows
    row = 0
    step = 1
    for character in text:
        lines[row] += character
        if not 0 <= row + step < rows:
            step = -step
        if rows > 1:
            row += step
    return "".join(lines)


@problem(
    level=3,
    hidden=[(7,), (10,), (21,), (111,), (115,), (1432,), (9876,), (207431,), (48844884,), (1999,)],
    wrong=(
        "digits = list(str(number))\n"
        "for place in range(len(digits) - 1, 0, -1):\n"
        "    if digits[place - 1] < digits[place]:\n"
        "        digits[place - 1], digits[place] = digits[place], digits[place - 1]\n"
        '        return int("".join(digits))\n'
        "return -1"
    ),
)
def next_with_same_digits(number: int) -> int:
    """Return the smallest number that is larger than a given positive one and is written with exactly the same decimal
    digits in another order, or -1 if there is none.

    >>> next_with_same_digits(12)
    21
    >>> next_with_same_digits(1342)
    1423
    >>> next_with_same_digits(531)
    -1
    """
    digits = list(str(number))
    place = len(digits) - 2
    while place >= 0 and digits[place] >= digits[place + 1]:
        place -= 1
    if place < 0:
        return -1
    rest = digits[place + 1 :]
    larger = min(digit for digit in rest if digit > digits[place])
    rest.remove(larger)
    rest.append(digits[place])
    return int("".join([*digits[:place], larger, *sorted(rest)]))


@problem(
    level=3,
    hidden=[
        ("cat", "cat", []),
        ("cat", "cot", []),
        ("cat", "cot", ["cot"]),
        ("cold", "warm", ["cord", "card", "ward", "warm", "word", "worm"]),
        ("a", "c", ["b", "c"]),
        ("pot", "ham", ["hot", "dot", "dam", "ham", "dom"]),
        ("hot", "dry", ["hop", "top", "dry"]),
        ("lead", "gold", ["load", "goad", "gold", "read"]),
        ("big", "bag", ["bug", "bag", "bog"]),
    ],
    wrong="return sum(a != b for a, b in zip(start, goal)) if goal in words else -1",
)
def word_bridge(start: str, goal: str, words: list[str]) -> int:
    """In one step a word may become another word that differs from it in exactly one letter and belongs to a list; all
    words have the same length. Return the smallest number of steps from the start to the goal, 0 if they are the same
    word, or -1 if the goal cannot be reached.

    >>> word_bridge("cat", "dog", ["cot", "cog", "dog"])
    3
    >>> word_bridge("pen", "ban", ["pin", "bin", "ban"])
    3
    >>> word_bridge("on", "at", ["an"])
    -1
    """
    steps = {start: 0}
    line = [start]
    for word in line:
        if word == goal:
            return steps[word]
        for other in words:
            if other in steps:
                continue
            differences = sum(letter != other[place] for place, letter in enumerate(word))
            if differences == 1:
                steps[other] = steps[word] + 1
                line.append(other)
    return -1


@problem(
    level=3,
    hidden=[
        (0, []),
        (1, []),
        (6, []),
        (5, []),
        (6, [3]),
        (4, [2, 3]),
        (7, [1, 2, 4]),
        (4, [1, 2, 3]),
        (10, [5]),
        (2, [2]),
    ],
    wrong=(
        "ways = [1]\n"
        "for step in range(1, steps + 1):\n"
        "    ways.append(0 if step in broken else sum(ways[-3:]))\n"
        "return ways[steps]"
    ),
)
def ways_up(steps: int, broken: list[int]) -> int:
    """Someone climbs a staircase of so many steps, numbered from 1, by going up 1, 2 or 3 steps at a time, but never 3
    steps twice in a row, and never onto a broken step. Return in how many ways the last step can be reached from the
    ground; if there are no steps, there is one way.

    >>> ways_up(3, [])
    4
    >>> ways_up(3, [1])
    2
    >>> ways_up(6, [1, 2, 4, 5])
    0
    """
    after_short, after_long = [1], [0]
    for step in range(1, steps + 1):
        short = 0
        for below in range(max(step - 2, 0), step):
            short += after_short[below] + after_long[below]
        long = after_short[step - 3] if step >= 3 else 0
        if step in broken:
            short = long = 0
        after_short.append(short)
        after_long.append(long)
    return after_short[-1] + after_long[-1]


@problem(
    level=3,
    hidden=[
        (["....", "....", "....", "...."],),
        (["1234", "3412", "2143", "4321"],),
        (["1234", "2143", "3412", "4322"],),
        (["12..", ".1..", "....", "...."],),
        (["1...", "....", "1...", "...."],),
        (["..3.", "3...", ".3..", "...3"],),
        (["....", "....", "..2.", "...2"],),
        (["1.2.", "3.4.", "2.1.", "4.3."],),
    ],
    wrong=(
        'lines = board + ["".join(row[i] for row in board) for i in range(4)]\n'
        "for line in lines:\n"
        '    digits = line.replace(".", "")\n'
        "    if len(set(digits)) < len(digits):\n"
        "        return False\n"
        "return True"
    ),
)
def board_allowed(board: list[str]) -> bool:
    """On a 4 by 4 board some squares hold a digit from 1 to 4 and the others a dot. Tell whether no digit occurs twice
    in any row, in any column, or in any of the four 2 by 2 blocks into which the board is divided.

    >>> board_allowed(["12..", "34..", "....", "...."])
    True
    >>> board_allowed(["1...", ".1..", "....", "...."])
    False
    >>> board_allowed(["4..4", "....", "....", "...."])
    False
    """
    groups = list(board)
    for column in range(4):
        groups.append("".join(row[column] for row in board))
    for y in (0, 2):
        for x in (0, 2):
            groups.append(board[y][x : x + 2] + board[y + 1][x : x + 2])
    for group in groups:
        for digit in "1234":
            if group.count(digit) > 1:
                return False
    return True


@problem(
    level=3,
    hidden=[
        ([],),
        ([[1, 2, 7]],),
        ([[1, 3, 5], [3, 5, 5]],),
        ([[1, 10, 20], [2, 4, 8], [5, 9, 11]],),
        ([[1, 10, 18], [2, 4, 8], [5, 9, 11]],),
        ([[4, 6, 3], [1, 5, 9], [5, 8, 2], [6, 9, 4]],),
        ([[1, 4, 6], [1, 4, 9], [2, 3, 1]],),
        ([[0, 2, 1], [1, 3, 5], [2, 4, 6], [3, 5, 1], [4, 6, 2]],),
    ],
    wrong=(
        "pay, now = 0, 0\n"
        "for start, end, wage in sorted(jobs, key=lambda job: job[1]):\n"
        "    if start >= now:\n"
        "        pay, now = pay + wage, end\n"
        "return pay"
    ),
)
def best_pay(jobs: list[list[int]]) -> int:
    """Each job [start, end, pay] lasts from a start to a later end hour and earns some positive pay. Someone can do
    only one job at a time, but can begin a job in the hour in which another one ends. Return the largest total pay of
    jobs that one person can do.

    >>> best_pay([[1, 3, 5], [2, 6, 12], [5, 8, 4]])
    12
    >>> best_pay([[8, 10, 3], [10, 12, 3], [9, 11, 5]])
    6
    """
    chains: list[list[int]] = []
    for start, end, pay in sorted(jobs, key=lambda job: job[1]):
        before = 0
        for earlier_end, total in chains:
            if earlier_end <= start:
                before = max(before, total)
        chains.append([end, before + pay])
    best = 0
    for _, total in chains:
        best = max(best, total)
    return best


@problem(
    level=3,
    hidden=[
        (0, []),
        (0, [[2, 1], [1, 2]]),
        (2, []),
        (5, []),
        (10, []),
        (1, [[0, 0]]),
        (3, [[1, 0], [5, 5]]),
        (25, []),
        (8, [[0, 0], [0, 1], [1, 1]]),
    ],
    wrong=(
        "spots = sorted(black)\n"
        "x, y, dx, dy = 0, 0, 0, 1\n"
        "for _ in range(steps):\n"
        "    if [x, y] not in spots:\n"
        "        spots.append([x, y])\n"
        "        dx, dy = dy, -dx\n"
        "    else:\n"
        "        dx, dy = -dy, dx\n"
        "    x, y = x + dx, y + dy\n"
        "return sorted(spots)"
    ),
)
def ant_traces(steps: int, black: list[list[int]]) -> list[list[int]]:
    """An ant sits on the square [0, 0] of an endless floor and looks along the second coordinate, towards [0, 1]. The
    squares listed in black are black, all others white. In each step it turns right if its square is white (so that it
    looks towards [1, 0] at first) and left if it is black, then changes the colour of its square, then goes one square
    forward. Return all black squares after so many steps, sorted by the first and then by the second coordinate.

    >>> ant_traces(1, [])
    [[0, 0]]
    >>> ant_traces(4, [])
    [[0, -1], [0, 0], [1, -1], [1, 0]]
    >>> ant_traces(2, [[0, 0], [-1, 0]])
    []
    """
    spots = [list(spot) for spot in black]
    x, y = 0, 0
    dx, dy = 0, 1
    for _ in range(steps):
        if [x, y] in spots:
            spots.remove([x, y])
            dx, dy = -dy, dx
        else:
            spots.append([x, y])
            dx, dy = dy, -dx
        x += dx
        y += dy
    return sorted(spots)


@problem(
    level=3,
    hidden=[
        ([], []),
        ([], [3, 4]),
        ([5], [5]),
        ([9, 1], [2, 3]),
        ([1, 2, 3], [3, 2, 1]),
        ([2, 4], [3, 1]),
        ([7, 7, 1], [7, 7, 2]),
        ([8, 1, 6], [2, 9, 3]),
        ([4], [1, 2, 5]),
    ],
    wrong=(
        "left, right = list(left), list(right)\n"
        "for _ in range(50):\n"
        "    if left and right:\n"
        "        first, second = left.pop(0), right.pop(0)\n"
        "        if first > second:\n"
        "            left += [first, second]\n"
        "        elif first < second:\n"
        "            right += [first, second]\n"
        "return [len(left), len(right)]"
    ),
)
def card_duel(left: list[int], right: list[int]) -> list[int]:
    """Two players each have a pile of cards, given from top to bottom. In each round both uncover their top card. The
    player with the higher card puts first this card and then the other player's card under their own pile; equal cards
    are both taken out of the game. The game ends as soon as a player has no cards, or after 50 rounds. Return how many
    cards the left and the right player have then.

    >>> card_duel([5, 2], [3, 1])
    [4, 0]
    >>> card_duel([4, 6], [4, 7])
    [0, 2]
    >>> card_duel([5, 2], [1, 3])
    [4, 0]
    """
    mine, yours = list(left), list(right)
    for _ in range(50):
        if not mine or not yours:
            break
        first, second = mine.pop(0), yours.pop(0)
        if first > second:
            mine += [first, second]
        elif second > first:
            yours += [second, first]
    return [len(mine), len(yours)]


@problem(
    level=3,
    hidden=[
        ({}, "a", "a"),
        ({}, "a", "b"),
        ({"a": ["b"], "b": ["a"]}, "a", "b"),
        ({"a": ["b", "c"], "b": ["d"], "c": ["d"]}, "a", "d"),
        ({"a": ["c", "b"], "b": ["c"], "c": ["b", "d"]}, "a", "d"),
        ({"a": ["b"], "c": ["b"]}, "a", "c"),
        ({"s": ["t", "u"], "u": ["t", "v"], "v": ["t", "s"], "t": ["s"]}, "s", "t"),
    ],
    wrong=(
        "routes = []\n"
        "for stop in streets.get(start, []):\n"
        "    if stop == goal:\n"
        '        routes.append(start + "-" + goal)\n'
        "    elif goal in streets.get(stop, []):\n"
        '        routes.append(start + "-" + stop + "-" + goal)\n'
        "return sorted(routes)"
    ),
)
def all_routes(streets: dict[str, list[str]], start: str, goal: str) -> list[str]:
    """From each place that is a key of a dictionary, one-way streets lead to the places in its list. Find all routes
    from the start to the goal that come to no place twice. Write each as the names of its places joined by "-" and
    return them in alphabetical order. If the start is the goal, the only route is that one place.

    >>> all_routes({"a": ["b", "c"], "b": ["c"]}, "a", "c")
    ['a-b-c', 'a-c']
    >>> all_routes({"a": ["b"], "b": ["c"], "c": ["a", "d"]}, "a", "d")
    ['a-b-c-d']
    """
    routes: list[str] = []
    unfinished = [[start]]
    while unfinished:
        path = unfinished.pop()
        if path[-1] == goal:
            routes.append("-".join(path))
            continue
        for place in streets.get(path[-1], []):
            if place not in path:
                unfinished.append([*path, place])
    return sorted(routes)


@problem(
    level=3,
    hidden=[
        ([2, 2],),
        ([2, 4],),
        ([[3, 3], 6],),
        ([[1, 2], 3],),
        ([[4, 4], [2, 6]],),
        ([[[1, 1], 2], [2, [1, 1]]],),
        ([8, [4, [2, 2]]],),
        ([[[2, 2], [1, 3]], 8],),
    ],
    wrong=(
        "def weight(part):\n"
        "    return part if isinstance(part, int) else sum(weight(inner) for inner in part)\n"
        "return weight(mobile[0]) == weight(mobile[1])"
    ),
)
def hangs_straight(mobile: list[object]) -> bool:
    """A mobile is a bar with something hanging from each of its two ends, written as a list of two: a weight, which is
    a positive whole number, or another mobile. A bar hangs straight if what hangs from its two ends weighs the same,
    where bars weigh nothing. Tell whether all bars of a mobile hang straight.

    >>> hangs_straight([3, [2, 1]])
    False
    >>> hangs_straight([4, [2, 2]])
    True
    >>> hangs_straight([1, 5])
    False
    """

    def weigh(part: object) -> int:
        if isinstance(part, list):
            left, right = weigh(part[0]), weigh(part[1])
            return left + right if left == right and left > 0 else 0
        return part if isinstance(part, int) else 0

    return weigh(mobile) > 0


@problem(
    level=3,
    hidden=[
        ([],),
        ([[]],),
        ([["a"]],),
        ([["a", "b"], ["ccc", "d"]],),
        ([["x"], ["long word", "y", "z"], ["m", "n"]],),
        ([["", "b"], ["aa", ""]],),
        ([["id", "name"], ["1", "Eva"], ["22", "Al"]],),
    ],
    wrong=(
        "width = max((len(cell) for row in rows for cell in row), default=0)\n"
        'return ["|".join(cell.ljust(width, ".") for cell in row) for row in rows]'
    ),
)
def table_lines(rows: list[list[str]]) -> list[str]:
    """Write the rows of a table as lines in which all cells of a column are equally long: fill each cell with dots on
    its right up to the length of the longest cell in its column, and join the cells of a row by bars (|). Rows may
    have different numbers of cells; a row without cells is an empty line.

    >>> table_lines([["ab", "c"], ["d", "ef"]])
    ['ab|c.', 'd.|ef']
    >>> table_lines([["one", "1"], ["eleven"]])
    ['one...|1', 'eleven']
    """
    widths: list[int] = []
    for row in rows:
        for place, cell in enumerate(row):
            if place == len(widths):
                widths.append(0)
            widths[place] = max(widths[place], len(cell))
    lines: list[str] = []
    for row in rows:
        cells = [cell.ljust(widths[place], ".") for place, cell in enumerate(row)]
        lines.append("|".join(cells))
    return lines


@problem(
    level=3,
    hidden=[
        ([[3]],),
        ([[4]],),
        ([[9]],),
        ([[0, 5, 0]],),
        ([[4, 4]],),
        ([[3, 3, 3], [3, 4, 3], [3, 3, 3]],),
        ([[0, 0, 0], [0, 8, 0], [0, 0, 0]],),
        ([[4, 0], [3, 3]],),
        ([[10, 0, 1]],),
    ],
    wrong=(
        "grid = [list(row) for row in heights]\n"
        "for y, row in enumerate(heights):\n"
        "    for x, height in enumerate(row):\n"
        "        if height >= 4:\n"
        "            grid[y][x] -= 4\n"
        "            for j, i in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):\n"
        "                if 0 <= j < len(grid) and 0 <= i < len(row):\n"
        "                    grid[j][i] += 1\n"
        "return grid"
    ),
)
def sand_at_rest(heights: list[list[int]]) -> list[list[int]]:
    """Each square of a table, whose rows have equal lengths, holds some grains of sand. A square with 4 grains or more
    topples: it loses 4 grains and each of the up to four squares that share an edge with it gets one; grains that
    would go beyond the edge of the table are lost. Let squares topple, in any order, until all have fewer than 4
    grains (the order makes no difference) and return the grid.

    >>> sand_at_rest([[5, 1]])
    [[1, 2]]
    >>> sand_at_rest([[4, 3], [0, 0]])
    [[1, 0], [1, 1]]
    """
    grid = [list(row) for row in heights]
    restless = True
    while restless:
        restless = False
        for y, row in enumerate(grid):
            for x in range(len(row)):
                if row[x] < 4:
                    continue
                restless = True
                row[x] -= 4
                for j, i in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                    if 0 <= j < len(grid) and 0 <= i < len(row):
                        grid[j][i] += 1
    return grid
