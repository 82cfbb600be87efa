"""The jobs behind `antipasto basis`, `antipasto extract` and `antipasto map`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from antipasto.adapter import AntiPastoConfig
from antipasto.adapter.basis import cache_file, cached_file, load_basis
from antipasto.adapter.fingerprints import hashed_once
from antipasto.adapter.layer import as_matrix, basis_dtype
from antipasto.adapter.model import find_targets, rank_of
from antipasto.app.checks import check_new_file
from antipasto.app.inspection import guarded, strongest_layers
from antipasto.app.models import load_adapted, load_shapes, load_weights
from antipasto.names import HELDOUT, THRESHOLD, Dtype
from antipasto.routing.confounds import confounds
from antipasto.routing.directions import Direction, extract_direction
from antipasto.routing.forms import CLEAN, load_forms, of_pairs, score_forms
from antipasto.routing.monitor import Monitor
from antipasto.routing.pairs import ContrastPair, load_pairs, pairs_in, split_pairs
from antipasto.terminal import add_row, plain, progress_bar, say


class Cached(NamedTuple):
    """What `cache_bases` did.

    Attributes:
        layers: number of adapted layers.
        there: number of layers that were cached before.
    """

    layers: int
    there: int


def cache_bases(name_or_path: str, config: AntiPastoConfig, console: Console, *, dtype: Dtype = "auto") -> Cached:
    """Compute and cache the singular basis of every layer that a config adapts.

    Args:
        config: which layers, at what rank, and ``cache_dir``. Its ``target_modules`` is replaced by the resolved names.
        dtype: of the weights; each dtype has its own bases.

    Raises:
        ValueError: the model cannot be loaded, a layer cannot be adapted, or the cache folder cannot be written.
    """
    assert config.cache_dir is not None
    with console.status(Text(f"loading {plain(name_or_path)}")):
        model = load_weights(name_or_path, dtype=dtype)
    targets = find_targets(config, model)
    started = time.monotonic()
    files, there, numbers = set(), 0, 0
    with progress_bar(console) as progress:
        for name, module in progress.track(targets.items(), description="singular bases"):
            weight = as_matrix(module)
            numbers += _experts(weight) * rank_of(name, weight, config)
            with hashed_once():
                file, was_there = _cache_basis(name, module, weight, config)
            files.add(file)
            there += was_there
    done = Cached(len(targets), there)
    table = Table(show_header=False, title="singular bases", title_justify="left")
    computed = done.layers - done.there
    add_row(table, "model", name_or_path)
    add_row(table, "layers", done.layers)
    add_row(table, "cached before", "all" if computed == 0 else done.there)
    add_row(table, "computed now", computed)
    add_row(table, "seconds", f"{time.monotonic() - started:.1f}")
    add_row(table, "trainable numbers", f"{numbers:,}")
    # of the files that the config's bases are read from; a file may hold more than is asked
    add_row(table, "files", f"{sum(file.stat().st_size for file in files) / 2**20:,.1f} MiB")
    add_row(table, "folder", file.parent)
    console.print(table)
    return done


def _cache_basis(name: str, module: nn.Module, weight: Tensor, config: AntiPastoConfig) -> tuple[Path, bool]:
    """The cache file from which a layer gets its basis under a config, and whether it was there before."""
    assert config.cache_dir is not None
    rank, dtype = rank_of(name, weight, config), basis_dtype(module)
    file = cache_file(weight, config.cache_dir, rank=rank, dtype=dtype)
    _make_folder(file.parent)
    if (cached := cached_file(weight, config.cache_dir, rank=rank, dtype=dtype)) is not None:
        return cached, True
    try:
        load_basis(weight, rank=rank, dtype=dtype, cache_dir=config.cache_dir)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: {error}") from error
    if not file.exists():
        raise _no_cache(file.parent, "files cannot be written there")
    return file, False


RANKS = (256, 64, 16)
"""Ranks that `what_it_needs` shows where none is asked for."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What adapting a model at one rank takes. All sizes are in bytes.

    Attributes:
        rank: directions per layer; None for all.
        layers: number of adapted layers.
        numbers: number of trainable numbers.
        model: the model's weights.
        basis: U, S, Vh: in memory, shared by all adapters, and in the cache.
        adapted: W_θ of all layers. It is in memory in a merged training step, or where W_θ is held between forwards without
            gradient.
        adapter: a saved adapter with its quarantine.
    """

    rank: int | None
    layers: int
    numbers: int
    model: int
    basis: int
    adapted: int
    adapter: int


def what_it_needs(
    name_or_path: str, config: AntiPastoConfig, console: Console, *, dtype: Dtype = "auto"
) -> list[Needs]:
    """Print what adapting a model takes, from its config alone. No weight is read and no SVD is computed.

    Args:
        config: which layers, at what rank; without one, all directions and some lower ranks are compared.
        dtype: of the weights.

    Raises:
        ValueError: the model's config cannot be loaded, or a layer cannot be adapted.
    """
    model = load_shapes(name_or_path, dtype=dtype)
    layers = {name: as_matrix(module) for name, module in find_targets(config, model, shapes_only=True).items()}
    full = max(min(weight.shape[-2:]) for weight in layers.values())
    ranks = [None, *(rank for rank in RANKS if rank < full)] if config.rank is None else [config.rank]
    found = [_needs(model, layers, config, rank) for rank in ranks]
    title = f"what adapting {len(layers)} layers of {name_or_path} takes"
    table = Table(title=plain(title), title_justify="left", caption="held: between forwards without gradient")
    table.add_column("rank")
    for needs in found:
        table.add_column("all" if needs.rank is None else f"{needs.rank}", justify="right")
    add_row(table, "trainable numbers", *(f"{needs.numbers:,}" for needs in found))
    add_row(table, "saved adapter", *(_size(needs.adapter) for needs in found))
    add_row(table, "basis on disk, once", *(_size(needs.basis) for needs in found))
    add_row(table, "memory: the model", *(_size(needs.model) for needs in found))
    add_row(table, "memory: the basis", *(f"+ {_size(needs.basis)}" for needs in found))
    add_row(table, "memory: W_θ, merged or held", *(f"+ {_size(needs.adapted)}" for needs in found))
    console.print(table)
    return found


def _needs(model: nn.Module, layers: Mapping[str, Tensor], config: AntiPastoConfig, rank: int | None) -> Needs:
    config = dataclasses.replace(config, rank=rank)
    ranks = {name: rank_of(name, weight, config) for name, weight in layers.items()}
    numbers = sum(_experts(weight) * ranks[name] for name, weight in layers.items())
    return Needs(
        rank=rank,
        layers=len(layers),
        numbers=numbers,
        model=sum(p.numel() * p.element_size() for p in model.parameters()),
        basis=sum(_basis_bytes(weight, ranks[name]) for name, weight in layers.items()),
        adapted=sum(w.numel() * w.element_size() for w in layers.values()),
        adapter=4 * numbers * (2 if config.quarantine else 1),
    )


def _experts(weight: Tensor) -> int:
    """Number of matrices in a weight: 1, or that of the experts of a stack."""
    return weight.shape[:-2].numel()


def _basis_bytes(weight: Tensor, rank: int) -> int:
    """Size of U and Vh in the weight's dtype and of S in at least fp32, at a rank."""
    size = weight.element_size()
    return _experts(weight) * rank * (size * sum(weight.shape[-2:]) + max(size, 4))


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_cache(folder, str(error.strerror)) from error


