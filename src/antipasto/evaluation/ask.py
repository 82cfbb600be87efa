"""Ask arms a task's prompts, judge what they say, and say how far they are from the reference.

    KL of an answer a  =  Σ_t Σ_v p(v | a_<t) log( p(v | a_<t) / q(v | a_<t) )      p the arm, q the reference

at temperature 1, v over the vocabulary, t over the tokens that the arm itself produced. Its mean over sampled answers
estimates KL(arm ‖ reference) of whole answers with less noise than log p − log q of the drawn tokens, and is never negative.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from antipasto.adapter.knobs import deployed, reference, scaled
from antipasto.adapter.rollouts import templated
from antipasto.adapter.views import fixed, unwrap
from antipasto.evaluation.records import (
    DEPLOYED,
    RANDOM,
    REFERENCE,
    TRAINED,
    Answer,
    Evaluation,
    compare,
    dial_of,
    summarise,
)
from antipasto.evaluation.verdict import MARGIN, verdict
from antipasto.routing.monitor import Completion
from antipasto.tasks import Task

_LOGITS_AT_ONCE = 2**26  # numbers, of either model: 256 MiB in fp32


# ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Batch:
    """Prompts with their answers: ids and mask (b, p + t), which of the t new tokens belong to the answer (b, t), texts.

    And the tokens that end an answer.
    """

    ids: Tensor
    mask: Tensor
    new: Tensor
    texts: list[str]
    ends: list[int]


def sample_completions(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 500,
    temperature: float = 1.0,
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

    Returns:
        The completions' texts, without special tokens, in the order of the prompts.
    """
    how = Sampling(max_new_tokens, temperature=temperature, batch_size=batch_size)
    return [text for batch in _batches(model, tokenizer, prompts, how, seed) for text in batch.texts]


def own_answers(model: nn.Module, tokenizer: Any, prompts: Sequence[Any], how: Sampling) -> list[Completion]:
    """One answer of the start model, both knobs out, to each prompt, with its tokens: what a monitor is calibrated on."""
    found: list[Completion] = []
    with reference(model):
        for batch in _batches(model, tokenizer, prompts, how, how.seed):
            t = batch.new.shape[1]
            for answer, new, text in zip(batch.ids[:, -t:], batch.new, batch.texts, strict=True):
                ids = answer[new].tolist()
                cut = len(ids) == t and ids[-1] not in batch.ends
                found.append(Completion(prompts[len(found)], text, cut, ids))
    return found


def matched_scale(model: nn.Module, tokenizer: Any, prompts: Sequence[Any], how: Sampling) -> float:
    """The c with KL(c θ ‖ reference) = KL(deployed ‖ reference), of whole sampled answers: a control by size alone."""

    def kl() -> float:
        batches = _batches(model, tokenizer, prompts, how, how.seed)
        return float(torch.cat([_kl_to_reference(model, batch) for batch in batches]).mean())

    def kl_of(c: float) -> float:
        with scaled(model, c):
            return kl()

    with deployed(model):
        wanted = kl()
    return _where(kl_of, wanted)


_SEARCHES, _LARGEST = 8, 1.5


