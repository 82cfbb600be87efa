"""A batch whose rows see different knobs is, row by row, what separate forwards are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES, losses, randomise, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

import antipasto as ap
from antipasto.adapter.rows import RowViews, batch_shape, per_token
from antipasto.adapter.views import adapted_layers, mixed

DEPLOYED = torch.tensor([True, False, False, True])


def build(family: str = "llama", rank: int | None = None) -> nn.Module:
    shape = FAMILIES[family]
    model = get_peft_model(shape.build(), ap.AntiPastoConfig(target_modules=shape.target_modules, rank=rank))
    randomise(model, 0.3)
    return model


def left_padded(batch: int = 4, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask: row i begins with i pads."""
    ids = tokens(batch, length)
    mask = (torch.arange(length) >= torch.arange(batch)[:, None]).long()
    return ids * mask, mask


def logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@contextmanager
def rows_of(model: nn.Module, deployed: torch.Tensor | None) -> Iterator[RowViews]:
    with mixed(model) as rows:
        rows.set(deployed)
        yield rows


def separately(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Every row's logits under the view that is its own."""
    with torch.no_grad():
        trained = logits(model, ids, mask)
        with ap.deployed(model):
            deployed = logits(model, ids, mask)
    assert (trained - deployed).abs().amax((1, 2)).min() > 1e-3  # the views differ in every row
    return torch.where(DEPLOYED[:, None, None], deployed, trained)


def assert_real_tokens(got: torch.Tensor, want: torch.Tensor, mask: torch.Tensor) -> None:
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=2e-5, rtol=1e-4)


def gradient(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: layer.delta_s.grad.clone() for name, layer in ap.knobs(model).items()}
    model.zero_grad()
    return found


def assert_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name, g in want.items():
        assert g.any()
        torch.testing.assert_close(got[name] / g.abs().max(), g / g.abs().max(), atol=1e-5, rtol=0)


# ── forward ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_what_its_own_view_gives(family: str) -> None:
    model, (ids, mask) = build(family), left_padded()
    want = separately(model, ids, mask)
    with torch.no_grad(), rows_of(model, DEPLOYED):
        assert_real_tokens(logits(model, ids, mask), want, mask)


def test_truncated_rank() -> None:
    model, (ids, mask) = build(rank=3), left_padded()
    want = separately(model, ids, mask)
    with torch.no_grad(), rows_of(model, DEPLOYED):
        assert_real_tokens(logits(model, ids, mask), want, mask)


@pytest.mark.parametrize("ranks", [(3, 8), (8, 3)])
def test_two_adapters_of_different_rank(ranks: tuple[int, int]) -> None:
    model, (ids, mask) = build(rank=ranks[0]), left_padded()
    model.add_adapter("second", ap.AntiPastoConfig(rank=ranks[1]))
    model.base_model.set_adapter(["default", "second"])
    for name in ("default", "second"):
        randomise(model, 0.3, adapter_name=name)
    want = separately(model, ids, mask)
    with torch.no_grad(), rows_of(model, DEPLOYED):
        assert_real_tokens(logits(model, ids, mask), want, mask)
    layer = next(iter(adapted_layers(model).values()))
    x = torch.randn(2, 5, layer.in_features)
    y = layer.base_layer(x)
    for knobs in (ap.knobs(model, adapter_name=name)["model.layers.0.self_attn.q_proj"] for name in layer.r):
        assert knobs.layer is layer
        y = y + x @ knobs.Vh.T @ torch.diag(knobs.delta_s + knobs.delta_s_hack) @ knobs.U.T
    torch.testing.assert_close(layer(x), y)


def test_layers_that_were_merged_are_not_inside_and_are_again_outside() -> None:
    model, (ids, mask) = build(), left_padded()
    want = separately(model, ids, mask)
    model.merge_adapter()
    merged = logits(model, ids, mask)
    with torch.no_grad(), rows_of(model, DEPLOYED):
        assert not any(layer.merged for layer in adapted_layers(model).values())
        assert_real_tokens(logits(model, ids, mask), want, mask)
    assert all(layer.merged for layer in adapted_layers(model).values())
    assert torch.equal(logits(model, ids, mask), merged)


def test_none_is_the_ordinary_model() -> None:
    model, (ids, mask) = build(), left_padded()
    plain = logits(model, ids, mask)
    with rows_of(model, None) as rows:
        assert torch.equal(logits(model, ids, mask), plain)
        rows.set(DEPLOYED)
        assert not torch.equal(logits(model, ids, mask), plain)
        rows.set(None)
        assert torch.equal(logits(model, ids, mask), plain)
        torch.testing.assert_close(logits(model, ids[:3], mask[:3]), plain[:3])  # of any size
    with mixed(model):  # at first, all see both
        assert torch.equal(logits(model, ids, mask), plain)


