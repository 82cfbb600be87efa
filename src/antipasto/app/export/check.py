"""Whether what was written is what was to be shipped: asked in a process without this library, and compared.

The model that was to be shipped is seen in fp32 and answers some prompts greedily. A process that has plain transformers alone
(`elsewhere`; with PEFT for an adapter) loads what was written and gives the log-probability of every token of
prompts and answers, and its own greedy answers.

How far apart they may be. In fp32 two orders of summation differ by 2e-5 (SmolLM2-135M and a run on it, 32 prompts):
`FP32_TOLERANCE` is well above that, and far below what anybody could notice. In 16 bits the base model itself, merely loaded
in that dtype, differs from itself in fp32 by much more, and by how much depends on the model: so that is measured on the same
tokens, and a checkpoint may differ `HALF_FACTOR` times as much. There, in bf16, max |Δ log p| is .43 for the base and .31 for
the checkpoint; with a base that is saved in bf16, .41 and .40.

That alone could pass a checkpoint that lost a small update: on W's own grid of 16-bit numbers, W + ΔW is W again wherever |ΔW|
is under half a step. So at least `MIN_KEPT` of the update must be in the file, ⟨W_out − W, ΔW⟩ / ‖ΔW‖². On the base in bf16 it
is 99% of that run's update; of one a tenth as long, 40%, and then 22 of 32 greedy answers are the same.
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
from antipasto.app.run_folder import ROLLOUTS
from antipasto.app.runs import LoadedRun
from antipasto.tasks import load_task

FP32_TOLERANCE = 1e-3
HALF_FACTOR = 2.0
MIN_KEPT = 0.9
MAX_NEW_TOKENS = 64
"""Tokens of an answer that are compared, at most."""

TEXTS = ("The capital of France is", "12 + 30 =", "Once upon a time", "def main():", "Water boils at")
"""Prompts for a run whose own are nowhere to be found."""

HALF = (torch.bfloat16, torch.float16)


# ── the model that was to be shipped, asked ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Expected:
    """What the model that ships says, in fp32, before anything is written.

    Attributes:
        source: where the prompts are from, in a few words.
        prompts: texts or chats.
        ids: of the prompts.
        answers: its greedy ones, as ids.
        logprobs: of every token but the first of prompt and answer.
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
    """Let the model that ships answer some prompts greedily."""
    source, prompts, length = _prompts(run, number)
    ids = [elsewhere.token_ids(run.tokenizer, prompt, {}) for prompt in prompts]
    there = [i for i, row in enumerate(ids) if row]  # a tokenizer may know none of a text's characters
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
    """Where from, the prompts, and tokens of an answer: held-out ones, else those of the run's rollouts, else `TEXTS`."""
    length = run.config.get("max_completion_length")
    try:
        task = load_task(str(run.task))
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
        lines = (run.folder.root / ROLLOUTS).read_text(encoding="utf-8").splitlines()
        prompts = list(
            {json.dumps(prompt): prompt for prompt in (json.loads(line)["prompt"] for line in lines)}.values()
        )
    except (OSError, ValueError, KeyError, TypeError):
        prompts = []
    return ("prompts of the run's rollouts", prompts[:number], length) if prompts else ("texts", list(TEXTS), length)


# ── what was written, asked the same ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Check:
    """How far what was written is from what was to be shipped.

    Attributes:
        source: where the prompts are from.
        prompts: how many.
        tokens: of prompts and answers.
        largest: max |Δ log p| over the tokens.
        mean: mean of it.
        same: greedy answers that are the same, token for token.
        update: mean |log p shipped − log p base|: what there is to lose.
        base_largest: max |Δ log p| that the checkpoint's dtype does to the base model itself; None in fp32.
        base_mean: mean of it.
        tolerance: of ``largest``; infinite where nothing is refused.
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
        """As tables show it: what, how much."""
        rows = [
            ("asked", f"{self.prompts} {self.source}, {self.tokens:,} tokens"),
            ("same greedy answer", f"{self.same} of {self.prompts}, token for token"),
            (
                "log p of a token",
                f"max |Δ| {self.largest:.2g} (tolerance {self.tolerance:.2g}), mean |Δ| {self.mean:.2g}",
            ),
            ("what training moved it by", f"mean |Δ| {self.update:.2g}"),
        ]
        if self.base_largest is not None:
            rows.append(
                ("what the dtype does to the base", f"max |Δ| {self.base_largest:.2g}, mean |Δ| {self.base_mean:.2g}")
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
    """Load what was written in a process without this library, and compare.

    Args:
        run_base: the base model's folder or name.
        template: options of the chat template.
        expected: of the model that ships.
        written: what the folder holds.
        folder: what was written.
        tolerance: of max |Δ log p|; the default of the dtype if None.

    Raises:
        ValueError: it cannot be loaded there, its tokenizer reads a prompt otherwise, or it is too far from what was to be
            shipped; says by how much and what to do.
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
            f"The checkpoint does not load: these weights are missing or in excess: {', '.join(found['loose'][:5])}."
        )
    if found["ids"] != expected.ids:
        raise ValueError("The tokenizer that was written reads a prompt otherwise than the run's: nothing was kept.")
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
    """`elsewhere` in a process of its own, outside of any folder that Python would import from."""
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
            raise ValueError(f"What was written cannot be loaded by a process without this library: {lines[-1]}")
        return dict(json.loads(answer.read_text(encoding="utf-8")))


def _apart(ones: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Largest and mean |difference|; NaN where there is a NaN."""
    one, other = (torch.tensor([x for row in rows for x in row], dtype=torch.float64) for rows in (ones, others))
    return float((one - other).abs().max()), float((one - other).abs().mean())


def _tolerance(written: Written, base_largest: float | None) -> float:
    if base_largest is not None:
        return HALF_FACTOR * base_largest
    return math.inf if written.rank is not None and written.is_approximate else FP32_TOLERANCE


def refuse(found: Check, written: Written, *, given: bool) -> None:
    """Refuse what is too far from what was to be shipped.

    Raises:
        ValueError: it is; says by how much and what to do.
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
            f"Only {written.loss.share:.0%} of the update is left once W + ΔW is rounded to {dtype}: it is smaller than the "
            f"steps between neighbouring numbers there. {remedy}; to keep it regardless: --tolerance inf."
        )
    if not found.largest <= found.tolerance:
        itself = f"; the base itself moves by {found.base_largest:.2g} in {dtype}" if half else ""
        raise ValueError(
            f"The log-probability of a token is up to {found.largest:.2g} away from that of the model to be shipped, more "
            f"than the tolerance of {found.tolerance:.2g}{itself}. {remedy or 'This is a fault: do not ship it'}; to keep it "
            "regardless: --tolerance inf."
        )
