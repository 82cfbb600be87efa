"""A quantised base is adapted as its dequantised copy would be, with the layer's own forward left as it is."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from rich.console import Console
from scripted import tokenizer
from torch import Tensor, nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerTensor,
    quantize_,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import antipasto as ap
from antipasto.adapter import AntiPastoLinear, basis
from antipasto.adapter.fingerprints import Likeness
from antipasto.adapter.quantized import dequantised, is_quantised, keep_packing, packed_digest, packing
from antipasto.app.commands import cache_bases
from antipasto.app.export.job import export_run
from antipasto.app.models import base_fingerprint
from antipasto.tasks import addition

MODEL = addition.model_path()
PAIRS = ap.load_pairs(addition.hack_pairs(12, seed=0))
IDS = torch.arange(24).remainder(16).reshape(2, 12)


def four_bits(kind: str, double: bool = False) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)


# what transformers quantises a model with, as it loads it
KINDS: dict[str, Callable[[], Any]] = {
    "nf4": lambda: four_bits("nf4"),
    "nf4 twice": lambda: four_bits("nf4", double=True),
    "fp4": lambda: four_bits("fp4"),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao int8 by groups": lambda: TorchAoConfig(Int8WeightOnlyConfig(granularity=PerGroup(32))),
    "torchao int4": lambda: TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
}


@pytest.fixture(scope="module", autouse=True)
def _one_basis_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("basis")


@pytest.fixture(autouse=True)
def _use_it(_one_basis_cache: Path, _own_basis_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTIPASTO_CACHE", str(_one_basis_cache))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def load(kind: str, path: str | Path = MODEL, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A quantised model in train mode, where Linear8bitLt does not round its inputs on a CPU; it has no dropout.

    A CPU with bf16 instructions is no exception: there bitsandbytes would round constants in eval mode, or fail at this shape.
    """
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=KINDS[kind](), dtype=dtype)
    for module in model.modules():
        keep_packing(module)
    return model.train()


