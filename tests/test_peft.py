"""PEFT's surface: every verb that its users know, on this method."""

from __future__ import annotations

import copy
import json
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from families import FAMILIES, logits, randomise, tokens
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import antipasto as ap
from antipasto.adapter import AntiPastoLinear
from antipasto.adapter.basis import decompose
from antipasto.adapter.fingerprints import weight_digest
from antipasto.adapter.layer import as_matrix


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    """A tiny Llama with an adapter whose knobs are not zero."""
    model = get_peft_model(FAMILIES["llama"].build(seed, dtype), ap.AntiPastoConfig(**options))  # type: ignore[arg-type]
    randomise(model)
    return model


BASE = FAMILIES["llama"].build()


# ── saving and loading ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"rank": 3}, {"rank": 3, "rank_pattern": {"q_proj": 5}}, {"quarantine": False}]
)
def test_save_and_load(tmp_path: Path, options: dict[str, object], low_cpu_mem_usage: bool) -> None:
    model = build(**options)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(BASE))
    assert all(not parameter.requires_grad for parameter in loaded.parameters())
    for name, layer in ap.knobs(loaded).items():
        assert torch.equal(layer.delta_s, ap.knobs(model)[name].delta_s)
        assert (layer.delta_s_hack is None) == (options == {"quarantine": False})

    loaded = PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path, is_trainable=True)
    trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trainable == {f"base_model.model.{name}.delta_s.default.weight" for name in ap.knobs(loaded)}


def test_the_adapter_file_holds_the_knobs_and_no_basis(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == {
        f"base_model.model.{name}.{knob}.weight" for name in ap.knobs(model) for knob in ("delta_s", "delta_s_hack")
    }
    assert {tensor.ndim for tensor in saved.values()} == {1}
    assert sum(tensor.numel() for tensor in saved.values()) == 2 * sum(layer.r for layer in ap.knobs(model).values())
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 10_000


def test_the_saved_config_says_what_was_adapted_and_nothing_of_this_machine(tmp_path: Path) -> None:
    build(cache_dir=str(tmp_path / "cache")).save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "ANTIPASTO"
    assert set(saved["target_modules"]) == FAMILIES["llama"].leaves
    assert "cache_dir" not in saved
    assert str(tmp_path) not in json.dumps(saved)
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert type(config) is ap.AntiPastoConfig
    assert config.cache_dir == "auto"


def test_a_dropped_quarantine_stays_dropped_through_the_file(tmp_path: Path) -> None:
    model = build()
    with ap.deployed(model):
        expected = logits(model)
    ap.drop_quarantine(model)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert not any("hack" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert all(layer.delta_s_hack is None for layer in ap.knobs(loaded).values())


def test_an_adapter_of_another_rank_is_refused_by_name(tmp_path: Path) -> None:
    build(rank=3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "rank": 4}))
    with pytest.raises(ValueError, match=r"q_proj\.delta_s\.default\.weight .* shape \(3,\), expected \(4,\)"):
        PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("save_basis", [True, False])
def test_numbers_are_loaded_as_they_were_saved_onto_a_base_of_low_precision(
    tmp_path: Path, low_cpu_mem_usage: bool, save_basis: bool
) -> None:
    model = build(save_basis=save_basis)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    base = FAMILIES["llama"].build(dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the base is of another dtype
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    for name in ("default", "second"):
        state = peft.get_peft_model_state_dict(loaded, adapter_name=name)
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[key], value) and state[key].dtype == value.dtype for key, value in saved.items())


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_without_autocast_the_adapter_is_of_its_layers_dtype(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    """As PEFT documents it."""
    model = get_peft_model(
        FAMILIES["llama"].build(dtype=torch.bfloat16), ap.AntiPastoConfig(), autocast_adapter_dtype=False
    )
    model.add_adapter("second", ap.AntiPastoConfig())
    assert {k.dtype for layer in _layers(model).values() for k in layer.knobs("default")} == {torch.bfloat16}
    assert {k.dtype for layer in _layers(model).values() for k in layer.knobs("second")} == {torch.float32}
    model(input_ids=tokens()).logits.float().logsumexp(-1).mean().backward()
    assert all(layer.knobs("default")[0].grad.isfinite().all() for layer in _layers(model).values())
    randomise(model, adapter_name="default")
    for layer in _layers(model).values():  # the sum is not of bf16 terms
        assert layer.get_delta_weight("default").dtype == torch.float32
    model.save_pretrained(tmp_path)
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        base = FAMILIES["llama"].build(dtype=torch.bfloat16)
        loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=autocast, **options)
        for name, layer in _layers(loaded).items():
            assert {knob.dtype for knob in layer.knobs("default")} == {dtype}
            assert torch.equal(layer.knobs("default")[0], _layers(model)[name].knobs("default")[0].to(dtype))


