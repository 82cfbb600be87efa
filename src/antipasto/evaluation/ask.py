"""Sample each arm's answers to a task's prompts, judge them, and measure their KL to the reference.

An *arm* is the model in one view: the reference, as trained, deployed, or without a control's book.

    KL of an answer a  =  Σ_t Σ_v p(v | a_<t) log( p(v | a_<t) / q(v | a_<t) )      p the arm, q the reference

at temperature 1, with v over the vocabulary and t over the tokens that the arm produced. The mean over sampled answers
estimates KL(arm ‖ reference) of whole answers. It has less noise than log p − log q of the sampled tokens, and is never
negative.
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

_LOGITS_AT_ONCE = 2**26  # numbers per model: 256 MiB in fp32


# ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Batch:
    """Prompts with their answers.

    Attributes:
        ids: token ids (b, p + t) of prompts and answers.
        mask: attention mask (b, p + t).
        new: which of the t new tokens belong to the answer, (b, t) bool.
        texts: the answers' texts.
        ends: ids of the tokens that end an answer.
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
    """Sample one completion of each prompt from the model in its present view.

    The caller's random state is not changed. The same seed always gives the same samples.

    Args:
        model: a causal LM with ``generate``.
        tokenizer: its tokenizer, padding on the left.
        prompts: plain texts, or chats.
        max_new_tokens: maximal number of tokens per completion.
        seed: of the sampling.
        batch_size: prompts per batch.
        temperature: of the sampling; 0 means greedy decoding.

    Returns:
        The completions' texts, without special tokens, in the order of the prompts.
    """
    how = Sampling(max_new_tokens, temperature=temperature, batch_size=batch_size)
    return [text for batch in _batches(model, tokenizer, prompts, how, seed) for text in batch.texts]


def own_answers(model: nn.Module, tokenizer: Any, prompts: Sequence[Any], how: Sampling) -> list[Completion]:
    """Sample one answer of the reference to each prompt, with its tokens, to calibrate a monitor."""
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
    """Find c with KL(c θ ‖ reference) = KL(deployed ‖ reference) of whole sampled answers: a control for mere shrinkage."""

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
    """The c in (0, 1.5) with the KL closest to ``wanted``, of eight tries that begin at 1.

    Near the reference, KL grows about as c², so c ← c √(wanted / KL(c)). Where KL grows as c⁴ or faster, for example where the
    policy tips over into an exploit, this would oscillate: a step outside the remaining interval is replaced by bisection.
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
    """How answers are sampled.

    Attributes:
        max_new_tokens: maximal number of tokens per answer.
        temperature: of the sampling; 0 means greedy decoding.
        seed: of the sampling.
        batch_size: prompts per batch.
        options: further arguments of ``generate``, such as ``top_p``. Without them, samples are from the full distribution.
            At temperature 0, options that truncate the distribution are left out.
    """

    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 128
    options: Mapping[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """The fields by name, for the record of an evaluation; ``options`` only if there are any."""
        return {name: value for name, value in asdict(self).items() if name != "options" or value}

    def arguments(self) -> dict[str, Any]:
        """Arguments for ``generate``."""
        # top_k and top_p are explicit because generate's default is top_k=50
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
    """Sampling as in a training run. As in TRL, ``generation_kwargs`` take precedence over other options.

    Args:
        config: the run's config, as saved in its folder.
        task: gives the length of an answer if the config does not.
        temperature: replaces that of the run.
        seed: of the sampling.
        batch_size: prompts per batch.
    """
    trainer = config.get("trainer") or {}
    options: dict[str, Any] = {
        name: kind(trainer[name]) for name, kind in _DRAWN_BY.items() if trainer.get(name) is not None
    }
    if not trainer.get("use_vllm"):  # with vLLM they are options of its engine, which is not used here
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
    """Generate answers to all prompts, batch by batch, from one random stream."""
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
    """Context without the model's generation config, so that penalties or beams in it do not apply, as in GRPO.

    Yields:
        Ids of the tokens that end an answer: the end-of-sequence tokens of the config and of the tokenizer.
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
    """Token ids and attention mask of a batch of prompts, padded on the tokenizer's padding side."""
    if isinstance(prompts[0], str):
        return tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    return templated(tokenizer, prompts, return_tensors="pt", padding=True)


