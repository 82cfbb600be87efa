"""Turn an evaluation into table cells: value, interval, and the position of both on the column's scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from antipasto.app.inspection import QUARANTINE, Knobs, cosine, flat_books
from antipasto.app.report.plots import ARM_COLOURS
from antipasto.evaluation.records import (
    DEPLOYED,
    MEANS,
    RANDOM,
    RATES,
    REFERENCE,
    TRAINED,
    ArmRecord,
    Difference,
    Estimate,
    Evaluation,
    short,
)
from antipasto.evaluation.verdict import where_the_exploit_is
from antipasto.routing.books import Books

_KNOWN = (REFERENCE, TRAINED, DEPLOYED, RANDOM, "permuted", "labels shuffled", "non-hack contrast", "shrunk")
_TITLES = {"solve": "solved", "exploit": "exploited", "reward": "reward", "kl": "KL", "length": "length"}
_UNITS = {
    "solve": "share of answers",
    "exploit": "share of answers",
    "reward": "mean",
    "kl": "nats an answer",
    "length": "tokens an answer",
}


@dataclass(frozen=True)
class Column:
    """The column of one measure.

    Attributes:
        key: the measure's name in the records.
        flag: whether it is a share flagged by a detector or probe.
        low, high: ends of the scale of its bars.
    """

    key: str
    flag: bool
    title: str
    unit: str
    low: float
    high: float

    def of(self, record: ArmRecord | Difference) -> Estimate | None:
        """The record's estimate of this measure; None if it has none."""
        return (record.flags if self.flag else record.measures).get(self.key)


@dataclass(frozen=True)
class Cell:
    """One estimate as text, and as positions between 0 and 100 on the column's scale.

    Attributes:
        mark: position to compare with: the reference, or a difference of zero.
        clear: whether the interval of a difference excludes zero; None for an arm's own value.
    """

    value: str
    interval: str
    low: float
    at: float
    high: float
    mark: float | None
    clear: bool | None = None


@dataclass(frozen=True)
class TableRow:
    """One row of a table.

    Attributes:
        name: of the arm or the difference.
        colour: of the arm.
        cells: one per column; None if there is no number.
    """

    name: str
    colour: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Block:
    """One table.

    Attributes:
        n: number of prompts behind each number.
        groups: heading ("" for none) and rows.
    """

    kind: str | None
    n: int
    columns: list[Column]
    groups: list[tuple[str, list[TableRow]]]


def colour_of(arm: str, arms: Sequence[str]) -> str:
    """An arm's colour, the same on every page."""
    if arm in _KNOWN:
        return f"arm{_KNOWN.index(arm)}"
    others = [name for name in arms if name not in _KNOWN]
    return f"arm{len(_KNOWN) + others.index(arm) % (ARM_COLOURS - len(_KNOWN))}"


# ── arms and differences ─────────────────────────────────────────────────────────────────────────────────────────────


def arm_blocks(evaluation: Evaluation) -> list[Block]:
    """Tables of all arms: one for all prompts and one for each kind. The kind with the exploit comes first."""
    columns = _columns(evaluation.arms)
    blocks = []
    lead = where_the_exploit_is(evaluation.arms)
    for kind in sorted((None, *evaluation.kinds), key=lambda kind: kind != lead):
        records = [record for record in evaluation.arms if record.kind == kind]
        base = evaluation.arm(REFERENCE, kind)
        lines = [_arm_line(r, r.arm, colour_of(r.arm, evaluation.names), columns, base) for r in records]
        blocks.append(Block(kind, records[0].n, columns, [("", lines)]))
    return blocks


def difference_blocks(evaluation: Evaluation) -> list[Block]:
    """Tables of paired differences: one for all prompts and one for each kind. The deployed arm comes first."""
    found = evaluation.differences
    columns = _columns(found)
    blocks = []
    for kind in dict.fromkeys(difference.kind for difference in found):
        here = [difference for difference in found if difference.kind == kind]
        groups = []
        own = [d for d in here if d.arm == DEPLOYED]
        if own:
            groups.append((f"{DEPLOYED} minus …", [_difference_line(d, d.to, columns, evaluation) for d in own]))
        for to in dict.fromkeys(d.to for d in here if d.arm != DEPLOYED):
            rest = [d for d in here if d.to == to and d.arm != DEPLOYED]
            groups.append((f"… minus {to}", [_difference_line(d, d.arm, columns, evaluation) for d in rest]))
        blocks.append(Block(kind, here[0].n, columns, groups))
    return blocks


