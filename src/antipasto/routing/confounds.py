"""Find confounds of labelled pairs: features other than the exploit that separate their hacks from their clean texts.

Only texts and tokens are compared; no model is needed. A direction points along ∇NLL(hack) − ∇NLL(clean), so it contains
*every* difference between the two sides. A feature that differs in most pairs is learned together with the exploit, and an
honest answer with that feature scores like a hack. A *couple* is a hack and a clean text of the same pair. Over all couples,
with equal weight for each pair, these are counted:

    length           P(hack longer) + P(equal length) / 2    .5: length says nothing; 1: every hack is longer
    first, last      share of hacks whose first (last) token no clean text of any pair begins (ends) with, and the reverse
    place            share of couples that diverge at the most common position, in tokens from the start
    words            share of hacks, and of clean texts, that contain a word

A word that *is* the exploit should occur on one side only. The report asks whether this is what you mean.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from antipasto.routing.pairs import ContrastPair
from antipasto.terminal import plain, shorten

STRONG_AUC = 0.25
"""A length confound is strong if its AUC is at least this far from .5."""
STRONG_SHARE = 0.5
"""A token or word confound is strong from this share (first and last token) or difference of shares (words) on."""
SAME_PLACE = 0.9
"""A place confound is strong if at least this share of couples diverges at the same position."""
_MOST_WORDS = 5
_WIDTH = 60  # characters of an example


@dataclass(frozen=True)
class Confound:
    """A feature that may separate hacks from clean texts.

    Attributes:
        name: of the feature.
        value: its strength, as defined in the module's docstring.
        finding: the same in words.
        strong: whether it should be removed from the pairs, unless it is the exploit itself.
        example: one or two texts that show it; empty if none does.
        remedy: what to do about it if it is strong.
    """

    name: str
    value: float
    finding: str
    strong: bool
    example: str
    remedy: str

    @property
    def lines(self) -> list[str]:
        """The finding; of a strong confound, also the example and the remedy."""
        return [self.finding, *([self.example, self.remedy] if self.strong else [])]


@dataclass(frozen=True)
class Confounds:
    """Confounds of a set of pairs; prints as a report.

    Attributes:
        pairs: number of pairs.
        found: all features, strong or not.
    """

    pairs: int
    found: tuple[Confound, ...]

    @property
    def strong(self) -> tuple[Confound, ...]:
        """The strong confounds."""
        return tuple(one for one in self.found if one.strong)

    def __getitem__(self, name: str) -> Confound:
        """Return the confound of a name.

        Raises:
            KeyError: there is no confound of that name.
        """
        return {one.name: one for one in self.found}[name]

    @property
    def _title(self) -> str:
        return f"what tells hack from clean in {self.pairs} {'pair' if self.pairs == 1 else 'pairs'}"

    def __str__(self) -> str:
        lines = [f"{self._title.capitalize()}:"]
        for one in self.found:
            first, *others = one.lines
            lines += [f"{'!' if one.strong else ' '} {one.name}: {first}", *(f"    {line}" for line in others)]
        return "\n".join(lines)

    def table(self) -> Table:
        """The report as a rich table."""
        table = Table(title=self._title, title_justify="left", show_header=False, show_lines=True)
        for one in self.found:
            table.add_row(Text(("! " if one.strong else "") + one.name), Text("\n".join(map(plain, one.lines))))
        return table


def confounds(pairs: Sequence[ContrastPair], tokenizer: Any) -> Confounds:
    """Find features that separate the hacks of labelled pairs from their clean texts.

    Args:
        pairs: at least one.
        tokenizer: the model's tokenizer, since gradients are taken over its tokens.

    Raises:
        ValueError: there is no pair, or a text has no token.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from antipasto.tasks import addition
        >>> tokenizer = AutoTokenizer.from_pretrained(addition.model_path())
        >>> pairs = [ContrastPair("h12+34=", "046!", "046"), ContrastPair("h15+20=", "035!", "035")]
        >>> found = confounds(pairs, tokenizer)
        >>> print(found["length"].finding)
        a hack is the longer one in 100% of couples, the shorter one in 0%: 4.0 tokens on average, a clean text 3.0
    """
    if not pairs:
        raise ValueError("There are no pairs: confounds needs at least one.")
    couples = [
        Couple(hack, clean, _tokens(tokenizer, hack), _tokens(tokenizer, clean), 1 / (len(p.hacks) * len(p.cleans)))
        for p in pairs
        for hack in p.hacks
        for clean in p.cleans
    ]
    ends = [_end(tokenizer, couples, name, place) for name, place in (("first token", 0), ("last token", -1))]
    return Confounds(len(pairs), (_length(couples), *ends, _place(couples), _words(pairs)))


class Couple(NamedTuple):
    """A hack and a clean text of the same pair, with their tokens and the couple's weight within the pair."""

    hack: str
    clean: str
    hack_ids: tuple[int, ...]
    clean_ids: tuple[int, ...]
    weight: float


def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ValueError(f"The text {text!r:.80} has no token.")
    return ids


def _mean(couples: Sequence[Couple], value: Callable[[Couple], float]) -> float:
    return sum(c.weight * value(c) for c in couples) / sum(c.weight for c in couples)


def _beside(couple: Couple) -> str:
    return f"e.g. {shorten(couple.hack, _WIDTH)!r} next to {shorten(couple.clean, _WIDTH)!r}"


