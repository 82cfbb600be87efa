"""What users of PEFT count on, over every plan and rank: the behaviours that PEFT's own suite asks of its methods.

The list is that of tests/test_custom_models.py and tests/testing_common.py in PEFT's repository; the tests are our own.
docs/compatibility.md says row by row what holds, and names these tests.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, tokens
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import antipasto as ap

PLANS = [
    ("auto", None),
    ("auto", 4),
    ("factored", None),
    ("factored", 4),
    ("merged", None),
    ("merged", 4),
    ("spectral", None),
]
pytestmark = pytest.mark.parametrize(("plan", "rank"), PLANS)
Config = Callable[..., ap.AntiPastoConfig]


@pytest.fixture
def config(plan: Any, rank: int | None) -> Config:
    return lambda **options: ap.AntiPastoConfig(**{"plan": plan, "rank": rank, **options})


class Branching(nn.Module):
    """Linears, a layer norm, an embedding; takes a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 12)
        self.lin0, self.lin1 = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 11)

    def forward(self, ids: Tensor, *, scale: float = 1.0) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + scale * self.lin1(F.silu(self.lin0(x)))))


IDS = torch.arange(22).reshape(2, 11) % 11
TARGETS = ["lin0", "lin1"]


def adapted(config: Config, **options: Any) -> PeftModel:
    return get_peft_model(Branching(), config(target_modules=TARGETS, **options))


def move(model: nn.Module, size: float = 0.3, adapter: str | None = None, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in ap.knobs(model, adapter_name=adapter).values():
        layer.delta_s.data = size * torch.randn(layer.r, generator=generator).to(layer.delta_s)


def moved(config: Config) -> PeftModel:
    model = adapted(config)
    move(model)
    return model


def output(model: nn.Module, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, **kwargs)


def step(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).logsumexp(-1).mean().backward()
        optimizer.step()


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_the_adapter_is_trainable(config: Config) -> None:
    model = adapted(config)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"base_model.model.{name}.delta_s.default.weight" for name in TARGETS}
    numbers, everything = model.get_nb_trainable_parameters()
    assert numbers == sum(layer.r for layer in ap.knobs(model).values()) < everything


