"""The job behind `antipasto export`: write what ships of a run, check it, and only then put it in its place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig
from yaml import YAMLError

from antipasto.app.checks import check_new_folder
from antipasto.app.export.card import TAG, About, render
from antipasto.app.export.check import HALF, Check, ask, check, refuse
from antipasto.app.export.weights import Dtypes, Written, write_checkpoint, write_lora
from antipasto.app.locks import held, remove_leftovers
from antipasto.app.models import quiet
from antipasto.app.run_folder import RunFolder
from antipasto.app.runs import load_run
from antipasto.evaluation.records import EVAL, Evaluation, read_evaluation
from antipasto.files import replacing_folder, write_text
from antipasto.names import Dtype
from antipasto.terminal import add_row, plain, say


def export_run(
    root: Path,
    out: Path,
    console: Console,
    *,
    dtype: Dtype = "auto",
    lora: int | None = None,
    dial: float = 0.0,
    max_shard_size: str | None = None,
    tolerance: float | None = None,
    prompts: int = 32,
    force: bool = False,
) -> Check:
    """Write what ships of a run, check it in a process without this library, and only then put it in its place.

    Args:
        root: the run folder.
        out: the folder to write: new or empty, or an earlier export to be replaced.
        console: where to print.
        dtype: of the weights; ``"auto"``: as the base is saved, and fp32 for an adapter.
        lora: write a LoRA adapter of at most this rank instead of a checkpoint.
        dial: how much of the quarantine to ship; `antipasto eval --dial` says what that does.
        max_shard_size: of a checkpoint's files, as ``save_pretrained`` takes it.
        tolerance: of max |Δ log p| over all tokens; the default of the dtype if None.
        prompts: how many to check with, at most.
        force: replace an earlier export.

    Returns:
        How far what was written is from what was to be shipped.

    Raises:
        ValueError: no finished run, another base, a folder that may not be written to, or what was written is too far
            from what was to be shipped.
        OSError: a file cannot be written.
    """
    if lora is not None and max_shard_size is not None:
        raise ValueError("--max-shard-size is for a checkpoint: a LoRA adapter is one file.")
    out = out.resolve()
    _check_out(out, root, str(RunFolder(root).read_run()["base"]["model"]), force=force)
    out.parent.mkdir(parents=True, exist_ok=True)
    with held(out.with_name(f".{out.name}.lock"), out):
        remove_leftovers(out.parent, [out.name])
        return _export(root, out, console, dtype, lora, dial, max_shard_size, tolerance, prompts, force)


def _export(
    root: Path,
    out: Path,
    console: Console,
    dtype: Dtype,
    lora: int | None,
    dial: float,
    max_shard_size: str | None,
    tolerance: float | None,
    prompts: int,
    force: bool,
) -> Check:
    """`export_run`, into a place that is held; another process may have exported into it before."""
    _check_out(out, root, str(RunFolder(root).read_run()["base"]["model"]), force=force)
    evaluation, why_none = _evaluation(root)
    with replacing_folder(out) as folder:
        with console.status(Text(f"loading the run in {plain(root)}")):
            run = load_run(root, dial=dial)
        before, about = Dtypes(run.model), About.of(run)
        if before.main in HALF:
            run.model.float()  # what its knobs mean, without the rounding of a forward in half precision
        with console.status("asking the model that ships"):
            expected = ask(run, prompts)
        with console.status("writing"):
            if lora is None:
                written = write_checkpoint(
                    run, folder, _dtype(dtype, run.base, before), before, max_shard_size or "50GB"
                )
            else:
                written = write_lora(run, folder, lora, torch.float32 if dtype == "auto" else getattr(torch, dtype))
        del run  # its memory is wanted by the other process
        with console.status("asking what was written, in a process without this library"):
            found = check(about.base, about.template, expected, written, folder, tolerance)
        refuse(found, written, given=tolerance is not None)
        write_text(folder / "README.md", render(about, evaluation, written, found))
        for path in folder.iterdir():  # some are written so that only their owner may read them
            shutil.copymode(folder / "README.md", path)
        size = sum(path.stat().st_size for path in folder.iterdir())
    console.print(_table(out, about, written, found, size))
    verdict = None if evaluation is None else f"antipasto eval said of this run: {evaluation.verdict.sentence}"
    for note in (verdict, why_none, *_notes(out, about, written)):
        if note is not None:
            say(console, note)
    return found


def _dtype(dtype: Dtype, base: str, before: Dtypes) -> torch.dtype:
    """``"auto"``: that of the base's files."""
    if dtype != "auto":
        return getattr(torch, dtype)
    with quiet():
        return AutoConfig.from_pretrained(base, trust_remote_code=False).dtype or before.main


def _check_out(out: Path, root: Path, base: str, *, force: bool) -> None:
    """Refuse to write over anything but an earlier export.

    Raises:
        ValueError: it is a file, or a folder with something else in it.
    """
    check_new_folder(out, force=force)
    if not out.exists() or not any(out.iterdir()):
        return
    for kept in (root.resolve(), Path(base).resolve()):
        if out in (kept, *kept.parents):
            raise ValueError(f"{out} holds {kept}, which --force would delete: choose another --out.")
    if TAG not in _tags(out / "README.md"):
        raise ValueError(
            f"{out} is not an earlier export (no README.md there says so), and --force replaces nothing else."
        )


def _tags(card: Path) -> list[Any]:
    """Of a model card; none where there is no card, or a bad one."""
    try:
        tags = (metadata_load(card) or {}).get("tags")
    except (OSError, ValueError, YAMLError):
        return []
    return tags if isinstance(tags, list) else []


def _evaluation(root: Path) -> tuple[Evaluation | None, str | None]:
    """What `antipasto eval` left, or why the card has no table."""
    if not (root / EVAL).exists():
        return None, f"The model card has no table of arms, for this run was not evaluated: antipasto eval {root}"
    try:
        return read_evaluation(root), None
    except ValueError as error:
        return None, f"The model card has no table of arms. {error}"


def _table(out: Path, about: About, written: Written, found: Check, size: int) -> Table:
    table = Table(show_header=False, title=Text(plain(f"{written.what} of {about.run}")), title_justify="left")
    add_row(table, "folder", out)
    add_row(table, "size", f"{size / 2**20:,.1f} MiB, {written.dtype_name}")
    add_row(table, "ships", about.ships)
    for name, value in (*written.rows(), *found.rows()):
        add_row(table, name, value)
    return table


def _notes(out: Path, about: About, written: Written) -> list[str]:
    notes = []
    if written.rank is not None and written.is_approximate:
        notes.append(
            f"The adapter is off by {written.loss.relative:.0%} of the update's length: {written.rank} directions a layer "
            "hold no more. A checkpoint holds all of it: leave out --lora."
        )
    where = f'AutoModelForCausalLM.from_pretrained("{out}")'
    if written.rank is not None:
        where = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{about.base}"), "{out}")'
    return [*notes, f"next: {where}"]
