"""A target that cannot be adapted is an error that names it, and leaves the model as it was."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from families import FAMILIES, HEADS, LINEAR_ATTENTION, SIZES
from torch import nn

import antipasto as ap
from antipasto.adapter import AntiPastoLinear
from antipasto.adapter.basis import decompose


class Quantised(nn.Linear):
    """Stands for bitsandbytes' layers: a Linear whose weight holds packed bytes."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)


class Packed(nn.Module):
    """Stands for GPTQ's and AWQ's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qweight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)


class Experts(nn.Module):
    """Stands for experts with a forward of their own: one 3-D parameter under a name of the default set."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(2, 4, 4))


def holder(name: str, module: nn.Module) -> nn.Module:
    """A model with one good layer, and a bad one under ``block.<name>``."""
    model = nn.Module()
    model.good_proj = nn.Linear(4, 4)
    model.block = nn.Module()
    setattr(model.block, name, module)
    return model


def with_nan() -> nn.Linear:
    layer = nn.Linear(4, 4)
    nn.init.constant_(layer.weight[1], float("nan"))
    return layer


def too_large() -> nn.Linear:
    layer = nn.Linear(4, 4)
    nn.init.constant_(layer.weight, 3e38)
    return layer


def float8() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


BAD = {
    "an embedding": (nn.Embedding(4, 4), "Embedding"),
    "a convolution": (nn.Conv1d(4, 4, 3), "Conv1d"),
    "a norm": (nn.LayerNorm(4), "LayerNorm"),
    "a container": (nn.Sequential(nn.Linear(4, 4)), "Sequential"),
    "packed bytes": (Quantised(), "torch.uint8, perhaps quantised (Quantised)"),
    "packed integers": (Packed(), "quantised (Packed)"),
    "float8": (float8(), "torch.float8_e4m3fn"),
    "a weight without values": (nn.Linear(4, 4, device="meta"), "meta device"),
    "a weight with NaN": (with_nan(), "NaN or Inf"),
    "a weight with an infinite S": (too_large(), "a singular value of 1.2e+39, more than torch.float32 can hold"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_adapted_is_named(what: str) -> None:
    module, reason = BAD[what]
    model = holder("bad_proj", module)
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        ap.wrap(model, ap.AntiPastoConfig(target_modules=["good_proj", "bad_proj"]))
    assert "block.bad_proj" in str(error.value)
    assert [type(m) for m in model.modules()] == before
    assert all(p.requires_grad for n, p in model.named_parameters() if n.startswith("good_proj"))
    if what not in ("a weight with NaN", "a weight with an infinite S"):
        assert "Supported: 2-D weights of torch.nn.Linear and transformers' Conv1D" in str(error.value)
    # and what the message proposes works
    assert set(
        ap.wrap(model, ap.AntiPastoConfig(target_modules=["good_proj", "bad_proj"], exclude_modules=["block.bad_proj"]))
    ) == {"good_proj"}


def test_stacked_experts() -> None:
    model = holder("experts", Experts())
    with pytest.raises(
        ValueError,
        match=r"block\.experts\.down_proj is a target.*shape \(2, 4, 4\) of a Experts, which is not a module of",
    ):
        ap.wrap(model, ap.AntiPastoConfig(target_modules=["good_proj", "down_proj"]))


SMALL: dict[str, object] = {**SIZES, **HEADS}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
# model type → options, what the default adapts, what its warning says
HYBRIDS: dict[str, tuple[dict[str, object], set[str], list[str]]] = {
    "falcon_h1": (
        SMALL | MAMBA | {"mamba_d_ssm": 32},
        ATTENTION | MLP,
        [r"2 × out_proj \(the fused kernels of falcon_h1 models"],
    ),
    "bamba": (
        SMALL | MAMBA | {"attn_layer_indices": [1]},
        ATTENTION | MLP,
        [r"1 × out_proj \(the fused kernels of bamba models"],
    ),
    "qwen3_next": (
        SMALL
        | LINEAR_ATTENTION
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
        ATTENTION | MLP | {"out_proj"},
        [r"2 × down_proj \(experts in one parameter are adapted only where target_modules names them"],
    ),
    "nemotron_h": (
        SMALL
        | {
            "layers_block_type": ["mamba", "attention", "moe", "mlp"],
            "num_hidden_layers": 4,
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "moe_intermediate_size": 8,
            "moe_shared_expert_intermediate_size": 8,
        },
        ATTENTION | {"up_proj", "down_proj"},
        [r"1 × out_proj \(the fused kernels", r"1 × up_proj \(experts in one", r"1 × down_proj \(experts in one"],
    ),
}


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_the_default_adapts_what_it_can_and_says_what_it_leaves(model_type: str, tmp_path: Path) -> None:
    options, adapted, messages = HYBRIDS[model_type]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **options)
    base = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        before = base(input_ids=ids).logits
    with pytest.warns(UserWarning, match="These layers of the default target set cannot be adapted in this") as caught:
        model = peft.get_peft_model(base, ap.AntiPastoConfig())
    (warning,) = [str(w.message) for w in caught if "default target set" in str(w.message)]
    for message in messages:
        assert re.search(message, warning), warning
    layers = ap.knobs(model)
    assert {name.rpartition(".")[2] for name in layers} == adapted
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    for layer in layers.values():
        layer.delta_s.data.fill_(0.1)
    model(input_ids=ids).logits.logsumexp(-1).mean().backward()
    if model_type != "nemotron_h":  # a random router may pass an expert over
        assert all(layer.delta_s.grad is not None for layer in layers.values())
    model.save_pretrained(tmp_path)  # and the file finds the same layers, without a word
    loaded = peft.PeftModel.from_pretrained(model.unload(), tmp_path)
    assert ap.knobs(loaded).keys() == layers.keys()


def test_what_the_default_leaves_out_is_added_to_what_the_user_does() -> None:
    for exclude in (["model.0.q_proj"], r"model\.0\..*"):
        model = nn.Module()
        model.model = nn.ModuleList(holder("bad_proj", nn.Linear(4, 4)) for _ in range(2))
        for one in model.model:
            one.q_proj, one.up_proj, one.v_proj = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1)
        model.model[1].v_proj = nn.Linear(4, 4)
        model.model[0].extra = nn.ModuleDict({"up_proj": nn.Conv1d(4, 4, 1)})
        config = ap.AntiPastoConfig(exclude_modules=exclude)
        if isinstance(exclude, str):  # has all that would be left
            layers = ap.wrap(model, config)
            assert set(layers) == {"model.1.q_proj", "model.1.up_proj", "model.1.v_proj"}
            continue
        with pytest.warns(UserWarning, match=r"1 × v_proj \(its type is Conv1d\); 1 × up_proj"):
            layers = ap.wrap(model, config)
        assert set(layers) == {"model.0.up_proj", "model.1.q_proj", "model.1.up_proj", "model.1.v_proj"}


