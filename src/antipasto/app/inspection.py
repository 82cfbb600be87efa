"""Show an adapter, a direction, a monitor, the books of a run, or a whole run folder as tables.

A *book* is what one direction moved into the quarantine, or what a control direction would have moved.

    share in quarantine = ‖δS_hack‖² / (‖δS‖² + ‖δS_hack‖²)
    overlap of two books a, b = a·b / (‖a‖ ‖b‖), over all layers together

Loads no model, and no pickles. Text from files is printed literally, without markup or control characters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from antipasto.adapter.config import PEFT_TYPE
from antipasto.app.checks import check_file
from antipasto.app.evaluate import rates_table
from antipasto.app.run_folder import RunFolder
from antipasto.evaluation.records import EVAL, read_evaluation
from antipasto.evaluation.rollout_log import Rollout, read
from antipasto.names import THRESHOLD
from antipasto.reading import as_number, read_json, read_rows
from antipasto.routing.books import CHANCE, Books, read_books
from antipasto.routing.directions import Direction
from antipasto.routing.monitor import read_monitor
from antipasto.terminal import add_row, plain, shorten

THRESHOLDS = (0.5, THRESHOLD, 0.8, 1.0)
QUARANTINE = "quarantine"
_TOP = 5
_CONFIG_LINES = 24
_METRICS = re.compile(r"(reward|oracle|exploit|flagged|score)(/\w+)?|kl|routing/.*")
_KNOB = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.(?P<knob>delta_s|delta_s_hack)(?:\.weight)?")


def show(path: Path, console: Console) -> None:
    """Print what is at a path, as tables.

    Raises:
        ValueError: it cannot be shown, or is damaged; names the file.
        OSError: it cannot be read.
    """
    for number, part in enumerate(describe(path)):  # everything is read before the first line is printed
        if number and isinstance(part, Table):
            console.print()
        console.print(part)


def describe(path: Path) -> list[RenderableType]:
    """The parts that `show` prints."""
    if path.is_dir() or not path.exists():
        if (path / "adapter_config.json").exists():
            return adapter_parts(path)
        return run_parts(path, RunFolder(path).read_config())
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            form = (file.metadata() or {}).get("format", "")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}.") from error
    if form.startswith("antipasto-direction-"):
        return direction_parts(Direction.load(path))
    if form.startswith("antipasto-monitor-"):
        return monitor_parts(path)
    if form.startswith("antipasto-books-"):
        return books_parts(path)
    if path.name == "adapter_model.safetensors":
        return adapter_parts(path.parent)
    raise ValueError(
        f"{path} is a safetensors file, but not a direction, monitor or books (format {form!r}). Give one of these, an "
        "adapter's folder, or a run folder."
    )


def _sentence(text: str) -> Text:
    return Text(plain(text))


def _table(title: str, *columns: str, texts: Sequence[str] = (), caption: str | None = None) -> Table:
    """An empty table. The columns that are not ``texts`` hold numbers."""
    table = Table(title=_sentence(title), title_justify="left", caption=caption, caption_justify="left")
    for name in columns:
        table.add_column(Text(plain(name)), justify="left" if name in texts else "right", overflow="fold")
    return table


# ── adapter ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Knobs(NamedTuple):
    """δS and δS_hack of one layer, (r,), or (experts·r,) if it has a matrix for each expert."""

    delta_s: Tensor
    hack: Tensor | None
    experts: int = 1


def adapter_parts(folder: Path) -> list[RenderableType]:
    """Describe an adapter: sizes by kind of layer, and its largest coordinates."""
    config = read_json(folder / "adapter_config.json")
    if not isinstance(config, dict) or config.get("peft_type") != PEFT_TYPE.value:
        other = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{folder / 'adapter_config.json'}: expected peft_type {PEFT_TYPE.value}, got {other!r}.")
    knobs, others = read_adapter(folder / "adapter_model.safetensors")
    quarantine = quarantine_of(knobs)
    table = _table(
        f"adapter of {config.get('base_model_name_or_path') or 'an unnamed base model'}",
        *("layers", "number", "r", "‖δS‖", "‖δS_hack‖", "in quarantine"),
        texts=["layers"],
        caption="in quarantine: ‖δS_hack‖² / (‖δS‖² + ‖δS_hack‖²)" if quarantine else None,
    )
    *kinds, whole = knob_rows(knobs)
    for row in sorted(kinds, key=lambda row: str(row[0])):
        add_row(table, *row)
    table.add_section()
    add_row(table, *whole)
    parts: list[RenderableType] = [table, *_largest(knobs)]
    if not quarantine:
        parts.append(_sentence("It has no quarantine: all of it ships."))
    elif not any(hack.any() for hack in quarantine.values()):
        parts.append(_sentence("It has an empty quarantine."))
    else:
        parts.append(_sentence("It still has its quarantine: call drop_quarantine before it ships."))
    if bool(config.get("quarantine")) != bool(quarantine):
        parts.append(_sentence("Its config disagrees about the quarantine: the two files do not belong together."))
    if not all(torch.isfinite(t).all() for layer in knobs.values() for t in layer[:2] if t is not None):
        parts.append(_sentence("IT HAS NaN OR Inf: the run that wrote it diverged."))
    if others:
        parts.append(_sentence(f"It also has {others} other tensors (modules_to_save)."))
    return parts


def read_adapter(path: Path) -> tuple[dict[str, Knobs], int]:
    """Read an adapter's weights: layer → knobs, and the number of tensors that are not knobs."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}.") from error
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if match := _KNOB.fullmatch(key):
            found.setdefault(match["layer"], {})[match["knob"]] = tensor.float()
    if not found:
        raise ValueError(f"{path} has no delta_s in it: it is not an adapter of this library.")
    for name, pair in found.items():
        if "delta_s" not in pair or any(
            t.ndim not in (1, 2) or t.shape != pair["delta_s"].shape for t in pair.values()
        ):
            raise ValueError(f"{path}: {name} needs a vector delta_s, and delta_s_hack of the same length, if any.")
    knobs = {}
    for name, pair in found.items():
        delta_s, hack = pair["delta_s"], pair.get("delta_s_hack")
        experts = len(delta_s) if delta_s.ndim > 1 else 1
        knobs[name] = Knobs(delta_s.flatten(), None if hack is None else hack.flatten(), experts)
    return knobs, len(tensors) - sum(map(len, found.values()))


