"""Sample a model's answers and count them, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from antipasto.records import Rate
from antipasto.tasks import REWARDED, SOLVED, Task


@torch.no_grad()
def sample_completions(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 500,
    temperature: float = 1.0,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """One completion of each prompt, sampled from the model as it is seen now.

    The caller's random state is left alone; the same seed gives the same draws, whatever ran before.

    Args:
        model: a causal LM with ``generate``.
        tokenizer: its tokenizer, padding on the left.
        prompts: plain texts, or chats.
        max_new_tokens: at most this many tokens each.
        seed: of the draws.
        batch_size: prompts at once.
        temperature: of the sampling; 0 takes the likeliest token every time.
        on_batch: called after each batch with the number of its prompts.

    Returns:
        The completions' texts, without special tokens, in the order of the prompts.
    """
    training = model.training
    completions: list[str] = []
    device = next(model.parameters()).device
    try:
        model.eval()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                batch = _tokenize(tokenizer, list(prompts[start : start + batch_size])).to(device)
                # top_k and top_p spelled out: generate's own default is top_k=50
                how: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
                if temperature == 0:
                    how = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
                output = model.generate(**batch, **how, max_new_tokens=max_new_tokens)  # type: ignore[operator]
                new_tokens = output[:, batch["input_ids"].shape[1] :]
                completions += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
                if on_batch is not None:
                    on_batch(len(new_tokens))
    finally:
        model.train(training)
    return completions


def _tokenize(tokenizer: Any, prompts: list[Any]) -> Any:
    """Ids and mask of a batch of prompts, padded as the tokenizer pads."""
    if isinstance(prompts[0], str):
        return tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    return tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )


# ── arms ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ArmRecord:
    """How one arm answers a task's prompts.

    Attributes:
        name: the arm's.
        reward: mean of what training sees.
        solve: share that the oracle calls solved; None without an oracle.
        exploit: share that is rewarded and not solved; None without an oracle.
        flagged: share that the detector flags; None without a detector.
        completions: the answers, in the order of the prompts.
    """

    name: str
    reward: float
    solve: Rate | None
    exploit: Rate | None
    flagged: Rate | None
    completions: list[str]

    def to_json(self) -> dict[str, Any]:
        """The record without its completions."""
        rates = {name: getattr(self, name) for name in ("solve", "exploit", "flagged")}
        return {
            "arm": self.name,
            "reward": self.reward,
            **{name: None if rate is None else rate.to_json() for name, rate in rates.items()},
        }


def judge_arm(name: str, task: Task, rows: Sequence[Mapping[str, Any]], completions: list[str]) -> ArmRecord:
    """Count an arm's answers to rows of a task.

    Raises:
        TaskError: one of the task's functions fails.
    """
    columns = {column: [row[column] for row in rows] for column in rows[0] if column != "prompt"}
    judged = task.judge([row["prompt"] for row in rows], completions, columns)
    n = len(rows)
    solve = exploit = None
    if judged.oracle is not None:
        solve = Rate(sum(truth >= SOLVED for truth in judged.oracle), n)
        fooled = [r >= REWARDED and truth < SOLVED for r, truth in zip(judged.reward, judged.oracle, strict=True)]
        exploit = Rate(sum(fooled), n)
    flagged = None if judged.flagged is None else Rate(sum(judged.flagged), n)
    return ArmRecord(name, sum(judged.reward) / n, solve, exploit, flagged, completions)
