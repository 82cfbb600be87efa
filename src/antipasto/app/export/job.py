"""The job behind `antipasto export`: write what ships to a temporary folder, check it, and move it to its place."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig

from antipasto.app.checks import check_new_folder
from antipasto.app.export.card import TAG, About, card_metadata, render
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
    """Write what ships, check it in a process without this library, and only then put it in its place.

    Args:
        out: the folder to write: new or empty, or an earlier export to replace.
        dtype: of the weights; ``"auto"``: as the base is saved, fp32 for an adapter.
        lora: write a LoRA adapter of at most this rank instead of a checkpoint.
        dial: share of the quarantine to ship; see `antipasto eval --dial` for its effect.
        max_shard_size: of a checkpoint's files, as ``save_pretrained`` takes it.
        tolerance: of max |Δ log p| over all tokens; None: the default of the dtype.
        prompts: maximum number of prompts to check with.
        force: replace an earlier export.

    Returns:
        The result of the check.

    Raises:
        ValueError: the run is not finished, its base model has changed, the folder may not be written to, or the check failed.
        OSError: a file cannot be written.
    """
    if lora is not None and max_shard_size is not None:
        raise ValueError("--max-shard-size is for a checkpoint: a LoRA adapter is one file.")
    out = out.resolve()
    base = str(RunFolder(root).read_run()["base"]["model"])
    _check_out(out, root, base, force=force)
    out.parent.mkdir(parents=True, exist_ok=True)
    with held(out.with_name(f".{out.name}.lock"), out):
        remove_leftovers(out.parent, [out.name])
        _check_out(out, root, base, force=force)  # again: another process may have exported into it
        evaluation, why_none = _evaluation(root)
        with replacing_folder(out) as folder:
            with console.status(Text(f"loading the run in {plain(root)}")):
                run = load_run(root, dial=dial)
            before, about = Dtypes(run.model), About.of(run)
            if before.main in HALF:
                run.model.float()  # without the rounding errors of a forward in half precision
            with console.status("computing the outputs of the model that should ship"):
                expected = ask(run, prompts)
            with console.status("writing"):
                if lora is None:
                    to = _dtype(dtype, run.base, before)
                    written = write_checkpoint(run, folder, to, before, max_shard_size or "50GB")
                else:
                    written = write_lora(run, folder, lora, torch.float32 if dtype == "auto" else getattr(torch, dtype))
            del run  # frees memory for the other process
            with console.status("checking the written files in a process without this library"):
                found = check(about.base, about.template, expected, written, folder, tolerance)
            refuse(found, written, given=tolerance is not None)
            write_text(folder / "README.md", render(about, evaluation, written, found))
            for path in folder.iterdir():  # some files are created with read permission for their owner only
                shutil.copymode(folder / "README.md", path)
            size = sum(path.stat().st_size for path in folder.iterdir())
        console.print(_table(out, about, written, found, size))
        verdict = None if evaluation is None else f"antipasto eval said of this run: {evaluation.verdict.sentence}"
        for note in (verdict, why_none, *_notes(out, about, written)):
            if note is not None:
                say(console, note)
        return found


def _dtype(dtype: Dtype, base: str, before: Dtypes) -> torch.dtype:
    """Resolve ``"auto"`` to the dtype of the base's files."""
    if dtype != "auto":
        return getattr(torch, dtype)
    with quiet():
        return AutoConfig.from_pretrained(base, trust_remote_code=False).dtype or before.main


def _check_out(out: Path, root: Path, base: str, *, force: bool) -> None:
    """Check that the folder is new, empty, or an earlier export to replace.

    Raises:
        ValueError: it is something else, or contains the run or its base model.
    """
    check_new_folder(out, force=force)
    if not out.exists() or not any(out.iterdir()):
        return
    for kept in (root.resolve(), Path(base).resolve()):
        if out in (kept, *kept.parents):
            raise ValueError(f"{out} contains {kept}, which --force would delete: choose another --out.")
    tags = card_metadata(out / "README.md").get("tags")
    if not isinstance(tags, list) or TAG not in tags:
        raise ValueError(
            f"{out} is not an earlier export (its README.md does not say so), and --force replaces nothing else: choose "
            "another --out."
        )


def _evaluation(root: Path) -> tuple[Evaluation | None, str | None]:
    """The run's evaluation, or a sentence on why the card has none."""
    if not (root / EVAL).exists():
        return (
            None,
            f"The model card has no table of results, because this run was not evaluated: antipasto eval {root}",
        )
    try:
        return read_evaluation(root), None
    except ValueError as error:
        return None, f"The model card has no table of results. {error}"


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
            f"The adapter misses {written.loss.relative:.0%} of the update (by norm), because its rank is {written.rank}. A "
            "checkpoint has all of it: leave out --lora."
        )
    where = f'AutoModelForCausalLM.from_pretrained("{out}")'
    if written.rank is not None:
        where = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{about.base}"), "{out}")'
    return [*notes, f"next: {where}"]