# ── several adapters ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_adapters_come_and_go_and_share_one_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr(
        "antipasto.adapter.model.load_identified_basis", lambda *a, **k: pytest.fail("the layers have it already")
    )
    first = logits(model)
    bases = {name: layer.basis for name, layer in _layers(model).items()}
    model.add_adapter("second", ap.AntiPastoConfig(rank=4))
    assert torch.equal(logits(model), first)  # the new one is not active yet
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(BASE))  # and starts at zero
    assert all(layer.basis is bases[name] for name, layer in _layers(model).items())
    assert {k.r for k in ap.knobs(model).values()} == {4}
    assert all(
        k.U.shape == (layer.out_features, 4)
        for layer, k in zip(_layers(model).values(), ap.knobs(model).values(), strict=True)
    )
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"base_model.model.{name}.delta_s.second.weight" for name in ap.knobs(model)}

    randomise(model, seed=1, adapter_name="second")
    second = logits(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)
    with pytest.raises(ValueError, match="activate one alone, or pass adapter_name to knobs, one of"):
        ap.knobs(model)
    assert torch.equal(logits(model), both)

    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert set(model.peft_config) == {"second"}
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    assert all(layer.r == {"second": 4} for layer in _layers(model).values())


def test_a_larger_rank_second_keeps_the_first(tmp_path: Path) -> None:
    model = build(rank=2)
    first = logits(model)
    model.add_adapter("second", ap.AntiPastoConfig())
    torch.testing.assert_close(logits(model), first)
    model.set_adapter("second")
    randomise(model, seed=1, adapter_name="second")
    fresh = get_peft_model(FAMILIES["llama"].build(), ap.AntiPastoConfig())
    randomise(fresh, seed=1)
    assert torch.equal(logits(model), logits(fresh))


UNMERGES = "Adapter cannot be set when the model is merged. Unmerging"  # PEFT's words, and what LoRA does


def test_adapters_are_added_and_loaded_while_another_is_merged(tmp_path: Path) -> None:
    model = build(rank=2)
    model.save_pretrained(tmp_path)
    want, weights = logits(model), {n: layer.base_layer.weight for n, layer in _layers(model).items()}
    model.merge_adapter()
    with pytest.warns(UserWarning, match=UNMERGES):
        model.add_adapter("second", ap.AntiPastoConfig())  # whose larger basis is of W, and not of what is merged
    assert all(layer.base_layer.weight is weights[name] for name, layer in _layers(model).items())
    torch.testing.assert_close(logits(model), want)
    for name, layer in _layers(model).items():
        for got, expected in zip(layer.basis, ap.load_basis(BASE.get_submodule(name).weight), strict=True):
            assert torch.equal(got, expected)
    model.merge_adapter()
    with pytest.warns(UserWarning, match=UNMERGES):
        model.load_adapter(tmp_path, "third")
    model.set_adapter("third")
    torch.testing.assert_close(logits(model), want)


def test_the_config_is_the_callers_own() -> None:
    config, second = ap.AntiPastoConfig(), ap.AntiPastoConfig()
    model = get_peft_model(FAMILIES["llama"].build(), config)
    model.add_adapter("second", second)
    assert model.peft_config["default"] is config
    assert model.peft_config["second"] is second