def test_training_changes_only_the_adapter(config: Config) -> None:
    model = adapted(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def test_training_learns(config: Config) -> None:
    model = adapted(config)
    first = output(model).logsumexp(-1).mean()
    step(model, 20)
    assert output(model).logsumexp(-1).mean() < first


def test_a_layer_that_is_not_used_has_no_gradient_and_does_not_move(config: Config) -> None:
    model = get_peft_model(
        nn.ModuleDict({"used": nn.Linear(6, 6), "idle": nn.Linear(6, 6)}), config(target_modules=["used", "idle"])
    )
    model.base_model.model["used"](torch.ones(2, 6)).sum().backward()
    layers = ap.knobs(model)
    assert layers["used"].delta_s.grad is not None
    assert layers["idle"].delta_s.grad is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(config: Config, reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        model = get_peft_model(FAMILIES["llama"].build(), config())
        move(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        model(tokens()).logits.logsumexp(-1).mean().backward()
        grads.append([layer.delta_s.grad for layer in ap.knobs(model).values()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


# ── being off, being merged ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_fresh_adapter_is_the_base_model(config: Config) -> None:
    assert torch.equal(output(adapted(config)), output(Branching()))


def test_disabling_restores_the_base_model_and_enabling_the_adapter(config: Config) -> None:
    model = moved(config)
    before = output(model)
    with model.disable_adapter():
        assert torch.equal(output(model), output(Branching()))
    assert torch.equal(output(model), before)
    assert not torch.allclose(before, output(Branching()))


@pytest.mark.parametrize("safe", [True, False])
def test_merging_is_the_same_function_and_unmerging_gives_back_the_bits(config: Config, safe: bool) -> None:
    model = moved(config)
    before = output(model)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(output(model), before)
    model.unmerge_adapter()
    assert torch.equal(output(model), before)
    model.merge_adapter(safe_merge=safe)
    with model.disable_adapter():  # which unmerges, as everywhere in PEFT
        assert torch.equal(output(model), output(Branching()))
    assert torch.equal(output(model), before)


def test_merge_and_unload_leaves_a_plain_model(config: Config) -> None:
    model = moved(config)
    before = output(model)
    plain = model.merge_and_unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    assert type(plain.lin0) is nn.Linear
    torch.testing.assert_close(output(plain), before)


def test_unload_gives_back_the_base_model(config: Config) -> None:
    model = moved(config)
    plain = model.unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    assert type(plain.lin0) is nn.Linear
    assert torch.equal(output(plain), output(Branching()))


def test_get_base_model_is_the_model_inside(config: Config) -> None:
    model = adapted(config)
    assert isinstance(model.get_base_model(), Branching)


# ── several adapters ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_adapters_are_added_switched_and_deleted(config: Config) -> None:
    model = moved(config)
    first = output(model)
    model.add_adapter("second", config(target_modules=["lin0"]))
    assert torch.equal(output(model), first)
    model.set_adapter("second")
    assert torch.equal(output(model), output(Branching()))
    move(model, adapter="second", seed=2)
    second = output(model)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    model.set_adapter("default")
    assert torch.equal(output(model), first)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(output(model), second)
    assert not [name for name in model.state_dict() if ".default." in name]


def test_two_active_adapters_add_up_and_merge_together(config: Config) -> None:
    model = adapted(config)
    model.add_adapter("second", config(target_modules=TARGETS))
    move(model)
    move(model, adapter="second", seed=2)
    model.base_model.set_adapter(["default", "second"])
    both = output(model)
    twin = adapted(config)
    for name, layer in ap.knobs(twin).items():
        layer.delta_s.data = sum(ap.knobs(model, adapter_name=a)[name].delta_s for a in ("default", "second")).detach()  # type: ignore[union-attr]
    torch.testing.assert_close(output(twin), both)
    model.merge_adapter(adapter_names=["default", "second"])
    torch.testing.assert_close(output(model), both)


def test_the_same_name_twice_is_refused(config: Config) -> None:
    model = adapted(config)
    with pytest.raises(ValueError, match="default"):
        model.add_adapter("default", config(target_modules=TARGETS, rank=2))


def test_layer_and_model_status(config: Config) -> None:
    model = adapted(config)
    status = model.get_model_status()
    assert (status.num_adapter_layers, status.enabled, status.active_adapters) == (2, True, ["default"])
    assert status.trainable_params == sum(layer.r for layer in ap.knobs(model).values())
    assert [layer.merged_adapters for layer in model.get_layer_status()] == [[], []]
    assert status.requires_grad == {"default": True}


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_saved_and_loaded_it_is_the_same(
    config: Config, tmp_path: Path, low_cpu_mem_usage: bool, trainable: bool
) -> None:
    model = moved(config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        Branching(), tmp_path, is_trainable=trainable, low_cpu_mem_usage=low_cpu_mem_usage
    )
    torch.testing.assert_close(output(loaded), output(model))
    assert {p.requires_grad for n, p in loaded.named_parameters() if "delta_s." in n} == {trainable}


def test_one_of_several_adapters_is_saved(config: Config, tmp_path: Path) -> None:
    model = adapted(config)
    model.add_adapter("second", config(target_modules=["lin0"]))
    move(model, adapter="second")
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert not (tmp_path / "adapter_config.json").exists()
    model.set_adapter("second")
    loaded = PeftModel.from_pretrained(Branching(), tmp_path, subfolder="second")
    torch.testing.assert_close(output(loaded), output(model))
    with pytest.raises(ValueError, match="none"):
        model.save_pretrained(tmp_path, selected_adapters=["none"])


def test_modules_to_save_are_saved_with_it(config: Config, tmp_path: Path) -> None:
    model = adapted(config, modules_to_save=["head"])
    step(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Branching(), tmp_path)
    torch.testing.assert_close(output(loaded), output(model))
    assert any("head" in name for name in get_peft_model_state_dict(model))


def test_the_state_dict_goes_round(config: Config) -> None:
    model, other = adapted(config), adapted(config)
    move(model)
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    assert torch.equal(output(other), output(model))


def test_a_config_goes_round(config: Config, tmp_path: Path) -> None:
    one = config(target_modules=TARGETS, rank_pattern={"lin1": 3}, modules_to_save={"head"})  # a set, as PEFT allows
    one.save_pretrained(str(tmp_path))
    for other in (ap.AntiPastoConfig.from_pretrained(str(tmp_path)), PeftConfig.from_pretrained(tmp_path)):
        assert other.to_dict() == one.to_dict()
    assert ap.AntiPastoConfig(**one.to_dict()).rank_pattern == {"lin1": 3}


# ── copies, dtypes, devices ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_independent(config: Config, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = moved(config)
    before = output(model)
    other = duplicate(model)
    assert torch.equal(output(other), before)
    step(other)
    assert torch.equal(output(model), before)
    assert not torch.equal(output(other), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_bases_train_fp32_knobs(config: Config, dtype: torch.dtype) -> None:
    model = get_peft_model(Branching().to(dtype), config(target_modules=TARGETS))
    assert torch.equal(output(model), output(Branching().to(dtype)))
    assert {layer.delta_s.dtype for layer in ap.knobs(model).values()} == {torch.promote_types(dtype, torch.float32)}
    step(model)
    assert output(model).dtype == dtype
    assert not torch.equal(output(model), output(Branching().to(dtype)))


def test_autocast_computes_in_its_dtype(config: Config) -> None:
    model = moved(config)
    with torch.autocast("cpu", torch.bfloat16):
        low = output(model)
    torch.testing.assert_close(low.float(), output(model), atol=0.1, rtol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS).float().sum().backward()
    assert all(layer.delta_s.grad.dtype == torch.float32 for layer in ap.knobs(model).values())  # type: ignore[union-attr]


def test_it_moves_and_casts_with_the_model(config: Config) -> None:
    model = moved(config)
    before = output(model)
    torch.testing.assert_close(output(model.double()).float(), before)
    assert {layer.layer.basis.U.dtype for layer in ap.knobs(model).values()} == {torch.float64}  # type: ignore[union-attr]
    assert next(iter(ap.knobs(model.to("meta")).values())).U.is_meta


# ── calls ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_keyword_arguments_reach_the_model(config: Config) -> None:
    model = adapted(config)
    assert torch.equal(output(model, scale=0.5), output(Branching(), scale=0.5))
    with pytest.raises(TypeError, match="nonsense"):
        output(model, nonsense=1)


def test_empty_and_one_token_batches(config: Config) -> None:
    model = moved(config)
    assert model(IDS[:0]).shape == (0, 11, 11)
    torch.testing.assert_close(model(IDS[:1, :1]), model(IDS)[:1, :1])


def test_generate_with_a_cache_is_generate_without(config: Config) -> None:
    model = get_peft_model(FAMILIES["llama"].build(), config())
    move(model, 0.5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = tokens()[:, :4]
    with_cache, without = (model.generate(input_ids=ids, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(with_cache, without)


def test_tied_weights_are_refused_or_left_alone(config: Config) -> None:
    twice = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    twice["b"].weight = twice["a"].weight
    with pytest.raises(ValueError, match="b is a target, but cannot be adapted: it shares its weight with a"):
        get_peft_model(twice, config(target_modules=["a", "b"]))
    model = FAMILIES["llama"].build()
    model.lm_head.weight = model.model.embed_tokens.weight
    adapted = get_peft_model(model, config())
    assert adapted.base_model.model.lm_head.weight is adapted.base_model.model.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_beside_another_method(config: Config) -> None:
    """On layers of its own, in one model; on the same layer it is refused."""
    model = get_peft_model(Branching(), LoraConfig(target_modules=["head"], init_lora_weights=False)).base_model.model
    before = output(model)
    layers = ap.wrap(model, config(target_modules=TARGETS))
    assert torch.equal(output(model), before)
    next(iter(layers.values())).delta_s.data.fill_(0.3)
    assert not torch.equal(output(model), before)
    other = get_peft_model(Branching(), LoraConfig(target_modules=["lin0"])).base_model.model
    with pytest.raises(ValueError, match=r"already carries an adapter of another method.*lora"):
        ap.wrap(other, config(target_modules=["lin0"]))


def test_pefts_mixed_model_refuses_it(config: Config) -> None:
    """PEFT lists the methods that it mixes; an outside one is not among them."""
    with pytest.raises(ValueError, match="not compatible"):
        get_peft_model(Branching(), config(target_modules=TARGETS), mixed=True)


def test_adapter_names_by_row_are_refused(config: Config) -> None:
    """LoRA's `adapter_names=` of a batch: not offered; never silently ignored."""
    model = adapted(config)
    with pytest.raises(ValueError, match="adapter_names, another adapter for each row"):
        model(IDS, adapter_names=["default", "default"])


def test_compile_breaks_no_graph(config: Config) -> None:
    model = moved(config)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(IDS), model(IDS))
    assert len(graphs) == 1
