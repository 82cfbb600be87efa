"""The job behind `antipasto watch`: score rollouts at the base model of their training. It does not need the trained model.

    watch.json             base, monitor, options, files and their digests; at the end, the result
    monitor.safetensors    the monitor, if it was made from pairs
    scores.jsonl           one line per rollout, in the order in which they were scored
    compare.json           with ``compare``: AUCs by window of steps
    watch.html             the page
    .lock                  locked while a process writes into the folder

A call continues an interrupted one, also if files have grown or were added. It is refused if the monitor, an option or a
scored file has changed, unless ``anew`` is set to start again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from antipasto.adapter.fingerprints import hashed_once
from antipasto.adapter.rollouts import TokenIds
from antipasto.app.checks import find_files
from antipasto.app.locks import held_folder
from antipasto.app.models import base_fingerprint, load_adapted, quiet
from antipasto.app.onset import find_onset
from antipasto.app.watch.compare import compare_scores
from antipasto.app.watch.config import WatchConfig
from antipasto.app.watch.page import write_page
from antipasto.app.watch.result import PAGE, Watched, Window
from antipasto.app.watch.scoring import SCORES, Scorer, is_finite
from antipasto.app.watch.sources import Index, Known, Source, is_still, known, read_index, read_sources
from antipasto.evaluation.records import Rate
from antipasto.files import write_json, write_text
from antipasto.reading import as_number, read_json, read_rows
from antipasto.routing.directions import Direction
from antipasto.routing.monitor import Completion, Monitor
from antipasto.routing.pairs import ContrastPair, load_pairs, pairs_in
from antipasto.terminal import progress_bar

FACTS, SCORES_FILE, MONITOR, COMPARE = "watch.json", "scores.jsonl", "monitor.safetensors", "compare.json"
FORMAT = "antipasto-watch-1"
_CHUNK = 2048  # rollouts that are scored and written together
ANEW = "or --anew to score all of them again"


def watch(
    base: str,
    rollouts: Sequence[str | Path],
    *,
    pairs: str | Path | None = None,
    monitor: str | Path | None = None,
    out: str | Path | None = None,
    compare: bool = False,
    anew: bool = False,
    config: WatchConfig | None = None,
    console: Console | None = None,
) -> Watched:
    """Score rollouts at the model that training started from, and write a page about them.

    Args:
        base: the model before training: its folder, or its name on the hub.
        rollouts: files, or patterns of files.
        pairs: JSON lines with prompt, hack and clean, to make a monitor from.
        monitor: a saved monitor, instead of pairs; or a direction, with ``config.threshold``.
        out: folder for the results; None: ``watch`` next to the first file.
        compare: also compute AUCs of this and other scores against the labels in the files.
        anew: discard earlier scores in ``out``.
        config: how to score.
        console: where to print; None: nothing is printed.

    Returns:
        The result, which is also written to the folder.

    Raises:
        ValueError: a file, a column or a monitor cannot be used, ``out`` has scores of another call, or another process writes
            into it; says which.
        OSError: a file cannot be read or written.
    """
    config, console = config or WatchConfig(), console or Console(quiet=True)
    if (pairs is None) == (monitor is None):
        raise ValueError("Give either --pairs, to make a monitor from, or --monitor, a saved one.")
    options = _options(config)
    files = find_files(rollouts)
    out = Path(out) if out is not None else files[0].parent / "watch"
    labelled = None if pairs is None else load_pairs(pairs)
    given = known(Path(pairs if pairs is not None else str(monitor)))
    index = _sampled(read_index(files, config), config)
    if compare and not np.isfinite(index.label).any():
        raise ValueError(
            "--compare needs labels, and the files have none: name a column of 0 and 1 with --label-column, or reward and "
            "oracle with --reward-column and --oracle-column."
        )
    with held_folder(out), hashed_once():
        model, tokenizer = load_adapted(base, config.adapter(), console, dtype=config.dtype)
        facts = {
            "format": FORMAT,
            "base": base_fingerprint(model),
            "made_of": {"pairs" if monitor is None else "monitor": given.sha256},
            **options,
        }
        known_files = _begin(out, facts, files, anew=anew)
        facts["files"] = [asdict(one) for one in known_files]
        write_json(out / FACTS, {**facts, "result": None})  # before the files that it describes
        with console.status("loading the monitor"):
            scorer = _scorer(out / MONITOR if monitor is None else Path(monitor), model, tokenizer, labelled, config)
        names = [one.name for one in known_files]
        with quiet():
            _score(out / SCORES_FILE, scorer, files, names, index, config, console)
        watched = _conclude(out, files, names, index, scorer.monitor, config, facts, compare=compare)
        write_page(watched, base, config)
        return watched


def _options(config: WatchConfig) -> dict[str, Any]:
    """The options that scores depend on."""
    targets, excluded = config.target_modules, config.exclude_modules
    return {
        "dtype": config.dtype,
        "rank": config.rank,
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
        "exclude_modules": None if excluded is None else sorted(excluded),
        "prompt_column": config.prompt_column,
        "completion_column": config.completion_column,
        "max_tokens": config.max_tokens,
        "threshold": config.threshold,
        "seed": config.seed,
        "sample": config.sample,
        "windows": config.windows if config.sample is not None else None,
    }


def _sampled(index: Index, config: WatchConfig) -> Index:
    """The rollouts to score: all, or a sample of each window."""
    if config.sample is None:
        return index
    rng = np.random.default_rng(config.seed)
    parts = [
        rng.choice(part, config.sample, replace=False) if len(part) > config.sample else part
        for part in index.windows(config.windows)
    ]
    return index.only(np.sort(np.concatenate(parts)))


def _scorer(
    path: Path, model: Any, tokenizer: Any, labelled: Sequence[ContrastPair] | None, config: WatchConfig
) -> Scorer:
    """The scorer, from the monitor in a file. With labelled pairs, the monitor is made first if the file does not exist."""
    if labelled is None:
        return Scorer(_monitor(path, model, tokenizer, config), config.batch_size)
    if not path.exists():
        half = pairs_in(config.batch_size)
        Monitor.from_pairs(model, tokenizer, labelled, seed=config.seed, batch_size=half).save(path)
    return Scorer.with_probe(_monitor(path, model, tokenizer, config), labelled, config.batch_size)


def _monitor(path: Path, model: Any, tokenizer: Any, config: WatchConfig) -> Monitor:
    """Load a monitor, or make one from a direction and the caller's threshold."""
    try:
        direction = Direction.load(path)
    except ValueError:
        saved = Monitor.load(path, model, tokenizer)
        if config.threshold is None:
            _ = saved.threshold  # raises if there is none
            return saved
        found = Monitor(model, tokenizer, saved.direction, threshold=config.threshold)
        found.calibration = saved.calibration
        return found
    if config.threshold is None:
        raise ValueError(f"{path} is a direction, which has no threshold: give --threshold, or --pairs.")
    try:
        return Monitor(model, tokenizer, direction, threshold=config.threshold)
    except ValueError as error:
        raise ValueError(f"{path} is not a direction that can be used: {error}") from error


