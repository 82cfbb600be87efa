"""Check an export: compare the written files with the model that should ship, in a process without this library.

The model that should ship answers some prompts greedily, in fp32. A process with plain transformers (`elsewhere`; with PEFT
for an adapter) loads the written files. It computes the log-probability of every token of prompts and answers, and its own
greedy answers.

Tolerance in fp32: two orders of summation differ by 2e-5 (SmolLM2-135M and a run on it, 32 prompts). `FP32_TOLERANCE` is well
above that and too small to notice.

Tolerance in 16 bits: the base model loaded in that dtype already differs from itself in fp32, by an amount that depends on the
model. It is measured on the same tokens, and a checkpoint may differ by `HALF_FACTOR` times as much. For the run above in
bf16, max |Δ log p| is .43 for the base and .31 for the checkpoint; with a base that is saved in bf16, .41 and .40.

That alone could pass a checkpoint that lost a small update: in 16 bits, W + ΔW rounds to W wherever |ΔW| is under half a
rounding step. So at least `MIN_KEPT` of the update must be in the file, ⟨W_out − W, ΔW⟩ / ‖ΔW‖². For the run above, with a
bf16 base, it is 99%. For an update a tenth as long it is 40%, and 22 of 32 greedy answers are the same.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from antipasto.adapter.knobs import reference
from antipasto.app.export import elsewhere
from antipasto.app.export.weights import Written
from antipasto.app.models import quiet
from antipasto.app.runs import LoadedRun
from antipasto.reading import read_rows

FP32_TOLERANCE = 1e-3
HALF_FACTOR = 2.0
MIN_KEPT = 0.9
MAX_NEW_TOKENS = 64
"""Maximum tokens of an answer to compare."""

TEXTS = ("The capital of France is", "12 + 30 =", "Once upon a time", "def main():", "Water boils at")
"""Prompts for a run whose own prompts are not available."""

HALF = (torch.bfloat16, torch.float16)


# ── the model that should ship ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Expected:
    """Outputs of the model that should ship, in fp32.

    Attributes:
        source: where the prompts are from, in a few words.
        prompts: texts or chats.
        ids: of the prompts.
        answers: greedy answers, as ids.
        logprobs: of every token of prompt and answer except the first.
        base_logprobs: of the same tokens, by the base model.
        pad: the padding token's id.
        max_new_tokens: of an answer.
    """

    source: str
    prompts: list[Any]
    ids: list[list[int]]
    answers: list[list[int]]
    logprobs: list[list[float]]
    base_logprobs: list[list[float]]
    pad: int
    max_new_tokens: int

    @property
    def sequences(self) -> list[list[int]]:
        """Prompts with their answers."""
        return [prompt + answer for prompt, answer in zip(self.ids, self.answers, strict=True)]


def ask(run: LoadedRun, number: int) -> Expected:
    """Compute the outputs of the model that should ship."""
    source, prompts, length = _prompts(run, number)
    ids = [elsewhere.token_ids(run.tokenizer, prompt, {}) for prompt in prompts]
    there = [i for i, row in enumerate(ids) if row]  # a text of unknown characters may have no tokens
    prompts, ids = [prompts[i] for i in there], [ids[i] for i in there]
    pad = run.tokenizer.pad_token_id or 0
    with quiet():
        with run.shipped():
            answers = elsewhere.greedy(run.model, ids, pad, length)
            sequences = [prompt + answer for prompt, answer in zip(ids, answers, strict=True)]
            logprobs = elsewhere.token_logprobs(run.model, sequences)
        with reference(run.model):
            base_logprobs = elsewhere.token_logprobs(run.model, sequences)
    return Expected(source, prompts, ids, answers, logprobs, base_logprobs, pad, length)


def _prompts(run: LoadedRun, number: int) -> tuple[str, list[Any], int]:
    """Source, prompts and answer length. Prompts are held-out ones, else those of the run's rollouts, else `TEXTS`."""
    length = run.config.get("max_completion_length")
    try:
        task = run.load_task()
        rows, source = (task.test, "held-out") if task.test is not None else (task.train, "training")
        prompts = [row["prompt"] for row in list(rows)[:number]]
        return (
            f"{source} prompts of task {task.name}",
            prompts,
            min(length or task.max_completion_length or MAX_NEW_TOKENS, MAX_NEW_TOKENS),
        )
    except (ValueError, ImportError):
        pass  # the task's file is elsewhere: any prompts will do
    length = min(length or MAX_NEW_TOKENS, MAX_NEW_TOKENS)
    try:
        asked = [row["prompt"] for _, row in read_rows(run.folder.rollouts, [])]
    except (OSError, ValueError, KeyError):
        asked = []
    prompts = list({json.dumps(prompt): prompt for prompt in asked}.values())
    return ("prompts of the run's rollouts", prompts[:number], length) if prompts else ("texts", list(TEXTS), length)