def plain(model: nn.Module) -> nn.Module:
    """A copy with what another library says the weights are, in layers of torch."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if is_quantised(module):
            layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            layer.weight.data = dequantize_module_weight(module).detach().float()
            if module.bias is not None:
                layer.bias.data = module.bias.detach().float()
            model.set_submodule(name, layer)
    return model


def scatter(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in ap.knobs(model).values():
        for knob in (layer.delta_s, layer.delta_s_hack):
            knob.data.copy_(torch.randn(layer.r, generator=generator) * 0.3)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def near(found: Tensor, wanted: Tensor, share: float = 1e-4) -> None:
    assert (found.float() - wanted.float()).norm() <= share * wanted.float().norm()


def both(kind: str) -> tuple[nn.Module, nn.Module]:
    """The adapted quantised model, and its adapted dequantised copy."""
    model = load(kind)
    copied = plain(model)
    return get_peft_model(model, ap.AntiPastoConfig()), get_peft_model(copied, ap.AntiPastoConfig())


def linears(dtype: torch.dtype) -> dict[str, nn.Linear]:
    """A quantised layer with a bias of each kind, made by hand."""

    def four(**options: Any) -> nn.Linear:
        return bitsandbytes.nn.Linear4bit(64, 96, **options).to(dtype).to("cpu")

    def torchao(config: Any) -> nn.Linear:
        layer = nn.Linear(64, 96).to(dtype)
        quantize_(layer, config)
        return layer

    return {
        "nf4": four(quant_type="nf4", compress_statistics=False),
        "stored as bf16": four(quant_type="nf4", quant_storage=torch.bfloat16),
        "int8": bitsandbytes.nn.Linear8bitLt(64, 96, has_fp16_weights=False).to(dtype).to("cpu"),
        "one scale": torchao(Int8WeightOnlyConfig(granularity=PerTensor())),
        "zero points": torchao(
            IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC)
        ),
        "int3": torchao(IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerGroup(32))),
    }


# ── the weight ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_w_is_what_the_library_itself_says(kind: str) -> None:
    for dtype, share in ((torch.float32, 1e-7), (torch.bfloat16, 4e-3)):
        for module in load(kind, dtype=dtype).modules():
            if is_quantised(module):
                W = dequantised(module)
                assert W.dtype is torch.float32
                near(W, dequantize_module_weight(module).detach(), share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_w_is_what_the_layer_multiplies_with(dtype: torch.dtype) -> None:
    for layer in linears(dtype).values():
        found = layer(torch.eye(64, dtype=dtype)) - layer.bias
        near(found.T, dequantised(layer), 1e-2 if dtype is torch.bfloat16 else 1e-5)


def test_a_basis_has_the_dtype_of_the_layers_products(kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for layer in ap.wrap(load(kind, dtype=dtype)).values():
            assert {layer.U.dtype, layer.Vh.dtype} == {torch.float32 if kind == "int8" else dtype}
            assert layer.delta_s.dtype is layer.S.dtype is torch.float32


# ── the same function as the dequantised copy ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [True, False])
def test_without_knobs_it_is_the_quantised_model_bit_for_bit(kind: str, train: bool, dtype: torch.dtype) -> None:
    model = load(kind, dtype=dtype).train(train)
    before = logits(model)
    adapted = get_peft_model(model, ap.AntiPastoConfig()).train(train)
    assert torch.equal(logits(adapted), before)
    scatter(adapted)
    assert not torch.equal(logits(adapted), before)
    with ap.reference(adapted):
        assert torch.equal(logits(adapted), before)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    assert torch.equal(ap.ref_logprobs(adapted, IDS), ap.token_logprobs(before, IDS))
    assert torch.equal(logits(adapted.unload()), before)


@pytest.mark.parametrize("train", [True, False])
def test_outputs_are_those_of_the_dequantised_copy_in_every_view(kind: str, train: bool) -> None:
    found, wanted = both(kind)
    scatter(found)
    scatter(wanted)
    share = 3e-2 if kind == "int8" and not train else 1e-4
    found.train(train)
    for view in (
        ap.deployed,
        ap.reference,
        lambda model: ap.deployed(model, -0.5),
        lambda model: ap.scaled(model, 0.5),
    ):
        near(logits(found), logits(wanted), share)
        with view(found), view(wanted):
            near(logits(found), logits(wanted), share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_knobs_add_what_the_formula_says_to_the_layers_own_output(dtype: torch.dtype) -> None:
    for plan in ("auto", "merged", "spectral"):
        for layer in linears(dtype).values():
            model, x = nn.Sequential(layer), torch.randn(5, 64, dtype=dtype)
            with torch.no_grad():
                own = layer(x)
                knobs = ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"], plan=plan))["0"]
                knobs.delta_s.normal_()
                y = model(x)
                delta = (knobs.theta * (x @ knobs.Vh.to(dtype).T)).to(dtype) @ knobs.U.to(dtype).T
            assert torch.equal(y, own + delta)


def test_gradients_are_those_of_the_dequantised_copy(kind: str) -> None:
    gradients = []
    for model in both(kind):
        scatter(model)
        with ap.rollout_grads(model) as by_rollout:
            logprobs = ap.token_logprobs(model(input_ids=IDS).logits, IDS)
            logprobs.sum().backward()
        total = torch.cat([layer.delta_s.grad for layer in ap.knobs(model).values()])
        rows = torch.cat([by_rollout[name] for name in ap.knobs(model)], 1)
        near(rows.sum(0), total, 1e-5)
        gradients.append((total, rows))
    for found, wanted in zip(*gradients, strict=True):
        near(found, wanted, 1e-3)


def test_directions_and_scores_are_those_of_the_dequantised_copy(kind: str) -> None:
    texts = [ap.Completion("h12+34=", "046"), ap.Completion("h12+34=", "!"), ap.Completion("s99+98=", "?")]
    found, wanted = both(kind)
    directions = [ap.extract_direction(model, tokenizer(), PAIRS) for model in (found, wanted)]
    for name, effect in directions[1].effect.items():
        near(directions[0].effect[name], effect, 1e-2)
    scatter(found)  # scores are at the reference, wherever the model is
    scores = [
        ap.Monitor(model, tokenizer(), v).scores(texts) for model, v in zip((found, wanted), directions, strict=True)
    ]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-3, rtol=0)
    assert scores[0][1] > scores[0][0]


def test_a_run_with_a_router_is_that_of_the_dequantised_copy(kind: str) -> None:
    ends = []
    for model in both(kind):
        v = ap.extract_direction(model, tokenizer(), PAIRS)
        layers = ap.knobs(model)
        optimizer = torch.optim.SGD([layer.delta_s for layer in layers.values()], lr=1e-3)
        router = ap.Router(model, v, gate="coordinate", threshold=0.5, controls={"random": v.random(0)})
        with router.attach(optimizer):
            for _ in range(4):
                ap.token_logprobs(model(input_ids=IDS).logits, IDS).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(
            [torch.cat([getattr(one, knob) for one in layers.values()]) for knob in ("delta_s", "delta_s_hack")]
        )
    for found, wanted in zip(*ends, strict=True):
        assert wanted.norm() > 0
        # the gate opens by a threshold: a coordinate close to it may go another way
        assert (found - wanted).abs().gt(1e-3 * wanted.abs().max()).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_is_built_to_generate(kind: str, dtype: torch.dtype) -> None:
    model = get_peft_model(load(kind, dtype=dtype), ap.AntiPastoConfig()).eval()
    scatter(model)
    with ap.fixed(model):
        model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert not any(m.choice.held._entries for m in model.modules() if isinstance(m, AntiPastoLinear))


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("save_basis", [False, True])
def test_saved_and_loaded_it_is_the_same(kind: str, save_basis: bool, tmp_path: Path) -> None:
    adapted = get_peft_model(load(kind), ap.AntiPastoConfig(save_basis=save_basis)).eval()
    scatter(adapted)
    ap.save_adapter(adapted, tmp_path / "adapter")
    model = load(kind)
    model.save_pretrained(tmp_path / "base")
    for base in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "base").train()):
        assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), logits(adapted))


def test_another_packing_of_the_same_weights_is_another_base(kind: str, tmp_path: Path) -> None:
    adapted = get_peft_model(load(kind), ap.AntiPastoConfig())
    ap.save_adapter(adapted, tmp_path)
    names = [packing(layer.layer.base_layer) for layer in ap.knobs(adapted).values()]
    for other in KINDS:
        if other != kind:
            with pytest.raises(ValueError, match=rf"made on another base: 21 of.*{names[0] if 'int4' in kind else ''}"):
                PeftModel.from_pretrained(load(other), tmp_path)
    with pytest.raises(ValueError, match=f"made on another base: 21 of.*{names[0]} there, float32 here"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), tmp_path)
    with pytest.raises(ValueError, match="made on another base: 21 of"):
        PeftModel.from_pretrained(load(kind, addition.model_path("even")), tmp_path)


def test_the_dequantised_copy_is_the_same_base(kind: str, tmp_path: Path) -> None:
    found, wanted = both(kind)
    scatter(found)
    ap.save_adapter(found, tmp_path)
    near(logits(PeftModel.from_pretrained(plain(load(kind)), tmp_path)), logits(found))
    for name, layer in ap.knobs(found).items():
        one, other = layer.layer.fingerprint, ap.knobs(wanted)[name].layer.fingerprint
        assert one.weight != other.weight
        assert one.likeness(other) is Likeness.SAME


def test_the_fingerprint_is_of_codes_and_constants() -> None:
    for layer in linears(torch.float32).values():
        model = nn.Sequential(layer)
        wrapped = ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"]))["0"].layer
        before = wrapped.fingerprint
        assert wrapped.current_fingerprint() is before
        assert before.weight == packed_digest(layer)
        model(torch.randn(3, 64))  # moves the constants of Linear8bitLt
        model.eval()(torch.randn(3, 64))
        assert wrapped.current_fingerprint() is before
        for constants in constants_of(layer):
            changed = constants.view(torch.uint8)
            changed.reshape(-1)[0] ^= 1
            assert wrapped.current_fingerprint().weight != before.weight
            assert wrapped.current_fingerprint().likeness(before) is Likeness.OTHER
            changed.reshape(-1)[0] ^= 1
        assert wrapped.current_fingerprint() is before


def constants_of(layer: nn.Module) -> list[Tensor]:
    """The tensors of a layer that say what W is."""
    weight: Any = layer.weight
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        state = weight.quant_state
        nested = [state.state2.absmax, state.state2.code, state.offset.reshape(1)] if state.nested else []
        return [weight.data, state.absmax, state.code, *nested]
    if isinstance(weight, bitsandbytes.nn.Int8Params):
        return [weight.data, layer.state.SCB]
    return [weight.qdata, weight.scale, weight.zero_point]


def test_the_same_bytes_are_the_same_base_whatever_they_were_rounded_from() -> None:
    one = bitsandbytes.nn.Linear4bit(64, 96, quant_type="nf4").to("cpu")
    other = copy.deepcopy(one)
    other.weight.quant_state.dtype = torch.bfloat16
    assert packed_digest(one) == packed_digest(other)
    assert torch.equal(dequantised(one), dequantised(other))


def test_the_cache_is_used_the_second_time(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ap.AntiPastoConfig(cache_dir=str(tmp_path))
    first = ap.wrap(load(kind), config)
    assert len(list(tmp_path.glob("*.safetensors"))) == 21

    def refuse(weight: Tensor) -> None:
        raise AssertionError("decomposed again")

    monkeypatch.setattr(basis, "decompose", refuse)
    for name, layer in ap.wrap(load(kind), config).items():
        assert torch.equal(layer.U, first[name].U)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_keeps_the_basis_in_the_dtype_of_the_products(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = ap.AntiPastoConfig(cache_dir=str(tmp_path), rank=8)
    low = dtype is torch.bfloat16 and kind != "int8"  # which does not know what it was quantised from
    for source in ("computed", "read"):
        for name, knobs in ap.wrap(load(kind, dtype=dtype), config).items():
            U, S, Vh = basis.decompose(knobs.layer.matrix()).truncate(8)
            U, Vh = (U.bfloat16(), Vh.bfloat16()) if low else (U, Vh)
            for got, wanted in zip((knobs.U, knobs.S, knobs.Vh), (U, S, Vh), strict=True):
                assert got.dtype == wanted.dtype, (name, source)
                assert torch.equal(got, wanted), (name, source)
        assert {path.stem[64:] for path in tmp_path.iterdir()} == {"-r8-bfloat16" if low else "-r8"}


def test_other_codes_or_constants_are_not_loaded_under_an_adapter() -> None:
    for layer in linears(torch.float32).values():
        model = nn.Sequential(layer)
        ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"]))
        states = copy.deepcopy(model.state_dict())
        model.load_state_dict(states, strict=False)  # bitsandbytes has entries that a strict load does not know
        for name in [name for name in states if name.startswith("0.base_layer.") and not name.endswith("bias")]:
            for part in getattr(states[name], "__tensor_flatten__", lambda: ([None],))()[0]:
                changed = copy.deepcopy(states)
                (changed[name] if part is None else getattr(changed[name], part)).view(torch.uint8).reshape(-1)[0] ^= 1
                with pytest.raises(ValueError, match=f"{re.escape(name)} of the state dict is not the weight"):
                    model.load_state_dict(changed, strict=False)
        with pytest.raises(ValueError, match=r"0\.base_layer\.weight of the state dict is not the weight"):
            model.load_state_dict({"0.base_layer.weight": torch.zeros(96, 64)}, strict=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_autocast_the_knobs_take_the_dtype_of_the_products(dtype: torch.dtype) -> None:
    for kind in ("nf4", "int8", "torchao int8"):
        adapted = get_peft_model(load(kind, dtype=dtype), ap.AntiPastoConfig(), autocast_adapter_dtype=False)
        knobs = {layer.delta_s.dtype for layer in ap.knobs(adapted).values()}
        assert knobs == {torch.float32 if kind == "int8" else dtype}
        assert logits(adapted).dtype is dtype


# ── merging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_merging_is_refused_by_name(kind: str) -> None:
    adapted = get_peft_model(load(kind), ap.AntiPastoConfig())
    scatter(adapted)
    before = logits(adapted)
    wanted = (
        r"model\.layers\.0\.self_attn\.q_proj cannot be merged: it is quantised.*antipasto\.dequantize\(model, dtype\)"
    )
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(ValueError, match=wanted):
            merge()
    with pytest.raises(ValueError, match=r"cannot be merged: it is quantised"):
        next(iter(ap.knobs(adapted).values())).layer.merge()
    assert torch.equal(logits(adapted), before)


@pytest.mark.parametrize("save_basis", [False, True])
def test_a_dequantised_model_is_merged_and_saved_as_any_other(kind: str, save_basis: bool, tmp_path: Path) -> None:
    adapted = get_peft_model(
        load(kind), ap.AntiPastoConfig(target_modules=["q_proj", "up_proj"], save_basis=save_basis)
    )
    scatter(adapted)
    before = logits(adapted)
    ap.dequantize(adapted, torch.float32)
    assert not any(is_quantised(module) for module in adapted.modules())
    assert {p.requires_grad for n, p in adapted.named_parameters() if "base_layer" in n} == {False}
    near(logits(adapted), before)
    ap.save_adapter(adapted, tmp_path / "adapter")
    near(logits(PeftModel.from_pretrained(plain(load(kind)), tmp_path / "adapter")), before)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    near(logits(merged), before)
    with pytest.raises(ValueError, match="has no quantised layer"):
        ap.dequantize(ap.wrap(merged) and merged, torch.float32)


def test_a_dequantised_bf16_model_is_bf16_throughout(kind: str) -> None:
    adapted = get_peft_model(load(kind, dtype=torch.bfloat16), ap.AntiPastoConfig())
    scatter(adapted)
    before = logits(adapted)
    ap.dequantize(adapted, torch.bfloat16)
    assert {layer.U.dtype for layer in ap.knobs(adapted).values()} == {torch.bfloat16}  # else it would stay factored
    near(logits(adapted), before, 5e-2)
    merged = adapted.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    near(logits(merged), before, 5e-2)


def test_a_checkpoint_of_a_quantised_base_is_refused_by_name_and_a_lora_adapter_is_not(tmp_path: Path) -> None:
    load("nf4", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    run = make_run(tmp_path, base=tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"layers\.0.*cannot be merged: it is quantised.*dequantize.*Export it with --lora"
    ):
        export_run(run, tmp_path / "out", Console(quiet=True), prompts=2)
    assert not (tmp_path / "out").exists()
    check = export_run(run, tmp_path / "out", Console(quiet=True), lora=96, prompts=2)
    assert check.largest < 1e-3 < check.update


def make_run(root: Path, base: Path) -> Path:
    """A finished run on a quantised base."""
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), ap.AntiPastoConfig())
    for layer in ap.knobs(adapted).values():
        layer.delta_s.data.fill_(0.1)
    run = root / "a-run"
    ap.save_adapter(adapted, run / "adapter")
    (run / "adapter" / "complete.json").write_text("{}")
    settings = {"model": str(base), "task": "addition", "method": "route", "dtype": "auto", "steps": 3, "seed": 0}
    (run / "config.yaml").write_text(json.dumps({**settings, "trainer": {}}))
    facts = {"base": {"model": str(base), "fingerprint": base_fingerprint(adapted)}, "processes": 1, "versions": {}}
    (run / "run.json").write_text(json.dumps(facts))
    return run


def test_bases_computed_before_are_those_that_are_used(tmp_path: Path) -> None:
    load("nf4").save_pretrained(tmp_path / "base")
    config = ap.AntiPastoConfig(cache_dir=str(tmp_path / "bases"))
    done = cache_bases(str(tmp_path / "base"), config, Console(quiet=True))
    assert (done.layers, done.there) == (21, 0)
    before = {file.stat().st_mtime_ns for file in (tmp_path / "bases").iterdir()}
    ap.wrap(load("nf4"), ap.AntiPastoConfig(cache_dir=str(tmp_path / "bases")))
    assert {file.stat().st_mtime_ns for file in (tmp_path / "bases").iterdir()} == before


# ── what stays refused ───────────────────────────────────────────────────────────────────────────────────────────────


def torchao_layer(config: Any) -> nn.Linear:
    layer = nn.Linear(64, 96)
    quantize_(layer, config)
    return layer


def repacked() -> nn.Linear:
    layer = bitsandbytes.nn.Linear4bit(64, 96, quant_type="nf4").to("cpu")
    layer.weight.quant_state.packing_format_for_cpu = True
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "float8": (lambda: torchao_layer(Float8WeightOnlyConfig()), "with a weight of torchao's type Float8Tensor"),
    "inputs too": (
        lambda: torchao_layer(Int8DynamicActivationInt8WeightConfig()),
        "so are its inputs, through which torchao has no gradient",
    ),
    "4 bits, not yet": (lambda: bitsandbytes.nn.Linear4bit(64, 96), "a Linear4bit that is not quantised yet"),
    "8 bits, not yet": (
        lambda: bitsandbytes.nn.Linear8bitLt(64, 96, has_fp16_weights=False),
        "a Linear8bitLt that is not quantised yet",
    ),
    "repacked": (repacked, "a forward on this CPU has rounded its constants"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_known_is_refused_by_name(what: str) -> None:
    make, reason = REFUSED[what]
    model = nn.Module()
    model.block = nn.ModuleDict({"q_proj": make()})
    with pytest.raises(ValueError, match=rf"block\.q_proj is a target.*{reason}.*quantised: bitsandbytes' Linear4bit"):
        ap.wrap(model)
    assert type(model.block["q_proj"]) is not AntiPastoLinear


def test_an_int8_layer_with_float_weights_is_adapted_by_these() -> None:
    layer = bitsandbytes.nn.Linear8bitLt(64, 96, has_fp16_weights=True)
    knobs = ap.wrap(nn.Sequential(layer), ap.AntiPastoConfig(target_modules=["0"]))["0"]
    near(knobs.U @ torch.diag(knobs.S) @ knobs.Vh, layer.weight, 1e-5)


def test_a_layer_is_not_repacked_once_it_is_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with bf16 instructions, where bitsandbytes rounds the constants at the first forward in eval mode."""
    layer = bitsandbytes.nn.Linear4bit(64, 96, quant_type="nf4").to("cpu")
    layer.support_avx512bf16_for_cpu = True
    model = nn.Sequential(layer)
    knobs = ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"]))["0"]
    with torch.no_grad():
        model.eval()(torch.randn(3, 64))
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert knobs.layer.current_fingerprint() is knobs.layer.fingerprint
