"""Each sequence's gradient, out of one backward, is that of a backward of its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, Family, losses, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

import antipasto as ap
from antipasto.adapter.rollouts import TokenIds, nll_gradients


def build(family: Family, dtype: torch.dtype = torch.float32, rank: int | None = None) -> nn.Module:
    model = get_peft_model(
        family.build(dtype=dtype), ap.AntiPastoConfig(target_modules=family.target_modules, rank=rank)
    )
    generator = torch.Generator().manual_seed(0)
    for layer in ap.knobs(model).values():
        layer.delta_s.data.copy_(torch.randn(layer.r, generator=generator) * 0.05)
    return model


def one_by_one(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    knobs = ap.knobs(model)
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in knobs}
    for i in range(len(ids)):
        loss = losses(model, ids[i : i + 1], None if mask is None else mask[i : i + 1]).sum()
        for name, grad in zip(knobs, torch.autograd.grad(loss, [k.delta_s for k in knobs.values()]), strict=True):
            rows[name].append(grad)
    return {name: torch.stack(grads) for name, grads in rows.items()}


def assert_rows(grads: ap.RolloutGrads, want: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert set(grads) == set(want)
    for name, rows in want.items():
        scale = rows.abs().max()
        torch.testing.assert_close(
            grads[name] / scale, rows / scale, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [None, 3])
def test_rows_are_those_of_single_backwards(family: str, rank: int | None) -> None:
    model, ids = build(FAMILIES[family], rank=rank), tokens(4, 6)
    with ap.rollout_grads(model) as grads:
        losses(model, ids).sum().backward()
    assert_rows(grads, one_by_one(model, ids))
    for name, layer in ap.knobs(model).items():
        torch.testing.assert_close(grads[name].sum(0), layer.delta_s.grad)


def test_the_forward_and_the_knobs_gradient_are_those_without_the_context() -> None:
    model, ids = build(FAMILIES["llama"]), tokens(4, 6)
    plain = losses(model, ids)
    plain.sum().backward()
    before = {name: layer.delta_s.grad.clone() for name, layer in ap.knobs(model).items()}
    model.zero_grad()
    with ap.rollout_grads(model):
        inside = losses(model, ids)
        inside.sum().backward()
    assert torch.equal(inside, plain)
    for name, layer in ap.knobs(model).items():
        torch.testing.assert_close(layer.delta_s.grad, before[name])


def test_padding_changes_no_row() -> None:
    model, ids = build(FAMILIES["llama"]), tokens(3, 5)
    short = torch.cat([ids, torch.zeros(3, 4, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones(3, 5, dtype=torch.long), torch.zeros(3, 4, dtype=torch.long)], 1)
    with ap.rollout_grads(model) as grads:
        losses(model, short, mask).sum().backward()
    assert_rows(grads, one_by_one(model, ids))


@given(split=st.lists(st.integers(1, 3), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_accumulation_keeps_the_rows_in_order(split: list[int], seed: int) -> None:
    model, ids = build(FAMILIES["llama"]), tokens(sum(split), 4, seed)
    with ap.rollout_grads(model) as grads:
        for part in ids.split(split):
            losses(model, part).sum().backward()
    assert_rows(grads, one_by_one(model, ids))
    for name, layer in ap.knobs(model).items():
        torch.testing.assert_close(grads[name].sum(0), layer.delta_s.grad, atol=1e-4, rtol=1e-4)


def test_two_forwards_and_one_backward_keep_the_order_too() -> None:
    model, ids = build(FAMILIES["llama"]), tokens(4, 4)
    with ap.rollout_grads(model) as grads:
        (losses(model, ids[:1]).sum() + losses(model, ids[1:]).sum()).backward()
        with torch.no_grad():
            losses(model, ids)  # leaves no row
    assert_rows(grads, one_by_one(model, ids))
    grads.clear()
    assert len(grads) == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model, ids = build(FAMILIES["llama"]).train(), tokens(4, 5)
    want = one_by_one(model, ids)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    with ap.rollout_grads(model) as grads:
        for part in ids.split(2):
            losses(model, part).sum().backward()
    assert_rows(grads, want)


def test_checkpointing_that_is_not_reentrant_runs_several_forwards_again() -> None:
    """Of several sizes; and calls without gradient in between do not count."""
    model, ids = build(FAMILIES["llama"]).train(), tokens(4, 5)
    parts = [ids[:1], ids[1:3, :4], ids[3:]]
    separate = [one_by_one(model, part) for part in parts]
    want = {name: torch.cat([rows[name] for rows in separate]) for name in separate[0]}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with ap.rollout_grads(model) as grads:
        loss = sum(losses(model, part).sum() for part in parts)
        with torch.no_grad():
            losses(model, ids)
        loss.backward()
    assert_rows(grads, want)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_of_two_forwards_at_once_is_refused() -> None:
    model, ids = build(FAMILIES["llama"]).train(), tokens(4, 5)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with ap.rollout_grads(model):
        losses(model, ids[:1]).sum().backward()
        with torch.no_grad():
            losses(model, ids)  # does not count
        loss = losses(model, ids[1:2]).sum()
        with torch.no_grad():
            losses(model, ids[:, :3])  # nor does this
        loss.backward()
        both = losses(model, ids[:1]).sum() + losses(model, ids[1:]).sum()
        with pytest.raises(ValueError, match="Several forwards before one backward"):
            both.backward()


def test_packed_sequences_by_their_index() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    layers = ap.wrap(model, ap.AntiPastoConfig(target_modules=["0", "2"]))
    x = torch.randn(9, 5)
    index = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3])
    want = {name: [] for name in layers}
    for i in range(4):
        grads = torch.autograd.grad(model(x[index == i]).square().sum(), [k.delta_s for k in layers.values()])
        for name, grad in zip(layers, grads, strict=True):
            want[name].append(grad)
    for shape in ((9,), (1, 9)):
        with ap.rollout_grads(model, sequence_index=index) as got:
            model(x.reshape(*shape, 5)).square().sum().backward()
        assert_rows(got, {name: torch.stack(rows) for name, rows in want.items()})
    with ap.rollout_grads(model) as got:  # another index each micro-batch
        for part, part_index in ((x[:4], index[:4]), (x[4:], index[4:] - 2)):
            got.sequence_index = part_index
            model(part).square().sum().backward()
    assert_rows(got, {name: torch.stack(rows) for name, rows in want.items()})


class Flattening(nn.Module):
    """A model that folds (b, s) into one dimension before its layer, as mixtures of experts do, and uses it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.inner(x.reshape(-1, 4)).tanh()
        return self.inner(flat).reshape(x.shape)