def test_a_contexts_view_counts_more_than_the_rows() -> None:
    model, (ids, mask) = build(), left_padded()
    with torch.no_grad():
        with ap.reference(model):
            base = logits(model, ids, mask)
        with ap.deployed(model):
            deployed = logits(model, ids, mask)
        with rows_of(model, DEPLOYED):
            inside = logits(model, ids, mask)
            with ap.reference(model):
                assert torch.equal(logits(model, ids, mask), base)
            with model.disable_adapter():
                assert torch.equal(logits(model, ids, mask), base)
            with ap.deployed(model):
                assert torch.equal(logits(model, ids, mask), deployed)
            assert torch.equal(logits(model, ids, mask), inside)


@given(
    parts=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    deployed=st.lists(st.booleans(), min_size=12, max_size=12),
)
@settings(max_examples=20, deadline=None)
def test_part_by_part_and_then_from_the_start(parts: list[int], deployed: list[bool]) -> None:
    n = sum(parts)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"], cache_dir=None))
    randomise(model, 0.3)
    x, who = torch.randn(n, 4), torch.tensor(deployed[:n])
    trained = model(x)
    with ap.deployed(model):
        want = torch.where(who[:, None], model(x), trained)
    with rows_of(model, who):
        for _ in range(2):
            got = torch.cat([model(part) for part in x.split(parts)])
            torch.testing.assert_close(got, want)
        torch.testing.assert_close(model(x), want)


def test_generate_gives_every_row_its_own_policys_tokens() -> None:
    model, (ids, mask) = build(), left_padded()
    randomise(model, 1.5, seed=3)  # far enough from the base model that the policies disagree
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}

    def sample() -> torch.Tensor:
        return model.generate(input_ids=ids, attention_mask=mask, **options)

    trained = sample()
    with ap.deployed(model):
        deployed = sample()
    assert all(not torch.equal(a, b) for a, b in zip(trained, deployed, strict=True))
    with rows_of(model, DEPLOYED):
        assert torch.equal(sample(), torch.where(DEPLOYED[:, None], deployed, trained))
        assert torch.equal(sample(), torch.where(DEPLOYED[:, None], deployed, trained))  # and again


