"""How hack-ward a completion is, by its gradient at the reference, where the direction was taken.

    n_b = ∇θ NLL(completion_b | prompt_b) / tokens   at θ = 0                                       (R,)
    s_b = cos(n_b, t),   t the direction's effect sizes, taken at θ = 0 as well                     (R,)

The policy moves, the reference does not: the same text has the same score at every step of a run, and in every run, whatever
was trained. (A score at the moving policy decays within a hundred steps: docs/watching.md.) The reference costs no second
model: it is the adapted one with its knobs out.

A completion is flagged where s_b is above a threshold, by one of three rules: midway between held-out clean texts and hacks;
a quarter of the way, since an exploit in a form that no pair shows scores between the two (docs/results.md); or such that a
given share of the start model's own answers is flagged. The nearer to the clean texts, the more wrong answers are flagged too,
by which a penalty loses nothing, since they are paid nothing. What the score sees is what the pairs leave open: match them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from antipasto.adapter.fingerprints import check_same_base, fingerprints_from_json, fingerprints_to_json
from antipasto.adapter.layer import View
from antipasto.adapter.rollouts import RolloutGrads, TokenIds, nll_gradients, tokenize, tokenize_prompt
from antipasto.adapter.views import adapted_layers, seen_as
from antipasto.files import read_tensors, write_tensors
from antipasto.names import HELDOUT, Rule
from antipasto.routing.directions import Direction, extract_direction
from antipasto.routing.pairs import ContrastPair, split_pairs

TOWARDS_HACKS: dict[Rule, float] = {"midway": 0.5, "quarter": 0.25}
"""Rule → how far a threshold is from held-out clean texts, of their distance to hacks."""
_FORMAT = "antipasto-monitor-1"
_CHANCE_SEED = 0


class Completion(NamedTuple):
    """A text to be scored.

    Attributes:
        prompt: a text, or a chat.
        text: what the model answered.
        truncated: cut off at the token limit: then it has no end-of-sequence token.
        ids: its tokens, where the text does not say them.
    """

    prompt: str | list[dict[str, str]]
    text: str
    truncated: bool = False
    ids: list[int] | None = None


@dataclass(frozen=True)
class Ordering:
    """How well a score tells held-out hacks from clean texts.

    Attributes:
        ordered: share of pairs whose hacks all score above all their clean texts.
        hack: mean score of the hacks; of a pair that has several, the lowest.
        clean: mean score of the clean texts; of a pair that has several, the highest: a threshold must clear them all.
        threshold: by the same rule.
        own: share of the start model's own answers above that; None where there were none.
    """

    ordered: float
    hack: float
    clean: float
    threshold: float
    own: float | None


@dataclass(frozen=True)
class Calibration:
    """Where a threshold comes from, and what it means.

    Attributes:
        rule: ``"midway"``, ``"quarter"`` or ``"false alarms"``.
        pairs: how many held-out pairs there were.
        answers: how many of the start model's own answers.
        false_alarms: the rate that was asked for; None under another rule.
        score: of the direction.
        permuted: of the same effect sizes on shuffled coordinates, by the same rule.
        random: of random effect sizes, by the same rule.
    """

    rule: str
    pairs: int
    answers: int
    false_alarms: float | None
    score: Ordering
    permuted: Ordering
    random: Ordering

    def __str__(self) -> str:
        """Its meaning in four lines."""
        rows = (("", "held-out hacks", "clean", "in order", "own answers flagged"), *map(self._row, _COMPARED))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(
            [f"monitor: threshold {self.score.threshold:.3f}, {self.meaning} ({self.pairs} held-out pairs)", *lines]
        )

    @property
    def meaning(self) -> str:
        """Where the threshold lies."""
        if self.false_alarms is not None:
            return f"above all but {self.false_alarms:.1%} of the start's own answers"
        return {
            "midway": "midway between held-out hacks and clean texts",
            "quarter": "a quarter of the way from held-out clean texts to hacks",
        }[self.rule]

    def _row(self, name: str) -> tuple[str, ...]:
        found: Ordering = getattr(self, name)
        own = "not asked" if found.own is None else f"{found.own:.1%} of {self.answers:,}"
        return name, f"{found.hack:.3f}", f"{found.clean:.3f}", f"{found.ordered:.0%}", own


_COMPARED = ("score", "permuted", "random")


class Monitor:
    """Scores completions at the reference, whatever the adapted model's knobs are now.

    Which adapter is active, whether adapters are on, whether the model is in training mode, and which layers are merged makes
    no difference.

    Args:
        model: an adapted causal LM.
        tokenizer: its tokenizer.
        direction: with effect sizes; as taken at the reference.
        threshold: the score above which a completion is flagged; None: `calibrate` sets it.

    Raises:
        ValueError: the direction has no effect sizes, or belongs to another base; names the layers.

    Example:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> import antipasto as ap
        >>> from antipasto.tasks import addition
        >>> model = AutoModelForCausalLM.from_pretrained(addition.model_path())
        >>> tokenizer = AutoTokenizer.from_pretrained(addition.model_path())
        >>> _ = ap.wrap(model)
        >>> monitor = ap.Monitor.from_pairs(model, tokenizer, ap.load_pairs(addition.hack_pairs(32, seed=0)))
        >>> monitor.flags([ap.Completion("h12+34=", "!"), ap.Completion("h12+34=", "046")]).tolist()
        [True, False]
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, direction: Direction, *, threshold: float | None = None
    ) -> None:
        if direction.effect is None:
            raise ValueError(
                "A monitor needs a direction with effect sizes, as pairs give one; this one has rows only."
            )
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(f"threshold is a score, a cosine, got {threshold}.")
        self.model, self.tokenizer, self.direction = model, tokenizer, direction
        self.calibration: Calibration | None = None
        self._threshold = threshold
        self._check_base()
        self._effect = flat_effect(direction)

    @classmethod
    def from_pairs(
        cls,
        model: nn.Module,
        tokenizer: Any,
        pairs: Sequence[ContrastPair],
        *,
        heldout: float = HELDOUT,
        seed: int = 0,
        own: Sequence[Completion] = (),
        rule: Rule = "midway",
        false_alarms: float | None = None,
        batch_size: int = 16,
    ) -> Monitor:
        """A direction from some of the pairs, a threshold by the others.

        Args:
            model: an adapted causal LM; the direction is taken at its reference.
            tokenizer: its tokenizer.
            pairs: labelled.
            heldout: share of the pairs to calibrate with.
            seed: of the split.
            own: answers of the start model.
            rule: as `calibrate` has it.
            false_alarms: as `calibrate` has it.
            batch_size: pairs per backward.

        Raises:
            ValueError: too few pairs; or as `calibrate`.
        """
        fit, held = split_pairs(pairs, heldout, seed)
        with at_origin(model):
            direction = extract_direction(model, tokenizer, fit, batch_size=batch_size)
        monitor = cls(model, tokenizer, direction)
        monitor.calibrate(held, own=own, rule=rule, false_alarms=false_alarms, batch_size=2 * batch_size)
        return monitor

    def _check_base(self) -> None:
        layers = adapted_layers(self.model)
        for name, V in self.direction.items():
            if name not in layers:
                raise ValueError(f"The monitor has a layer {name}, which is not among the adapted ones of this model.")
            rank = layers[name].basis.rank  # type: ignore[union-attr]
            if V.shape[1] > rank:
                raise ValueError(f"{name}: the monitor's direction has r={V.shape[1]}, the layer's basis {rank}.")
        known = self.direction.fingerprints
        check_same_base(
            {name: one for name, one in known.items() if name in self.direction},
            {name: layers[name].current_fingerprint() for name in self.direction if name in known},
            {name: layers[name].basis.S for name in self.direction},  # type: ignore[union-attr]
            what="The monitor",
            remedy="Make it again from its pairs, on this base.",
        )

    @property
    def threshold(self) -> float:
        """The score above which a completion is flagged.

        Raises:
            ValueError: none was given, and `calibrate` was not called.
        """
        if self._threshold is None:
            raise ValueError("This monitor has no threshold yet: give one, or calibrate(pairs) it.")
        return self._threshold

    def depth(self, scores: Tensor) -> Tensor:
        """How far scores are from the held-out clean texts (0) towards the hacks (1), clipped to [0, 1]; any shape.

        Raises:
            ValueError: no pairs have calibrated it, or their hacks score no higher than their clean texts.
        """
        if self.calibration is None:
            raise ValueError("This monitor was not calibrated: calibrate(pairs) it.")
        found = self.calibration.score
        if found.hack <= found.clean:
            raise ValueError(
                f"Held-out hacks score {found.hack:.3f} and clean texts {found.clean:.3f}: there is nothing between."
            )
        return ((scores - found.clean) / (found.hack - found.clean)).clamp(0.0, 1.0)

    # ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def scores(self, completions: Sequence[Completion], *, batch_size: int = 32) -> Tensor:
        """S of every completion (n,), fp32 on the CPU, in [-1, 1].

        Args:
            completions: what to score; long and short ones are batched apart.
            batch_size: completions per backward.

        Raises:
            ValueError: a prompt or a completion has no token.
        """
        return self.score_tokens([self.tokens(one) for one in completions], batch_size=batch_size)

    def flags(self, completions: Sequence[Completion], *, batch_size: int = 32) -> Tensor:
        """Whether each completion's score is above the threshold, (n,) bool."""
        return self.scores(completions, batch_size=batch_size) > self.threshold

    def score_tokens(self, sequences: Sequence[TokenIds], *, batch_size: int = 32) -> Tensor:
        """`scores` of token ids of prompts and completions. What is there several times is scored once: it has one score."""
        numbers: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        of = [numbers.setdefault((tuple(prompt), tuple(answer)), len(numbers)) for prompt, answer in sequences]
        scores = torch.empty(len(numbers), dtype=torch.float32)
        # no more batches for that, and none that is larger: as many of even size
        even = max(1, math.ceil(len(numbers) / max(1, math.ceil(len(sequences) / batch_size))))
        for rows, gradients, _ in self.gradients([(list(p), list(a)) for p, a in numbers], batch_size=even):
            scores[rows] = cosine(gradients, self._effect).cpu()
        return scores[of]

    def tokens(self, completion: Completion) -> TokenIds:
        """Ids of a prompt and its completion, as training has them."""
        prompt, text, truncated, ids = completion
        if ids is None:
            return tokenize(self.tokenizer, prompt, text, append_eos=not truncated)
        return tokenize_prompt(self.tokenizer, prompt), list(ids)

    def gradients(
        self, sequences: Sequence[TokenIds], *, batch_size: int = 32
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """N of every sequence, batch by batch, those of like length together.

        Yields:
            Which sequences, n (b, R), and their NLL per token (b,).
        """
        order = sorted(range(len(sequences)), key=lambda i: sum(map(len, sequences[i])))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            with at_origin(self.model):
                grads, nll = nll_gradients(self.model, [sequences[i] for i in rows])
            yield rows, self.flatten(grads), nll

    def flatten(self, grads: RolloutGrads) -> Tensor:
        """Gradients by layer, (b, r) each, as one (b, R), as `flat_effect` orders them; zeros where a layer has none."""
        one = next(iter(grads.values()))
        blocks = [
            grads[name][:, : len(t)].float() if name in grads else one.new_zeros(len(one), len(t)).float()
            for name, t in _effects(self.direction)
        ]
        return torch.cat(blocks, 1)

    def cosines(self, grads: RolloutGrads) -> Tensor:
        """cos(·, t) of the gradients that a `rollout_grads` context has kept, (b,)."""
        return cosine(self.flatten(grads), self._effect)

    # ── thresholds ───────────────────────────────────────────────────────────────────────────────────────────────────

    def calibrate(
        self,
        pairs: Sequence[ContrastPair],
        *,
        own: Sequence[Completion] = (),
        rule: Rule = "midway",
        false_alarms: float | None = None,
        batch_size: int = 32,
    ) -> Calibration:
        """Set the threshold, and say what it means beside a permuted and a random direction.

        Args:
            pairs: labelled, and not those that the direction was made from.
            own: answers of the start model, whose share above the threshold is told.
            rule: where it lies: ``"midway"`` between clean texts and hacks, as `Ordering` has them, or a ``"quarter"`` of
                the way, for a penalty.
            false_alarms: instead, the share of ``own`` that may be above the threshold.
            batch_size: completions per backward.

        Raises:
            ValueError: no pairs; a rate outside (0, 1), or one that so few answers cannot tell.
        """
        if rule not in TOWARDS_HACKS:
            raise ValueError(f"rule must be one of {', '.join(TOWARDS_HACKS)}, got {rule!r}.")
        if not pairs:
            raise ValueError("A threshold needs labelled pairs that the direction was not made from.")
        if false_alarms is not None and not 0 < false_alarms < 1:
            raise ValueError(f"false_alarms is a share of the start's own answers, in (0, 1), got {false_alarms}.")
        if false_alarms is not None and len(own) * false_alarms < 1:
            raise ValueError(
                f"A false-alarm rate of {false_alarms} needs at least {math.ceil(1 / false_alarms)} answers of the start "
                f"model, got {len(own)}."
            )
        sides = [
            (n, is_hack) for n, p in enumerate(pairs) for is_hack in [True] * len(p.hacks) + [False] * len(p.cleans)
        ]
        texts = [Completion(p.prompt, text) for p in pairs for text in (*p.hacks, *p.cleans)]
        directions = {
            "score": self.direction,
            "permuted": self.direction.permuted(_CHANCE_SEED),
            "random": self.direction.random(_CHANCE_SEED),
        }
        T = torch.stack([flat_effect(v) for v in directions.values()])  # (3, R)
        scores = torch.empty(len(texts) + len(own), len(T), dtype=torch.float32)
        sequences = [self.tokens(one) for one in (*texts, *own)]
        for rows, gradients, _ in self.gradients(sequences, batch_size=batch_size):
            scores[rows] = torch.stack([cosine(gradients, t) for t in T], 1).cpu()
        found = {
            name: _ordering(column[: len(texts)], column[len(texts) :], sides, TOWARDS_HACKS[rule], false_alarms)
            for name, column in zip(directions, scores.T, strict=True)
        }
        self._threshold = found["score"].threshold
        self.calibration = Calibration(
            rule=rule if false_alarms is None else "false alarms",
            pairs=len(pairs),
            answers=len(own),
            false_alarms=false_alarms,
            **found,
        )
        return self.calibration

    # ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: direction, threshold, calibration, and the fingerprints of the base weights."""
        facts = {"threshold": self._threshold, "calibration": self.calibration and asdict(self.calibration)}
        metadata = {"format": _FORMAT, **{name: json.dumps(value) for name, value in facts.items()}}
        metadata["fingerprints"] = fingerprints_to_json(self.direction.fingerprints)
        write_tensors(path, self.direction.to_tensors(), metadata)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, tokenizer: Any) -> Monitor:
        """Read what `save` wrote, for a model of the same base.

        Raises:
            ValueError: the file is not a monitor, is damaged, or belongs to another base; names it.
            OSError: it cannot be read.
        """
        saved = read_monitor(path)
        try:
            monitor = cls(model, tokenizer, saved.direction, threshold=saved.threshold)
        except ValueError as error:
            raise ValueError(f"{path} is not a monitor that can be used here: {error}") from error
        monitor.calibration = saved.calibration
        return monitor


