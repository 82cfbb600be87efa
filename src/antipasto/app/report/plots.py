"""Draw small figures as inline SVG, with real text and the page's own colours.

matplotlib draws with one placeholder colour for each name of `COLOURS`. In the SVG these become the classes ``f-NAME`` (fill)
and ``s-NAME`` (stroke), which the style sheet colours for light, dark and paper. No style attribute is left, because the
page's content security policy forbids them. The same numbers give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from antipasto.app.onset import Onset, running_mean, smoothing
from antipasto.app.report.layers import Grid
from antipasto.evaluation.records import Estimate
from antipasto.terminal import shorten

LEVELS = 9
ARM_COLOURS, RUN_COLOURS = 10, 8
COLOURS = (
    *("ink", "muted", "rule", "paper"),
    *(f"arm{i}" for i in range(ARM_COLOURS)),
    *(f"run{i}" for i in range(RUN_COLOURS)),
    *(f"level{i}" for i in range(LEVELS)),
)
DASHES = ("", "5 2", "1.5 1.5", "6 2 1.5 2", "3 1.5")

_SVG = "http://www.w3.org/2000/svg"
_BY_CODE = {f"#{0x123400 + i:06x}": name for i, name in enumerate(COLOURS)}
_CODE = {name: code for code, name in _BY_CODE.items()}
_GEOMETRY = ("x", "y", "width", "height", "d", "transform")
_LONG_NUMBER = re.compile(r"\d+\.\d{3,}")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "antipasto",
    "text.parse_math": False,  # names from files may contain dollar signs
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": _CODE["ink"],
    "axes.edgecolor": _CODE["rule"],
    "axes.labelcolor": _CODE["muted"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": _CODE["rule"],
    "ytick.color": _CODE["rule"],
    "xtick.labelcolor": _CODE["muted"],
    "ytick.labelcolor": _CODE["muted"],
    "grid.color": _CODE["rule"],
    "grid.linewidth": 0.4,
}


@dataclass(frozen=True)
class Line:
    """One line of a figure.

    Attributes:
        label: for the legend.
        colour: a name of `COLOURS`.
        points: (x, y), in the order of x.
        dash: one of `DASHES`.
        band: (low, high) around each point. A line with a band is not smoothed.
    """

    label: str
    colour: str
    points: Sequence[tuple[float, float]]
    dash: str = ""
    band: Sequence[tuple[float, float]] | None = None


@dataclass(frozen=True)
class Plot:
    """A figure of the page.

    Attributes:
        title: above the figure.
        svg: the drawing.
        keys: the lines of its legend.
        ramp: labels of the lowest and the highest level of a heat map.
        wide: whether it takes the page's whole width.
    """

    title: str
    caption: str
    svg: Markup
    keys: Sequence[Line] = ()
    ramp: tuple[str, str] | None = None
    wide: bool = False


def class_rules() -> str:
    """CSS rules for the classes of `COLOURS`."""
    return "".join(f".f-{name}{{fill:var(--{name})}}.s-{name}{{stroke:var(--{name})}}" for name in COLOURS)


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def curves(
    title: str,
    caption: str,
    lines: Sequence[Line],
    *,
    share: bool = False,
    unit: str = "",
    level: float | None = None,
    onset: Onset | None = None,
) -> Plot:
    """Plot values over steps: thin as they are, thick as `running_mean`, which the caption says.

    Args:
        lines: at least one. One with the title as its label is left out of the legend.
        share: draw the axis from 0 to 1.
        unit: of the values.
        level: a value to compare with, drawn as a horizontal line.
        onset: drawn as a vertical line in a band.
    """
    windows = [1 if line.band is not None else smoothing(len(line.points)) for line in lines]
    if max(windows) > 1:
        caption += f" Thin: each step; thick: mean of {max(windows)}."
    label = f"{title} by step. {_ends(lines)}"
    with _drawing((4.4, 2.35)) as (figure, axes):
        if onset is not None:
            label += f" Onset at {onset}."
            axes.axvspan(onset.low, onset.high, color=_CODE["rule"], alpha=0.5, linewidth=0)
            axes.axvline(onset.step, color=_CODE["muted"], linewidth=1.0)
            axes.annotate(
                "onset",
                (onset.step, 1),
                (3, -1),
                axes.get_xaxis_transform(),  # steps across, 0 to 1 upwards
                "offset points",
                color=_CODE["muted"],
                va="top",
            )
        if level is not None:
            axes.axhline(level, color=_CODE["muted"], linewidth=1, linestyle=_linestyle(DASHES[1]))
        for line, window in zip(lines, windows, strict=True):
            x, y = np.array(line.points, dtype=float).T
            if line.band is not None:
                axes.fill_between(x, *np.array(line.band).T, color=_CODE[line.colour], alpha=0.22, linewidth=0)
            colour, marker = _CODE[line.colour], "o" if len(x) == 1 else ""
            if window > 1:
                axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.3)
            smooth = running_mean(y, window)
            axes.plot(
                x, smooth, color=colour, linestyle=_linestyle(line.dash), linewidth=1.7, marker=marker, markersize=3
            )
        if share:
            axes.set_ylim(-0.02, 1.02)
        else:
            axes.margins(y=0.08)
            lowest = [low for line in lines for low, _ in (line.band or [(y, y) for _, y in line.points])]
            if min(lowest) >= 0:
                axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        svg = to_svg(figure, label)
    return Plot(title, caption, svg, [line for line in lines if line.label != title])


def trade(title: str, caption: str, points: Sequence[tuple[str, Estimate, Estimate]], colour: str) -> Plot:
    """Plot exploit against solve along a path, with the intervals of both.

    Args:
        points: label, solve and exploit of each point of the path, in order.
        colour: a name of `COLOURS`.
    """
    with _drawing((4.4, 2.9)) as (figure, axes):
        x, y = (np.array([(e.value, e.low, e.high) for e in of]).T for of in zip(*(p[1:] for p in points), strict=True))
        axes.errorbar(
            x[0],
            y[0],
            xerr=np.abs(x[1:] - x[0]),
            yerr=np.abs(y[1:] - y[0]),
            color=_CODE[colour],
            ecolor=_CODE["rule"],
            marker="o",
            markersize=4,
            elinewidth=1,
        )
        for (label, *_), *at in zip(points, x[0], y[0], strict=True):
            axes.annotate(label, tuple(at), (5, 4), textcoords="offset points", color=_CODE["ink"])
        axes.set_xlabel("solved")
        axes.set_ylabel("exploited")
        axes.grid()
        axes.margins(0.12)
        said = "; ".join(f"{label}: solved {solve}, exploited {exploit}" for label, solve, exploit in points)
        svg = to_svg(figure, f"{title}. {said}.")
    return Plot(title, caption, svg)


def spectrum(title: str, caption: str, lines: Sequence[Line], *, unit: str) -> Plot:
    """Plot sizes along the singular values, bin by bin."""
    with _drawing((3.1, 1.9)) as (figure, axes):
        for line in lines:
            y = np.array([value for _, value in line.points])
            edges = np.linspace(0, 1, len(y) + 1)
            style = _linestyle(line.dash)
            axes.stairs(y, edges, baseline=None, color=_CODE[line.colour], linewidth=1.6, linestyle=style)
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set_xticks([0, 0.5, 1], ["largest σ", "j / r = .5", "smallest"])
        first, _, last = axes.get_xticklabels()
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")
        axes.set_ylabel(unit)
        axes.grid(axis="y")
        axes.yaxis.set_major_locator(MaxNLocator(4))
        svg = to_svg(figure, f"{title}, along the singular values. {_ends(lines)}")
    return Plot(title, caption, svg, lines)


def heat_map(title: str, caption: str, numbers: Grid, *, top: float, form: str = ".3g") -> Plot:
    """Draw one number for each kind of layer and depth as a shade.

    Args:
        top: the number that gets the strongest shade; 0 if all are 0.
        form: format of a number.
    """
    rows, columns = numbers.values.shape
    size = (max(4.4, 1.3 + 0.14 * columns), 0.75 + 0.21 * rows)
    with _drawing(size) as (figure, axes):
        for i, kind in enumerate(numbers.kinds):
            for j, depth in enumerate(numbers.depths):
                value = numbers.values[i, j]
                if not np.isnan(value):
                    cell = Rectangle((j, i), 1, 1, facecolor=_CODE[f"level{level(value, top)}"], linewidth=0.8)
                    cell.set_edgecolor(_CODE["paper"])
                    cell.set_gid(f"cell {shorten(kind, 40)}, depth {depth}: {value:{form}}")
                    axes.add_patch(cell)
        axes.set_xlim(0, columns)
        axes.set_ylim(rows, 0)
        every = max(1, -(-columns // 12))
        shown = range(0, columns, every)
        axes.set_xticks([j + 0.5 for j in shown], [numbers.depths[j] for j in shown])
        axes.set_yticks([i + 0.5 for i in range(rows)], [shorten(kind, 22) for kind in numbers.kinds])
        axes.tick_params(length=0)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.set_xlabel("depth: number of the block")
        svg = to_svg(figure, f"{title}, by kind of layer and depth. {_extremes(numbers, form)}")
    return Plot(title, caption, svg, ramp=("0", f"{top:{form}}"), wide=columns > 36)


def level(value: float, top: float) -> int:
    """The shade of a value: 0 to 8, in equal steps up to ``top``."""
    return 0 if top <= 0 else min(LEVELS - 1, max(0, int(value / top * LEVELS)))


def _ends(lines: Sequence[Line]) -> str:
    said = [f"{shorten(line.label, 40)}: from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in lines]
    return "; ".join(said) + "."


def _extremes(numbers: Grid, form: str) -> str:
    i, j = np.unravel_index(np.nanargmax(numbers.values), numbers.values.shape)
    where = f"{shorten(numbers.kinds[i], 40)}, depth {numbers.depths[j]}"
    return f"Largest: {numbers.values[i, j]:{form}} at {where}; mean {np.nanmean(numbers.values):{form}}."


def _linestyle(dash: str) -> Any:
    return (0, tuple(float(part) for part in dash.split())) if dash else "-"


# ── matplotlib to inline SVG ─────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _drawing(size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    """Context manager of a figure with one pair of axes, in the page's style. Restores matplotlib's settings."""
    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        yield figure, axes


def to_svg(figure: Figure, label: str) -> Markup:
    """Turn a figure into an SVG element, with a label for screen readers."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser uses its own fonts
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = buffer.getvalue()
    prefix = "p" + hashlib.sha256(label.encode(errors="replace") + drawn).hexdigest()[:8]
    root = ElementTree.fromstring(drawn)
    _strip(root)
    used = set(re.findall(r"#(\w+)", " ".join(value for e in root.iter() for value in _references(e))))
    for element in root.iter():
        _restyle(element)
        _reidentify(element, used, prefix)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label, "class": "plot"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _strip(root: ElementTree.Element) -> None:
    """Remove metadata, style sheets and namespaces, which HTML does not need."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        element.text = (element.text or "").strip() or None
        element.tail = None
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}


def _references(element: ElementTree.Element) -> list[str]:
    return [value for key, value in element.attrib.items() if key in ("href", "clip-path")]


def _reidentify(element: ElementTree.Element, used: set[str], prefix: str) -> None:
    """Keep only ids that are referred to, and make them unique to this figure. A cell's id becomes its tooltip."""
    name = element.attrib.pop("id", None)
    if name in used:
        element.set("id", f"{prefix}-{name}")
    elif name is not None and name.startswith("cell "):
        tooltip = ElementTree.Element("title")
        tooltip.text = name.removeprefix("cell ")
        element.insert(0, tooltip)
    for key in ("href", "clip-path"):
        if key in element.attrib:
            element.set(key, element.attrib[key].replace("#", f"#{prefix}-"))


def _restyle(element: ElementTree.Element) -> None:
    """Replace the style attribute by classes for colours and attributes for the rest."""
    style = element.attrib.pop("style", "")
    classes = []
    for part in filter(str.strip, style.split(";")):
        key, value = (text.strip() for text in part.split(":", 1))
        if key in ("fill", "stroke"):
            if value != "none":
                classes.append(f"{key[0]}-{_BY_CODE[value]}")
                continue
        elif key == "font":  # the page's own family
            key, value = "font-size", value.split("px")[0].split()[-1]
        elif key.startswith("font"):
            if key != "font-size":
                continue
            value = value.removesuffix("px")
        element.set(key, value)
    for key in _GEOMETRY:
        if key in element.attrib:
            element.set(key, _LONG_NUMBER.sub(lambda match: f"{float(match[0]):.2f}", element.attrib[key]))
    if element.tag == "text" and not any(name.startswith("f-") for name in classes):
        classes.append("f-ink")
    if classes:
        element.set("class", " ".join(classes))