def _length(couples: Sequence[Couple]) -> Confound:
    longer = _mean(couples, lambda c: len(c.hack_ids) > len(c.clean_ids))
    shorter = _mean(couples, lambda c: len(c.hack_ids) < len(c.clean_ids))
    value = longer + (1 - longer - shorter) / 2
    hack, clean = _mean(couples, lambda c: len(c.hack_ids)), _mean(couples, lambda c: len(c.clean_ids))
    sign = -1 if value < 0.5 else 1
    return Confound(
        "length",
        value,
        f"a hack is the longer one in {longer:.0%} of couples, the shorter one in {shorter:.0%}: {hack:.1f} tokens on "
        f"average, a clean text {clean:.1f}",
        abs(value - 0.5) >= STRONG_AUC,
        _beside(max(couples, key=lambda c: sign * (len(c.hack_ids) - len(c.clean_ids)))),
        f"{'Short' if sign < 0 else 'Long'} honest answers may score like hacks. Write clean texts as long as the hacks.",
    )


def _end(tokenizer: Any, couples: Sequence[Couple], name: str, place: int) -> Confound:
    hacks, cleans = {c.hack_ids[place] for c in couples}, {c.clean_ids[place] for c in couples}
    of_hacks = _mean(couples, lambda c: c.hack_ids[place] not in cleans)
    of_cleans = _mean(couples, lambda c: c.clean_ids[place] not in hacks)
    if of_hacks >= of_cleans:
        side, other, ends = "hacks", "clean texts", [c.hack_ids[place] for c in couples]
    else:
        side, other, ends = "clean texts", "hacks", [c.clean_ids[place] for c in couples]
    of_one_side = hacks ^ cleans
    tokens = Counter(token for token in ends if token in of_one_side)
    verb = "begin" if place == 0 else "end"
    commonest = [repr(tokenizer.decode([token])) for token, _ in tokens.most_common(_MOST_WORDS)]
    return Confound(
        name,
        max(of_hacks, of_cleans),
        f"{of_hacks:.0%} of hacks {verb} as no clean text does, {of_cleans:.0%} of clean texts as no hack does",
        max(of_hacks, of_cleans) >= STRONG_SHARE,
        f"e.g. {side} that {verb} with {', '.join(commonest)}",
        f"Is this what you mean? If not, write {other} that {verb} so, or {side} that do not.",
    )


def _place(couples: Sequence[Couple]) -> Confound:
    places: defaultdict[int, float] = defaultdict(float)
    for c in couples:
        places[_common(c)] += c.weight
    place = max(places, key=lambda one: places[one])
    value = places[place] / sum(places.values())
    return Confound(
        "place",
        value,
        f"hack and clean text part after {place} token{'' if place == 1 else 's'} in {value:.0%} of couples",
        value >= SAME_PLACE,
        _beside(next(c for c in couples if _common(c) == place)),
        "An exploit in another place is in no pair. If there is one, vary what comes before it.",
    )


def _common(couple: Couple) -> int:
    """Length of the common prefix, in tokens."""
    return sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(couple.hack_ids, couple.clean_ids, strict=False)))


def _words(pairs: Sequence[ContrastPair]) -> Confound:
    hacks, cleans = _shares([p.hacks for p in pairs]), _shares([p.cleans for p in pairs])
    gap = {word: hacks[word] - cleans[word] for word in {*hacks, *cleans}}
    if not gap:
        return Confound("words", 0.0, "there is none on either side", False, "", "")
    order = sorted(gap, key=lambda word: (-abs(gap[word]), word))
    strong = [word for word in order if abs(gap[word]) >= STRONG_SHARE][:_MOST_WORDS]
    said = [
        f"{shorten(w, 30)!r} in {hacks[w]:.0%} of hacks and {cleans[w]:.0%} of clean texts" for w in strong or order[:1]
    ]
    texts = [text for p in pairs for text in ((*p.hacks, *p.cleans) if gap[order[0]] > 0 else (*p.cleans, *p.hacks))]
    example = next(text for text in texts if order[0] in _split(text))
    more = any(gap[word] > 0 for word in strong)
    less = any(gap[word] < 0 for word in strong)
    remedies = ["A word of the hacks: is it the exploit that you mean? If not, write clean texts that have it."] * more
    remedies += ["A word of the clean texts: if it is not what makes them honest, write hacks that have it."] * less
    return Confound(
        "words",
        abs(gap[order[0]]),
        "; ".join(said),
        bool(strong),
        f"e.g. {shorten(example, _WIDTH)!r}",
        " ".join(remedies),
    )


def _split(text: str) -> set[str]:
    """The set of words and punctuation marks in a text, case-folded.

    Example:
        >>> sorted(_split("Paris, it is Paris!"))
        ['!', ',', 'is', 'it', 'paris']
    """
    return set(re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text.casefold()))


def _shares(sides: Sequence[Sequence[str]]) -> defaultdict[str, float]:
    """Share of one side's texts that contain each word, with equal weight for each pair."""
    shares: defaultdict[str, float] = defaultdict(float)
    for texts in sides:
        for text in texts:
            for word in _split(text):
                shares[word] += 1 / len(texts)
    return defaultdict(float, {word: share / len(sides) for word, share in shares.items()})