def comparison_blocks(evaluations: Sequence[tuple[str, str, Evaluation]]) -> list[Block]:
    """Tables of what each run would ship and the reference: one for all prompts and one for each kind that all runs have.

    Args:
        evaluations: (run's name, colour, evaluation).
    """
    columns = _columns(r for _, _, e in evaluations for r in e.arms if r.arm in (REFERENCE, e.ships))
    blocks = []
    for kind in (None, *(kind for kind in evaluations[0][2].kinds if all(kind in e.kinds for _, _, e in evaluations))):
        references = [
            (f"{REFERENCE} of {name}", record)
            for name, _, e in evaluations
            if (record := e.arm(REFERENCE, kind)) is not None
        ]
        if references and all(record == references[0][1] for _, record in references):
            references = [(REFERENCE, references[0][1])]
        grey = colour_of(REFERENCE, ())
        lines = [_arm_line(record, title, grey, columns, record) for title, record in references]
        numbers = []
        for name, colour, evaluation in evaluations:
            record = evaluation.arm(evaluation.ships, kind)
            assert record is not None, (evaluation.ships, kind)
            base = evaluation.arm(REFERENCE, kind)
            lines.append(_arm_line(record, f"{name}, {evaluation.ships}", colour, columns, base))
            numbers.append(record.n)
        blocks.append(Block(kind, min(numbers), columns, [("", lines)]))
    return blocks


def _columns(records: Iterable[ArmRecord | Difference]) -> list[Column]:
    records = list(records)
    rates = [(name, False) for name in RATES if any(name in r.measures for r in records)]
    flags = [(name, True) for name in dict.fromkeys(name for r in records for name in r.flags)]
    means = [(name, False) for name in MEANS if any(name in r.measures for r in records)]
    columns = []
    for key, flag in (*rates, *flags, *means):
        estimates = [e for r in records if (e := (r.flags if flag else r.measures).get(key)) is not None]
        low, high = min(0.0, *(e.low for e in estimates)), max(0.0, *(e.high for e in estimates))
        share = flag or key in RATES
        if share and not any(isinstance(r, Difference) for r in records):
            low, high = 0.0, 1.0
        if isinstance(records[0], Difference):
            high = max(high, -low)
            low = -high
        title, unit = (key, "share flagged") if flag else (_TITLES[key], _UNITS[key])
        columns.append(Column(key, flag, title, unit, low, high if high > low else low + 1.0))
    return columns


def _arm_line(record: ArmRecord, name: str, colour: str, columns: Sequence[Column], base: ArmRecord | None) -> TableRow:
    cells = [_cell(c.of(record), c, None if base is None or (e := c.of(base)) is None else e.value) for c in columns]
    return TableRow(name, colour, cells)


def _difference_line(difference: Difference, name: str, columns: Sequence[Column], evaluation: Evaluation) -> TableRow:
    cells = [_cell(column.of(difference), column, 0.0, signed=True) for column in columns]
    return TableRow(f"{difference.arm} − {difference.to}", colour_of(name, evaluation.names), cells)


def _cell(estimate: Estimate | None, column: Column, mark: float | None, *, signed: bool = False) -> Cell | None:
    if estimate is None:
        return None
    return Cell(
        signed_text(estimate.value) if signed else number(estimate.value),
        f"[{number(estimate.low)}, {number(estimate.high)}]",
        low=_place(estimate.low, column),
        at=_place(estimate.value, column),
        high=_place(estimate.high, column),
        mark=None if mark is None else _place(mark, column),
        clear=estimate.excludes_zero if signed else None,
    )


def share_block(
    titles: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, str, Sequence[Estimate | None]]],
    mark: float | None = None,
) -> Block:
    """A table of numbers between 0 and 1.

    Args:
        titles: title and unit of each column.
        rows: name, colour and numbers of each row.
        mark: a number to compare with.
    """
    columns = [Column("", False, title, unit, 0.0, 1.0) for title, unit in titles]
    lines = [
        TableRow(name, colour, [_cell(one, column, mark) for one, column in zip(cells, columns, strict=True)])
        for name, colour, cells in rows
    ]
    return Block(None, 0, columns, [("", lines)])


def _place(value: float, column: Column) -> float:
    return round(100 * (value - column.low) / (column.high - column.low), 1)


def number(value: float) -> str:
    """Format with two decimals below 10, one above, and a minus sign as wide as a digit.

    Example:
        >>> number(0.5), number(-3.14159), number(123.45)
        ('.50', '−3.14', '123.5')
    """
    text = short(value) if abs(value) < 10 else f"{value:.1f}"
    return text.replace("-", "−")


def signed_text(value: float) -> str:
    """Format a difference with its sign.

    Example:
        >>> signed_text(0.25), signed_text(-0.25), signed_text(0.0)
        ('+.25', '−.25', '.00')
    """
    text = number(value)
    return f"+{text}" if value > 0 and text != ".00" else text


# ── books ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def book_rows(books: Books, knobs: dict[str, Knobs] | None) -> list[tuple[str, str, str]]:
    """Book, norm, overlap with the quarantine (the cosine over all layers together)."""
    flat = flat_books(books, knobs)
    rows = []
    for name, vector in flat.items():
        overlap = cosine(flat[QUARANTINE], vector) if QUARANTINE in flat else None
        rows.append((name, f"{vector.norm():.3g}", "–" if overlap is None else f"{overlap:.2f}".replace("-", "−")))
    return rows
