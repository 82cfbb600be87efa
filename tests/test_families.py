"""Real architectures at toy size: identity at zero, the formula, the gradient, and the free reference."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, Family, randomise, tokens
from peft import get_peft_model
from torch import nn

import antipasto as ap
from antipasto.adapter.functional import spectral_linear_reference
from antipasto.adapter.layer import as_matrix


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def config(family: Family, **options: object) -> ap.AntiPastoConfig:
    return ap.AntiPastoConfig(target_modules=family.target_modules, **options)  # type: ignore[arg-type]


def with_weights_written_out(base: nn.Module, knobs: dict[str, ap.LayerKnobs]) -> dict[str, torch.Tensor]:
    """W + U diag(θ) Vh for every adapted weight of the base model, differentiable in the knobs."""
    weights = {}
    for name, layer in knobs.items():
        original = base.get_submodule(name)
        W = as_matrix(original).detach() + layer.U @ torch.diag(layer.delta_s + layer.delta_s_hack) @ layer.Vh
        weights[f"{name}.weight"] = W if isinstance(original, nn.Linear) else W.T
    return weights


def test_zero_is_the_base_model(family: Family) -> None:
    model, base = family.build(), family.build()
    knobs = ap.wrap(model, config(family))
    assert {name.rpartition(".")[2] for name in knobs} == family.leaves
    ids = tokens()
    assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.parametrize("rank", [None, 3])
def test_model_and_its_gradient_are_the_formulas(family: Family, rank: int | None) -> None:
    model, base = family.build(dtype=torch.float64), family.build(dtype=torch.float64)
    knobs = ap.wrap(model, config(family, rank=rank))
    randomise(model, 0.05)
    ids = tokens()
    logits = model(input_ids=ids).logits
    reference = torch.func.functional_call(
        base, with_weights_written_out(base, knobs), kwargs={"input_ids": ids}, tie_weights=False
    ).logits
    # the models take norms and softmaxes in fp32, also when they are fp64
    torch.testing.assert_close(logits, reference, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, base(input_ids=ids).logits, atol=1e-3)

    deltas = [layer.delta_s for layer in knobs.values()]
    probe = torch.randn_like(logits)
    got = torch.autograd.grad((logits * probe).sum(), deltas)
    want = torch.autograd.grad((reference * probe).sum(), deltas)
    for name, g, w in zip(knobs, got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        assert g.abs().max() > 0, f"{name} does not take part"


def test_gradcheck_of_every_kind_of_layer_on_its_own_inputs(family: Family) -> None:
    model = family.build(dtype=torch.float64)
    knobs = ap.wrap(model, config(family))
    randomise(model, 0.05)
    one_of_each = {name.rpartition(".")[2]: layer for name, layer in knobs.items()}
    inputs = {}
    handles = [
        layer.layer.register_forward_pre_hook(lambda _, args, leaf=leaf: inputs.update({leaf: args[0].detach()}))
        for leaf, layer in one_of_each.items()
    ]
    model(input_ids=tokens(1, 3))
    for handle in handles:
        handle.remove()
    for leaf, layer in one_of_each.items():
        base = layer.layer.base_layer
        bias = None if base.bias is None else base.bias.detach()

        def run(x: torch.Tensor, delta_s: torch.Tensor, layer: ap.LayerKnobs = layer) -> torch.Tensor:
            return torch.func.functional_call(layer.layer, {"delta_s.default.weight": delta_s}, (x,))

        def formula(x: torch.Tensor, delta_s: torch.Tensor, layer: ap.LayerKnobs = layer) -> torch.Tensor:
            W, theta = as_matrix(layer.layer.base_layer).detach(), delta_s + layer.delta_s_hack.detach()
            return spectral_linear_reference(x, W, bias, layer.U, layer.Vh, theta)  # noqa: B023

        x, delta_s = inputs[leaf].requires_grad_(), layer.delta_s.detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(run, (x, delta_s)), leaf
        torch.testing.assert_close(run(x, delta_s), formula(x, delta_s))
        jacobians = zip(
            torch.autograd.functional.jacobian(run, (x, delta_s)),
            torch.autograd.functional.jacobian(formula, (x, delta_s)),
            strict=True,
        )
        for got, want in jacobians:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_logprobs_are_those_of_an_untouched_second_copy(family: Family, dtype: torch.dtype) -> None:
    model, base = family.build(dtype=dtype), family.build(dtype=dtype)
    untouched = copy.deepcopy(base.state_dict())
    peft_model = get_peft_model(model, config(family))
    knobs = ap.knobs(peft_model)
    ids, mask = tokens(4, 9), torch.ones(4, 9, dtype=torch.long)
    mask[0, :3] = 0
    optimizer = torch.optim.AdamW([layer.delta_s for layer in knobs.values()], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        (-ap.token_logprobs(peft_model(input_ids=ids, attention_mask=mask).logits, ids).mean()).backward()
        optimizer.step()
    trained = ap.token_logprobs(peft_model(input_ids=ids, attention_mask=mask).logits, ids)

    with torch.no_grad():
        expected = ap.token_logprobs(base(input_ids=ids, attention_mask=mask).logits, ids)
    got = ap.ref_logprobs(peft_model, ids, mask)
    assert torch.equal(got, expected)
    assert got.shape == (4, 8)
    assert not got.requires_grad
    assert not torch.equal(trained, expected)
    assert all(torch.equal(base.state_dict()[name], weight) for name, weight in untouched.items())


def test_trainable_parameters_are_exactly_the_delta_s_of_the_targets(family: Family) -> None:
    base = family.build()
    targets = {
        name
        for name, module in base.named_modules()
        if name.rpartition(".")[2] in family.leaves and hasattr(module, "weight")
    }
    model = get_peft_model(base, config(family))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"base_model.model.{name}.delta_s.default.weight" for name in targets}
    assert set(ap.knobs(model)) == targets


def test_generation_with_a_cache_uses_the_knobs(family: Family) -> None:
    model = family.build()
    ap.wrap(model, config(family))
    randomise(model, 1.0)
    ids = tokens(2, 4)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(ids, **options)
    for length in range(4, 10):  # token by token, without a cache
        step = model(input_ids=out[:, :length]).logits[:, -1].argmax(-1)
        assert torch.equal(step, out[:, length])
    with ap.reference(model):
        assert torch.equal(model.generate(ids, **options), family.build().generate(ids, **options))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(family: Family, use_reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = get_peft_model(family.build(), config(family))
        randomise(model, 0.05)
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(0)  # dropout
        ap.token_logprobs(model(input_ids=tokens(), use_cache=False).logits, tokens()).sum().backward()
        return {name: layer.delta_s.grad for name, layer in ap.knobs(model).items()}

    plain, checkpointed = gradients(False), gradients(True)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], msg=lambda m, name=name: f"{name}: {m}")
