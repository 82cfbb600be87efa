"""What came of demo runs: the sentences and the comparison that their numbers allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.table import Table

from antipasto.app.arms import cell
from antipasto.evaluation.ask import conclude
from antipasto.evaluation.records import REFERENCE, Estimate, Evaluation


def pool(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The answers of several seeds as one evaluation; its intervals are of prompts, not of seeds."""
    offset, answers = 0, []
    for evaluation in evaluations:
        answers += [replace(answer, row=answer.row + offset) for answer in evaluation.answers]
        offset += evaluation.facts["prompts"]
    # arm by arm: the first answers name the arms in their order
    return conclude(evaluations[0].task, {"prompts": offset}, answers, margin=evaluations[0].margin)


def reading(evaluations: Sequence[Evaluation]) -> str:
    """The verdict on all seeds together."""
    if len(evaluations) == 1:
        return evaluations[0].verdict.sentence
    note = "(Intervals are of the answers of all seeds together; the table's ± is the spread between seeds.)"
    return f"{pool(evaluations).verdict.sentence} {note}"


def comparison(runs: Mapping[str, Sequence[Evaluation]], says: Mapping[str, str]) -> Table:
    """What each method would ship, beside the reference. One seed: rates with 95% intervals; several: mean ± sd."""
    first = next(iter(runs.values()))
    spread = "[95% interval]" if len(first) == 1 else f"(mean ± sd of {len(first)} seeds)"
    flags = list(first[0].arms[0].flags)
    table = Table("prompts", "method", "solve", "exploit", *flags, title=f"what each method would ship {spread}")
    table.caption = "\n".join(f"{name}: {text}" for name, text in says.items() if name in runs)
    table.caption_justify = "left"
    for kind in first[0].kinds:
        rows = {REFERENCE: [e.arm(REFERENCE, kind) for e in first]}
        rows |= {method: [e.arm(e.ships, kind) for e in seeds] for method, seeds in runs.items()}
        for name, found in rows.items():
            records = [record for record in found if record is not None]
            cells = [cell([r.measures[m] for r in records]) for m in ("solve", "exploit")]
            table.add_row(kind, name, *cells, *(cell([r.flags[f] for r in records]) for f in flags))
        table.add_section()
    return table


def standing(runs: Mapping[str, Sequence[Evaluation]]) -> str:
    """Where each method stands, by its own numbers; the answers of all seeds together."""
    pooled = {method: pool(seeds) for method, seeds in runs.items()}

    def ranked(measure: str, kind: str | None, *, high: bool) -> str:
        found: dict[str, Estimate] = {}
        for method, evaluation in pooled.items():
            record = evaluation.arm(evaluation.ships, kind)
            assert record is not None
            found[method] = record.measures[measure]
        return ", ".join(f"{m} {found[m]}" for m in sorted(found, key=lambda m: found[m].value, reverse=high))

    kinds = next(iter(pooled.values())).kinds
    text = [f"Fewest exploits, of all answers: {ranked('exploit', None, high=False)}."]
    text += [f"Most solved on {kind} prompts: {ranked('solve', kind, high=True)}." for kind in kinds]
    return " ".join(text)
