"""The figures of a report, with titles and captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from antipasto.app.inspection import quarantine_of
from antipasto.app.onset import Onset, find_onset
from antipasto.app.report.layers import grid, size, spectrum
from antipasto.app.report.plots import DASHES, RUN_COLOURS, Line, Plot, curves, heat_map, trade
from antipasto.app.report.plots import spectrum as spectrum_plot
from antipasto.app.report.run import Run
from antipasto.app.report.tables import colour_of
from antipasto.evaluation.records import DEPLOYED, RANDOM, REFERENCE, TRAINED, Evaluation, dial_of

_KINDS = 12  # maximum number of figures of single kinds of layers
_VIEWS = {"trained": TRAINED, "deployed": DEPLOYED}
_TRAINED, _DEPLOYED, _REFERENCE, _RANDOM = (colour_of(arm, ()) for arm in (TRAINED, DEPLOYED, REFERENCE, RANDOM))


def run_colour(number: int) -> str:
    """The colour of a run among several."""
    return f"run{number % RUN_COLOURS}"


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def overview(run: Run) -> list[Plot]:
    """Reward with oracle, and the exploit with its onset, if they were logged."""
    onset = _onset(run)
    rewards = _lines_of(run, "reward", "reward", "reward, ", "")
    truths = _lines_of(run, "solved", "oracle", "oracle, ", DASHES[1])
    exploited = _lines_of(run, "exploited", "exploit")
    plots = []
    if rewards:
        caption = "Mean reward, which training sees. This task has no oracle."
        if truths:
            caption = "Solid: the reward, which training sees. Dashed: the oracle, which it does not see. A gap: it is fooled."
        lines = [*rewards, *truths]
        plots.append(curves("Reward and oracle", caption, lines, unit="mean", onset=onset))
    if exploited:
        caption = "Share of the step's rollouts that are rewarded and not solved."
        if onset is not None:
            caption += " Vertical line: where it began to rise, with its 95% interval."
        plots.append(curves("Exploited", caption, exploited, share=True, unit="share", onset=onset))
    return plots


def _onset(run: Run) -> Onset | None:
    """Onset of the exploit over all policies."""
    counts = {} if run.rollouts is None else run.rollouts.exploits
    if not counts:
        return None
    steps, hits, totals = np.array([(step, *counts[step]) for step in sorted(counts)]).T
    return find_onset(steps, hits, totals)


def dial(evaluation: Evaluation, kind: str | None) -> Plot | None:
    """Exploit against solve by share of the quarantine left in; None if that was not evaluated."""
    found = [(c, r) for r in evaluation.arms if r.kind == kind and (c := dial_of(r.arm)) is not None]
    if len(found) < 3 or not {"solve", "exploit"} <= found[0][1].measures.keys():
        return None
    where = "all prompts" if kind is None else f"{kind} prompts"
    points = [
        (f"{c:g}", r.measures["solve"], r.measures["exploit"]) for c, r in sorted(found, key=lambda pair: pair[0])
    ]
    return trade(
        "The dial",
        f"Answers to {where}. Labels: share of the quarantine left in; 0 is deployed, 1 as trained. Bars: 95% intervals. "
        "antipasto export --dial ships a point of this curve.",
        points,
        _DEPLOYED,
    )


_METRICS = (
    (
        "kl",
        "KL to the reference",
        "Mean over the tokens of the rollouts: how far the policy has moved.",
        "nats per token",
    ),
    (
        "routing/hackward_in",
        "Hack-ward part of the gradient",
        "Before the optimizer. If it is no higher than chance, the gradient does not point at the hack.",
        "fraction",
    ),
    ("routing/hackward_update", "Hack-ward part of the step", "The optimizer's update before routing.", "fraction"),
    (
        "routing/hackward_out",
        "Hack-ward part of what ships",
        "Of the part of the update that stays in δS. Low if routing works.",
        "fraction",
    ),
    (
        "routing/quarantine_norm",
        "Size of the quarantine",
        "‖δS_hack‖ over all layers, and the same for what the random control would have moved.",
        "norm",
    ),
    ("completions/mean_length", "Length", "Mean over the rollouts.", "tokens"),
    ("entropy", "Entropy", "Mean over the tokens. Near zero, the policy has stopped exploring.", "nats per token"),
)
"""Logged metrics with a figure: name, title, caption, unit."""


def training(run: Run) -> list[Plot]:
    """Further training curves of one run, if it logged them."""
    plots = []
    if flagged := _lines_of(run, "flagged", "flagged"):
        caption = "Flagged by the detector or the monitor. Share of the step's rollouts."
        plots.append(curves("Flagged", caption, flagged, share=True, unit="share"))
    for key, title, caption, unit in _METRICS:
        if not run.metrics.get(key):
            continue
        lines = [Line(title, "ink", run.metrics[key])]
        if key.startswith("routing/"):
            lines = [Line("the direction", _TRAINED, run.metrics[key])]
        if chance := run.metrics.get(f"{key}_random"):
            lines.append(Line("a random direction: chance", _RANDOM, chance, DASHES[1]))
        plots.append(curves(title, caption, lines, unit=unit))
    return plots


def _lines_of(run: Run, measure: str, metric: str, prefix: str = "", dash: str | None = None) -> list[Line]:
    """Lines by sampling policy if rollouts.jsonl has the measure, else one line from the metrics, or none.

    Without ``dash``, each policy has its own dash.
    """
    views = {} if run.rollouts is None else run.rollouts.curves.get(measure, {})
    if views:
        return [
            Line(
                f"{prefix}sampled {_VIEWS.get(view, view)}",
                colour_of(_VIEWS.get(view, view), ()),
                points,
                DASHES[i] if dash is None else dash,
            )
            for i, (view, points) in enumerate(sorted(views.items(), key=lambda item: item[0] != "trained"))
        ]
    return [Line(f"{prefix}all rollouts", "ink", run.metrics[metric], dash or "")] if run.metrics.get(metric) else []


def overlaid(runs: Sequence[Run]) -> list[Plot]:
    """The same metric of several runs: of the policy that would ship if the run samples from it, else of all rollouts."""
    plots = []
    for key, title, caption, share in (
        ("reward", "Reward", "Mean reward of the rollouts of the policy that would ship.", False),
        ("oracle", "Solved", "Mean oracle score of the rollouts of the policy that would ship.", True),
        (
            "exploit",
            "Exploited",
            "Share of rollouts of the policy that would ship that are rewarded, not solved.",
            True,
        ),
        ("kl", "KL to the reference", "Mean over the tokens of all rollouts, in nats.", False),
    ):
        lines = [
            Line(run.name, run_colour(i), points, DASHES[i % len(DASHES)])
            for i, run in enumerate(runs)
            if (points := run.metrics.get(f"{key}/deployed") or run.metrics.get(key))
        ]
        if lines:
            plots.append(curves(title, caption, lines, share=share))
    return plots


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def maps(run: Run) -> list[Plot]:
    """Heat maps by layer: both knobs on one scale, and the direction."""
    plots = []
    if run.knobs is not None:
        ships = grid({name: size(pair.delta_s) for name, pair in run.knobs.items()})
        held = {name: size(hack) for name, hack in quarantine_of(run.knobs).items()}
        top = float(np.nanmax([np.nanmax(ships.values), *held.values()]))
        how = "Shade: root mean square of the layer's coordinates"
        plots.append(heat_map("δS, which ships", f"{how}. A row is a kind of layer, a column a block.", ships, top=top))
        if held:
            caption = f"{how}, on the scale of δS."
            plots.append(heat_map("δS_hack, the quarantine", caption, grid(held), top=top))
    if run.direction is not None and run.direction.effect is not None:
        shares = grid({n: float((t.abs() > run.threshold).float().mean()) for n, t in run.direction.effect.items()})
        caption = (
            f"Shade: share of a layer's coordinates with an effect size above {run.threshold:g}: the gate guards these."
        )
        top = float(np.nanmax(shares.values))
        plots.append(heat_map("Where the direction is strong", caption, shares, top=top, form=".0%"))
    return plots


def spectra(run: Run) -> list[Plot]:
    """How far each part of the spectrum moved: all layers together, then each kind."""
    plots = []
    if run.knobs is not None:
        parts: list[tuple[str, str, Mapping[str, Tensor]]] = [
            ("δS, ships", _DEPLOYED, {name: pair.delta_s for name, pair in run.knobs.items()})
        ]
        if held := quarantine_of(run.knobs):
            parts.append(("δS_hack, quarantine", _TRAINED, held))
            if run.books is not None and "random" in run.books.books:
                parts.append(("the random control's book", _RANDOM, run.books.books["random"]))
        found = [(label, colour, spectrum(vectors, run.knobs)) for label, colour, vectors in parts]
        for kind in list(found[0][2])[: _KINDS + 1]:
            lines = [
                Line(label, colour, list(enumerate(values[kind])), DASHES[i])
                for i, (label, colour, values) in enumerate(found)
                if kind in values
            ]
            caption = "A flat line means that all singular directions moved alike." if not kind else ""
            plots.append(spectrum_plot(kind or "All layers", caption, lines, unit="rms"))
    if run.direction is not None and run.direction.effect is not None:
        effect = spectrum(run.direction.effect, run.knobs)[""]
        lines = [Line("effect size", _REFERENCE, list(enumerate(effect)))]
        caption = "Root mean square of the effect sizes: where in the spectrum the pairs separate hack from clean."
        plots.insert(1, spectrum_plot("The direction, all layers", caption, lines, unit="effect size"))
    return plots
