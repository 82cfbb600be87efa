"""Sample a model's answers and count them, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import binomtest
from torch import nn


@dataclass(frozen=True)
class Rate:
    """A share of independent yes-or-no outcomes, with its 95% Wilson score interval (Wilson 1927).

    Attributes:
        hits: how many were yes.
        total: of how many.

    Example:
        >>> print(Rate(50, 100))
        .50 [.40,.60]
    """

    hits: int
    total: int

    @property
    def value(self) -> float:
        """The share, hits / total."""
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95% interval."""
        ci = binomtest(self.hits, self.total).proportion_ci(confidence_level=0.95, method="wilson")
        return float(ci.low), float(ci.high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{_share(self.value)} [{_share(low)},{_share(high)}]"

    def to_json(self) -> dict[str, float]:
        """The rate as a flat record."""
        low, high = self.interval
        return {"hits": self.hits, "total": self.total, "rate": self.value, "low": low, "high": high}


def _share(value: float) -> str:
    text = f"{value:.2f}"
    return text[1:] if text.startswith("0.") else text


@torch.no_grad()
def sample_completions(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, seed: int, batch_size: int = 500
) -> list[str]:
    """One completion of each prompt, sampled at temperature 1 from the model as it is seen now.

    The caller's random state is left alone; the same seed gives the same draws, whatever ran before.

    Args:
        model: a causal LM with ``generate``.
        tokenizer: its tokenizer, padding on the left.
        prompts: plain texts.
        max_new_tokens: at most this many tokens each.
        seed: of the draws.
        batch_size: prompts at once.

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
                batch = tokenizer(
                    list(prompts[start : start + batch_size]),
                    return_tensors="pt",
                    padding=True,
                    return_token_type_ids=False,
                ).to(device)
                # top_k and top_p spelled out: generate's own default is top_k=50
                output = model.generate(  # type: ignore[operator]
                    **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens
                )
                new_tokens = output[:, batch["input_ids"].shape[1] :]
                completions += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    finally:
        model.train(training)
    return completions