def test_flattened_tokens_and_a_layer_used_twice() -> None:
    model = Flattening()
    (layer,) = ap.wrap(model, ap.AntiPastoConfig(target_modules=["inner"])).values()
    x = torch.randn(3, 5, 4)
    with ap.rollout_grads(model) as grads:
        model(x).square().sum().backward()
    want = [torch.autograd.grad(model(row[None]).square().sum(), layer.delta_s)[0] for row in x]
    assert_rows(grads, {"inner": torch.stack(want)})


def test_bf16() -> None:
    model, ids = build(FAMILIES["llama"], torch.bfloat16), tokens(4, 6)
    with ap.rollout_grads(model) as grads:
        losses(model, ids).sum().backward()
    assert {rows.dtype for rows in grads.values()} == {torch.float32}
    assert_rows(grads, one_by_one(model, ids), tolerance=0.05)


def test_detached_rows_leave_the_knobs_alone_and_work_on_frozen_ones() -> None:
    model, ids = build(FAMILIES["llama"]), tokens(4, 6)
    want = one_by_one(model, ids)
    with ap.rollout_grads(model, detach=True) as grads:
        torch.autograd.backward(losses(model, ids).sum(), inputs=grads.leaves)
    assert_rows(grads, want)
    assert all(layer.delta_s.grad is None for layer in ap.knobs(model).values())
    model.requires_grad_(False)
    with ap.rollout_grads(model) as grads:
        losses(model, ids).sum().backward()
    assert_rows(grads, want)


def test_the_context_leaves_nothing_behind() -> None:
    model = build(FAMILIES["llama"])
    inner = model.get_base_model()
    with pytest.raises(KeyboardInterrupt), ap.rollout_grads(model):
        raise KeyboardInterrupt
    assert not inner._forward_pre_hooks
    assert all(layer.layer.spread_theta is None for layer in ap.knobs(model).values())


def test_what_cannot_be_told_apart_is_an_error() -> None:
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(5, 4))
    ap.wrap(model, ap.AntiPastoConfig(target_modules=["1"]))
    with (
        ap.rollout_grads(model, sequence_index=torch.zeros(7)),
        pytest.raises(ValueError, match=r"6 tokens.*7 entries"),
    ):
        model(torch.randn(2, 3, 5))
    with ap.rollout_grads(model), pytest.raises(ValueError, match="1 was called directly"):
        model[1](torch.randn(3, 5))
    picky = nn.Sequential(nn.Flatten(0, 2), nn.Linear(5, 4))
    ap.wrap(picky, ap.AntiPastoConfig(target_modules=["1"]))
    with ap.rollout_grads(picky), pytest.raises(ValueError, match="which token belongs to which sequence"):
        picky(torch.randn(2, 3, 2, 5))


class ManyWords(nn.Module):
    """A causal LM without layers in between, with as many words as real models have."""

    WORDS = 100_000

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(self.WORDS, 8)
        self.head = nn.Linear(8, self.WORDS)

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=4 * self.head(self.embed(input_ids)))


def test_a_completions_nll_is_exact_with_many_words() -> None:
    model = ManyWords()
    ap.wrap(model, ap.AntiPastoConfig(target_modules=["head"], rank=2, cache_dir=None))
    ids = torch.randint(ManyWords.WORDS, (4, 6), generator=torch.Generator().manual_seed(0))
    _, nll = nll_gradients(model, [TokenIds(row[:2], row[2:]) for row in ids.tolist()])
    with torch.no_grad():
        exact = model(ids).logits.double().log_softmax(-1)
    want = -exact[:, 1:-1].gather(2, ids[:, 2:, None]).squeeze(2).mean(1)
    torch.testing.assert_close(nll.double(), want, atol=5e-6, rtol=0)
