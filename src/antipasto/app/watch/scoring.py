"""Scores of a rollout at the reference, all from one forward and one backward.

    score      cos(n, t)          n = ∇θ NLL / tokens at θ = 0, t the pairs' effect sizes        (`antipasto.routing.monitor`)
    permuted   cos(n, t')         t' the same effect sizes on shuffled coordinates
    random     cos(n, t'')        t'' random effect sizes of the same spread
    nll        NLL / tokens       −log p of the reference
    tokens     length
    probe      h · w              h (R,): Vh x of all adapted layers, mean over the completion's tokens,
                                  w (R,): mean of h over the pairs' hacks minus that over their clean texts

The probe is what one would use without gradients. Vh is linear, so it is applied once, to the mean of x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from antipasto.adapter.rollouts import TokenIds
from antipasto.adapter.views import adapted_layers
from antipasto.routing.directions import cosine
from antipasto.routing.monitor import Completion, Monitor
from antipasto.routing.pairs import ContrastPair

SCORES = ("score", "nll", "tokens", "probe", "permuted", "random")
_CHANCE_SEED = 0


class Activations:
    """Collects h of the sequences of one forward, (b, R): Vh x of every adapted layer, mean over the completion's tokens.

    Experts in one parameter, which see only some of the tokens each, are left out.
    """

    def __init__(self) -> None:
        self.mask = torch.empty(0)  # (b, s), of the completions' tokens
        self.parts: dict[str, Tensor] = {}

    def expect(self, sequences: Sequence[TokenIds]) -> None:
        """Announce the sequences of the next forward, which `nll_gradients` pads on the right."""
        self.parts.clear()
        self.mask = torch.zeros(len(sequences), max(one.length for one in sequences))
        for row, one in enumerate(sequences):
            self.mask[row, len(one.prompt) : one.length] = torch.tensor(one.own) / sum(one.own)

    @property
    def vectors(self) -> Tensor:
        """The collected h, (b, R), in fp32 on the CPU."""
        return torch.cat([self.parts[name] for name in sorted(self.parts)], 1)

    def on_layer(self, name: str, layer: Any, x: Tensor) -> None:
        x = x.detach().float().reshape(*self.mask.shape, -1)
        mean = torch.einsum("bs,bsi->bi", self.mask.to(x.device), x)
        self.parts[name] = (mean @ layer.basis.Vh.float().T.to(x.device)).cpu()


@contextmanager
def activations(model: nn.Module) -> Iterator[Activations]:
    """Context manager in which `Activations` are collected from each forward."""
    kept = Activations()
    handles = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: kept.on_layer(name, layer, args[0]))
        for name, layer in adapted_layers(model).items()
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Scorer:
    """Scores sequences by a monitor, and by other scores to compare with.

    Attributes:
        monitor: of the base model.
        batch_size: sequences per backward.
        probe: w (R,); None without pairs to fit it on.
    """

    monitor: Monitor
    batch_size: int = 32
    probe: Tensor | None = None

    @classmethod
    def with_probe(cls, monitor: Monitor, pairs: Sequence[ContrastPair], batch_size: int = 32) -> Scorer:
        """Make a scorer with a probe fitted on pairs."""
        sides: list[list[Tensor]] = []
        for part in ([p.hacks for p in pairs], [p.cleans for p in pairs]):
            texts = [Completion(p.prompt, text) for p, said in zip(pairs, part, strict=True) for text in said]
            of_all = cls(monitor, batch_size).vectors([monitor.tokens(one) for one in texts])
            sides.append([one.mean(0) for one in of_all.split([len(said) for said in part])])
        hack, clean = (torch.stack(side).mean(0) for side in sides)
        return cls(monitor, batch_size, hack - clean)

    def vectors(self, sequences: Sequence[TokenIds]) -> Tensor:
        """The h of sequences, (n, R)."""
        found: list[Tensor] = [torch.empty(0)] * len(sequences)
        for rows, _, _, h in self._batches(sequences):
            for row, one in zip(rows, h, strict=True):
                found[row] = one
        return torch.stack(found)

    def __call__(self, sequences: Sequence[TokenIds]) -> list[dict[str, float | None]]:
        """Compute `SCORES` of each sequence; equal sequences are computed once."""
        unique = list(dict.fromkeys(one.hashable for one in sequences))
        direction = self.monitor.direction
        others = [direction.permuted(_CHANCE_SEED), direction.random(_CHANCE_SEED)]
        targets = [torch.cat([v.effect[name] for name in v]) for v in (direction, *others) if v.effect is not None]
        found: dict[TokenIds, dict[str, float | None]] = {}
        for rows, gradients, nll, h in self._batches(unique):
            cosines = torch.stack([cosine(gradients, t) for t in targets], 1).cpu()
            probed = [None] * len(rows) if self.probe is None else (h @ self.probe).tolist()
            for row, (score, permuted, random), loss, p in zip(
                rows, cosines.tolist(), nll.tolist(), probed, strict=True
            ):
                one = unique[row]
                values = (score, loss, float(sum(one.own)), p, permuted, random)
                found[one] = dict(zip(SCORES, values, strict=True))
        return [found[one.hashable] for one in sequences]

    def _batches(self, sequences: Sequence[TokenIds]) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
        """Yield batches of similar length: row numbers, n (b, R), NLL per token (b,), h (b, R)."""
        order = sorted(range(len(sequences)), key=lambda i: sequences[i].length)
        with activations(self.monitor.model) as kept:
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                batch = [sequences[i] for i in rows]
                kept.expect(batch)
                ((inner, gradients, nll),) = self.monitor.gradients(batch, batch_size=len(batch))
                assert inner == list(range(len(batch))), "they come sorted"
                yield rows, gradients, nll, kept.vectors


def is_finite(scores: dict[str, float | None]) -> bool:
    """Whether every score that exists is finite."""
    return all(value is None or math.isfinite(value) for value in scores.values())