def quarantine_of(knobs: Mapping[str, Knobs]) -> dict[str, Tensor]:
    """Layer → δS_hack, of the layers that have one."""
    return {name: layer.hack for name, layer in knobs.items() if layer.hack is not None}


def kind_of(layer: str) -> str:
    """The last part of a layer's name.

    Example:
        >>> kind_of("model.layers.3.self_attn.q_proj")
        'q_proj'
    """
    return layer.rpartition(".")[2]


def knob_rows(knobs: Mapping[str, Knobs]) -> list[tuple[object, ...]]:
    """By kind of layer, and then for all layers: name, number, r, ‖δS‖, ‖δS_hack‖, share in quarantine."""
    kinds: dict[str, list[Knobs]] = {}
    for name, layer in knobs.items():
        kinds.setdefault(kind_of(name), []).append(layer)
    return [(kind, *norms(layers)) for kind, layers in (*kinds.items(), ("all", list(knobs.values())))]


def norms(layers: Sequence[Knobs]) -> tuple[object, ...]:
    """Number, r, ‖δS‖, ‖δS_hack‖, share in quarantine of some layers together."""
    sizes = [len(layer.delta_s) // layer.experts for layer in layers]
    r = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    ships = float(torch.cat([layer.delta_s for layer in layers]).norm())
    hack = [layer.hack for layer in layers if layer.hack is not None]
    if not hack:
        return len(layers), r, f"{ships:.3g}", "-", "-"
    held = float(torch.cat(hack).norm())
    total = ships**2 + held**2
    return len(layers), r, f"{ships:.3g}", f"{held:.3g}", f"{held**2 / total:.0%}" if total > 0 else "-"


def _largest(knobs: Mapping[str, Knobs]) -> list[RenderableType]:
    flat = torch.cat([layer.delta_s for layer in knobs.values()])
    hack = torch.cat([torch.zeros_like(x.delta_s) if x.hack is None else x.hack for x in knobs.values()])
    theta = flat + hack
    squares = theta.square()
    if not squares.any() or not torch.isfinite(squares).all():
        return []
    places = [
        (name if layer.experts == 1 else f"{name}.{e}", j)
        for name, layer in knobs.items()
        for e in range(layer.experts)
        for j in range(len(layer.delta_s) // layer.experts)
    ]
    table = _table(
        "largest coordinates of θ = δS + δS_hack",
        *("layer", "j", "θ", "δS", "δS_hack", "of ‖θ‖²"),
        texts=["layer"],
        caption="j: number of the singular direction; 0 has the largest singular value",
    )
    for i in squares.topk(min(_TOP, len(squares))).indices.tolist():
        name, j = places[i]
        share = float(squares[i] / squares.sum())
        add_row(table, name, j, f"{theta[i]:+.3f}", f"{flat[i]:+.3f}", f"{hack[i]:+.3f}", f"{share:.1%}")
    return [table]


# ── direction ────────────────────────────────────────────────────────────────────────────────────────────────────────


def direction_parts(direction: Direction) -> list[RenderableType]:
    """Describe a direction: its held-out score, the coordinates it guards by threshold, and its strongest layers."""
    rows = sum(len(V) for V in direction.values())
    coordinates = sum(V.shape[1] for V in direction.values())
    held = direction.heldout
    parts: list[RenderableType] = [
        _sentence(f"direction: {len(direction)} layers, {rows} rows, {coordinates:,} coordinates"),
        _sentence(
            "It was not scored on held-out pairs."
            if held is None
            else f"held-out pairs ordered right: {round(held.overall * held.pairs)} of {held.pairs} ({held.overall:.0%}); "
            f"random directions: {held.random:.0%}"
        ),
    ]
    if direction.effect is None:
        return [*parts, _sentence("It has no effect sizes: use it with gate 'one_sided', not 'coordinate'.")]
    table = _table("coordinates that the coordinate gate guards", "effect size above", "coordinates", "share")
    for threshold in THRESHOLDS:
        number = guarded(direction, threshold)
        mark = " (default)" if threshold == THRESHOLD else ""
        add_row(table, f"{threshold}{mark}", f"{number:,}", f"{number / coordinates:.1%}")
    return [*parts, table, strongest_layers(direction)]


def monitor_parts(path: Path) -> list[RenderableType]:
    """Describe a monitor: its threshold, how it was calibrated, and its direction."""
    saved = read_monitor(path)
    if saved.calibration is None:
        what = (
            "no threshold" if saved.threshold is None else f"threshold {saved.threshold:.3f}, given and not calibrated"
        )
        return [_sentence(f"monitor: {what}"), *direction_parts(saved.direction)]
    return [*map(_sentence, str(saved.calibration).splitlines()), *direction_parts(saved.direction)]


def guarded(direction: Direction, threshold: float = THRESHOLD) -> int:
    """Number of coordinates whose effect size is above a threshold."""
    return sum(int((t.abs() > threshold).sum()) for t in (direction.effect or {}).values())


def strongest_layers(direction: Direction) -> Table:
    """The layers with the most guarded coordinates."""
    assert direction.effect is not None
    table = _table(
        f"strongest layers, of {len(direction)}",
        *("layer", f"above {THRESHOLD}", "largest", "held-out"),
        texts=["layer"],
        caption="above, largest: effect sizes; held-out: pairs that this layer alone orders right",
    )
    above = {name: int((effect.abs() > THRESHOLD).sum()) for name, effect in direction.effect.items()}
    largest = {name: float(effect.abs().max()) for name, effect in direction.effect.items()}
    for name in sorted(above, key=lambda name: (above[name], largest[name]), reverse=True)[:_TOP]:
        share = None if direction.heldout is None else direction.heldout.layers.get(name)
        number = f"{above[name]} of {len(direction.effect[name])}"
        add_row(table, name, number, f"{largest[name]:.2f}", "-" if share is None else f"{share:.0%}")
    return table


# ── books ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def books_parts(path: Path, knobs: Mapping[str, Knobs] | None = None) -> list[RenderableType]:
    """Describe books: the norm of each, and their overlaps.

    Args:
        knobs: of the same run, to compare the books with its quarantine.
    """
    saved = read_books(path)
    books = flat_books(saved, knobs)
    numbers = [str(i) for i in range(1, len(books) + 1)]
    table = _table(
        f"books after {saved.steps} steps: what each would have moved into the quarantine",
        *("", "book", "norm", *numbers),
        texts=["book"],
        caption="columns 1, 2, …: overlap (cosine) with that book, -1 to 1",
    )
    for number, (name, book) in zip(numbers, books.items(), strict=True):
        cosines = [cosine(book, other) for other in books.values()]
        add_row(table, number, name, f"{book.norm():.3g}", *("-" if c is None else f"{c:.2f}" for c in cosines))
    return [table]


def flat_books(saved: Books, knobs: Mapping[str, Knobs] | None) -> dict[str, Tensor]:
    """Each book as one vector over all layers. The quarantine comes first, if the knobs have one for the same layers."""
    layers = saved.books[CHANCE]
    quarantine = quarantine_of(knobs or {})
    books = saved.books
    if {name: len(part) for name, part in quarantine.items()} == {name: len(part) for name, part in layers.items()}:
        books = {QUARANTINE: quarantine, **books}
    return {name: torch.cat([book[layer].float() for layer in layers]) for name, book in books.items()}


def cosine(a: Tensor, b: Tensor) -> float | None:
    """Cosine of two vectors; None if one is zero."""
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length > 0 else None


# ── run folder ───────────────────────────────────────────────────────────────────────────────────────────────────────


def run_parts(folder: Path, config: Mapping[str, Any]) -> list[RenderableType]:
    """Describe a run folder, finished or not."""
    place = RunFolder(folder)
    parts: list[RenderableType] = [_config_table(folder, config)]
    if place.metrics.exists():
        parts += metrics_parts(place.metrics, config)
    if place.rollouts.exists():
        parts += rollouts_parts(place.rollouts)
    if (folder / EVAL).exists():
        evaluation = read_evaluation(folder)
        parts += [rates_table([evaluation]), _sentence(evaluation.verdict.sentence)]
    knobs = None
    if place.adapter.is_dir():
        parts += adapter_parts(place.adapter)
        knobs, _ = read_adapter(place.adapter / "adapter_model.safetensors")
    if place.monitor.exists():
        parts += monitor_parts(place.monitor)
    if place.direction.exists():
        parts += direction_parts(Direction.load(place.direction))
    if place.books.exists():
        parts += books_parts(place.books, knobs)
    checkpoints = sorted(int(p.name[11:]) for p in folder.glob("checkpoint-*") if p.name[11:].isdecimal())
    if checkpoints:
        parts.append(_sentence(f"checkpoints at steps {', '.join(map(str, checkpoints))}"))
    if place.unfinished is not None:
        parts.append(_sentence(place.unfinished))
    expected = [place.metrics, place.rollouts, place.adapter]
    if missing := [path.name for path in expected if not path.exists()]:
        parts.append(_sentence(f"missing, or not written yet: {', '.join(missing)}"))
    return parts


def _config_table(folder: Path, config: Mapping[str, Any]) -> Table:
    table = _table(f"run {folder}", "setting", "value", texts=["setting", "value"])
    lines = settings(config)
    for name, value in lines[:_CONFIG_LINES]:
        add_row(table, shorten(name, 40), shorten(value, 70))
    if len(lines) > _CONFIG_LINES:
        add_row(table, "…", f"{len(lines) - _CONFIG_LINES} more")
    return table


def settings(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested options as lines of name and value; those that are None are left out."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += settings(value, f"{prefix}{key}.")
        elif value is not None:
            if not isinstance(value, str):  # the text of a single number or bool ends in "..."
                value = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
            lines.append((f"{prefix}{key}", value))
    return lines


def metrics_parts(path: Path, config: Mapping[str, Any]) -> list[RenderableType]:
    """Describe metrics.jsonl: steps done, and the first and last value of each metric."""
    notes: list[str] = []
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    steps = 0.0
    for rows, (where, row) in enumerate(read_rows(path, notes), 1):
        steps = max(steps, as_number(row, "step", where) or rows)
        for key in filter(_METRICS.fullmatch, row):
            value = as_number(row, key, where)
            if value is not None:
                first.setdefault(key, value)
                last[key] = value
    total = config.get("steps", config.get("max_steps"))
    paired = [key for key in last if f"{key}_random" in last]
    by_chance = ("last, random",) if paired else ()
    table = _table(
        f"{steps:.0f} steps done" if total is None else f"{steps:.0f} of {total} steps done",
        *("metric", "first", "last", *by_chance),
        texts=["metric"],
        caption="random: the value for a random direction of the same shape" if paired else None,
    )
    for key in last:
        if key.removesuffix("_random") not in paired:
            add_row(table, key, f"{first[key]:.3f}", f"{last[key]:.3f}")
        elif key in paired:
            add_row(table, key, f"{first[key]:.3f}", f"{last[key]:.3f}", f"{last[f'{key}_random']:.3f}")
    return [table if last else _sentence(f"{path.name}: no reward in it yet."), *map(_sentence, notes)]


def rollouts_parts(path: Path) -> list[RenderableType]:
    """Describe rollouts.jsonl: rewards in the first and last tenth, and the rollouts with the highest hackward score."""
    notes: list[str] = []
    columns: dict[str, list[float]] = {"reward": [], "oracle": [], "exploit": [], "flagged": []}
    top: list[tuple[float, Rollout]] = []  # by hackward score; of equal scores the earlier first
    for rollout in read(path, notes):
        exploits = None if rollout.oracle is None else rollout.exploits
        measured = (rollout.reward, rollout.oracle, exploits, rollout.flagged)
        for column, value in zip(columns.values(), measured, strict=True):
            if value is not None:
                column.append(float(value))
        if rollout.hackward is not None and math.isfinite(rollout.hackward):
            top.append((rollout.hackward, rollout))
            top = sorted(top, key=lambda scored: scored[0], reverse=True)[:_TOP]
    count = len(columns["reward"])
    table = _table(f"{count:,} rollouts", "mean of", "first tenth", "last tenth", texts=["mean of"])
    for key, values in columns.items():
        if values:
            tenth = max(1, len(values) // 10)
            add_row(table, key, f"{fmean(values[:tenth]):.3f}", f"{fmean(values[-tenth:]):.3f}")
    parts: list[RenderableType] = [table if count else _sentence(f"{path.name}: no rollout in it yet.")]
    if top:
        parts.append(_most_hackward(top))
    elif count:
        parts.append(_sentence("No rollout has a hackward score."))
    return [*parts, *map(_sentence, notes)]


def _most_hackward(top: Sequence[tuple[float, Rollout]]) -> Table:
    table = _table(
        "rollouts with the highest hackward score",
        *("hackward", "step", "reward", "prompt, then completion"),
        texts=["prompt, then completion"],
    )
    for score, rollout in top:
        prompt, completion = _said(rollout.prompt), _said(rollout.completion)
        text = Text(f"{shorten(prompt, 100)}\n") + Text(shorten(completion, 200), style="bold")
        add_row(table, f"{score:.3f}", rollout.step, rollout.reward, text)
        table.add_section()
    return table


def _said(text: Any) -> Any:
    """A text as it is; of a chat, its last message."""
    if isinstance(text, list) and text and isinstance(text[-1], dict):
        return text[-1].get("content", "")
    return text