@pytest.mark.parametrize(
    ("model_type", "options", "names"),
    [
        ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 16}, {"c_attn"}),
        ("gpt_neox", {"intermediate_size": 8}, {"query_key_value"}),
        ("bert", {"intermediate_size": 8}, {"query", "value"}),
        ("t5", {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2, "vocab_size": 16}, {"q", "v"}),
    ],
)
def test_models_that_peft_has_defaults_for_get_these(
    model_type: str, options: dict[str, object], names: set[str]
) -> None:
    if model_type in ("gpt_neox", "bert"):
        options = options | {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model_type, **options))
    assert {name.rpartition(".")[2] for name in ap.wrap(model)} == names


def test_one_layer_under_two_names() -> None:
    """Only the first would be replaced; merging would then change the other."""
    model = nn.Module()
    model.a = nn.Linear(4, 4)
    model.block = nn.ModuleDict({"b": model.a})
    with pytest.raises(ValueError, match=r"a is a target.*it is the same module as block\.b"):
        ap.wrap(model, ap.AntiPastoConfig(target_modules=["a"]))


def test_the_output_projection_of_multihead_attention_is_never_called() -> None:
    model = nn.TransformerEncoderLayer(8, 2)
    with pytest.raises(ValueError, match=r"self_attn\.out_proj.*nn\.MultiheadAttention"):
        ap.wrap(model, ap.AntiPastoConfig(target_modules=["out_proj"]))
    with pytest.raises(ValueError, match=r"self_attn\.out_proj.*nn\.MultiheadAttention"):
        ap.wrap(model, ap.AntiPastoConfig(target_modules="all-linear"))


