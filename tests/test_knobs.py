"""The handles, and the models that an adapted model is with some of its knobs out."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, logits, randomise, tokens
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

import antipasto as ap
from antipasto.adapter import AntiPastoLinear, View


def build(*, wrapped_by: str = "wrap") -> nn.Module:
    """A tiny Llama whose knobs, quarantine included, are not zero."""
    model = FAMILIES["llama"].build()
    if wrapped_by == "wrap":
        ap.wrap(model)
    else:
        model = get_peft_model(model, ap.AntiPastoConfig())
    randomise(model)
    return model


def snapshot(model: nn.Module) -> dict[str, tuple[torch.Tensor, int, int]]:
    """Values, versions and addresses of every parameter: a write would show."""
    return {n: (p.detach().clone(), p._version, p.data_ptr()) for n, p in model.named_parameters()}


def assert_unwritten(model: nn.Module, before: dict[str, tuple[torch.Tensor, int, int]]) -> None:
    for name, parameter in model.named_parameters():
        value, version, address = before[name]
        assert torch.equal(parameter, value)
        assert (parameter._version, parameter.data_ptr()) == (version, address), name


@pytest.fixture(params=["wrap", "peft"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(wrapped_by=request.param)


BASE = FAMILIES["llama"].build()


# ── handles ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_handles_name_layers_as_the_base_model_does(model: nn.Module) -> None:
    layers = ap.knobs(model)
    layer = layers["model.layers.0.mlp.up_proj"]
    assert isinstance(layer.layer, AntiPastoLinear)
    assert layer.delta_s is layer.layer.delta_s["default"].weight
    assert layer.delta_s_hack is layer.layer.delta_s_hack["default"].weight
    assert (layer.r, layer.U.shape, layer.S.shape, layer.Vh.shape) == (16, (24, 16), (16,), (16, 16))
    torch.testing.assert_close((layer.U * layer.S) @ layer.Vh, layer.layer.base_layer.weight, atol=1e-6, rtol=0)


def test_handles_of_a_compiled_and_of_a_replicated_model() -> None:
    model = build(wrapped_by="peft")
    assert set(ap.knobs(torch.compile(model))) == set(ap.knobs(model))

    class Replica(nn.parallel.DistributedDataParallel):  # the wrapper without its process group
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    assert set(ap.knobs(Replica(model))) == set(ap.knobs(model))


def test_wrap_works_in_place_and_freezes_the_rest() -> None:
    model = FAMILIES["llama"].build()
    config = ap.AntiPastoConfig()
    layers = ap.wrap(model, config, adapter_name="mine")
    assert config.target_modules is None  # the caller's config is the caller's
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{n}.delta_s.mine.weight" for n in layers}
    assert type(model) is type(BASE)
    assert torch.equal(logits(model), logits(BASE))


def test_wrap_twice_is_an_error() -> None:
    for wrapped_by in ("wrap", "peft"):
        model = build(wrapped_by=wrapped_by)
        before = logits(model)
        with pytest.raises(ValueError, match=r"already wrapped\. Use antipasto\.knobs\(model\)"):
            ap.wrap(model)
        assert torch.equal(logits(model), before)


def test_training_finds_a_planted_theta_in_a_module_that_is_no_language_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    layers = ap.wrap(model, ap.AntiPastoConfig(target_modules=["0", "2"]))
    planted = [torch.randn(layer.r) * 0.3 for layer in layers.values()]
    x = torch.randn(256, 4)
    deltas = [layer.delta_s for layer in layers.values()]
    with torch.no_grad():
        torch._foreach_copy_(deltas, planted)
        y = model(x)
        torch._foreach_zero_(deltas)
    optimizer = torch.optim.Adam(deltas, lr=0.02)
    for _ in range(800):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    for found, wanted in zip(deltas, planted, strict=True):
        torch.testing.assert_close(found, wanted, atol=0.01, rtol=0)


def test_the_knobs_of_a_wrapped_model_save_and_load() -> None:
    model, other = build(), FAMILIES["llama"].build()
    ap.wrap(other)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("call", [ap.knobs, ap.drop_quarantine, lambda m: ap.ref_logprobs(m, tokens())])
def test_a_model_without_knobs_is_an_error(call: object) -> None:
    with pytest.raises(ValueError, match="no AntiPaSTO layers"):
        call(FAMILIES["llama"].build())  # type: ignore[operator]


def test_an_unknown_adapter_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no adapter 'other'; there are \['default'\]"):
        ap.knobs(build(), adapter_name="other")


# ── contexts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_reference_is_the_base_model_and_deployed_is_without_quarantine(model: nn.Module) -> None:
    before, trained = snapshot(model), logits(model)
    with ap.reference(model):
        assert torch.equal(logits(model), logits(BASE))
        assert_unwritten(model, before)
    with ap.deployed(model):
        deployed = logits(model)
        assert_unwritten(model, before)
    assert torch.equal(logits(model), trained)
    assert_unwritten(model, before)

    twin = copy.deepcopy(model)
    for layer in ap.knobs(twin).values():
        layer.delta_s_hack.data.zero_()
    assert torch.equal(deployed, logits(twin))
    assert not torch.allclose(deployed, trained)


@pytest.mark.parametrize("dial", [-0.5, 0.25, 1.0])
def test_deployed_leaves_in_as_much_of_the_quarantine_as_the_dial_says(model: nn.Module, dial: float) -> None:
    twin, trained = copy.deepcopy(model), logits(model)
    for layer in ap.knobs(twin).values():
        layer.delta_s_hack.data.mul_(dial)
    before = snapshot(model)
    with ap.deployed(model, dial):
        torch.testing.assert_close(logits(model), logits(twin))
        assert dial == 1 or not torch.allclose(logits(model), trained)
        assert_unwritten(model, before)
    assert torch.equal(logits(model), trained)
    ap.drop_quarantine(twin)
    with pytest.raises(ValueError, match="needs a quarantine, but this model's quarantine was dropped"):
        ap.deployed(twin, dial)
    with ap.deployed(twin):
        pass


def test_contexts_nest_and_the_innermost_counts(model: nn.Module) -> None:
    trained = logits(model)
    with ap.deployed(model):
        deployed = logits(model)
        with ap.reference(model):
            assert torch.equal(logits(model), logits(BASE))
            with ap.deployed(model):
                assert torch.equal(logits(model), deployed)
            assert torch.equal(logits(model), logits(BASE))
        assert torch.equal(logits(model), deployed)
    assert torch.equal(logits(model), trained)


@pytest.mark.parametrize("context", [ap.reference, ap.deployed])
def test_contexts_restore_on_exceptions(model: nn.Module, context: object) -> None:
    trained = logits(model)
    with pytest.raises(KeyboardInterrupt), ap.deployed(model), context(model):  # type: ignore[operator]
        raise KeyboardInterrupt
    assert torch.equal(logits(model), trained)
    assert {layer.layer.view for layer in ap.knobs(model).values()} == {View.TRAINED}


def test_gradients_inside_contexts(model: nn.Module) -> None:
    layer = ap.knobs(model)["model.layers.0.mlp.up_proj"]
    layer.delta_s_hack.requires_grad_(True)

    def gradient(knob: torch.Tensor) -> torch.Tensor | None:
        output = ap.token_logprobs(model(input_ids=tokens()).logits, tokens()).sum()
        return torch.autograd.grad(output, knob, allow_unused=True)[0]

    assert torch.equal(gradient(layer.delta_s), gradient(layer.delta_s_hack))
    with ap.deployed(model):
        assert gradient(layer.delta_s).abs().sum() > 0
        assert gradient(layer.delta_s_hack) is None  # it takes no part


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_backward_inside_the_context_with_gradient_checkpointing(use_reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = build(wrapped_by="peft").train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        with ap.deployed(model):
            ap.token_logprobs(model(input_ids=tokens(), use_cache=False).logits, tokens()).sum().backward()
        return [layer.delta_s.grad for layer in ap.knobs(model).values()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_contexts_of_a_merged_model_and_back() -> None:
    model = build(wrapped_by="peft")
    with ap.deployed(model):
        deployed = logits(model)
    model.merge_adapter()
    merged = logits(model)
    weights = {name: layer.layer.base_layer.weight.clone() for name, layer in ap.knobs(model).items()}
    with ap.reference(model):
        assert torch.equal(logits(model), logits(BASE))
    with ap.deployed(model):
        assert torch.equal(logits(model), deployed)
    assert torch.equal(logits(model), merged)
    for name, layer in ap.knobs(model).items():
        assert layer.layer.merged
        assert torch.equal(layer.layer.base_layer.weight, weights[name])
    model.unmerge_adapter()
    assert torch.equal(logits(model.unload()), logits(BASE))


def test_merging_inside_deployed_merges_what_ships_and_ends_with_the_context() -> None:
    model = build(wrapped_by="peft")
    trained = logits(model)
    with ap.deployed(model):
        deployed = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), deployed, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), trained)


def test_scaled_is_theta_at_a_fraction(model: nn.Module) -> None:
    before, trained = snapshot(model), logits(model)
    with ap.scaled(model, 0.25):
        quarter = logits(model)
        assert_unwritten(model, before)
        with ap.reference(model):
            assert torch.equal(logits(model), logits(BASE))
    assert torch.equal(logits(model), trained)
    with ap.scaled(model, 1.0):
        torch.testing.assert_close(logits(model), trained, atol=1e-6, rtol=0)
    twin = copy.deepcopy(model)
    for layer in ap.knobs(twin).values():
        layer.delta_s.data.mul_(0.25)
        layer.delta_s_hack.data.mul_(0.25)
    torch.testing.assert_close(quarter, logits(twin), atol=1e-5, rtol=1e-5)


# ── dropping the quarantine ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("merged", [False, True])
def test_drop_quarantine_leaves_what_deployed_showed(model: nn.Module, merged: bool) -> None:
    with ap.deployed(model):
        deployed = logits(model)
    if merged:
        for layer in ap.knobs(model).values():
            layer.layer.merge()
    ap.drop_quarantine(model)
    torch.testing.assert_close(logits(model), deployed, atol=1e-5 if merged else 0, rtol=0)
    assert not any("delta_s_hack" in name for name in model.state_dict())
    assert all(layer.delta_s_hack is None for layer in ap.knobs(model).values())
    with ap.deployed(model):
        torch.testing.assert_close(logits(model), deployed, atol=1e-5 if merged else 0, rtol=0)
    ap.drop_quarantine(model)  # again: nothing to do


# ── log-probabilities ────────────────────────────────────────────────────────────────────────────────────────────────


def test_token_logprobs_are_those_of_log_softmax() -> None:
    torch.manual_seed(0)
    scores, ids = torch.randn(3, 5, 11, requires_grad=True), torch.randint(0, 11, (3, 5))
    got = ap.token_logprobs(scores, ids)
    want = scores.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(f.sum(), scores) for f in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    assert ap.token_logprobs(scores.bfloat16(), ids).dtype == torch.float32
    assert ap.token_logprobs(scores[:, :1], ids[:, :1]).shape == (3, 0)


def test_token_logprobs_says_what_shapes_it_wants() -> None:
    with pytest.raises(ValueError, match=r"Expected logits \(b, s, v\).*got \(2, 3, 4\) and \(2, 4\)"):
        ap.token_logprobs(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long))


def test_ref_logprobs_leaves_no_trace(model: nn.Module) -> None:
    before, trained = snapshot(model), logits(model)
    ap.ref_logprobs(model, tokens())
    assert_unwritten(model, before)
    assert torch.equal(logits(model), trained)
