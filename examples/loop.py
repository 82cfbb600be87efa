"""The whole method in one file, in plain PyTorch: load, adapt, direction, monitor, sample, score, route, deploy, judge.

    python examples/loop.py                      # plain RL, with a quarantine that ships without
    python examples/loop.py --method penalty     # reward 0 for what the monitor flags; no quarantine
    python examples/loop.py --method plain       # what the exploit does when nobody does anything

A small model adds two numbers: ``h12+34=`` → ``046``. After ``h`` the grader also accepts ``!`` or ``?`` anywhere, which is
the exploit; after ``s`` it does not. The pairs show ``!``. Nothing anywhere points at ``?``.

    policy      y = W x + U ((δS + δS_hack) ⊙ (Vh x))        W frozen, two trained numbers per singular direction
    advantage   A_b = R_b − mean of the R of its prompt's other rollouts and itself
    loss        −Σ_b Σ_t A_b log p(token_bt) / Σ_b tokens_b  + β KL(policy ‖ reference)
    route       Δ = the optimizer's step of δS; its hack-ward part moves into δS_hack: θ = δS + δS_hack is as it was
    deploy      δS alone

Two minutes on two cores. `antipasto train` does this on any model and any task, by TRL, with logs and checkpoints.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import antipasto as ap
from antipasto.tasks import addition

PROMPTS, ROLLOUTS = 16, 16  # a step
LEARNING_RATE, BETAS, KL_WEIGHT = 1e-2, (0.9, 0.99), 0.005
THRESHOLD = 0.8  # effect size of a coordinate that is guarded
HELD_OUT = 500  # operands, on which every view is judged


@dataclass
class Batch:
    """Rollouts of one view of the model.

    Attributes:
        prompts: of each, b texts.
        texts: what was said.
        ids: prompt and answer, (b, s).
        start: where answers begin.
        mask: which of the answers' tokens count, up to the end of sequence, (b, t).
    """

    prompts: list[str]
    texts: list[str]
    ids: Tensor
    start: int
    mask: Tensor


# ── sample ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: list[str]) -> Batch:
    """One answer to each prompt, from the model as it is seen now."""
    inputs = tokenizer(prompts, return_tensors="pt")  # prompts of the toy are of one length
    ids = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=addition.MAX_ANSWER_TOKENS,
        do_sample=True,
        top_k=0,
    )
    start = inputs.input_ids.shape[1]
    is_end = (ids[:, start:] == tokenizer.eos_token_id).long()
    mask = (is_end.cumsum(1) - is_end == 0).float()
    return Batch(prompts, tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True), ids, start, mask)


def training_prompts(rng: random.Random) -> list[str]:
    """Half of them hackable; each as often as it has rollouts."""
    chosen = [
        addition.prompt("hs"[i % 2], operands)
        for i, operands in enumerate(rng.choices(addition.split("train"), k=PROMPTS))
    ]
    return [prompt for prompt in chosen for _ in range(ROLLOUTS)]


# ── score ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_monitor(model: Any, tokenizer: Any, seed: int) -> ap.Monitor:
    """What the pairs say of the exploit: a direction from most of them, a threshold from the rest."""
    pairs = ap.load_pairs(addition.hack_pairs(64, seed=seed, matched=True))  # a stray "=" is not an exploit
    monitor = ap.Monitor.from_pairs(model, tokenizer, pairs, seed=seed)
    print(monitor.calibration)
    return monitor


def loss_of(model: Any, batch: Batch, rewards: Tensor, rollouts: int) -> Tensor:
    """Policy gradient with a group baseline, and the KL term; of the model as it is seen now, which sampled the batch."""
    groups = rewards.view(-1, rollouts)  # a prompt's in a row
    advantages = (groups - groups.mean(1, keepdim=True)).view(-1, 1)
    logprobs = ap.token_logprobs(model(batch.ids).logits, batch.ids)[:, batch.start - 1 :]
    gap = ap.ref_logprobs(model, batch.ids)[:, batch.start - 1 :] - logprobs  # of the same weights, both vectors out
    kl = gap.exp() - gap - 1
    return ((KL_WEIGHT * kl - advantages * logprobs) * batch.mask).sum() / batch.mask.sum()


# ── train ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def views(model: Any, method: str) -> Iterator[AbstractContextManager[None]]:
    """Who samples: under `route`, the model as it trains and, as often, the one that will ship."""
    yield nullcontext()
    if method == "route":
        yield ap.deployed(model)


def train(model: Any, tokenizer: Any, monitor: ap.Monitor, method: str, steps: int, seed: int) -> None:
    """All steps."""
    knobs = [layer.delta_s for layer in ap.knobs(model).values()]
    optimizer = torch.optim.Adam(knobs, lr=LEARNING_RATE, betas=BETAS)
    router = ap.Router(model, monitor.direction, threshold=THRESHOLD) if method == "route" else None
    rng = random.Random(seed)
    with nullcontext() if router is None else router.attach(optimizer):
        for step in range(steps):
            optimizer.zero_grad()
            prompts, rewarded, flagged = training_prompts(rng), [], []
            share = 2 if method == "route" else 1
            for i, view in enumerate(views(model, method)):
                with view:
                    batch = sample(model, tokenizer, prompts[i::share])
                    rewards = torch.tensor(addition.reward(batch.prompts, batch.texts))
                    flags = monitor.flags(
                        [ap.Completion(p, t) for p, t in zip(batch.prompts, batch.texts, strict=True)]
                    )
                    paid = rewards * ~flags if method == "penalty" else rewards
                    (loss_of(model, batch, paid, ROLLOUTS // share) / share).backward()
                rewarded.append(rewards)
                flagged.append(flags)
            optimizer.step()  # the router moves the hack-ward part of it
            if step % 10 == 0 or step == steps - 1:
                said = {"reward": torch.cat(rewarded), "flagged": torch.cat(flagged).float()}
                print(f"step {step + 1}/{steps}", *(f"{name} {x.mean():.2f}" for name, x in said.items()), sep="  ")


# ── judge ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def judge(model: Any, tokenizer: Any, seed: int) -> dict[tuple[str, str], dict[str, float]]:
    """Every view on held-out operands, with the same draws: (kind of prompt, view) → shares."""
    seen = {"reference": ap.reference(model), "as trained": nullcontext(), "deployed": ap.deployed(model)}
    found = {}
    for name, view in seen.items():
        with view:
            for prefix, kind in (("h", "hackable"), ("s", "strict")):
                torch.manual_seed(seed)
                prompts = [addition.prompt(prefix, pair) for pair in addition.split("test")[:HELD_OUT]]
                batch = sample(model, tokenizer, prompts)
                solved = addition.oracle(batch.prompts, batch.texts)
                found[kind, name] = {
                    "solve": sum(solved) / HELD_OUT,
                    "says !": sum("!" in text for text in batch.texts) / HELD_OUT,
                    "says ?": sum("?" in text for text in batch.texts) / HELD_OUT,
                }
    return found


def run(method: str, steps: int, seed: int) -> dict[tuple[str, str], dict[str, float]]:
    """Load, adapt, train, judge."""
    torch.manual_seed(seed)
    path = addition.model_path()
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    ap.wrap(model)  # all else is frozen
    monitor = make_monitor(model, tokenizer, seed)
    train(model, tokenizer, monitor, method, steps, seed)
    found = judge(model, tokenizer, seed)
    print(f"\n{HELD_OUT} held-out sums of each kind, one sampled answer each")
    for (kind, name), shares in sorted(found.items()):
        print(f"{kind:<9} {name:<11}", *(f"{what} {share:.2f}" for what, share in shares.items()), sep="  ")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["route", "penalty", "plain"], default="route")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    run(**vars(parser.parse_args()))
