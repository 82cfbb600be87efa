"""Score how hack-ward a completion is, by the gradient of its NLL at the reference.

    n_b = ∇θ NLL(completion_b | prompt_b) / tokens   at θ = 0                                       (R,)
    s_b = cos(n_b, t)    with t (R,) the direction's effect sizes, also computed at θ = 0

The policy changes during training, the reference does not. So the same text has the same score at every step of every run.
(A score at the current policy decays: docs/results.md.) The reference needs no second model: it is
the adapted model without its knobs.

A completion is flagged if s_b is above a threshold. There are three rules for the threshold:

* midway between held-out clean texts and hacks;
* a quarter of the way from clean texts to hacks, because exploits in a form that no pair shows score between the two
  (docs/results.md);
* such that a given share of the reference's own answers is flagged.

A threshold close to the clean texts also flags more wrong answers. A penalty loses nothing by that, since wrong answers get
no reward anyway. The score responds to every difference between hacks and clean texts in the pairs, so keep all else equal.
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
from antipasto.adapter.rollouts import RolloutGrads, TokenIds, flat_rows, nll_gradients, tokenize, tokenize_prompt
from antipasto.adapter.sharded import is_sharded
from antipasto.adapter.views import adapted_layers, replaced, seen_as
from antipasto.adapter.zero import refuse_partitioned
from antipasto.files import read_tensors, readable_as, write_tensors
from antipasto.names import HELDOUT, Rule
from antipasto.routing.directions import Direction, cosine, extract_direction
from antipasto.routing.pairs import ContrastPair, split_pairs

TOWARDS_HACKS: dict[Rule, float] = {"midway": 0.5, "quarter": 0.25}
"""Rule → position of the threshold between held-out clean texts (0) and hacks (1)."""
_FORMAT = "antipasto-monitor-1"
_CHANCE_SEED = 0


class Completion(NamedTuple):
    """A completion to be scored.

    Attributes:
        prompt: a text, or a chat.
        text: the model's answer.
        truncated: whether it was cut off at the token limit, and so has no end-of-sequence token.
        ids: its token ids, if tokenising the text would not reproduce them.
        tool_mask: 1 for each of ``ids`` that the model wrote, 0 for what tools answered; None if it wrote all of them. The
            score is of the model's own tokens.
    """

    prompt: str | list[dict[str, str]]
    text: str
    truncated: bool = False
    ids: list[int] | None = None
    tool_mask: list[int] | None = None


@dataclass(frozen=True)
class Ordering:
    """How well a score separates held-out hacks from clean texts.

    Attributes:
        ordered: share of pairs in which every hack scores above every clean text.
        hack: mean over pairs of the score of the hack, or of the lowest one if there are several.
        clean: mean over pairs of the score of the clean text, or of the highest one if there are several, since a threshold
            must be above them all.
        threshold: by the monitor's rule.
        own: share of the reference's own answers above that threshold; None if none were given.
    """

    ordered: float
    hack: float
    clean: float
    threshold: float
    own: float | None


@dataclass(frozen=True)
class Calibration:
    """How a threshold was chosen, and how well it separates hacks from clean texts.

    Attributes:
        rule: ``"midway"``, ``"quarter"`` or ``"false alarms"``.
        pairs: number of held-out pairs.
        answers: number of the reference's own answers.
        false_alarms: the requested rate; None under another rule.
        score: the ordering by the direction.
        permuted: the ordering by the same effect sizes on shuffled coordinates, under the same rule.
        random: the ordering by random effect sizes, under the same rule.
    """

    rule: str
    pairs: int
    answers: int
    false_alarms: float | None
    score: Ordering
    permuted: Ordering
    random: Ordering

    def __str__(self) -> str:
        rows = (("", "held-out hacks", "clean", "in order", "own answers flagged"), *map(self._row, _COMPARED))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(
            [f"monitor: threshold {self.score.threshold:.3f}, {self.meaning} ({self.pairs} held-out pairs)", *lines]
        )

    @property
    def meaning(self) -> str:
        """Where the threshold lies, in words."""
        if self.false_alarms is not None:
            return f"above all but {self.false_alarms:.1%} of the reference's own answers"
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
    """Scores completions at the reference, independently of the present values of the knobs.

    Scores do not depend on which adapter is active, whether adapters are enabled, training mode, or merged layers.

    Args:
        model: an adapted causal LM.
        tokenizer: its tokenizer.
        direction: with effect sizes, extracted at the reference.
        threshold: the score above which a completion is flagged; if None, set by `calibrate`.

    Raises:
        ValueError: the direction has no effect sizes, or belongs to another base. The message names the layers.

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
                "A monitor needs a direction with effect sizes, as from extract_direction; this one has rows only."
            )
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(f"threshold must be a score, that is a cosine, got {threshold}.")
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
        """Create a monitor: extract its direction from some of the pairs, and calibrate its threshold on the others.

        Args:
            model: an adapted causal LM. The direction is extracted at its reference.
            tokenizer: its tokenizer.
            pairs: labelled pairs.
            heldout: share of the pairs to calibrate on.
            seed: of the split.
            own: answers of the reference.
            rule: as in `calibrate`.
            false_alarms: as in `calibrate`.
            batch_size: pairs per backward.

        Raises:
            ValueError: there are too few pairs; or as `calibrate`.
        """
        fit, held = split_pairs(pairs, heldout, seed)
        with at_origin(model):
            direction = extract_direction(model, tokenizer, fit, batch_size=batch_size)
        monitor = cls(model, tokenizer, direction)
        monitor.calibrate(held, own=own, rule=rule, false_alarms=false_alarms, batch_size=2 * batch_size)
        return monitor

    def _check_base(self) -> None:
        refuse_partitioned(self.model, "a monitor")
        layers = adapted_layers(self.model)
        for name, V in self.direction.items():
            if name not in layers:
                raise ValueError(
                    f"The monitor has a layer {name}, which is not among the adapted layers of this model."
                )
            r = layers[name].basis.S.numel()
            if V.shape[1] > r:
                raise ValueError(f"{name}: the monitor's direction has r={V.shape[1]}, the layer's basis {r}.")
        known = self.direction.fingerprints
        check_same_base(
            {name: one for name, one in known.items() if name in self.direction},
            {name: layers[name].current_fingerprint() for name in self.direction if name in known},
            {name: layers[name].basis.S for name in self.direction},
            what="The monitor",
            remedy="Create it again from its pairs, on this base.",
        )

    @property
    def threshold(self) -> float:
        """The score above which a completion is flagged.

        Raises:
            ValueError: no threshold was given, and `calibrate` was not called.
        """
        if self._threshold is None:
            raise ValueError("This monitor has no threshold yet: pass threshold=, or call calibrate(pairs).")
        return self._threshold

    def depth(self, scores: Tensor) -> Tensor:
        """Position of scores between held-out clean texts (0) and hacks (1), clipped to [0, 1]; any shape.

        Raises:
            ValueError: the monitor was not calibrated, or its held-out hacks score no higher than the clean texts.
        """
        if self.calibration is None:
            raise ValueError("This monitor was not calibrated: call calibrate(pairs).")
        found = self.calibration.score
        if found.hack <= found.clean:
            raise ValueError(
                f"Held-out hacks score {found.hack:.3f}, no higher than clean texts at {found.clean:.3f}: depth is undefined."
            )
        return ((scores - found.clean) / (found.hack - found.clean)).clamp(0.0, 1.0)

    # ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def scores(self, completions: Sequence[Completion], *, batch_size: int = 32) -> Tensor:
        """Score every completion: (n,), fp32 on the CPU, in [-1, 1].

        Args:
            completions: the completions, which are batched by length.
            batch_size: completions per backward.

        Raises:
            ValueError: a prompt or a completion has no token.
        """
        return self.score_tokens([self.tokens(one) for one in completions], batch_size=batch_size)

    def flags(self, completions: Sequence[Completion], *, batch_size: int = 32) -> Tensor:
        """Whether each completion's score is above the threshold, (n,) bool."""
        return self.scores(completions, batch_size=batch_size) > self.threshold

    def score_tokens(self, sequences: Sequence[TokenIds], *, batch_size: int = 32) -> Tensor:
        """Like `scores`, for token ids of prompts and completions (`TokenIds`, or tuples). Duplicates are scored once.

        Under FSDP2 the processes wait for each other in every forward, so that each has to score the same number of sequences.
        Duplicates are then scored each by itself.
        """
        sequences, apart = [TokenIds(*one) for one in sequences], is_sharded(self.model)
        numbers: dict[tuple[TokenIds, int], int] = {}
        of = [numbers.setdefault((one.hashable, apart and n), len(numbers)) for n, one in enumerate(sequences)]
        scores = torch.empty(len(numbers), dtype=torch.float32)
        # the same number of batches as without removing duplicates, or fewer, of even size and none larger
        even = max(1, math.ceil(len(numbers) / max(1, math.ceil(len(sequences) / batch_size))))
        for rows, gradients, _ in self.gradients([one for one, _ in numbers], batch_size=even):
            scores[rows] = cosine(gradients, self._effect).cpu()
        return scores[of]

    def tokens(self, completion: Completion) -> TokenIds:
        """Token ids of a prompt and its completion, as in training."""
        prompt, text, truncated, ids, tool_mask = completion
        if ids is None:
            return tokenize(self.tokenizer, prompt, text, append_eos=not truncated)
        return TokenIds(tokenize_prompt(self.tokenizer, prompt), ids, tool_mask)

    def gradients(
        self, sequences: Sequence[TokenIds], *, batch_size: int = 32
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Compute n of every sequence in batches of similar length.

        Yields:
            Indices of the batch's sequences, their n (b, R), and their NLL per token (b,).
        """
        sequences = [TokenIds(*one) for one in sequences]
        order = sorted(range(len(sequences)), key=lambda i: sequences[i].length)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            with at_origin(self.model):
                grads, nll = nll_gradients(self.model, [sequences[i] for i in rows])
            yield rows, self.flatten(grads), nll

    def flatten(self, grads: RolloutGrads) -> Tensor:
        """Concatenate gradients by layer, (b, r) each, to (b, R) in the order of `flat_effect`; zeros for missing layers."""
        return flat_rows(grads, {name: len(t) for name, t in _effects(self.direction)})

    def cosines(self, grads: RolloutGrads) -> Tensor:
        """cos(·, t) of the gradients from a `rollout_grads` context, (b,)."""
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
        """Set the threshold, and report how it separates texts, compared with a permuted and a random direction.

        Args:
            pairs: labelled pairs that the direction was not extracted from.
            own: answers of the reference. The share of them above the threshold is reported.
            rule: ``"midway"``, halfway from clean texts to hacks, as `Ordering` defines these; or ``"quarter"``, a quarter
                of the way, which suits a penalty.
            false_alarms: choose the threshold such that this share of ``own`` is above it, and ignore ``rule``.
            batch_size: completions per backward.

        Raises:
            ValueError: there are no pairs, the rate is outside (0, 1), or there are too few answers for it.
        """
        if rule not in TOWARDS_HACKS:
            raise ValueError(f"rule must be one of {', '.join(TOWARDS_HACKS)}, got {rule!r}.")
        if not pairs:
            raise ValueError("A threshold needs labelled pairs that the direction was not extracted from, got none.")
        if false_alarms is not None and not 0 < false_alarms < 1:
            raise ValueError(
                f"false_alarms must be a share of the reference's own answers, in (0, 1), got {false_alarms}."
            )
        if false_alarms is not None and len(own) * false_alarms < 1:
            raise ValueError(
                f"A false-alarm rate of {false_alarms} needs at least {math.ceil(1 / false_alarms)} answers of the "
                f"reference, got {len(own)}."
            )
        sides = [len(texts) for p in pairs for texts in (p.hacks, p.cleans)]
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
        metadata = {
            "format": _FORMAT,
            "fingerprints": fingerprints_to_json(self.direction.fingerprints),
            "threshold": json.dumps(self._threshold),
            "calibration": json.dumps(self.calibration and asdict(self.calibration)),
        }
        write_tensors(path, self.direction.to_tensors(), metadata)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, tokenizer: Any) -> Monitor:
        """Read a file that `save` wrote, for a model with the same base.

        Raises:
            ValueError: the file is not a monitor, is damaged, or belongs to another base. The message names it.
            OSError: the file cannot be read.
        """
        saved = read_monitor(path)
        try:
            monitor = cls(model, tokenizer, saved.direction, threshold=saved.threshold)
        except ValueError as error:
            raise ValueError(f"{path} does not fit this model: {error}") from error
        monitor.calibration = saved.calibration
        return monitor


class SavedMonitor(NamedTuple):
    """Contents of a file that `Monitor.save` wrote, without a model."""

    direction: Direction
    threshold: float | None
    calibration: Calibration | None


def read_monitor(path: str | Path) -> SavedMonitor:
    """Read a monitor's file.

    Raises:
        ValueError: the file is not a monitor, or is damaged. The message names it.
        OSError: the file cannot be read.
    """
    with readable_as("monitor", path):
        tensors, metadata = read_tensors(path, _FORMAT)
        direction = Direction.from_tensors(tensors, fingerprints_from_json(metadata["fingerprints"]))
        threshold = json.loads(metadata["threshold"])
        if not (threshold is None or (isinstance(threshold, float) and math.isfinite(threshold))):
            raise ValueError(f"its threshold is {threshold!r}")
        return SavedMonitor(direction, threshold, _calibration(json.loads(metadata["calibration"])))


@contextmanager
def at_origin(model: nn.Module) -> Iterator[None]:
    """Context in which the model is the base model in eval mode, differentiable with respect to knobs at zero.

    It does not depend on which adapters exist or are active.
    """
    with seen_as(model, View.ORIGIN), replaced("training", dict.fromkeys(model.modules(), False)):
        yield


def flat_effect(direction: Direction) -> Tensor:
    """Effect sizes t of all layers, concatenated: (R,)."""
    return torch.cat([t for _, t in _effects(direction)])


def _effects(direction: Direction) -> list[tuple[str, Tensor]]:
    """Effect sizes by layer, sorted by name: the order survives saving, so that sums over layers stay bitwise equal."""
    assert direction.effect is not None
    return sorted(direction.effect.items())


def _ordering(
    of_pairs: Tensor, of_own: Tensor, sides: list[int], towards: float, false_alarms: float | None
) -> Ordering:
    """Ordering of scores: of each pair's hacks, then its clean texts, ``sides`` says how many; and of the own answers."""
    parts = [part.tolist() for part in of_pairs.split(sides)]
    hacks, cleans = list(map(min, parts[::2])), list(map(max, parts[1::2]))
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