def _no_cache(folder: Path, reason: str) -> ValueError:
    return ValueError(f"{folder} cannot be used as the cache folder ({reason}): choose another --cache-dir.")


def extract(
    name_or_path: str,
    pairs_file: Path,
    out: Path,
    config: AntiPastoConfig,
    console: Console,
    *,
    dtype: Dtype = "auto",
    heldout: float = HELDOUT,
    seed: int = 0,
    batch_size: int = 16,
    force: bool = False,
) -> Direction:
    """Extract a direction from labelled pairs and save it. Print the pairs' confounds and how good the direction is.

    Args:
        pairs_file: JSON lines with prompt, hack and clean.
        out: the file to write.
        config: which layers, at what rank.
        dtype: of the model's weights.
        heldout: share of the pairs, in [0, 1), that are held out to judge the direction.
        seed: of the split, and of the shuffled labels.
        batch_size: pairs per backward.
        force: overwrite ``out``.

    Raises:
        ValueError: ``out`` exists, the pairs are invalid or too few, or the model cannot be loaded or adapted.
        OSError: a file cannot be read or written.
    """
    check_new_file(out, force=force)
    pairs = load_pairs(pairs_file)
    fit, held = split_pairs(pairs, heldout, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_adapted(name_or_path, config, console, dtype=dtype)
    with console.status(f"extracting from {len(fit)} pairs"):
        direction = extract_direction(model, tokenizer, fit, heldout=held, batch_size=batch_size)
        shuffled = extract_direction(model, tokenizer, fit, shuffle_labels=seed, batch_size=batch_size)
    direction.save(out)
    console.print(confounds(pairs, tokenizer).table())
    console.print(_direction_table(direction, shuffled, fit, held))
    console.print(strongest_layers(direction))
    say(console, f"written: {out}")
    return direction


def score_map(
    name_or_path: str,
    forms_file: Path,
    config: AntiPastoConfig,
    console: Console,
    *,
    pairs_file: Path | None = None,
    monitor_file: Path | None = None,
    dtype: Dtype = "auto",
    heldout: float = HELDOUT,
    seed: int = 0,
    batch_size: int = 32,
) -> None:
    """Score a file of texts by form, and print how each form compares with clean texts and with the threshold.

    With pairs, their held-out hacks and clean texts are two more forms. If the file has no form ``clean``, the held-out clean
    texts take its place.

    Args:
        forms_file: JSON lines with form, prompt and text.
        config: which layers, at what rank.
        pairs_file: pairs to make the monitor from.
        monitor_file: a saved monitor, instead of pairs.
        dtype: of the model's weights.
        heldout: share of the pairs to calibrate with.
        seed: of the pairs' split.
        batch_size: texts per backward.

    Raises:
        ValueError: not exactly one of pairs and monitor is given, a file is invalid, there are no clean texts, or the model
            cannot be loaded.
        OSError: a file cannot be read.
    """
    if (pairs_file is None) == (monitor_file is None):
        raise ValueError("Give either --pairs, to make a monitor from, or --monitor, a saved one.")
    forms = load_forms(forms_file)
    pairs = None if pairs_file is None else load_pairs(pairs_file)
    if pairs is not None:
        _, held = split_pairs(pairs, heldout, seed)
        clean = "held-out clean texts" if CLEAN in forms else CLEAN
        forms = {"held-out hacks": of_pairs(held, clean=False), clean: of_pairs(held, clean=True), **forms}
    elif CLEAN not in forms:
        raise ValueError(f"{forms_file} has no form {CLEAN!r} to compare the others with: add honest answers.")
    model, tokenizer = load_adapted(name_or_path, config, console, dtype=dtype)
    with console.status(Text(f"scoring {sum(map(len, forms.values()))} texts")):
        if pairs is not None:
            half = pairs_in(batch_size)
            monitor = Monitor.from_pairs(model, tokenizer, pairs, heldout=heldout, seed=seed, batch_size=half)
        else:
            assert monitor_file is not None
            monitor = Monitor.load(monitor_file, model, tokenizer)
        found = score_forms(monitor, forms, batch_size=batch_size)
    console.print(found.table())


def _direction_table(
    direction: Direction, shuffled: Direction, fit: Sequence[ContrastPair], held: Sequence[ContrastPair]
) -> Table:
    total = sum(V.shape[1] for V in direction.values())
    table = Table("", "this direction", "by chance", title=f"direction from {len(fit)} pairs", title_justify="left")
    score = direction.heldout
    add_row(
        table,
        f"{len(held)} held-out pairs ordered right",
        "-" if score is None else f"{score.overall:.0%}",
        "-" if score is None else f"{score.random:.0%} (random directions)",
    )
    add_row(
        table,
        f"coordinates with an effect size above {THRESHOLD}",
        f"{guarded(direction):,} of {total:,}",
        f"{guarded(shuffled):,} (labels shuffled)",
    )
    return table