class Flattening(nn.Module):
    """A model that folds (b, s) into one dimension before its layer, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.reshape(-1, 4)).reshape(x.shape)


def test_flattened_tokens_know_their_row() -> None:
    model = Flattening()
    ap.wrap(model, ap.AntiPastoConfig(target_modules=["inner"], cache_dir=None))
    randomise(model, 0.3)
    x = torch.randn(4, 5, 4)
    trained = model(x)
    with ap.deployed(model):
        want = torch.where(DEPLOYED[:, None, None], model(x), trained)
    with rows_of(model, DEPLOYED):
        torch.testing.assert_close(model(x), want)
        model(x).square().sum().backward()


# ── backward ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def separate_gradients(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    losses(model, ids[~DEPLOYED], mask[~DEPLOYED]).sum().backward()
    with ap.deployed(model):
        losses(model, ids[DEPLOYED], mask[DEPLOYED]).sum().backward()
    return gradient(model)


@pytest.mark.parametrize("family", ["llama", "qwen3_5", "gpt2"])
def test_gradients_add_up_to_the_separate_ones(family: str) -> None:
    model, (ids, mask) = build(family), left_padded()
    want = separate_gradients(model, ids, mask)
    with rows_of(model, DEPLOYED):
        losses(model, ids, mask).sum().backward()
    assert_gradients(gradient(model), want)


def test_the_quarantines_gradient_is_of_the_rows_that_see_it() -> None:
    model, (ids, mask) = build(), left_padded()
    for layer in ap.knobs(model).values():
        layer.delta_s_hack.requires_grad_(True)
    losses(model, ids[~DEPLOYED], mask[~DEPLOYED]).sum().backward()
    want = {name: layer.delta_s_hack.grad.clone() for name, layer in ap.knobs(model).items()}
    model.zero_grad()
    with rows_of(model, DEPLOYED):
        losses(model, ids, mask).sum().backward()
    assert_gradients({name: layer.delta_s_hack.grad for name, layer in ap.knobs(model).items()}, want)


@pytest.mark.parametrize("rank", [None, 3])
def test_rollout_grads_gives_each_rows_own(rank: int | None) -> None:
    model, (ids, mask) = build(rank=rank), left_padded()
    single = []
    for i, is_deployed in enumerate(DEPLOYED.tolist()):
        if is_deployed:
            with ap.deployed(model):
                losses(model, ids[i : i + 1], mask[i : i + 1]).sum().backward()
        else:
            losses(model, ids[i : i + 1], mask[i : i + 1]).sum().backward()
        single.append(gradient(model))
    with rows_of(model, DEPLOYED), ap.rollout_grads(model) as grads:
        losses(model, ids, mask).sum().backward()
    for name in single[0]:
        want = torch.stack([g[name] for g in single])
        torch.testing.assert_close(grads[name] / want.abs().max(), want / want.abs().max(), atol=1e-5, rtol=0)
        torch.testing.assert_close(grads[name].sum(0), ap.knobs(model)[name].delta_s.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("per_row", [False, True])
def test_gradient_checkpointing(per_row: bool) -> None:
    model, (ids, mask) = build().train(), left_padded()
    want = separate_gradients(model, ids, mask)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with rows_of(model, DEPLOYED):
        if per_row:
            with ap.rollout_grads(model) as grads:
                losses(model, ids, mask).sum().backward()
            for name, g in want.items():
                torch.testing.assert_close(grads[name].sum(0), g, atol=1e-4, rtol=1e-4)
        else:
            losses(model, ids, mask).sum().backward()
    assert_gradients(gradient(model), want)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_part_by_part(use_reentrant: bool) -> None:
    """A part is run again with its own mask, or it is an error."""
    model, (ids, mask) = build().train(), left_padded()
    want = separate_gradients(model, ids, mask)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    first, second = slice(0, 2), slice(2, 4)
    for _ in range(2):
        with rows_of(model, DEPLOYED):
            for part in (first, second):
                losses(model, ids[part], mask[part]).sum().backward()
        assert_gradients(gradient(model), want)
    with rows_of(model, DEPLOYED) as rows:
        both = losses(model, ids[first], mask[first]).sum() + losses(model, ids[second], mask[second]).sum()
        with pytest.raises(ValueError, match="Call backward after each forward"):
            both.backward()
    with rows_of(model, DEPLOYED) as rows:
        loss = losses(model, ids, mask).sum()
        rows.set(None)
        with pytest.raises(ValueError, match="since then the mask was set"):
            loss.backward()
    with rows_of(model, torch.tensor([True, False]).repeat(2)):  # what is alike need not be told apart
        (losses(model, ids[first], mask[first]).sum() + losses(model, ids[second], mask[second]).sum()).backward()


def test_without_checkpointing_several_parts_share_a_backward() -> None:
    model, (ids, mask) = build(), left_padded()
    want = separate_gradients(model, ids, mask)
    with rows_of(model, DEPLOYED):
        sum(losses(model, ids[part], mask[part]).sum() for part in (slice(0, 3), slice(3, 4))).backward()
    assert_gradients(gradient(model), want)


# ── what is left behind, what is refused ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("raises", [False, True])
def test_the_context_leaves_nothing_behind(raises: bool) -> None:
    model = build()
    layers = adapted_layers(model).values()
    try:
        with rows_of(model, DEPLOYED) as rows:
            assert all(layer.rows is rows for layer in layers)
            with mixed(model) as inner:  # the innermost counts
                assert all(layer.rows is inner for layer in layers)
            assert all(layer.rows is rows for layer in layers)
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raises
    assert not model.get_base_model()._forward_pre_hooks
    assert all(layer.rows is None for layer in layers)
    ids, mask = left_padded(3)
    logits(model, ids, mask)  # a batch of any size again


def test_a_wrong_number_of_rows_is_an_error() -> None:
    model, (ids, mask) = build(), left_padded()
    with torch.no_grad(), rows_of(model, DEPLOYED) as rows:
        logits(model, ids[:3], mask[:3])
        with pytest.raises(ValueError, match="a batch of 2 rows, with 1 of the mask's 4 rows left"):
            logits(model, ids[:2], mask[:2])
        rows.set(DEPLOYED[:2])  # from the start
        with pytest.raises(ValueError, match="a batch of 4 rows, with 2 of the mask's 2 rows left"):
            logits(model, ids, mask)


def test_calls_that_do_not_say_their_rows_are_errors() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, *, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = ByName()
    ap.wrap(model, ap.AntiPastoConfig(target_modules=["inner"], cache_dir=None))
    with rows_of(model, DEPLOYED):
        with pytest.raises(ValueError, match="a batch of 0 rows"):
            model(x=torch.ones(4, 4))
        with pytest.raises(ValueError, match="A layer was called directly while rows see different knobs"):
            model.inner(torch.ones(4, 4))


def test_shapes() -> None:
    ids, embeds, other = torch.zeros(2, 3), torch.zeros(4, 5, 6), torch.zeros(7, 8)
    assert batch_shape((other,), {"input_ids": ids, "inputs_embeds": embeds}) == (2, 3)
    assert batch_shape((other,), {"input_ids": None, "inputs_embeds": embeds}) == (4, 5)
    assert batch_shape(("no tensor", other), {}) == (7, 8)
    assert batch_shape((), {"x": other}) == ()
    theta = torch.arange(6.0).view(2, 3)
    assert torch.equal(per_token(theta, torch.zeros(2, 4, 5, 9), (2, 4)), theta[:, None, None])
    assert torch.equal(per_token(theta, torch.zeros(2, 9), ()), theta)
    assert torch.equal(per_token(theta, torch.zeros(4, 9), (2, 2)), theta[[0, 0, 1, 1]])
    for x, shape in ((torch.zeros(3, 4, 9), (2, 4)), (torch.zeros(5, 9), (2, 2)), (torch.zeros(9), ())):
        with pytest.raises(ValueError, match="which token belongs to which sequence"):
            per_token(theta, x, shape)
