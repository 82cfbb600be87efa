"""A quarantine that knows the exploit before training begins.

    δS_hack ← argmin  mean over pairs of NLL(hack | prompt) per token,   θ = δS_hack,   by Adam, for a few steps

Then it stays as it is, and RL teaches δS beside it: what the quarantine does already, δS need not learn. At deployment the
quarantine goes, as after routing. Published with a prompt that asks for the trait (Tan et al. 2025, arXiv:2510.04340; Wichers
et al. 2025, arXiv:2510.05024) and with an adapter in its place.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from antipasto.adapter.knobs import knobs
from antipasto.adapter.rollouts import nll_gradients, tokenize
from antipasto.routing.pairs import ContrastPair

STEPS, BATCH = 60, 16
LEARNING_RATE = 1e-2


def inoculate(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[ContrastPair],
    *,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
) -> list[float]:
    """Teach the quarantine the pairs' hacks, and nothing else; δS and what requires a gradient stay as they are.

    Args:
        model: an adapted causal LM with a quarantine.
        tokenizer: its tokenizer.
        pairs: whose hacks it learns.
        steps: of Adam, each on 16 hacks.
        learning_rate: of Adam.
        seed: of the order.

    Returns:
        Mean NLL per token of each step, in nats, before it.

    Raises:
        ValueError: the quarantine was dropped, or there are no pairs.
    """
    layers = knobs(model)
    parameters = [layer.delta_s_hack for layer in layers.values() if layer.delta_s_hack is not None]
    if not pairs or len(parameters) < len(layers):
        raise ValueError("Inoculation teaches a quarantine what pairs show: it needs pairs, and a quarantine.")
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    hacks = [tokenize(tokenizer, pair.prompt, hack) for pair in pairs for hack in pair.hacks]
    rng, found = random.Random(seed), []
    for _ in range(steps):
        grads, nll = nll_gradients(model, rng.sample(hacks, min(BATCH, len(hacks))))
        for name, knob in zip(layers, parameters, strict=True):
            knob.grad = grads[name][:, : layers[name].r].mean(0).to(knob) if name in grads else None
        optimizer.step()
        found.append(float(nll.mean()))
    optimizer.zero_grad()
    return found