# ── where it was interrupted ─────────────────────────────────────────────────────────────────────────────────────────


def _begin(out: Path, facts: Mapping[str, Any], files: Sequence[Path], *, anew: bool) -> list[Known]:
    """Start in the folder, or continue an earlier call. Returns the files under the names that its scores use."""
    ours = [SCORES_FILE, COMPARE, PAGE, *([MONITOR] if "pairs" in facts["made_of"] else [])]
    now = [known(path) for path in files]
    place = out / FACTS
    if anew or not place.exists() or not (out / SCORES_FILE).exists():  # nothing is scored yet
        there = [name for name in ours if (out / name).exists()]
        if there and not anew and not place.exists():
            raise ValueError(f"{out} has {there[0]}, but no {FACTS} that describes it: choose another --out, {ANEW}.")
        for name in (FACTS, *ours):
            (out / name).unlink(missing_ok=True)
        return now
    before = read_json(place)
    if not isinstance(before, dict) or before.get("format") != FORMAT:
        raise ValueError(f"{place} is not what antipasto watch wrote: choose another --out, {ANEW}.")
    for name, value in facts.items():
        if before.get(name) != value:
            what = {"base": "the base", "made_of": "the pairs or the monitor"}.get(name, f"--{name.replace('_', '-')}")
            raise ValueError(f"{out} has scores of another call ({what} differs): choose another --out, {ANEW}.")
    earlier = {one["path"]: Known(**one) for one in before["files"]}
    if gone := sorted(set(earlier) - {one.path for one in now}):
        raise ValueError(f"{out} also has scores of {gone[0]}: add that file, choose another --out, {ANEW}.")
    for path, one in zip(files, now, strict=True):
        if one.path in earlier and not is_still(earlier[one.path], path):
            raise ValueError(f"{path} has changed since it was scored into {out}: choose another --out, {ANEW}.")
    return [replace(one, name=earlier[one.path].name) if one.path in earlier else one for one in now]


