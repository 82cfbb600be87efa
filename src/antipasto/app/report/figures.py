"""The figures of a report, with titles and captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from antipasto.app.onset import find_onset, smoothing
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
        plots.append(curves("Reward and oracle", caption + _smoothed(lines), lines, unit="mean", onset=onset))
    if exploited:
        caption = f"Share of the step's rollouts that are rewarded and not solved.{_smoothed(exploited)}"
        if onset is not None:
            caption += " Vertical line: where it began to rise, with its 95% interval."
        plots.append(curves("Exploited", caption, exploited, share=True, unit="share", onset=onset))
    return plots


def _onset(run: Run) -> tuple[float, float, float] | None:
    """Onset of the exploit over all policies: lower end, step, upper end."""
    counts = {} if run.rollouts is None else run.rollouts.exploits
    if not counts:
        return None
    steps, hits, totals = np.array([(step, *counts[step]) for step in sorted(counts)]).T
    found = find_onset(steps, hits, totals)
    return None if found is None else (found.low, found.step, found.high)


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


def training(run: Run) -> list[Plot]:
    """Further training curves of one run, if it logged them."""
    plots = [
        _by_policy(run, "flagged", "Flagged", "flagged", "Flagged by the detector or the monitor."),
        _single(
            run,
            "kl",
            "KL to the reference",
            "Mean over the tokens of the rollouts: how far the policy has moved.",
            "nats per token",
        ),
        *(
            _with_chance(run, f"routing/{key}", title, caption)
            for key, title, caption in (
                (
                    "hackward_in",
                    "Hack-ward part of the gradient",
                    "Before the optimizer. If it is no higher than chance, the gradient does not point at the hack.",
                ),
                (
                    "hackward_update",
                    "Hack-ward part of the step",
                    "The optimizer's update before routing.",
                ),
                (
                    "hackward_out",
                    "Hack-ward part of what ships",
                    "Of the part of the update that stays in δS. Low if routing works.",
                ),
                (
                    "quarantine_norm",
                    "Size of the quarantine",
                    "‖δS_hack‖ over all layers, and the same for what the random control would have moved.",
                ),
            )
        ),
        _single(run, "completions/mean_length", "Length", "Mean over the rollouts.", "tokens"),
        _single(
            run,
            "entropy",
            "Entropy",
            "Mean over the tokens. Near zero, the policy has stopped exploring.",
            "nats per token",
        ),
    ]
    return [plot for plot in plots if plot is not None]


def _by_policy(run: Run, measure: str, title: str, metric: str, caption: str) -> Plot | None:
    """A share of the step's rollouts, by sampling policy."""
    lines = _lines_of(run, measure, metric)
    if not lines:
        return None
    caption += f" Share of the step's rollouts.{_smoothed(lines)}"
    return curves(title, caption, lines, share=True, unit="share")


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


def _single(run: Run, key: str, title: str, caption: str, unit: str) -> Plot | None:
    points = run.metrics.get(key)
    if not points:
        return None
    lines = [Line(title, "ink", points)]
    plot = curves(title, caption + _smoothed(lines), lines, unit=unit)
    return Plot(plot.title, plot.caption, plot.svg)


def _with_chance(run: Run, key: str, title: str, caption: str) -> Plot | None:
    if not run.metrics.get(key):
        return None
    lines = [Line("the direction", _TRAINED, run.metrics[key])]
    if run.metrics.get(f"{key}_random"):
        lines.append(Line("a random direction: chance", _RANDOM, run.metrics[f"{key}_random"], DASHES[1]))
    return curves(title, caption + _smoothed(lines), lines, unit="norm" if key.endswith("norm") else "fraction")


def _smoothed(lines: Sequence[Line]) -> str:
    window = smoothing(max(len(line.points) for line in lines))
    return f" Thin: each step; thick: mean of {window}." if window > 1 else ""


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
            plots.append(curves(title, caption + _smoothed(lines), lines, share=share))
    return plots


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def maps(run: Run) -> list[Plot]:
    """Heat maps by layer: both knobs on one scale, and the direction."""
    plots = []
    if run.knobs is not None:
        ships = grid({name: size(pair.delta_s) for name, pair in run.knobs.items()})
        held = {name: size(pair.hack) for name, pair in run.knobs.items() if pair.hack is not None}
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
        parts: dict[str, tuple[str, str, Mapping[str, Tensor]]] = {
            "δS, ships": (_DEPLOYED, DASHES[0], {name: pair.delta_s for name, pair in run.knobs.items()})
        }
        held = {name: pair.hack for name, pair in run.knobs.items() if pair.hack is not None}
        if held:
            parts["δS_hack, quarantine"] = (_TRAINED, DASHES[1], held)
        if held and run.books is not None and "random" in run.books.books:
            parts["the random control's book"] = (_RANDOM, DASHES[2], run.books.books["random"])
        found = {label: spectrum(vectors) for label, (_, _, vectors) in parts.items()}
        kinds = list(found["δS, ships"])[: _KINDS + 1]
        for kind in kinds:
            lines = [
                Line(label, parts[label][0], list(enumerate(values[kind])), parts[label][1])
                for label, values in found.items()
                if kind in values
            ]
            caption = "A flat line means that all singular directions moved alike." if not kind else ""
            plots.append(spectrum_plot(kind or "All layers", caption, lines, unit="rms"))
    if run.direction is not None and run.direction.effect is not None:
        effect = spectrum(run.direction.effect)[""]
        lines = [Line("effect size", _REFERENCE, list(enumerate(effect)))]
        caption = "Root mean square of the effect sizes: where in the spectrum the pairs separate hack from clean."
        plots.insert(1, spectrum_plot("The direction, all layers", caption, lines, unit="effect size"))
    return plots