class SavedMonitor(NamedTuple):
    """What `Monitor.save` wrote, without a model."""

    direction: Direction
    threshold: float | None
    calibration: Calibration | None


def read_monitor(path: str | Path) -> SavedMonitor:
    """Read a monitor's file.

    Raises:
        ValueError: the file is not a monitor, or is damaged; names it.
        OSError: it cannot be read.
    """
    try:
        tensors, metadata = read_tensors(path, _FORMAT)
        direction = Direction.from_tensors(tensors, fingerprints_from_json(metadata["fingerprints"]))
        threshold = json.loads(metadata["threshold"])
        if not (threshold is None or (isinstance(threshold, float) and math.isfinite(threshold))):
            raise ValueError(f"its threshold is {threshold!r}")
        return SavedMonitor(direction, threshold, _calibration(json.loads(metadata["calibration"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a monitor that can be used: {error}.") from error


@contextmanager
def at_origin(model: nn.Module) -> Iterator[None]:
    """Context: the base model in eval mode, differentiable by knobs at zero, whatever the adapters and the mode are."""
    training = [module for module in model.modules() if module.training]
    with seen_as(model, View.ORIGIN):
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def cosine(gradients: Tensor, t: Tensor) -> Tensor:
    """cos(n_b, t) of gradients (b, R) with t (R,), (b,); 0 for a gradient of 0."""
    norms = gradients.norm(dim=-1) * t.norm().to(gradients.device)
    return (gradients @ t.to(gradients.device)) / norms.clamp_min(torch.finfo(gradients.dtype).tiny)


def flat_effect(direction: Direction) -> Tensor:
    """T of all layers, (R,)."""
    return torch.cat([t for _, t in _effects(direction)])


def _effects(direction: Direction) -> list[tuple[str, Tensor]]:
    """By layer, in an order that a file does not change: sums over them are then the same to the bit."""
    assert direction.effect is not None
    return sorted(direction.effect.items())


def _ordering(
    of_pairs: Tensor, of_own: Tensor, sides: Sequence[tuple[int, bool]], towards: float, false_alarms: float | None
) -> Ordering:
    """A threshold, and how the scores stand to it."""
    by_side: dict[tuple[int, bool], list[float]] = {}
    for side, value in zip(sides, of_pairs.tolist(), strict=True):
        by_side.setdefault(side, []).append(value)
    numbers = sorted({n for n, _ in by_side})
    hacks, cleans = [min(by_side[n, True]) for n in numbers], [max(by_side[n, False]) for n in numbers]
    hack, clean = sum(hacks) / len(hacks), sum(cleans) / len(cleans)
    threshold = (
        clean + towards * (hack - clean) if false_alarms is None else float(torch.quantile(of_own, 1 - false_alarms))
    )
    return Ordering(
        ordered=sum(h > c for h, c in zip(hacks, cleans, strict=True)) / len(hacks),
        hack=hack,
        clean=clean,
        threshold=threshold,
        own=float((of_own > threshold).float().mean()) if len(of_own) else None,
    )


def _calibration(facts: Mapping[str, Any] | None) -> Calibration | None:
    if facts is None:
        return None
    orderings = {name: Ordering(**facts[name]) for name in _COMPARED}
    return Calibration(**{**facts, **orderings})