def test_a_weighted_sum_of_adapters_is_exact(tmp_path: Path) -> None:
    model = build(rank=3)
    model.add_adapter("second", ap.AntiPastoConfig(target_modules=["q_proj", "up_proj"], rank=5, quarantine=False))
    randomise(model, seed=1, adapter_name="second")
    model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)
    for layer in _layers(model).values():
        assert layer.r["sum"] == max(layer.r["default"], layer.r.get("second", 0))
        want = 0.5 * layer.get_delta_weight("default")
        if "second" in layer.r:
            want = want - 2 * layer.get_delta_weight("second")
        torch.testing.assert_close(layer.get_delta_weight("sum"), want)
        torch.testing.assert_close(layer.knobs("sum")[1][:3], 0.5 * layer.knobs("default")[1])
    model.set_adapter("sum")
    want = logits(model)
    assert not torch.allclose(want, logits(BASE))
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path / "sum")
    assert torch.equal(logits(loaded), want)

    model.add_weighted_adapter(["default", "default"], [1.0, 1.0], "twice", combination_type="linear")
    for layer in _layers(model).values():
        assert torch.equal(layer.knobs("twice")[0], 2 * layer.knobs("default")[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (["default"], [1.0], "new", "svd"),
            "combination_type='svd' is not offered: use combination_type='linear', which is exact",
        ),
        ((["default"], [1.0], "new", "ties"), "combination_type='ties' is not offered"),
        ((["default", "none"], [1.0, 1.0], "new"), "no adapter 'none'"),
        ((["default"], [1.0], "default"), "an adapter 'default' already"),
        ((["default"], [1.0, 2.0], "new"), "one finite weight for each"),
        (([], [], "new"), "Expected adapters"),
        ((["default"], [float("nan")], "new"), "one finite weight"),
    ],
)
def test_a_weighted_sum_that_makes_no_sense(arguments: tuple[object, ...], message: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"default"}


@pytest.mark.filterwarnings("ignore:.*modify a model with PEFT for a second time.*")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute.*")
def test_the_same_name_twice_is_an_error() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"q_proj has an adapter 'default' already"):
        get_peft_model(model.get_base_model(), ap.AntiPastoConfig())


def _layers(model: nn.Module) -> dict[str, AntiPastoLinear]:
    return {name: knobs.layer for name, knobs in ap.knobs(model, adapter_name=next(iter(model.peft_config))).items()}


# ── disabling, merging, unloading ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(family: str, dtype: torch.dtype) -> None:
    base = FAMILIES[family].build(dtype=dtype)
    keys = {name: weight_digest(weight) for name, weight in base.state_dict().items()}
    model = get_peft_model(base, ap.AntiPastoConfig(target_modules=FAMILIES[family].target_modules))
    randomise(model)
    unmerged = logits(model)
    model.merge_adapter()
    assert all(layer.merged for layer in _layers(model).values())
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(logits(model), unmerged, **tolerance)
    for layer in _layers(model).values():  # the written weight is the formula, rounded once
        U, _, Vh = layer.basis
        delta_s, hack = layer.knobs("default")
        W = as_matrix(layer.base_layer).clone()
        layer.unmerge()
        want = (as_matrix(layer.base_layer).float() + (U.float() * (delta_s + hack)) @ Vh.float()).to(dtype)
        assert torch.equal(W, want)
        assert isinstance(layer.base_layer, (nn.Linear, Conv1D))
    assert torch.equal(logits(model), unmerged)
    model.merge_adapter()
    model.unmerge_adapter()
    assert {n: weight_digest(w) for n, w in model.unload().state_dict().items()} == keys


def test_ten_thousand_merges_in_bf16_end_with_the_original_bytes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16)).to(torch.bfloat16)
    before = weight_digest(model[0].weight)
    (knobs,) = ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"])).values()
    knobs.delta_s.data.normal_()
    knobs.delta_s_hack.data.normal_()
    for _ in range(10_000):
        knobs.layer.merge()
        assert not torch.equal(knobs.layer.base_layer.weight, knobs.layer.base_weight)
        knobs.layer.unmerge()
    assert weight_digest(knobs.layer.base_layer.weight) == before


