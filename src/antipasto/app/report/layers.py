"""Knobs and directions by kind of layer, depth and singular direction.

size     rms_j δ = √(mean_j δ_j²), over the coordinates j of a layer, so that wide and narrow layers compare
place    j / r: 0 for the largest singular value of a layer, 1 for the smallest
share    of a layer's coordinates whose effect size exceeds the gate's threshold
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from antipasto.app.inspection import Knobs, kind_of

BINS = 16
_DEPTH = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Grid:
    """One number for each kind of layer and depth; NaN if there is no such layer.

    Attributes:
        kinds: names of the rows, such as ``q_proj``.
        depths: names of the columns; ``"-"`` for layers outside the blocks.
        values: (kinds, depths).
    """

    kinds: list[str]
    depths: list[str]
    values: np.ndarray


def depth_of(layer: str) -> str:
    """The number of a layer's block; ``"-"`` if it has none.

    Example:
        >>> depth_of("model.layers.3.mlp.experts.7.up_proj"), depth_of("lm_head")
        ('3', '-')
    """
    match = _DEPTH.search(f".{layer}.")
    return match[1] if match else "-"


def grid(numbers: Mapping[str, float]) -> Grid:
    """Arrange one number per layer by kind and depth. Several in one place, such as experts, are averaged."""
    cells: dict[tuple[str, str], list[float]] = {}
    for layer, number in numbers.items():
        cells.setdefault((kind_of(layer), depth_of(layer)), []).append(number)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    depths = sorted({depth for _, depth in cells}, key=lambda depth: (depth == "-", int(depth) if depth != "-" else 0))
    values = np.array([[np.mean(cells[k, d]) if (k, d) in cells else np.nan for d in depths] for k in kinds])
    return Grid(kinds, depths, values)


def size(vector: Tensor) -> float:
    """Root mean square."""
    return float(vector.square().mean().sqrt())


def spectrum(vectors: Mapping[str, Tensor], knobs: Mapping[str, Knobs] | None = None) -> dict[str, np.ndarray]:
    """Kind of layer → root mean square by place, (bins,); key ``""`` for all layers.

    Coordinate j of a layer is in bin ⌊j · bins / r⌋. There are at most as many bins as the smallest layer has coordinates.

    Args:
        vectors: layer → (r,), or (experts·r,).
        knobs: layer → its knobs, which say how many experts it has.
    """
    experts = {layer: pair.experts for layer, pair in (knobs or {}).items()}
    sizes = {layer: len(vector) // experts.get(layer, 1) for layer, vector in vectors.items()}
    bins = min(BINS, *sizes.values(), BINS)
    squares: dict[str, np.ndarray] = {}
    numbers: dict[str, np.ndarray] = {}
    for layer, vector in vectors.items():
        place = np.arange(len(vector)) % sizes[layer] * bins // sizes[layer]
        square = np.bincount(place, weights=vector.double().numpy() ** 2, minlength=bins)
        number = np.bincount(place, minlength=bins)
        for kind in ("", kind_of(layer)):
            squares[kind] = squares.get(kind, np.zeros(bins)) + square
            numbers[kind] = numbers.get(kind, np.zeros(bins)) + number
    return {kind: np.sqrt(squares[kind] / numbers[kind]) for kind in squares}
