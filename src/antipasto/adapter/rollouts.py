"""Per-sequence gradients for the cost of one backward.

    ∂L/∂θ = Σ_tokens (Uᵀ ∂L/∂y) ⊙ (Vh x) = Σ_b g_b,     g_b: the same sum over the tokens of sequence b alone     (batch, r)

Each layer's θ (r,) is expanded to one row per sequence. g is the gradient of the expanded θ, which autograd computes on the
way to the gradient of θ. If L is a sum of one term per sequence, g_b is the gradient of the term of sequence b. Experts in one
parameter run once per sequence for that, each time with that sequence's row (`experts`); their g is flat, (batch, E·r).

`nll_gradients` applies this to each completion's negative log-likelihood (NLL) given its prompt.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from antipasto.adapter import AntiPastoExperts
from antipasto.adapter.knobs import token_logprobs
from antipasto.adapter.rows import batch_shape, in_backward, per_token
from antipasto.adapter.views import adapted_layers, replaced, unwrap
from antipasto.adapter.zero import refuse_partitioned


class RolloutGrads(Mapping[str, Tensor]):
    """Layer name → gradients (batch, r), one row per sequence, filled by the backwards in a `rollout_grads` context.

    With gradient accumulation, the rows of the micro-batches are concatenated. A layer that took no part has no entry. r is
    that of the layer's basis.
    """

    def __init__(self, sequence_index: Tensor | None, *, detach: bool) -> None:
        self.sequence_index = sequence_index
        self.leaves: list[Tensor] = []
        self._detach = detach
        self._rows: dict[str, dict[int, Tensor]] = {}
        self._forward = 0  # number of model calls with gradient
        self._finished = 0  # the last of these whose backward was seen
        self._tokens: tuple[int, ...] = ()  # (batch, sequence) of the last of them
        # layer → shape of its input → sequence_index and _tokens there, in calls whose backward was not seen yet
        self._seen: dict[str, dict[tuple[int, ...], tuple[Tensor | None, tuple[int, ...]]]] = {}

    def clear(self) -> None:
        """Delete all rows, before the next step."""
        self._rows.clear()
        self.leaves.clear()

    def __getitem__(self, name: str) -> Tensor:
        by_forward = self._rows[name]
        return torch.cat([by_forward[forward] for forward in sorted(by_forward)])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: record that a micro-batch of this shape begins."""
        if _OPEN[module][-1] is not self:
            return  # the call belongs to a nested context
        if torch.is_grad_enabled():
            self._tokens = batch_shape(args, kwargs)
            if self._finished == self._forward:
                self._seen.clear()
            self._forward += 1

    def spread(self, name: str, theta: Tensor, x: Tensor) -> Tensor:
        """Expand θ (r,) or (b, r) to a shape that broadcasts to x's tokens, and record the gradient of each sequence's row."""
        rows, index, tokens = self._rows_of(name, theta, x, (-1,))
        return self._per_token(name, rows, x, tokens) if index is None else rows[index]  # (…, r)

    def by_sequence(self, name: str, theta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `spread` for θ (E, r) or (b, E, r) of experts, but return a row per sequence, and each token's sequence.

        Returns:
            (b, E, r), and (T,) for tokens x (T, d).
        """
        rows, index, tokens = self._rows_of(name, theta, x, (-1, -1))
        if index is None:
            index = self._per_token(name, torch.arange(len(rows), device=x.device)[:, None], x, tokens)
        return rows, index.flatten()

    def _rows_of(
        self, name: str, theta: Tensor, x: Tensor, shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        """θ of each sequence, whose gradient is recorded; which of them each token sees, if said; and the call's (b, s)."""
        if self._forward == 0:
            raise ValueError(
                f"{name} was called directly inside rollout_grads: call the model passed to rollout_grads."
            )
        recomputes = in_backward()
        # reentrant checkpointing has run it without gradient before; otherwise the rows of the first run get the gradient
        again = recomputes and name in self._seen
        if recomputes and not again and self._forward - self._finished > 1:
            raise ValueError(
                "Several forwards before one backward, under reentrant gradient checkpointing: it is not known which of them "
                "is run again. Call backward after each, or use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        if self._detach or not theta.requires_grad:
            theta = theta.detach().requires_grad_()
            if not again:
                self.leaves.append(theta)
        leading = tuple(x.shape[:-1])
        index, tokens = self.sequence_index, self._tokens
        if again:
            index, tokens = self._seen[name].get(leading, (index, tokens))
        elif not recomputes:
            self._seen.setdefault(name, {})[leading] = index, tokens
        index = None if index is None else index.to(x.device)
        if index is None:
            batch = tokens[0] if tokens else (*leading, 1)[0]
        elif index.numel() == torch.Size(leading).numel():
            batch, index = int(index.max()) + 1, index.reshape(leading)
        else:
            raise ValueError(
                f"{name} sees {torch.Size(leading).numel()} tokens (inputs of leading shape {leading}), "
                f"but sequence_index has {index.numel()} entries: give one per token."
            )
        rows = theta.expand(batch, *shape)
        if not again:
            self._keep(name, rows)
        return rows, index, tokens

    def _per_token(self, name: str, rows: Tensor, x: Tensor, tokens: tuple[int, ...]) -> Tensor:
        try:
            return per_token(rows, x, tokens)
        except ValueError as error:
            raise ValueError(f"{name} sees {error}") from None

    def _keep(self, name: str, rows: Tensor) -> None:
        forward = self._forward

        def keep(grad: Tensor) -> None:
            grad = grad.detach().reshape(grad.shape[0], -1)
            self._finished = max(self._finished, forward)
            earlier = self._rows.setdefault(name, {}).get(forward)  # exists if a layer is used twice in one call
            self._rows[name][forward] = grad.clone() if earlier is None else earlier + grad

        rows.register_hook(keep)


_OPEN: weakref.WeakKeyDictionary[nn.Module, list[RolloutGrads]] = weakref.WeakKeyDictionary()
"""Model → its open contexts, innermost last."""


@contextmanager
def rollout_grads(
    model: nn.Module, sequence_index: Tensor | None = None, *, detach: bool = False
) -> Iterator[RolloutGrads]:
    """Context in which a backward also computes each sequence's own gradient of θ.

    The knobs get their gradients as usual. Summed over the batch, the rows equal what was added to them, up to rounding.

    Args:
        model: an adapted model. ``input_ids``, ``inputs_embeds`` or else its first tensor argument has the batch first.
        sequence_index: for packed or flattened inputs: the sequence that each token belongs to, one integer per token,
            counted from 0. Where it changes, set ``grads.sequence_index`` before each micro-batch.
        detach: do not pass the gradient on to the knobs. Differentiate with respect to ``grads.leaves`` in that case.

    Yields:
        Layer name → gradients (batch, r), in the knobs' dtype. They can also be read after the context.

    Raises:
        ValueError: the model is not adapted, or a layer cannot tell which token belongs to which sequence.

    Example:
        >>> from antipasto import AntiPastoConfig, wrap
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> layers = wrap(model, AntiPastoConfig(target_modules=["0"], cache_dir=None))
        >>> with rollout_grads(model) as grads:
        ...     model(torch.randn(5, 4)).sum().backward()
        >>> grads["0"].shape
        torch.Size([5, 3])
    """
    grads = RolloutGrads(sequence_index, detach=detach)
    inner = unwrap(model)
    spreads: dict[nn.Module, Any] = {
        layer: partial(grads.by_sequence if isinstance(layer, AntiPastoExperts) else grads.spread, name)
        for name, layer in adapted_layers(model).items()
    }
    handle = inner.register_forward_pre_hook(grads.on_forward, with_kwargs=True, prepend=True)
    _OPEN.setdefault(inner, []).append(grads)
    try:
        with replaced("spread_theta", spreads):
            yield grads
    finally:
        handle.remove()
        _OPEN[inner].remove(grads)


def flat_rows(grads: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    """Concatenate gradients by layer, (b, r) each, to (b, R) in fp32; zeros for layers that have none.

    Args:
        grads: layer name → (b, r), or more than r numbers, of which the first r are taken.
        sizes: layer name → r, in the order of the result.

    Example:
        >>> flat_rows({"b": torch.ones(1, 3)}, {"a": 1, "b": 2})
        tensor([[0., 1., 1.]])
    """
    one = next(iter(grads.values()))
    blocks = [grads[name] if name in grads else one.new_zeros(len(one), r) for name, r in sizes.items()]
    return torch.cat([block[:, :r].float() for block, r in zip(blocks, sizes.values(), strict=True)], 1)


# ── the gradient of a completion's NLL ───────────────────────────────────────────────────────────────────────────────


class TokenIds(NamedTuple):
    """Token ids of a prompt and its completion.

    Attributes:
        prompt: of the prompt.
        completion: of the completion.
        tool_mask: 1 for each token of the completion that the model wrote, 0 for what tools or an environment answered, as in
            TRL; None if the model wrote all of it.
    """

    prompt: Sequence[int]
    completion: Sequence[int]
    tool_mask: Sequence[int] | None = None

    @property
    def length(self) -> int:
        """Number of tokens of prompt and completion together."""
        return len(self.prompt) + len(self.completion)

    @property
    def own(self) -> Sequence[int]:
        """The tool mask; ones if there is none."""
        return [1] * len(self.completion) if self.tool_mask is None else self.tool_mask

    @property
    def hashable(self) -> TokenIds:
        """The same ids in tuples."""
        return TokenIds(tuple(self.prompt), tuple(self.completion), self.tool_mask and tuple(self.tool_mask))


def nll_gradients(
    model: nn.Module, sequences: Sequence[TokenIds], *, per_token: bool = True
) -> tuple[RolloutGrads, Tensor]:
    """Compute ∇θ NLL(completion_b | prompt_b) for every sequence b, with one backward, in the model's present view.

    Sequences are padded on the right, whatever the tokenizer's padding side: a causal model does not see later tokens.
    Nothing is written to the model or its gradients.

    Args:
        model: an adapted causal LM.
        sequences: token ids of prompts and completions, each with at least one token.
        per_token: take the mean over the completion's tokens, so that long answers do not outweigh short ones; if False, the
            sum.

    Returns:
        Layer name → (b, r), and the NLL (b,) in fp32.

    Raises:
        ValueError: no layer can be differentiated, because of reentrant gradient checkpointing; or the model is under ZeRO-3.
    """
    refuse_partitioned(model, "a direction or a score at the reference")
    ids, mask, completion = (t.to(next(model.parameters()).device) for t in _pad(sequences))
    with torch.enable_grad(), rollout_grads(model, detach=True) as grads:
        # the prompts' logits are not needed, but would be most of the head's work
        keep = ids.shape[1] - min(len(one.prompt) for one in sequences) + 1
        options = {"logits_to_keep": keep} if "logits_to_keep" in signature(unwrap(model).forward).parameters else {}
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits[:, -keep:]
        nll = completion_nll(token_logprobs(logits, ids[:, -keep:]), completion[:, 1 - keep :], per_token=per_token)
        backward_by_sequence(nll, grads)
    return grads, nll.detach()


def completion_nll(logprobs: Tensor, mask: Tensor, *, per_token: bool = True) -> Tensor:
    """NLL of each completion (b,), per token or in total, from token log-probabilities and the completion mask (b, t)."""
    total = -(logprobs * mask).sum(-1)
    return total / mask.sum(-1).clamp_min(1) if per_token else total


def backward_by_sequence(losses: Tensor, grads: RolloutGrads) -> None:
    """Backpropagate one loss per sequence (b,) into the rows of a `rollout_grads` context with ``detach=True``.

    Raises:
        ValueError: no layer that took part can be differentiated.
    """
    if not grads.leaves:
        raise ValueError(
            "No layer can be differentiated, which reentrant gradient checkpointing causes: turn checkpointing off here, or "
            "use gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
    torch.autograd.backward(losses.sum(), inputs=grads.leaves)


def tokenize(
    tokenizer: Any, prompt: str | list[dict[str, str]], completion: str, *, append_eos: bool = True
) -> TokenIds:
    """Tokenise prompt and completion separately, as in sampling, where the completion is generated after the prompt.

    Raises:
        ValueError: the prompt or the completion has no token.
    """
    prompt_ids = tokenize_prompt(tokenizer, prompt)
    completion_ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    if append_eos and tokenizer.eos_token_id is not None:
        completion_ids.append(tokenizer.eos_token_id)
    if not prompt_ids or not completion_ids:
        raise ValueError(f"Prompt {prompt!r} or its completion {completion!r} has no token: both need at least one.")
    return TokenIds(prompt_ids, completion_ids)


def tokenize_prompt(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    """Tokenise a prompt: a text as it is; a chat by the chat template, with the generation prompt."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(templated(tokenizer, prompt)["input_ids"])


def templated(tokenizer: Any, chats: Any, **options: Any) -> Any:
    """Call ``apply_chat_template`` on one chat or several, with the generation prompt.

    Raises:
        ValueError: the tokenizer has no chat template, or the template rejects a chat.
    """
    model = tokenizer.name_or_path
    if tokenizer.chat_template is None:
        raise ValueError(
            f"A prompt is a chat, but the tokenizer of {model} has no chat template: use a chat model (often named -Instruct "
            "or -it), or give prompts as plain texts."
        )
    try:
        return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True, **options)
    except TemplateError as error:
        raise ValueError(
            f"The chat template of {model} rejects a prompt ({error}): use the roles that it supports, in its order."
        ) from error


def _pad(sequences: Sequence[TokenIds]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask, and mask of the completion's tokens that the model wrote, (b, s), padded right with 0."""
    ids, mask, own = (
        torch.zeros(len(sequences), max(one.length for one in sequences), dtype=torch.long) for _ in range(3)
    )
    for row, one in enumerate(sequences):
        ids[row, : one.length] = torch.tensor([*one.prompt, *one.completion])
        mask[row, : one.length] = 1
        own[row, len(one.prompt) : one.length] = torch.tensor(one.own)
    return ids, mask, own