def test_peft_lora_drifts_where_this_does_not() -> None:
    """The reason for keeping W: the same cycles with PEFT's add-and-subtract do change the weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16)).to(torch.bfloat16)
    before = weight_digest(model[0].weight)
    lora = get_peft_model(model, peft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    for _ in range(100):
        lora.merge_adapter()
        lora.unmerge_adapter()
    assert weight_digest(lora.base_model.model[0].base_layer.weight) != before


def test_merging_and_unmerging_in_any_order_gives_back_the_weights() -> None:
    model = build(dtype=torch.bfloat16)
    model.add_adapter("second", ap.AntiPastoConfig(rank=4))
    randomise(model, seed=1, adapter_name="second")
    bases = {name: weight_digest(layer.base_layer.weight) for name, layer in _layers(model).items()}
    rng = random.Random(0)
    for _ in range(60):
        layer = rng.choice(list(_layers(model).values()))
        free = [name for name in ("default", "second") if name not in layer.merged_adapters]
        if free and rng.random() < 0.6:
            if layer.merged:
                with pytest.warns(UserWarning, match="Already following adapters were merged"):
                    layer.merge(adapter_names=[rng.choice(free)])
            else:
                layer.merge(adapter_names=[rng.choice(free)], safe_merge=True)
        elif layer.merged:
            layer.unmerge()
    for layer in _layers(model).values():
        if layer.merged:
            layer.unmerge()
    assert {name: weight_digest(layer.base_layer.weight) for name, layer in _layers(model).items()} == bases


def test_unmerging_what_is_not_merged_warns() -> None:
    model = build()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_a_merged_model_moves_and_still_unmerges() -> None:
    model = build()
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    for name, layer in _layers(model).items():
        assert layer.base_layer.weight.dtype == torch.float64
        assert torch.equal(layer.base_layer.weight, BASE.get_submodule(name).weight.double())


def test_safe_merge_refuses_what_is_not_finite() -> None:
    model = build()
    name, layer = next(iter(_layers(model).items()))
    layer.knobs("default")[0].data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, BASE.get_submodule(name).weight)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merge_and_unload_leaves_a_plain_model(family: str) -> None:
    model = get_peft_model(FAMILIES[family].build(), ap.AntiPastoConfig(target_modules=FAMILIES[family].target_modules))
    randomise(model)
    adapted = logits(model)
    plain = model.merge_and_unload()
    assert not any(isinstance(module, AntiPastoLinear) for module in plain.modules())
    assert set(plain.state_dict()) == set(FAMILIES[family].build().state_dict())
    torch.testing.assert_close(logits(plain), adapted, atol=1e-5, rtol=1e-5)


def test_delta_weight_is_what_merging_adds_and_becomes_an_exact_lora() -> None:
    model = build(rank=3)
    assert model.supports_lora_conversion()
    adapted = logits(model)
    lora_config, state = peft.convert_to_lora(model, rank=3)
    lora = get_peft_model(FAMILIES["llama"].build(), lora_config)
    peft.set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(logits(lora), adapted, atol=1e-5, rtol=1e-5)


class Falcons(nn.Linear):
    """A forward of its own that is the same function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Residual(nn.Linear):
    """More than W x, but nothing more that W has a part in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.sin()


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Normed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)


class Clipped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(-4, 4))


def _hooked(post: bool) -> nn.Linear:
    layer = nn.Linear(6, 6)
    if post:
        layer.register_forward_hook(lambda _, __, y: 2 * y)
    else:
        layer.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    return layer


def _patched() -> nn.Linear:
    layer = nn.Linear(6, 6)
    old = layer.forward
    layer.forward = lambda x: 2 * old(x)  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Falcons, Residual])
def test_a_linear_with_a_forward_of_its_own_that_is_linear_in_its_weight_merges(
    kind: type[nn.Linear], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), kind(6, 6)).to(dtype)
    adapted = get_peft_model(model, ap.AntiPastoConfig(target_modules=["0", "1"]))
    randomise(adapted)
    x = torch.randn(4, 6, dtype=dtype)
    want = adapted(x)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x), want, **close)
    adapted.unmerge_adapter()
    assert torch.equal(adapted(x), want)
    torch.testing.assert_close(adapted.merge_and_unload()(x), want, **close)


OTHER_FUNCTIONS: dict[str, Callable[[], nn.Linear]] = {
    "doubled": lambda: Doubled(6, 6),
    "of a normed weight": lambda: Normed(6, 6),
    "of a clipped input": lambda: Clipped(6, 6),
    "a hook": lambda: _hooked(True),
    "a pre-hook": lambda: _hooked(False),
    "a patched forward": _patched,
}


@pytest.mark.parametrize("kind", OTHER_FUNCTIONS)
def test_what_merging_would_make_another_function_is_refused_by_name(kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), OTHER_FUNCTIONS[kind]()).to(dtype)
        adapted = get_peft_model(model, ap.AntiPastoConfig(target_modules=["0", "1"]))
        randomise(adapted)
        x = torch.randn(4, 6, dtype=dtype)
        before, weights = adapted(x), {name: weight.clone() for name, weight in adapted.state_dict().items()}
        for verb in (adapted.merge_adapter, adapted.merge_and_unload):
            with pytest.raises(
                ValueError,
                match=r"^1 cannot be merged: its forward, or a hook on it, uses its weight W for more than W x.*'1'",
            ):
                verb()
        layers = _layers(adapted)
        assert not any(layer.merged for layer in layers.values())  # nor the one before it
        with pytest.raises(ValueError, match=r"A \w+ cannot be merged"):
            layers["1"].merge()
        assert torch.equal(adapted(x), before)
        assert all(torch.equal(weight, weights[name]) for name, weight in adapted.state_dict().items())


def tied() -> tuple[PeftModel, nn.Module, nn.Module]:
    """An adapted model whose head is its embedding, and the two."""
    model = FAMILIES["llama"].build()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapted = get_peft_model(model, ap.AntiPastoConfig(target_modules=["lm_head", "q_proj"]))
    randomise(adapted)
    return adapted, model.lm_head, model.model.embed_tokens


@pytest.mark.filterwarnings("ignore:.*a tied layer is part of the adapter")  # PEFT's, of every method
def test_merging_a_head_that_is_tied_leaves_the_embedding_alone(tmp_path: Path) -> None:
    model, head, embedding = tied()
    want, before = logits(model), embedding.weight.detach().clone()
    model.merge_adapter()
    torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(embedding.weight, before)
    model.to(torch.float64)
    assert embedding.weight.dtype == head.base_layer.weight.dtype == torch.float64
    model.unmerge_adapter()
    assert head.base_layer.weight is embedding.weight
    model.to(torch.float32)
    assert torch.equal(embedding.weight, before)

    twin = copy.deepcopy(model)
    twin.merge_adapter()
    twin = copy.deepcopy(twin)
    twin.unmerge_adapter()
    inner = twin.base_model.model
    assert inner.lm_head.base_layer.weight is inner.model.embed_tokens.weight

    with pytest.warns(UserWarning, match="no longer tied after merging"):
        plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), want, atol=1e-5, rtol=1e-5)
    plain.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(plain).from_pretrained(tmp_path)), want, atol=1e-5, rtol=1e-5)


def test_a_weight_that_another_layer_has_too_stays_that_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    adapted = get_peft_model(model, ap.AntiPastoConfig(target_modules=["0"]))
    randomise(adapted)
    x = torch.randn(4, 6)
    want = adapted(x)
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x), want, atol=1e-5, rtol=1e-5)
    adapted.unmerge_adapter()
    assert model[0].base_layer.weight is model[1].weight
    torch.testing.assert_close(adapted.merge_and_unload()(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("verb", ["merge_and_unload", "unload"])
def test_unloading_inside_a_context_keeps_what_it_gave(verb: str) -> None:
    model = build()
    model.add_adapter("second", ap.AntiPastoConfig())
    with ap.deployed(model):
        deployed = logits(model)
        plain = getattr(model, verb)()
        torch.testing.assert_close(logits(plain), deployed if verb == "merge_and_unload" else logits(BASE))
    torch.testing.assert_close(logits(plain), deployed if verb == "merge_and_unload" else logits(BASE))

    model = build()
    model.merge_adapter()
    with ap.reference(model):
        base = model.unload()
    assert torch.equal(logits(base), logits(BASE))


def test_contexts_put_back_the_merged_weights_themselves() -> None:
    model = build()
    model.merge_adapter()
    merged = logits(model)
    for layer in ap.knobs(model).values():
        layer.delta_s.data.mul_(3)  # shows after the next merge, and not before
    ap.ref_logprobs(model, tokens())
    with torch.autocast("cpu", torch.bfloat16):
        ap.ref_logprobs(model, tokens())
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    model.add_adapter("second", ap.AntiPastoConfig())
    model.merge_adapter()
    with ap.reference(model):
        model.set_adapter("second")
    assert torch.equal(logits(model), logits(BASE))  # the second one is at zero, and nothing is merged


def test_merging_under_autocast_is_the_same_merge() -> None:
    model, other = build(), build()
    model.merge_adapter()
    with torch.autocast("cpu", torch.bfloat16):
        other.merge_adapter()
    for name, layer in _layers(model).items():
        assert torch.equal(layer.base_layer.weight, _layers(other)[name].base_layer.weight)


def test_deployed_inside_disable_adapter_is_the_base_model() -> None:
    model = build(modules_to_save=["lm_head"], target_modules=["q_proj"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(2)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(BASE))
        with ap.deployed(model):
            assert torch.equal(logits(model), logits(BASE))


def test_freezing_an_adapter_freezes_its_quarantine() -> None:
    model = build()
    model.add_adapter("second", ap.AntiPastoConfig())
    hacks = [layer.delta_s_hack for layer in ap.knobs(model, adapter_name="default").values()]

    def ask() -> None:
        for hack in hacks:
            hack.requires_grad_(True)

    ask()
    model.set_adapter("default")
    assert all(hack.requires_grad for hack in hacks)  # the active adapter's is the caller's choice
    model.set_adapter("second")
    assert not any(hack.requires_grad for hack in hacks)
    model.set_adapter("default")
    assert not any(hack.requires_grad for hack in hacks)
    ask()
    model.set_requires_grad("default", requires_grad=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_delta_weight_of_an_unknown_adapter_is_an_error() -> None:
    layer = next(iter(_layers(build()).values()))
    with pytest.raises(ValueError, match=r"no adapter 'typo'; it has \['default'\]"):
        layer.get_delta_weight("typo")


# ── transformers' own integration ────────────────────────────────────────────────────────────────────────────────────


def test_transformers_loads_adds_and_deletes_the_adapter(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    loaded = FAMILIES["llama"].build()
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    loaded.delete_adapter("default")
    fresh = FAMILIES["llama"].build()
    fresh.add_adapter(ap.AntiPastoConfig())
    assert torch.equal(logits(fresh), logits(BASE))
    assert set(ap.knobs(fresh)) == set(ap.knobs(model))


def test_a_wrapped_models_own_save_pretrained_writes_the_adapter(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    ap.wrap(model)
    randomise(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    assert torch.equal(logits(PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path)), logits(model))


def test_the_methods_name_is_a_member_of_pefts_enum() -> None:
    config = ap.AntiPastoConfig()
    assert isinstance(config.peft_type, peft.PeftType)
    assert config.peft_type.value == config.peft_type == "ANTIPASTO"
    assert peft.PeftType("ANTIPASTO") is config.peft_type
    assert pickle.loads(pickle.dumps(config)) == config
    assert json.loads(json.dumps(config.to_dict()))["peft_type"] == "ANTIPASTO"


# ── which layers, at what rank ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"target_modules": ["q_proj"]}, {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        ({"target_modules": ["layers.1.mlp.up_proj"]}, {"model.layers.1.mlp.up_proj"}),
        (
            {"target_modules": r".*layers\.0.*(k|v)_proj"},
            {"model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"},
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"model.layers.1.self_attn.q_proj"}),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
            {"model.layers.0.self_attn.q_proj"},
        ),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
            {"model.layers.1.self_attn.q_proj"},
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}, {"model.layers.1.self_attn.q_proj"}),
    ],
)
def test_choice_of_layers(options: dict[str, object], names: set[str]) -> None:
    model = build(**options)
    assert set(ap.knobs(model)) == names
    assert not torch.equal(logits(model), logits(BASE))


def test_all_linear_is_every_linear_but_the_head() -> None:
    linears = {name for name, module in BASE.named_modules() if isinstance(module, nn.Linear)}
    assert set(ap.knobs(build(target_modules="all-linear"))) == linears - {"lm_head"}


def test_modules_to_save_train_too_and_stand_aside_for_the_reference(tmp_path: Path) -> None:
    model = build(modules_to_save=["lm_head"], target_modules=["q_proj"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(2)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "base_model.model.lm_head.modules_to_save.default.weight" in trainable
    trained = logits(model)
    with ap.reference(model):
        assert torch.equal(logits(model), logits(BASE))
    assert torch.equal(logits(model), trained)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path)), trained)


def test_rank_and_rank_pattern() -> None:
    model = build(rank=3, rank_pattern={"q_proj": 5, r"layers\.1\.mlp\.up_proj": 99})
    ranks = {name: layer.r for name, layer in ap.knobs(model).items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 5
    assert ranks["model.layers.1.mlp.up_proj"] == 16  # there are no more
    assert ranks["model.layers.0.mlp.up_proj"] == 3
    layer = ap.knobs(model)["model.layers.0.self_attn.q_proj"]
    full = ap.load_basis(layer.layer.base_layer.weight)
    assert torch.equal(layer.U, full.U[:, :5])
    assert torch.equal(layer.S, full.S[:5])
    assert torch.equal(layer.Vh, full.Vh[:5])


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_is_the_same_wherever_its_basis_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rank: int | None
) -> None:
    base = FAMILIES["llama"].build(dtype=dtype)
    weights = {name: module.weight for name, module in base.named_modules() if type(module) is nn.Linear}
    for weight in weights.values():  # whole and in fp32, as every file was once
        ap.load_basis(weight, cache_dir=tmp_path / "whole")
    written = {path.name for path in (tmp_path / "whole").iterdir()}
    want = {name: decompose(weight) for name, weight in weights.items()}
    prints: dict[str, set[str]] = {}
    for folder in (
        None,
        tmp_path / "own",
        tmp_path / "own",
        tmp_path / "whole",
    ):  # computed, written, read, read in part
        if folder is not None and folder.exists():
            monkeypatch.setattr("antipasto.adapter.basis.decompose", lambda _: pytest.fail("it is in the cache"))
        config = ap.AntiPastoConfig(rank=rank, cache_dir=None if folder is None else str(folder))
        for name, knobs in ap.wrap(FAMILIES["llama"].build(dtype=dtype), config).items():
            U, S, Vh = want[name].truncate(knobs.r)
            assert knobs.r == (rank or len(want[name].S))
            for got, wanted in zip((knobs.U, knobs.S, knobs.Vh), (U.to(dtype), S, Vh.to(dtype)), strict=True):
                assert got.dtype == wanted.dtype
                assert torch.equal(got, wanted)
            prints.setdefault(name, set()).add(str(knobs.layer.fingerprint))
        monkeypatch.undo()
    assert {name: len(found) for name, found in prints.items()} == dict.fromkeys(prints, 1)
    assert {path.name for path in (tmp_path / "whole").iterdir()} == written
    kinds = {path.stem[64:] for path in (tmp_path / "own").iterdir()}
    assert kinds == {("-r4" if rank else "") + ("" if dtype == torch.float32 else f"-{dtype}".replace("torch.", ""))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1.*got 0"),
        ({"rank": 2.5}, "got 2.5"),
        ({"rank": True}, "got True"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\].*got -1"),
        ({"target_modules": "q_proj", "layers_to_transform": 1}, "needs target_modules to be a list"),
        ({"target_modules": ["q_proj"], "layers_pattern": "h"}, "no effect without layers_to_transform"),
    ],
)
def test_config_that_makes_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ap.AntiPastoConfig(**options)  # type: ignore[arg-type]


def test_a_misspelt_option_is_an_error() -> None:
    with pytest.raises(TypeError, match="ranks"):
        ap.AntiPastoConfig(ranks=3)  # type: ignore[call-arg]
