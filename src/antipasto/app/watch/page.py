"""The page of `antipasto watch`, in the report's style (`antipasto.app.report.html`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from antipasto.app.report.html import page_of
from antipasto.app.report.plots import Line, Plot, curves
from antipasto.app.report.rollouts import EACH, within
from antipasto.app.report.tables import Block, share_block
from antipasto.app.watch.compare import Comparison
from antipasto.app.watch.config import WatchConfig
from antipasto.app.watch.result import Watched
from antipasto.app.watch.sources import Source, read_sources
from antipasto.evaluation.records import Rate
from antipasto.files import write_text
from antipasto.routing.monitor import Ordering

BUDGET = 600_000
"""Characters of rollouts on a page."""
POINTS = 40
"""Maximum points of a curve: neighbouring steps are merged if there are more."""
_SPREAD = (0.1, 0.9)  # quantiles


@dataclass(frozen=True)
class Card:
    """One rollout of the page.

    Attributes:
        source: as in its file.
        file: the file's name.
        score: at the reference.
        nll: per token, at the reference.
        tokens: its length.
        above: whether it is above the threshold.
        times: number of scored rollouts with the same prompt and text.
    """

    source: Source
    file: str
    score: float
    nll: float
    tokens: int
    above: bool
    times: int

    @property
    def outcome(self) -> str:
        """The outcome's name in the page's filter."""
        return {True: "exploited", False: "solved", None: "neither"}[self.source.label]


def write_page(watched: Watched, base: str, config: WatchConfig) -> None:
    write_text(watched.page, render(watched, base, config))


def render(watched: Watched, base: str, config: WatchConfig) -> str:
    names = [one["name"] for one in watched.facts["files"]]
    calibration = watched.monitor.calibration
    return page_of(
        "watch.html",
        title=f"{len(watched.index):,} rollouts watched",
        kind="watch",
        watched=watched,
        base=base,
        names=names,
        plots=_plots(watched),
        windows=share_block(
            [(f"steps {w.first}–{w.last}", f"of {w.above.total:,}") for w in watched.windows],
            [("above the threshold", "arm1", [w.above.estimate for w in watched.windows])],
        ),
        comparison=None if watched.comparison is None else _compared(watched.comparison),
        lists=_lists(watched, config, names),
        calibration=calibration,
        orderings=[] if calibration is None else _orderings(calibration),
        settings=[(name, value) for name, value in watched.facts.items() if value is not None and name not in _HIDDEN],
        file_facts=watched.facts["files"],
        sentence=_sentence(watched),
        sampled=_sampled(watched),
        by_oracle=config.label_column is None,
        given_threshold=watched.facts["threshold"] is not None,
        has_labels=bool(np.isfinite(watched.index.label).any()),
    )


def _compared(comparison: Comparison) -> Block:
    titles = [(f"steps {w.first}–{w.last}", f"{w.exploits:,} against {w.others:,}") for w in comparison.windows]
    rows = [(title.long, f"arm{i}", cells) for i, (title, cells) in enumerate(comparison.rows)]
    return share_block(titles, rows, mark=0.5)


_HIDDEN = ("files", "result", "made_of")


def _orderings(calibration: Any) -> list[tuple[str, Ordering]]:
    return [
        ("the score", calibration.score),
        ("permuted direction", calibration.permuted),
        ("random direction", calibration.random),
    ]


def _sentence(watched: Watched) -> str:
    first, last = watched.windows[0], watched.windows[-1]
    shares = f"Share above the threshold: {first.above} at steps {first.first} to {first.last}"
    if len(watched.windows) > 1:
        shares += f", {last.above} at steps {last.first} to {last.last}"
    if watched.onset is None:
        return f"No clear rise was found. {shares}."
    onset = watched.onset
    return f"Yes, from step {onset.step:.0f} [95%: {onset.low:.0f} to {onset.high:.0f}]. {shares}."


def _sampled(watched: Watched) -> str | None:
    number = watched.facts["sample"]
    if number is None:
        return None
    windows, seed = watched.facts["windows"], watched.facts["seed"]
    return f"A sample: at most {number:,} rollouts of each of {windows} windows, seed {seed}."


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _plots(watched: Watched) -> list[Plot]:
    steps = np.unique(watched.index.step)
    parts = watched.index.windows(POINTS)
    x = [float(watched.index.step[part].mean()) for part in parts]
    scores, flagged = watched.scores["score"], watched.flagged
    rates = [Rate(int(flagged[part].sum()), len(part)) for part in parts]
    each = (
        "Each point is a step"
        if len(parts) == len(steps)
        else f"Each point is {len(steps) // len(parts)} or more steps"
    )
    mean = Line(
        "mean",
        "arm2",
        [(at, float(scores[part].mean())) for at, part in zip(x, parts, strict=True)],
        band=[tuple(np.quantile(scores[part], _SPREAD).tolist()) for part in parts],
    )
    above = Line(
        "above the threshold",
        "arm1",
        [(at, rate.value) for at, rate in zip(x, rates, strict=True)],
        band=[rate.interval for rate in rates],
    )
    where = "" if watched.onset is None else " Vertical line: the onset, with its 95% interval."
    return [
        curves(
            "Score at the reference",
            f"{each}. Band: the middle 80% of the rollouts. Dashed: the threshold.{where}",
            [mean],
            unit="cosine",
            level=watched.monitor.threshold,
            onset=watched.onset,
        ),
        curves(
            "Share above the threshold",
            f"{each}. Band: 95% interval (Wilson).{where}",
            [above],
            share=True,
            unit="share",
            onset=watched.onset,
        ),
    ]


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _lists(watched: Watched, config: WatchConfig, names: Sequence[str]) -> list[tuple[str, list[Card]]]:
    """The highest-scored texts, each once, and a random sample of all."""
    scores = watched.scores["score"]
    # equal prompts and texts have equal scores, so take enough of the highest to get this many distinct ones
    order = np.argsort(-scores, kind="stable")
    _, sizes = np.unique(-scores, return_counts=True)
    enough = int(sizes[: 2 * EACH].sum())
    sample = np.sort(np.random.default_rng(0).permutation(len(scores))[:EACH])
    at = {key: i for i, key in enumerate(watched.index.keys)}
    wanted = {*order[:enough].tolist(), *sample.tolist()}
    keys = {(int(watched.index.file[i]), int(watched.index.row[i])) for i in wanted}
    times: Counter[str] = Counter()
    first: dict[str, Source] = {}
    drawn: list[Source] = []
    chosen = set(sample.tolist())
    for one in read_sources(watched.files, config, [], among=keys):
        said = repr((one.prompt, one.text))
        times[said] += 1
        first.setdefault(said, one)
        if at[one.key] in chosen:
            drawn.append(one)
    highest = sorted(first.values(), key=lambda one: -scores[at[one.key]])[:EACH]

    def card(one: Source, *, counted: bool) -> Card:
        i = at[one.key]
        return Card(
            one,
            names[one.file],
            float(scores[i]),
            float(watched.scores["nll"][i]),
            int(watched.scores["tokens"][i]),
            bool(watched.flagged[i]),
            times[repr((one.prompt, one.text))] if counted else 1,
        )

    lists = [
        ("Highest scores", [card(one, counted=True) for one in highest]),
        ("A random sample", [card(one, counted=False) for one in drawn]),
    ]
    return [
        (title, within(cards, lambda card: (card.source.prompt, card.source.completion), BUDGET // 2))
        for title, cards in lists
    ]