# ── the written files ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Check:
    """Difference between the written files and the model that should ship.

    Attributes:
        source: where the prompts are from.
        prompts: number of prompts.
        tokens: number of tokens of prompts and answers.
        largest: max |Δ log p| over the tokens.
        mean: mean |Δ log p|.
        same: number of greedy answers that are equal, token by token.
        update: mean |log p shipped − log p base|, the effect of training.
        base_largest: max |Δ log p| of the base model due to the checkpoint's dtype; None in fp32.
        base_mean: mean of the same.
        tolerance: of ``largest``; infinite if nothing is refused.
    """

    source: str
    prompts: int
    tokens: int
    largest: float
    mean: float
    same: int
    update: float
    base_largest: float | None
    base_mean: float | None
    tolerance: float

    def rows(self) -> list[tuple[str, str]]:
        """Rows of a table: name and value."""
        rows = [
            ("asked", f"{self.prompts} {self.source}, {self.tokens:,} tokens"),
            ("same greedy answer", f"{self.same} of {self.prompts}, token by token"),
            (
                "log p of a token",
                f"max |Δ| {self.largest:.2g} (tolerance {self.tolerance:.2g}), mean |Δ| {self.mean:.2g}",
            ),
            ("its change by training", f"mean |Δ| {self.update:.2g}"),
        ]
        if self.base_largest is not None:
            rows.append(
                ("effect of the dtype on the base", f"max |Δ| {self.base_largest:.2g}, mean |Δ| {self.base_mean:.2g}")
            )
        return rows


def check(
    run_base: str,
    template: Mapping[str, Any],
    expected: Expected,
    written: Written,
    folder: Path,
    tolerance: float | None,
) -> Check:
    """Load the written files in a process without this library, and compare.

    Args:
        run_base: the base model's folder or hub name.
        template: options of the chat template.
        expected: outputs of the model that should ship.
        written: description of the files.
        folder: the files' folder.
        tolerance: of max |Δ log p|; None: the default of the dtype.

    Raises:
        ValueError: the files cannot be loaded, or their tokenizer encodes a prompt differently.
    """
    request = {
        "model": str(folder.resolve()) if written.rank is None else run_base,
        "adapter": None if written.rank is None else str(folder.resolve()),
        "tokenizer": str(folder.resolve()) if written.rank is None else run_base,
        "dtype": "auto" if written.rank is None else "float32",
        "prompts": expected.prompts,
        "ids": expected.ids,
        "sequences": expected.sequences,
        "template": dict(template),
        "pad": expected.pad,
        "max_new_tokens": expected.max_new_tokens,
        "blocked": ["antipasto", "peft"] if written.rank is None else ["antipasto"],
    }
    found = _elsewhere(request)
    if found["loose"]:
        raise ValueError(
            f"The checkpoint does not load: weights are missing or unexpected, first {', '.join(found['loose'][:5])}."
        )
    if found["ids"] != expected.ids:
        raise ValueError(
            "The written tokenizer encodes a prompt differently from the run's tokenizer, so nothing was exported."
        )
    largest, mean = _apart(found["logprobs"], expected.logprobs)
    base_largest = base_mean = None
    if written.rank is None and written.dtype in HALF:
        base = {"model": run_base, "dtype": written.dtype_name, "prompts": None}
        base_largest, base_mean = _apart(_elsewhere({**request, **base})["logprobs"], expected.base_logprobs)
    same = sum(a == b for a, b in zip(found["answers"], expected.answers, strict=True))
    return Check(
        source=expected.source,
        prompts=len(expected.ids),
        tokens=sum(map(len, expected.logprobs)),
        largest=largest,
        mean=mean,
        same=same,
        update=_apart(expected.base_logprobs, expected.logprobs)[1],
        base_largest=base_largest,
        base_mean=base_mean,
        tolerance=_tolerance(written, base_largest) if tolerance is None else tolerance,
    )


def _elsewhere(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run `elsewhere` in its own process, in an empty folder so that Python imports nothing from there."""
    program = Path(elsewhere.__file__).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch, "request.json"), Path(scratch, "answer.json")
        question.write_text(json.dumps(request), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", program, str(question), str(answer)],
            cwd=scratch,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise ValueError(f"The written files cannot be loaded by a process without this library: {lines[-1]}")
        return dict(json.loads(answer.read_text(encoding="utf-8")))


def _apart(ones: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Largest and mean absolute difference; NaN if there is a NaN."""
    one, other = (torch.tensor([x for row in rows for x in row], dtype=torch.float64) for rows in (ones, others))
    return float((one - other).abs().max()), float((one - other).abs().mean())


def _tolerance(written: Written, base_largest: float | None) -> float:
    if base_largest is not None:
        return HALF_FACTOR * base_largest
    return math.inf if written.rank is not None and written.is_approximate else FP32_TOLERANCE


def refuse(found: Check, written: Written, *, given: bool) -> None:
    """Check that the written files are close enough to the model that should ship.

    Raises:
        ValueError: they are not; says by how much and what to do.
    """
    dtype = written.dtype_name
    half = written.dtype in HALF and written.rank is None
    remedy = (
        "Export with --dtype float32, or as an adapter with --lora RANK"
        if half
        else "Raise --lora"
        if written.rank
        else ""
    )
    if half and not given and written.loss.share < MIN_KEPT:
        raise ValueError(
            f"Only {written.loss.share:.0%} of the update is left after rounding W + ΔW to {dtype}: it is smaller than the "
            f"rounding steps of that dtype. {remedy}; to export anyway: --tolerance inf."
        )
    if not found.largest <= found.tolerance:
        itself = f"; the base itself moves by {found.base_largest:.2g} in {dtype}" if half else ""
        raise ValueError(
            f"The log-probability of a token differs by up to {found.largest:.2g} from that of the model that should ship, "
            f"more than the tolerance of {found.tolerance:.2g}{itself}. {remedy or 'This is a bug: do not ship it'}; to "
            "export anyway: --tolerance inf."
        )