def test_a_computed_weight() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"0 is a target.*not a parameter but computed"):
        ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"]))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_weight_without_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 0))
    with pytest.raises(ValueError, match=r"0: Expected a 2-D weight \(o, i\) with numbers in it"):
        ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"]))


def test_mambas_kernels_read_past_the_layer() -> None:
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(ValueError, match=r"mixer\.out_proj is a target.*fused kernels of mamba models"):
        ap.wrap(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["q_proj", "qq_proj"]},
            r"names 'qq_proj', but no module.*Layers that can be adapted here: .*q_proj",
        ),
        ({"target_modules": r".*nothing.*"}, r"No module of this LlamaForCausalLM matches.*nothing"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "No module.*exclude_modules"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"layers_to_transform.*\[7\]"),
        ({"target_modules": []}, "No module"),
    ],
)
def test_a_target_set_that_matches_nothing(options: dict[str, object], message: str) -> None:
    model = FAMILIES["llama"].build()
    with pytest.raises(ValueError, match=message):
        ap.wrap(model, ap.AntiPastoConfig(**options))  # type: ignore[arg-type]
    assert not any(isinstance(module, AntiPastoLinear) for module in model.modules())


def test_a_model_without_the_default_names_says_what_there_is() -> None:
    model = FAMILIES["gpt2"].build()
    model.config.model_type = "of nobody"
    config = ap.AntiPastoConfig()
    with pytest.raises(
        ValueError, match=r"No module of this GPT2LMHeadModel has a name of the default set.*c_attn, c_fc, c_proj"
    ):
        peft.get_peft_model(model, config)
    assert config.target_modules is None


def test_an_error_while_adding_a_second_adapter_leaves_the_first() -> None:
    model = peft.get_peft_model(FAMILIES["llama"].build(), ap.AntiPastoConfig())
    with pytest.raises(ValueError, match="embed_tokens"):
        model.add_adapter("second", ap.AntiPastoConfig(target_modules=["q_proj", "embed_tokens"]))
    assert all(set(knobs.layer.r) == {"default"} for knobs in ap.knobs(model).values())


@pytest.mark.parametrize("threads", [1, 3, 20])
def test_bases_computed_several_at_a_time_are_each_layers_own(threads: int) -> None:
    model = FAMILIES["llama"].build()
    expected = {name: decompose(module.weight) for name, module in model.named_modules() if type(module) is nn.Linear}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layers = ap.wrap(model)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(layers) > 8
    for name, layer in layers.items():
        for got, want in zip((layer.U, layer.S, layer.Vh), expected[name], strict=True):
            assert torch.equal(got, want)


def test_after_a_layer_that_cannot_be_decomposed_no_other_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].build()
    model.model.layers[0].self_attn.k_proj.weight.data[0, 0] = torch.nan
    tried: list[torch.Tensor] = []

    def counted(weight: torch.Tensor) -> ap.Basis:
        tried.append(weight)
        return decompose(weight)

    monkeypatch.setattr("antipasto.adapter.basis.decompose", counted)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.k_proj: .* NaN"):
        ap.wrap(model)
    assert len(tried) < 6  # of 14: those that had begun
    assert not any(isinstance(module, AntiPastoLinear) for module in model.modules())