def _read_scores(path: Path, names: Sequence[str]) -> dict[tuple[int, int], dict[str, float | None]]:
    """Read scores by file and row. An incomplete last line is removed from the file."""
    if not path.exists():
        return {}
    numbers = {name: number for number, name in enumerate(names)}
    notes: list[str] = []
    found = {}
    for where, line in read_rows(path, notes):
        values = {name: as_number(line, name, where) for name in SCORES}
        row = as_number(line, "row", where)
        file = numbers.get(str(line.get("file")))
        if file is None or row is None or values["score"] is None:
            raise ValueError(f"{where}: this line is not a score of these files. Give --anew to score again.")
        found[file, int(row)] = values
    if notes:
        whole = path.read_bytes()
        write_text(path, whole[: whole.rindex(b"\n") + 1].decode() if b"\n" in whole else "")
    return found


def _score(
    path: Path,
    scorer: Scorer,
    files: Sequence[Path],
    names: Sequence[str],
    index: Index,
    config: WatchConfig,
    console: Console,
) -> None:
    """Score the rollouts that have no score yet, and append a line for each."""
    wanted = set(index.keys)
    left = wanted - _read_scores(path, names).keys()
    with progress_bar(console) as progress:
        bar = progress.add_task("scoring", total=len(wanted), completed=len(wanted) - len(left))
        for chunk in _chunks(read_sources(files, config, [], among=left)):
            scores = scorer([_tokens(scorer.monitor, one, config.max_tokens) for one in chunk])
            lines = []
            for one, values in zip(chunk, scores, strict=True):
                if not is_finite(values):
                    raise ValueError(f"{one.where}: its score is not finite; try --dtype float32.")
                above = values["score"] > scorer.monitor.threshold  # type: ignore[operator]
                place = {"file": names[one.file], "row": one.row, "step": one.step}
                lines.append(json.dumps({**place, "above": above, **values}) + "\n")
            with path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
            progress.update(bar, advance=len(chunk))


def _chunks(sources: Iterator[Source]) -> Iterator[list[Source]]:
    while chunk := list(islice(sources, _CHUNK)):
        yield chunk


def _tokens(monitor: Monitor, one: Source, max_tokens: int | None) -> TokenIds:
    """Token ids of a rollout, with an end-of-sequence token unless it was cut off."""
    try:
        if one.ids is not None or one.truncated is not None or max_tokens is None:
            return monitor.tokens(Completion(one.prompt, one.text, bool(one.truncated), one.ids, one.tool_mask))
        ids = monitor.tokens(Completion(one.prompt, one.text))
        written = len(ids.completion) - (monitor.tokenizer.eos_token_id is not None)
        return ids._replace(completion=ids.completion[:written]) if written >= max_tokens else ids
    except ValueError as error:
        raise ValueError(f"{one.where}: {error}") from error


# ── the result ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _conclude(
    out: Path,
    files: list[Path],
    names: Sequence[str],
    index: Index,
    monitor: Monitor,
    config: WatchConfig,
    facts: dict[str, Any],
    *,
    compare: bool,
) -> Watched:
    by_key = _read_scores(out / SCORES_FILE, names)
    table = np.array([[by_key[key][name] for name in SCORES] for key in index.keys], dtype=float)
    scores = dict(zip(SCORES, table.T, strict=True))
    flagged = scores["score"] > monitor.threshold
    parts = index.windows(config.windows)
    windows = [
        Window(int(index.step[p].min()), int(index.step[p].max()), Rate(int(flagged[p].sum()), len(p))) for p in parts
    ]
    steps, which = np.unique(index.step, return_inverse=True)
    onset = find_onset(steps, np.bincount(which, flagged), np.bincount(which))
    comparison = compare_scores(index, scores, parts) if compare else None
    above = Rate(int(flagged.sum()), len(flagged))
    result = {
        "rollouts": len(index),
        "threshold": monitor.threshold,
        "above": above.to_json(),
        "windows": [{"first": w.first, "last": w.last, **w.above.to_json()} for w in windows],
        "onset": onset and asdict(onset),
        "versions": {"antipasto": version("antipasto")},
    }
    if comparison is not None:
        write_json(out / COMPARE, comparison.to_json())
    facts = {**facts, "result": result}
    write_json(out / FACTS, facts)
    return Watched(
        out=out,
        files=files,
        index=index,
        scores=scores,
        monitor=monitor,
        above=above,
        windows=windows,
        onset=onset,
        comparison=comparison,
        facts=facts,
    )