def _until_end(answers: Tensor, ends: list[int]) -> Tensor:
    """Mask (b, t) bool of the tokens up to and including the first that ends an answer."""
    is_end = torch.isin(answers, torch.tensor(ends, dtype=answers.dtype, device=answers.device)).long()
    return is_end.cumsum(dim=1) - is_end == 0


@torch.no_grad()
def _kl_to_reference(model: nn.Module, batch: _Batch) -> Tensor:
    """KL of each answer of the batch (b,), in nats, for the model in its present view. Tokens with p = 0 contribute 0."""
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
            "The KL of an answer to the reference is not finite: logits of the arm or of the reference are NaN or infinite. "
            "If they overflow in half precision, train with --dtype float32."
        )
    return kl


def _answer_logprobs(model: nn.Module, ids: Tensor, mask: Tensor, t: int) -> Tensor:
    """Log-probabilities of the whole vocabulary at the answer's t positions, (b, t, v) fp32."""
    known = inspect.signature(unwrap(model).forward).parameters
    options: dict[str, Any] = {}
    if "position_ids" in known:  # as in generate: prompts of different lengths are padded on the left
        options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
    if "logits_to_keep" in known:
        options["logits_to_keep"] = t + 1
    logits = model(input_ids=ids, attention_mask=mask, **options).logits[:, -(t + 1) : -1]
    return logits.float().log_softmax(dim=-1)


# ── arms ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Chunk:
    """Rows that are sampled together with one seed. An interrupted evaluation continues chunk by chunk.

    Attributes:
        rows: indices of the rows.
        seed: of their sampling.
    """

    rows: Sequence[int]
    seed: int


def chunks_of(number: int, how: Sampling) -> list[Chunk]:
    """Split rows into chunks of one batch each, with different seeds.

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
    """Sample and judge every arm's answer to every row, with the same random draws for all arms.

    Args:
        model: an adapted causal LM.
        tokenizer: its tokenizer, padding on the left.
        task: judges the answers.
        rows: rows of the task, with all columns that its functions need.
        arms: name → context in which the model is that arm; each is entered once. ``reference`` is the reference.
        how: how answers are sampled.
        chunks: which rows are sampled together; `chunks_of` if None.
        done: answers of an earlier call. Chunks that are complete in it are not sampled again, but judged again.
        on_answers: called with each newly sampled chunk's answers.

    Returns:
        The answers, by arm and then by chunk.

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
                    prompts = [rows[row]["prompt"] for row in chunk.rows]
                    said = _ask(model, tokenizer, prompts, how, chunk.seed, is_reference=name == REFERENCE)
                found = _judge(task, rows, name, chunk, said)
                if is_new and on_answers is not None:
                    on_answers(found)
                answers += found
    return answers


class _Said(NamedTuple):
    """The part of an `Answer` that comes from sampling; the rest comes from the task."""

    text: str
    length: int
    kl: float


def _ask(
    model: nn.Module, tokenizer: Any, prompts: list[Any], how: Sampling, seed: int, *, is_reference: bool
) -> list[_Said]:
    said = []
    for batch in _batches(model, tokenizer, prompts, how, seed):
        lengths = batch.new.sum(dim=1).tolist()
        kls = [0.0] * len(lengths) if is_reference else _kl_to_reference(model, batch).tolist()
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
    """Compute records, differences and the verdict from answers.

    Args:
        task: the task's name.
        facts: how the answers were sampled.
        answers: of all arms to the same prompts, at least two.
        margin: as in `verdict`.

    Raises:
        ValueError: there are fewer than two prompts, or the arms have answers to different prompts.
    """
    names = list(dict.fromkeys(answer.arm for answer in answers))
    if len({answer.row for answer in answers}) < 2:
        raise ValueError("An evaluation needs answers to at least two prompts.")
    compared = [name for name in names if name in (DEPLOYED, TRAINED) or dial_of(name) is None]
    pairs = [(name, other) for other in (REFERENCE, RANDOM) for name in compared if name != other]
    pairs += [(DEPLOYED, other) for other in compared if other not in (DEPLOYED, REFERENCE, RANDOM)]
    arms, differences = summarise(answers), compare(answers, pairs)
    return Evaluation(
        task, dict(facts), margin, verdict(arms, differences, margin=margin), arms, differences, list(answers)
    )