def _where(kl_of: Callable[[float], float], wanted: float) -> float:
    """The c in (0, 1.5) whose KL is nearest to the one that is wanted, of eight tries from 1 on.

    KL grows about as c² near the reference: c ← c √(wanted / KL(c)). Where it grows as c⁴ or faster, as where the policy tips
    over into an exploit, that would go to and fro for ever: a step out of what is still possible is halved instead.
    """
    low, c, high = 0.0, 1.0, _LARGEST
    tried: dict[float, float] = {}
    for _ in range(_SEARCHES):
        found = tried[c] = kl_of(c)
        if found == wanted:
            break
        low, high = (c, high) if found < wanted else (low, c)
        step = c * (wanted / found) ** 0.5 if found > 0 else high
        c = step if low < step < high else (low + high) / 2
    return min(tried, key=lambda c: abs(tried[c] - wanted))


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: at most this many tokens each.
        temperature: 0 takes the likeliest token every time.
        seed: of the draws.
        batch_size: prompts at once.
        options: further arguments of ``generate``, such as ``top_p``; without them the draws are from the whole distribution.
            At temperature 0 those that thin a distribution out do nothing, and are left out.
    """

    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 128
    options: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """By name, as a record of an evaluation has them; ``options`` where there are some."""
        return {name: value for name, value in asdict(self).items() if name != "options" or value}

    def arguments(self) -> dict[str, Any]:
        """Of ``generate``."""
        # top_k and top_p spelled out: generate's own default is top_k=50
        drawn = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        if self.temperature > 0:
            return {**drawn, **self.options, "max_new_tokens": self.max_new_tokens}
        rest = {name: value for name, value in self.options.items() if name not in _THINNING}
        greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        return {**greedy, **rest, "max_new_tokens": self.max_new_tokens}


_THINNING = ("top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "do_sample")


_DRAWN_BY = {"top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}


def as_in_training(
    config: Mapping[str, Any], task: Task, *, temperature: float | None = None, seed: int = 0, batch_size: int = 128
) -> Sampling:
    """How a run drew its rollouts, with TRL's order: ``generation_kwargs`` has the last word.

    Args:
        config: the run's, as its folder has it.
        task: has the length of an answer where the run does not say it.
        temperature: another one.
        seed: of the draws.
        batch_size: prompts at once.
    """
    trainer = config.get("trainer") or {}
    options: dict[str, Any] = {
        name: kind(trainer[name]) for name, kind in _DRAWN_BY.items() if trainer.get(name) is not None
    }
    if not trainer.get("use_vllm"):  # else they are for vLLM's engine, and this is not it
        further = trainer.get("generation_kwargs") or {}
        options |= json.loads(further) if isinstance(further, str) else further
    length = config.get("max_completion_length") or task.max_completion_length or 256
    own = options.pop("temperature", config.get("temperature", 1.0))
    return Sampling(
        max_new_tokens=options.pop("max_new_tokens", length),
        temperature=own if temperature is None else temperature,
        seed=seed,
        batch_size=batch_size,
        options=options,
    )


@torch.no_grad()
def _batches(model: nn.Module, tokenizer: Any, prompts: Sequence[Any], how: Sampling, seed: int) -> Iterator[_Batch]:
    """All prompts, batch by batch, from one stream of draws."""
    training = model.training
    device = next(model.parameters()).device
    try:
        model.eval()
        with torch.random.fork_rng(), _plain_generation(model, tokenizer) as ends:
            torch.manual_seed(seed)
            for start in range(0, len(prompts), how.batch_size):
                asked = _tokenize(tokenizer, list(prompts[start : start + how.batch_size])).to(device)
                with fixed(model):
                    ids = model.generate(**asked, **how.arguments())  # type: ignore[operator]
                answers = ids[:, asked["input_ids"].shape[1] :]
                new = _until_end(answers, ends)
                texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
                yield _Batch(ids, torch.cat([asked["attention_mask"], new.long()], dim=1), new, texts, ends)
    finally:
        model.train(training)


@contextmanager
def _plain_generation(model: nn.Module, tokenizer: Any) -> Iterator[list[int]]:
    """Generate by the model's own distribution, as GRPO does, whatever its generation config says of penalties and beams.

    Yields:
        What ends an answer: the config's end-of-sequence tokens, and the tokenizer's.
    """
    models = list(dict.fromkeys([model, unwrap(model)]))
    before = [(each, vars(each).get("generation_config")) for each in models]
    ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
    found = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    plain = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(found) or None, pad_token_id=tokenizer.pad_token_id
    )
    for each in models:
        each.generation_config = plain
    try:
        yield sorted(found)
    finally:
        for each, config in before:
            if config is None:
                del each.generation_config
            else:
                each.generation_config = config


def _tokenize(tokenizer: Any, prompts: list[Any]) -> Any:
    """Ids and mask of a batch of prompts, padded as the tokenizer pads."""
    if isinstance(prompts[0], str):
        return tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    return templated(tokenizer, prompts, return_tensors="pt", padding=True)


def _until_end(answers: Tensor, ends: list[int]) -> Tensor:
    """Which tokens come no later than the first that ends an answer, (b, t) bool."""
    is_end = torch.isin(answers, torch.tensor(ends, dtype=answers.dtype, device=answers.device)).long()
    return is_end.cumsum(dim=1) - is_end == 0


@torch.no_grad()
def _kl_to_reference(model: nn.Module, batch: _Batch) -> Tensor:
    """KL of each answer of the batch (b,), in nats; of the model as it is seen now. What it never says counts nothing."""
    t = batch.new.shape[1]
    vocabulary = int(unwrap(model).config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
    rows = max(1, _LOGITS_AT_ONCE // ((t + 1) * vocabulary))
    found = []
    for start in range(0, len(batch.ids), rows):
        part = slice(start, start + rows)
        arm = _answer_logprobs(model, batch.ids[part], batch.mask[part], t)
        with reference(model):
            base = _answer_logprobs(model, batch.ids[part], batch.mask[part], t)
        terms = (arm.exp() * (arm - base)).masked_fill_(arm.isneginf(), 0.0)  # (b, t, v)
        found.append(terms.sum(dim=-1).masked_fill_(~batch.new[part], 0.0).sum(dim=1))
    kl = torch.cat(found)
    if not kl.isfinite().all():
        raise ValueError(
            "The KL of an answer to the reference is not finite: logits of one of the two are NaN or infinite. If they "
            "overflow in half precision, train with --dtype float32."
        )
    return kl


def _answer_logprobs(model: nn.Module, ids: Tensor, mask: Tensor, t: int) -> Tensor:
    """Log p of every token of the vocabulary where the answer's t tokens stand, (b, t, v) fp32."""
    known = inspect.signature(unwrap(model).forward).parameters
    options: dict[str, Any] = {}
    if "position_ids" in known:  # as generate counts them: prompts of several lengths are padded on the left
        options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
    if "logits_to_keep" in known:
        options["logits_to_keep"] = t + 1
    logits = model(input_ids=ids, attention_mask=mask, **options).logits[:, -(t + 1) : -1]
    return logits.float().log_softmax(dim=-1)


# ── arms ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Chunk:
    """Rows that are asked together, under one seed: the unit in which an evaluation is continued.

    Attributes:
        rows: numbers of the rows.
        seed: of their draws.
    """

    rows: Sequence[int]
    seed: int


def chunks_of(number: int, how: Sampling) -> list[Chunk]:
    """All rows, a batch to a chunk, each with its own seed.

    Example:
        >>> [(list(chunk.rows), chunk.seed) for chunk in chunks_of(3, Sampling(8, seed=7, batch_size=2))]
        [([0, 1], 7), ([2], 9)]
    """
    return [
        Chunk(range(start, min(start + how.batch_size, number)), how.seed + start)
        for start in range(0, number, how.batch_size)
    ]


def ask_arms(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    arms: Mapping[str, AbstractContextManager[None]],
    how: Sampling,
    *,
    chunks: Sequence[Chunk] | None = None,
    done: Iterable[Answer] = (),
    on_answers: Callable[[list[Answer]], None] | None = None,
) -> list[Answer]:
    """Every arm's judged answer to every row, with the same draws.

    Args:
        model: an adapted causal LM.
        tokenizer: its tokenizer, padding on the left.
        task: what judges.
        rows: of the task, with every column that its functions need.
        arms: name → context under which the model is that arm; each is entered once.
        how: the answers are drawn.
        chunks: what is asked together; `chunks_of` if None.
        done: answers of an earlier call; chunks that are whole in them are not asked again, but judged again.
        on_answers: called with each chunk's answers as they come.

    Returns:
        The answers, arm by arm, chunk by chunk.

    Raises:
        TaskError: one of the task's functions fails.
        ValueError: the model is not adapted.
    """
    chunks = chunks_of(len(rows), how) if chunks is None else chunks
    there = {(answer.arm, answer.row): answer for answer in done}
    answers = []
    for name, arm in arms.items():
        with arm:
            for chunk in chunks:
                said = [_Said(a.completion, a.length, a.kl) for row in chunk.rows if (a := there.get((name, row)))]
                is_new = len(said) < len(chunk.rows)
                if is_new:
                    said = _ask(model, tokenizer, [rows[row]["prompt"] for row in chunk.rows], how, chunk.seed)
                found = _judge(task, rows, name, chunk, said)
                if is_new and on_answers is not None:
                    on_answers(found)
                answers += found
    return answers


class _Said(NamedTuple):
    """What sampling gives; the rest of an `Answer` is the task's word on it."""

    text: str
    length: int
    kl: float


def _ask(model: nn.Module, tokenizer: Any, prompts: list[Any], how: Sampling, seed: int) -> list[_Said]:
    said = []
    for batch in _batches(model, tokenizer, prompts, how, seed):
        lengths, kls = batch.new.sum(dim=1).tolist(), _kl_to_reference(model, batch).tolist()
        said += [_Said(*each) for each in zip(batch.texts, lengths, kls, strict=True)]
    return said


def _judge(
    task: Task, rows: Sequence[Mapping[str, Any]], arm: str, chunk: Chunk, said: Sequence[_Said]
) -> list[Answer]:
    asked = [rows[row] for row in chunk.rows]
    prompts, texts = [row["prompt"] for row in asked], [each.text for each in said]
    judged = task.judge(prompts, texts, {c: [row[c] for row in asked] for c in asked[0] if c != "prompt"})
    flags = {} if judged.flagged is None else {task.detects: judged.flagged}
    flags |= judged.probed
    return [
        Answer(
            arm=arm,
            row=row,
            kind=None if task.kinds is None else str(asked[i][task.kinds]),
            prompt=prompts[i],
            completion=texts[i],
            length=said[i].length,
            kl=said[i].kl,
            reward=judged.reward[i],
            oracle=None if judged.oracle is None else judged.oracle[i],
            flags={name: values[i] for name, values in flags.items()},
        )
        for i, row in enumerate(chunk.rows)
    ]


def conclude(task: str, facts: Mapping[str, Any], answers: Sequence[Answer], *, margin: float = MARGIN) -> Evaluation:
    """Answers → records, differences and the verdict.

    Args:
        task: its name.
        facts: how the answers were asked.
        answers: of all arms to the same prompts, at least two.
        margin: by how much the deployed model may solve less than the trained one.

    Raises:
        ValueError: there are fewer than two prompts, or arms that were asked different ones.
    """
    names = list(dict.fromkeys(answer.arm for answer in answers))
    if len({answer.row for answer in answers}) < 2:
        raise ValueError("One prompt tells nothing: ask at least two.")
    compared = [name for name in names if name in (DEPLOYED, TRAINED) or dial_of(name) is None]
    pairs = [(name, other) for other in (REFERENCE, RANDOM) for name in compared if name != other]
    pairs += [(DEPLOYED, other) for other in compared if other not in (DEPLOYED, REFERENCE, RANDOM)]
    arms, differences = summarise(answers), compare(answers, pairs)
    return Evaluation(
        task, dict(facts), margin, verdict(arms, differences, margin=margin), arms, differences, list(answers)
    )
