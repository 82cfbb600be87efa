"""Experts in one parameter are, number by number, what experts written out as Linears are; and the base at zero."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import peft
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from families import HEADS, LINEAR_ATTENTION, SIZES, logits, losses
from families import tokens as ids
from peft import PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from scripted import Sampled, make, tokenizer
from torch import nn

import antipasto as ap
from antipasto.adapter import AntiPastoExperts
from antipasto.adapter.basis import decompose
from antipasto.adapter.fingerprints import Fingerprint, Likeness
from antipasto.adapter.functional import with_gradient
from antipasto.adapter.layer import as_matrix
from antipasto.adapter.views import adapted_layers, mixed
from antipasto.app.commands import what_it_needs
from antipasto.app.export.weights import Dtypes, write_checkpoint, write_lora
from antipasto.app.inspection import adapter_parts, norms, read_adapter
from antipasto.app.report.layers import spectrum
from antipasto.routing.monitor import Monitor, at_origin
from antipasto.tasks import addition

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
EXPERTS = 4
COMMON = {**SIZES, **HEADS, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 24},
    "qwen3_next": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 12,
        **LINEAR_ATTENTION,
    },
}
TARGETS = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]
WRITTEN_TARGETS = r".*\.q_proj|.*\.experts\.(gate_up|down)_proj\.\d+"
UP, DOWN = (f"model.layers.1.mlp.experts.{leaf}_proj" for leaf in ("gate_up", "down"))
PAIRS = ap.load_pairs(addition.hack_pairs(6, seed=0))
STD = 0.2
randomise = functools.partial(families.randomise, std=STD)


def build(family: str = "mixtral", implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():  # transformers' initial weights are so small that experts hardly matter
        for name, parameter in model.named_parameters():
            if parameter.ndim > 2 and "conv" not in name:
                parameter.mul_(8)
    model.set_experts_implementation(implementation)
    return model


class WrittenOut(nn.Module):
    """The experts of a layer as Linears, one pair per expert, over which the forward loops."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.act_fn = experts.act_fn
        for name in ("gate_up_proj", "down_proj"):
            linears = []
            for W in getattr(experts, name):
                linears.append(nn.Linear(W.shape[1], W.shape[0], bias=False))
                linears[-1].weight = nn.Parameter(W.detach().clone())
            setattr(self, name, nn.ModuleList(linears))

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for e, (up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            # every token passes every expert, so that a layer sees (T, …) and rows can be told apart
            gate, value = up(x).chunk(2, -1)
            share = torch.where(index == e, weights, torch.zeros_like(weights)).sum(-1, keepdim=True)
            out = out + down(self.act_fn(gate) * value) * share.to(x.dtype)
        return out


def write_out(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        layer.mlp.experts = WrittenOut(layer.mlp.experts)
    return model


def fused(family: str = "mixtral", implementation: str = "grouped_mm", **options: Any) -> nn.Module:
    model = build(family, implementation)
    ap.wrap(model, ap.AntiPastoConfig(target_modules=TARGETS, **options))
    return model


def written(family: str = "mixtral", **options: Any) -> nn.Module:
    model = write_out(build(family))
    ap.wrap(model, ap.AntiPastoConfig(target_modules=WRITTEN_TARGETS, **options))
    return model


def moved(family: str = "mixtral", implementation: str = "grouped_mm", **options: Any) -> nn.Module:
    """Fused experts whose knobs are not zero."""
    model = fused(family, implementation, **options)
    randomise(model)
    return model


def pair(family: str = "mixtral", implementation: str = "grouped_mm", **options: Any) -> tuple[nn.Module, nn.Module]:
    """A model with fused experts, and the same with Linears, with the same numbers in their knobs."""
    model, reference = moved(family, implementation, **options), written(family, **options)
    for name, layer in ap.knobs(reference).items():
        copy_into(layer, *of_expert(ap.knobs(model), name))
    return model, reference


def of_expert(layers: dict[str, ap.LayerKnobs], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    holder, _, leaf = name.rpartition(".")
    layer, index = (layers[holder], int(leaf)) if leaf.isdigit() else (layers[name], ...)
    return layer.delta_s.detach()[index], layer.delta_s_hack.detach()[index]


def copy_into(layer: ap.LayerKnobs, delta_s: torch.Tensor, hack: torch.Tensor) -> None:
    layer.delta_s.data.copy_(delta_s)
    layer.delta_s_hack.data.copy_(hack)


def gathered(numbers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Numbers (…, r) of layers one expert each → (…, E·r) under the stack's name."""
    found: dict[str, list[torch.Tensor]] = {}
    for name in sorted(numbers):  # there are fewer than ten experts
        holder, _, leaf = name.rpartition(".")
        found.setdefault(holder if leaf.isdigit() else name, []).append(numbers[name])
    return {name: torch.cat(parts, -1) for name, parts in found.items()}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    assert got.keys() == want.keys()
    for name, one in want.items():
        scale = float(one.abs().max())
        torch.testing.assert_close(
            got[name], one, rtol=tolerance, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert scale > 0, f"{name} does not take part"


def gradients(model: nn.Module, tokens: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    layers = ap.knobs(model)
    loss = losses(model, ids() if tokens is None else tokens).sum()
    found = torch.autograd.grad(loss, [layer.delta_s for layer in layers.values()])
    return {name: g.flatten() for name, g in zip(layers, found, strict=True)}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_knobs_are_rows_and_each_expert_has_its_own_basis(family: str) -> None:
    base = build(family)
    layers = ap.knobs(fused(family))
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "gate_up_proj", "down_proj"}
    for name in (UP, DOWN):
        W, layer = base.get_parameter(name), layers[name]
        r = min(W.shape[1:])
        assert layer.delta_s.shape == layer.delta_s_hack.shape == (EXPERTS, r)
        assert (layer.r, layer.numbers) == (r, EXPERTS * r)
        for e, one in enumerate(W):
            for got, want in zip((layer.U[e], layer.S[e], layer.Vh[e]), decompose(one), strict=True):
                assert torch.equal(got, want)


def test_zero_is_the_base_model_bit_for_bit(family: str, implementation: str) -> None:
    model, base = fused(family, implementation), build(family, implementation)
    want = logits(base)
    assert torch.equal(logits(model), want)
    assert torch.equal(model(input_ids=ids()).logits, want)  # with gradient
    randomise(model)
    assert not torch.allclose(logits(model), want, atol=1e-2)
    with ap.reference(model):
        assert torch.equal(logits(model), want)
        assert torch.equal(ap.ref_logprobs(model, ids()), ap.token_logprobs(want, ids()))
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj.base_layer.weight, base.get_parameter(DOWN))


@pytest.mark.parametrize("rank", [None, 3])
def test_output_and_gradient_are_those_of_experts_written_out(
    family: str, implementation: str, rank: int | None
) -> None:
    model, reference = pair(family, implementation, rank=rank)
    assert_same({"logits": logits(model)}, {"logits": logits(reference)})
    assert_same(gradients(model), gathered(gradients(reference)))


def test_the_base_gets_no_gradient_and_theta_one_that_both_knobs_share() -> None:
    model = moved()
    layers = ap.knobs(model)
    for layer in layers.values():
        layer.delta_s_hack.requires_grad_(True)
    losses(model, ids()).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"{name}.{knob}.default.weight" for name in layers for knob in ("delta_s", "delta_s_hack")
    }
    assert all(torch.equal(layer.delta_s.grad, layer.delta_s_hack.grad) for layer in layers.values())


@pytest.mark.parametrize("view", ["deployed", "dial", "scaled", "dropped"])
def test_views(view: str) -> None:
    contexts: dict[str, Callable[[nn.Module], Any]] = {
        "deployed": ap.deployed,
        "dial": lambda model: ap.deployed(model, dial=0.5),
        "scaled": lambda model: ap.scaled(model, 0.3),
        "dropped": lambda model: ap.drop_quarantine(model) or nullcontext(),
    }
    model, reference = pair()
    before = logits(model)
    with contexts[view](model), contexts[view](reference):
        assert_same({"logits": logits(model)}, {"logits": logits(reference)})
        assert not torch.allclose(logits(model), before, atol=1e-2)
    if view == "dropped":
        assert ap.knobs(model)[UP].delta_s_hack is None
    else:
        assert torch.equal(logits(model), before)


def test_a_write_to_a_knob_is_seen_whichever_way_it_is_written() -> None:
    model, reference = pair()
    for n in range(3):
        for one in (model, reference):
            logits(one)
            for layer in ap.knobs(one).values():
                layer.delta_s.data.mul_(0.5 + n)
        assert_same({"logits": logits(model)}, {"logits": logits(reference)})


def test_weights_are_held_between_forwards_without_gradient_unless_told_not_to() -> None:
    for hold in (True, False):
        model = fused(hold_weights=hold)
        layer = adapted_layers(model)[UP]
        assert isinstance(layer, AntiPastoExperts)
        assert layer.weights(torch.zeros(1, 16))[0][0].data_ptr() == layer.base_weight.data_ptr()  # W itself
        randomise(model)
        with torch.no_grad():
            (first,), (second,) = (layer.weights(torch.zeros(1, 16))[0] for _ in range(2))
        kept = first.data_ptr()
        del first, second
        with torch.no_grad():
            (third,) = layer.weights(torch.zeros(1, 16))[0]
        assert (third.data_ptr() == kept and len(layer.choice.held._entries) == 1) or not hold
        assert [entry.strong is not None for entry in layer.choice.held._entries] == [hold]


def test_a_sharded_layer_keeps_no_weight() -> None:
    """FSDP2 puts a DTensor where a knob's parameter is, and tells the knob so; here it is said."""
    model = moved()
    layer = adapted_layers(model)[UP]
    for sharded in (False, True):
        next(iter(layer.delta_s.values())).is_sharded = sharded
        layer.choice.forget()
        logits(model)
        assert sum(entry.strong is not None for entry in layer.choice.held._entries) == (not sharded)


def test_after_an_error_in_the_forward_the_module_is_as_it_was() -> None:
    model = moved()
    experts, want = model.model.layers[1].mlp.experts, logits(model)
    apply_gate, experts._apply_gate = experts._apply_gate, None
    with pytest.raises(TypeError):
        logits(model)
    experts._apply_gate = apply_gate
    assert isinstance(experts.gate_up_proj, AntiPastoExperts)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = get_peft_model(build(), ap.AntiPastoConfig(target_modules=TARGETS))
    randomise(model)
    want = gradients(model)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    with ap.rollout_grads(model) as grads:
        losses(model, ids()).sum().backward()
    assert_same({name: rows.sum(0) for name, rows in grads.items()}, want)
    assert_same({name: layer.delta_s.grad.flatten() for name, layer in ap.knobs(model).items()}, want)


def test_generation_with_a_cache_uses_the_knobs() -> None:
    model, reference = pair()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(ids(2, 4), **options)
    assert torch.equal(out, reference.generate(ids(2, 4), **options))
    with ap.reference(model):
        assert not torch.equal(model.generate(ids(2, 4), **options), out)


def test_a_copy_is_independent() -> None:
    model = moved()
    want = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), want)
        ap.knobs(other)[UP].delta_s.data.zero_()
        assert not torch.equal(logits(other), want)
        assert torch.equal(logits(model), want)


# ── sequences ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("view", ["trained", "origin"])
def test_the_gradient_of_every_sequence(family: str, implementation: str, view: str) -> None:
    context = at_origin if view == "origin" else nullcontext
    model, reference = pair(family, implementation)
    found = []
    for one in (model, reference):
        with (
            context(one) if view == "origin" else nullcontext(),
            ap.rollout_grads(one, detach=view == "origin") as grads,
        ):
            total = losses(one, ids()).sum()
            torch.autograd.backward(total, inputs=grads.leaves or None)
        found.append(dict(grads))
    assert found[0][UP].shape == (3, ap.knobs(model)[UP].numbers)
    assert_same(found[0], gathered(found[1]))


def test_each_sequence_alone_has_the_gradient_that_it_has_in_a_batch(implementation: str) -> None:
    model = moved(implementation=implementation)
    with ap.rollout_grads(model) as grads:
        for part in ids(5).split(2):  # as micro-batches
            losses(model, part).sum().backward()
    alone = [gradients(model, row[None]) for row in ids(5)]
    assert_same(dict(grads), {name: torch.stack([one[name] for one in alone]) for name in grads})
    assert_same(
        {name: layer.delta_s.grad.flatten() for name, layer in ap.knobs(model).items()}, gradients(model, ids(5))
    )


def test_packed_sequences_by_an_index() -> None:
    model = moved()
    index = torch.tensor([0, 0, 0, 2, 2, 2, 2])  # none of them is sequence 1
    tokens = ids(1)
    with ap.rollout_grads(model, sequence_index=index) as grads:
        losses(model, tokens).sum().backward()
    want = gradients(model, tokens)
    assert_same({name: rows.sum(0) for name, rows in grads.items()}, want)
    assert not grads[UP][1].any()
    assert grads[UP][0].any()
    with (
        ap.rollout_grads(model, sequence_index=index[:5]),
        pytest.raises(ValueError, match=r"q_proj sees 7 tokens.*5 entries"),
    ):
        losses(model, tokens)


@pytest.mark.parametrize("by_sequence", [False, True])
def test_rows_that_see_different_knobs(implementation: str, by_sequence: bool) -> None:
    deployed = torch.tensor([False, True, False])
    model, reference = pair(implementation=implementation)
    found = []
    for one in (model, reference):
        with mixed(one) as rows, ap.rollout_grads(one) if by_sequence else nullcontext() as grads:
            rows.set(deployed)
            with torch.no_grad():
                out = one(input_ids=ids()).logits
            rows.set(deployed)
            g = gradients(one)
        found.append((out, g, dict(grads or {})))
    (out, g, rows_g), (want, want_g, want_rows_g) = found
    assert_same({"logits": out}, {"logits": want})
    assert_same(g, gathered(want_g))
    assert_same(rows_g, gathered(want_rows_g))
    with ap.deployed(model):
        torch.testing.assert_close(out[1], logits(model)[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[::2], logits(model)[::2], rtol=1e-4, atol=1e-4)
    for all_of_a_kind in (True, False):
        with mixed(model) as rows, ap.deployed(model) if all_of_a_kind else nullcontext():
            want_all = logits(model)
        with mixed(model) as rows:
            rows.set(torch.full((3,), all_of_a_kind))
            torch.testing.assert_close(logits(model), want_all, rtol=1e-4, atol=1e-4)


# ── direction, monitor, router ───────────────────────────────────────────────────────────────────────────────────────


def directions(model: nn.Module, reference: nn.Module) -> tuple[ap.Direction, ap.Direction]:
    return tuple(ap.extract_direction(one, tokenizer(), PAIRS, batch_size=2) for one in (model, reference))  # type: ignore[return-value]


def test_a_direction_has_the_effect_sizes_of_experts_written_out(family: str) -> None:
    v, want = directions(*pair(family))
    assert v.effect is not None
    assert want.effect is not None
    got, expected = v.effect, gathered(want.effect)
    assert got.keys() == expected.keys()
    for name, one in expected.items():  # an effect size is a quotient: rounding shows where a spread is small
        close = torch.isclose(got[name], one, rtol=1e-2, atol=1e-3)
        assert close.float().mean() > 0.99, name
    assert v[UP].shape == (1, v.effect[UP].numel())


def test_a_direction_goes_round_and_belongs_to_its_base(tmp_path: Path) -> None:
    model, _ = pair()
    v = ap.extract_direction(model, tokenizer(), PAIRS)
    v.save(tmp_path / "v")
    loaded = ap.Direction.load(tmp_path / "v")
    assert all(torch.equal(loaded[name], v[name]) for name in v)
    loaded.check_base(model)
    other = build()
    other.get_parameter(UP).data[2].mul_(1.1)
    ap.wrap(other, ap.AntiPastoConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match=rf"{re.escape(UP)}: other weights, about 0\.0\d* of their norm apart"):
        loaded.check_base(other)
    with pytest.raises(ValueError, match=rf"{re.escape(UP)}: the direction has r=64, the layer 12"):
        ap.Direction({UP: v[UP]}).check_base(fused(rank=3))


def test_a_monitor_scores_as_that_of_experts_written_out(implementation: str) -> None:
    model, reference = pair(implementation=implementation)
    texts = [ap.Completion("h12+34=", said) for said in ("046", "!", "?", "04!6")]
    scores = []
    for one in (model, reference):
        monitor = Monitor.from_pairs(one, tokenizer(), PAIRS, heldout=0.5)
        scores.append(torch.cat([monitor.scores(texts), torch.tensor([monitor.threshold])]))
    torch.testing.assert_close(scores[0], scores[1], atol=2e-3, rtol=1e-2)
    assert scores[0].std() > 0.05


ROUTERS = [("route", "update"), ("erase", "update"), ("measure", "update"), ("route", "gradient")]


@pytest.mark.parametrize(("mode", "level"), ROUTERS)
def test_routed_steps_and_books_are_those_of_experts_written_out(mode: str, level: str, tmp_path: Path) -> None:
    model, reference = pair()
    w = directions(model, reference)[1]
    assert w.effect is not None
    effect = gathered(w.effect)  # the same numbers for both, so that no coordinate is at the threshold in one alone
    v = ap.Direction({name: (t / t.norm())[None] for name, t in effect.items()}, effect=effect)
    ends = []
    for one, direction in ((model, v), (reference, w)):
        router = ap.Router(one, direction, mode=mode, level=level, threshold=0.5, controls={"opposite": -direction})  # type: ignore[arg-type]
        knobs = [p for p in one.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(knobs, lr=0.05, momentum=0.5)
        with router.attach(optimizer):
            for step in range(3):
                optimizer.zero_grad()
                losses(one, ids(seed=step)).mean().backward()
                optimizer.step()
        layers = ap.knobs(one)
        ends.append(
            {
                "delta_s": {name: layer.delta_s.detach().flatten() for name, layer in layers.items()},
                "hack": {name: layer.delta_s_hack.detach().flatten() for name, layer in layers.items()},
                **{name: router.book(name) for name in router.books},
            }
        )
        with router.deployed("opposite"):
            ends[-1]["ablated"] = {"logits": logits(one)}
        router.save(tmp_path / "books")
        router.load(tmp_path / "books")
    for what, got in ends[0].items():
        assert_same(got, gathered(ends[1][what]), tolerance=1e-3)


def test_a_one_sided_gate_routes_along_the_stacks_row() -> None:
    model = fused()
    v = ap.extract_direction(model, tokenizer(), PAIRS)
    router = ap.Router(model, v, gate="one_sided")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    with router.attach(optimizer):
        losses(model, ids()).mean().backward()
        optimizer.step()
    layer = ap.knobs(model)[UP]
    assert float((v[UP] @ layer.delta_s.detach().flatten())[0]) >= -1e-6
    moved = layer.delta_s_hack.detach().flatten()
    torch.testing.assert_close(moved, (v[UP] @ moved)[0] * v[UP][0])


# ── PEFT's surface ───────────────────────────────────────────────────────────────────────────────────────────────────


def adapted(family: str = "mixtral", seed: int = 0, **options: Any) -> PeftModel:
    model = get_peft_model(build(family), ap.AntiPastoConfig(target_modules=TARGETS, **options))
    randomise(model, seed=seed)
    return model


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"quarantine": False}, {"save_basis": True}])
def test_save_and_load(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(build(family), ap.AntiPastoConfig(target_modules=TARGETS, **options))
    for layer in ap.knobs(model).values():
        layer.delta_s.data.normal_(std=STD)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    r = options.get("rank", 16)
    assert saved[f"base_model.model.{UP}.delta_s.weight"].shape == (EXPERTS, r)
    for low_cpu_mem_usage in (True, False):
        loaded = PeftModel.from_pretrained(build(family), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), logits(model))


def test_another_base_is_refused_and_a_rounded_one_recognised(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    other = build()
    other.get_parameter(DOWN).data[3, 0, 0] += 1
    with pytest.raises(ValueError, match=rf"made on another base: 1 of its 6 layers differ. {re.escape(DOWN)}: other"):
        PeftModel.from_pretrained(other, tmp_path)
    rounded = PeftModel.from_pretrained(build(dtype=torch.bfloat16), tmp_path)
    saved = model.peft_config["default"].base_fingerprints[UP]
    assert Fingerprint.parse(saved).likeness(ap.knobs(rounded)[UP].layer.current_fingerprint()) is Likeness.ROUNDED


def test_other_weights_are_not_loaded_under_an_adapter() -> None:
    model = fused()
    state = model.state_dict()
    model.load_state_dict(state)
    key = f"{UP}.base_layer.weight"
    with pytest.raises(ValueError, match=re.escape(key)):
        model.load_state_dict({**state, key: state[key] * 2})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_unmerging_give_back_the_bits(dtype: torch.dtype) -> None:
    model = get_peft_model(build(dtype=dtype), ap.AntiPastoConfig(target_modules=TARGETS))
    randomise(model)
    base, before = build(dtype=dtype), logits(model)
    for _ in range(20):
        model.merge_adapter(safe_merge=True)
        merged = model.base_model.model.get_submodule(UP).base_layer.weight
        model.unmerge_adapter()
        assert torch.equal(model.base_model.model.get_submodule(UP).base_layer.weight, base.get_parameter(UP))
    layer = ap.knobs(model)[UP]
    want = base.get_parameter(UP).detach().float() + layer.U.float() * layer.theta[:, None] @ layer.Vh.float()
    torch.testing.assert_close(merged, want.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert torch.equal(logits(model), before)
    model.merge_adapter()
    kept, merged = layer.delta_s.detach().clone(), logits(model)
    layer.delta_s.data.zero_()
    assert torch.equal(logits(model), merged)  # as merged, whatever the knobs are now
    layer.delta_s.data.copy_(kept)
    torch.testing.assert_close(logits(model), before, rtol=0.05 if dtype == torch.bfloat16 else 1e-4, atol=0.1)
    with ap.reference(model):
        assert torch.equal(logits(model), logits(base))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


def test_unloading_leaves_the_base_and_merging_a_plain_model(family: str) -> None:
    base, model = build(family), adapted(family)
    want = logits(model)
    plain = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(plain), want, rtol=1e-4, atol=1e-4)
    back = model.unload()
    assert torch.equal(logits(back), logits(base))
    for one in (plain, back):
        assert one.state_dict().keys() == base.state_dict().keys()
        assert [type(m) for m in one.modules()] == [type(m) for m in base.modules()]
        assert "forward" not in vars(one.model.layers[1].mlp.experts)
    ap.wrap(back, ap.AntiPastoConfig(target_modules=TARGETS))
    assert torch.equal(logits(back), logits(base))


def test_a_forward_that_somebody_put_there_is_called_and_put_back() -> None:
    model = build()
    experts, calls = model.model.layers[1].mlp.experts, []
    own = experts.forward

    def counted(*args: torch.Tensor) -> torch.Tensor:
        calls.append(len(args))
        return own(*args)

    experts.forward = counted
    wrapped = get_peft_model(model, ap.AntiPastoConfig(target_modules=TARGETS))
    logits(wrapped)
    assert calls == [3]
    assert wrapped.unload().model.layers[1].mlp.experts.forward is counted


def test_a_forward_that_somebody_put_around_ours_stays() -> None:
    model = adapted()
    experts, calls = model.base_model.model.model.layers[1].mlp.experts, []
    want = logits(model)

    class Counts(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            calls.append(len(args))
            return args, kwargs

    add_hook_to_module(experts, Counts())
    assert torch.equal(logits(model), want)
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), want, rtol=1e-4, atol=1e-4)
    assert calls == [3, 3]
    assert plain.model.layers[1].mlp.experts is experts
    assert isinstance(experts.gate_up_proj, nn.Parameter)


def test_several_adapters() -> None:
    model = adapted()
    first = logits(model)
    with pytest.raises(
        ValueError, match=rf"{re.escape(UP.replace('1', '0'))}: all adapters of experts need one rank.*16.*3"
    ):
        model.add_adapter("low", ap.AntiPastoConfig(target_modules=TARGETS, rank=3))
    assert all(set(layer.r) == {"default"} for layer in adapted_layers(model).values())
    model.add_adapter("second", ap.AntiPastoConfig(target_modules=TARGETS))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(build()))
    randomise(model, seed=5)
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "sum")
    for name, layer in ap.knobs(model, adapter_name="sum").items():
        want = sum(w * ap.knobs(model, adapter_name=a)[name].delta_s for a, w in (("default", 1.0), ("second", 0.5)))
        torch.testing.assert_close(layer.delta_s, want)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    model.add_adapter(
        "attention", ap.AntiPastoConfig(target_modules=["q_proj", "down_proj"], exclude_modules=["experts"])
    )
    assert {name.rpartition(".")[2] for name in ap.knobs(model, adapter_name="attention")} == {"q_proj"}


def test_beside_lora_on_other_layers() -> None:
    model = get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        ap.wrap(model, ap.AntiPastoConfig(target_modules=["down_proj"]))
    assert torch.equal(logits(model), logits(build()))


# ── precision ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bf16_trains_fp32_knobs_on_a_weight_rounded_once() -> None:
    model = build(dtype=torch.bfloat16)
    layers = ap.wrap(model, ap.AntiPastoConfig(target_modules=TARGETS))
    randomise(model)
    layer = layers[UP]
    assert layer.delta_s.dtype == torch.float32
    assert layer.U.dtype == torch.bfloat16
    assert isinstance(layer.layer, AntiPastoExperts)
    with torch.no_grad():
        (weight,), _ = layer.layer.weights(torch.zeros(1, 16))
    W = build(dtype=torch.bfloat16).get_parameter(UP).detach()
    exact = W.double() + layer.U.double() * layer.theta.double()[:, None] @ layer.Vh.double()
    once = (exact.to(torch.bfloat16).double() - exact).norm()
    assert weight.dtype == torch.bfloat16
    assert (weight.double() - exact).norm() < 1.5 * once
    reference = fused()
    for name, low in layers.items():
        copy_into(ap.knobs(reference)[name], low.delta_s, low.delta_s_hack)
    got, want = gradients(model, ids(16, 20)), gradients(reference, ids(16, 20))
    assert all(torch.nn.functional.cosine_similarity(got[name], want[name], dim=0) > 0.98 for name in (UP, DOWN))


def test_in_bf16_a_carried_basis_trains_as_one_that_is_not_saved(implementation: str) -> None:
    """PEFT keeps what is saved in fp32, so it is wider than the weights."""
    plain, carrying = (
        get_peft_model(
            build("mixtral", implementation, torch.bfloat16),
            ap.AntiPastoConfig(target_modules=TARGETS, save_basis=saves),
        )
        for saves in (False, True)
    )
    for model in (plain, carrying):
        randomise(model)
    assert (ap.knobs(plain)[UP].U.dtype, ap.knobs(carrying)[UP].U.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(logits(carrying), logits(plain))
    want = gradients(plain)
    assert all(torch.equal(g, want[name]) for name, g in gradients(carrying).items())


def test_the_gradient_is_projected_in_its_own_precision_under_autocast() -> None:
    W, U, Vh = torch.randn(2, 5, 4), torch.randn(2, 5, 3), torch.randn(2, 3, 4)
    theta, G = torch.zeros(2, 3, requires_grad=True), torch.randn(2, 5, 4)
    (want,) = torch.autograd.grad(with_gradient(W, theta, U, Vh), theta, G)
    torch.testing.assert_close(want, torch.einsum("eor,eoi,eri->er", U, G, Vh))
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(with_gradient(W, theta, U, Vh), theta, G)
    assert torch.equal(got, want)


def test_autocast() -> None:
    model = moved(implementation="eager")
    with torch.autocast("cpu", torch.bfloat16):
        losses(model, ids(16, 20)).sum().backward()  # inside the region, where a careless backward would cast again
    want = gradients(model, ids(16, 20))
    for name in (UP, DOWN):
        got = ap.knobs(model)[name].delta_s.grad.flatten()
        assert torch.nn.functional.cosine_similarity(got, want[name], dim=0) > 0.98
        assert not torch.allclose(got, want[name], rtol=1e-4)


# ── targets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_default_leaves_experts_out_and_says_so(family: str, tmp_path: Path) -> None:
    base = build(family)
    with pytest.warns(
        UserWarning, match=r"2 × down_proj \(experts in one parameter are adapted only where target_modules"
    ):
        model = get_peft_model(base, ap.AntiPastoConfig())
    assert not any(isinstance(layer, AntiPastoExperts) for layer in adapted_layers(model).values())
    model.save_pretrained(tmp_path)
    assert ap.knobs(PeftModel.from_pretrained(build(family), tmp_path)).keys() == ap.knobs(model).keys()
    model.add_adapter("all", ap.AntiPastoConfig(target_modules=TARGETS))
    with pytest.warns(UserWarning, match=r"2 × down_proj"):  # and where another adapter has them
        model.add_adapter("again", ap.AntiPastoConfig())
    assert ap.knobs(model, adapter_name="again").keys() == ap.knobs(model, adapter_name="default").keys()


@pytest.mark.parametrize(
    ("target_modules", "leaves"),
    [
        (["down_proj"], {"down_proj"}),
        (["experts.down_proj"], {"down_proj"}),
        (r".*experts\.\w+_proj", {"down_proj", "gate_up_proj"}),
        ([UP], {"gate_up_proj"}),
    ],
)
def test_experts_are_named_as_other_layers_are(target_modules: Any, leaves: set[str]) -> None:
    layers = ap.wrap(build(), ap.AntiPastoConfig(target_modules=target_modules))
    assert {name.rpartition(".")[2] for name in layers} == leaves
    assert all(isinstance(layer.layer, AntiPastoExperts) for layer in layers.values())


def test_all_linear_is_all_linears_as_in_peft() -> None:
    layers = ap.wrap(build(), ap.AntiPastoConfig(target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_rank_for_experts_and_layers_by_index() -> None:
    layers = ap.wrap(
        build(),
        ap.AntiPastoConfig(target_modules=TARGETS, rank_pattern={r".*experts\.down_proj": 5}, layers_to_transform=[1]),
    )
    assert {name: layer.r for name, layer in layers.items()} == {"model.layers.1.self_attn.q_proj": 16, UP: 16, DOWN: 5}


def test_what_cannot_be_adapted_is_refused_by_name() -> None:
    half = build(dtype=torch.float16)
    spread = build()
    spread.model.layers[1].mlp.experts._is_expert_parallel = True
    packed = build()
    packed.model.layers[1].mlp.experts.gate_up_proj = nn.Parameter(
        torch.zeros(4, 8, 8, dtype=torch.uint8), requires_grad=False
    )
    meta = build()
    meta.model.layers[1].mlp.experts.to("meta")
    nan = build()
    nan.get_parameter(UP).data[1, 0, 0] = torch.nan
    for model, reason in (
        (half, "float16"),
        (spread, "spread over processes"),
        (packed, "torch.uint8"),
        (meta, "meta device"),
        (nan, "NaN or Inf"),
    ):
        modules = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=rf"{re.escape(UP)}.*{reason}") as error:
            ap.wrap(model, ap.AntiPastoConfig(target_modules=[UP]))
        assert "exclude_modules=['experts']" in str(error.value) or reason == "NaN or Inf"
        assert [type(m) for m in model.modules()] == modules
        assert isinstance(model.model.layers[1].mlp.experts.gate_up_proj, nn.Parameter)
    with pytest.raises(ValueError, match=r"mlp\.experts is a target.*MixtralExperts"):
        ap.wrap(build(), ap.AntiPastoConfig(target_modules=["experts"]))


def test_the_basis_is_cached_in_one_file_per_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ap.AntiPastoConfig(target_modules=[UP], cache_dir=str(tmp_path))
    first = ap.wrap(build(), config)[UP]
    (file,) = tmp_path.glob("*.safetensors")
    monkeypatch.setattr("antipasto.adapter.basis.decompose", lambda weight: pytest.fail("it is in the cache"))
    second = ap.wrap(build(), config)[UP]
    assert torch.equal(first.U, second.U)
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.warns(ap.BasisCacheWarning, match=file.name):
        assert torch.equal(ap.wrap(build(), config)[UP].U, first.U)


def test_fingerprints_tell_experts_apart() -> None:
    one, other = build(), build()
    W = other.get_parameter(UP).data
    W[[0, 1]] = W[[1, 0]].clone()
    found = [ap.wrap(m, ap.AntiPastoConfig(target_modules=[UP]))[UP].layer.fingerprint for m in (one, other)]
    assert found[0].shape == (EXPERTS, 48, 16)
    assert type(found[0]).parse(str(found[0])) == found[0]
    distance = float((one.get_submodule(UP).base_layer.weight - W).norm() / W.norm())
    assert 0.4 * distance < found[0].distance(found[1]) < 2.5 * distance
    S = torch.tensor([[3.0, 2.0, 1.0], [9.0, 2.0 + 1e-7, 2.0]])
    assert (
        found[0].unsettled(found[0], S) == 2
    )  # not the first of an expert, which is far from the last of the one before


# ── other layouts ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_experts_with_transposed_weights_and_biases(implementation: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "gpt_oss", **{**COMMON, "num_local_experts": EXPERTS, "layer_types": None}
    )
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    base.set_experts_implementation(implementation)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.3)
    model = copy.deepcopy(base)
    layers = ap.wrap(model, ap.AntiPastoConfig(target_modules=TARGETS))
    assert torch.equal(logits(model), logits(base))
    randomise(model)
    layer = layers[UP]
    W = base.get_parameter(UP)
    assert layer.U.shape[1] == W.shape[2]
    weights = {
        name: (as_matrix(one.layer.base_layer) + one.U * (one.delta_s + one.delta_s_hack).unsqueeze(-2) @ one.Vh)
        for name, one in layers.items()
    }
    weights = {name if W.ndim == 3 else f"{name}.weight": W.mT if W.ndim == 3 else W for name, W in weights.items()}
    out = torch.func.functional_call(base, weights, kwargs={"input_ids": ids()}).logits
    assert_same({"logits": logits(model)}, {"logits": out.detach()})
    want = torch.autograd.grad(-ap.token_logprobs(out, ids()).sum(), [one.delta_s for one in layers.values()])
    assert_same(gradients(model), {name: g.flatten() for name, g in zip(layers, want, strict=True)})
    with ap.rollout_grads(model) as grads:
        losses(model, ids()).sum().backward()
    assert_same({name: rows.sum(0) for name, rows in grads.items()}, gradients(model))
    plain = get_peft_model(copy.deepcopy(base), ap.AntiPastoConfig(target_modules=TARGETS))
    for name, one in ap.knobs(plain).items():
        copy_into(one, layers[name].delta_s, layers[name].delta_s_hack)
    torch.testing.assert_close(logits(plain.merge_and_unload()), logits(model), rtol=1e-4, atol=1e-4)


# ── training and the application ─────────────────────────────────────────────────────────────────────────────────────


def test_grpo_with_a_router_a_monitor_and_deployed_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deployed half of each batch samples from δS, and every rollout's own gradient is taken, at θ and at the origin."""
    monkeypatch.setattr(ap, "AntiPastoConfig", functools.partial(ap.AntiPastoConfig, target_modules=TARGETS))
    made: dict[str, Any] = {}

    def router(model: nn.Module) -> ap.Router:
        made["router"] = ap.Router(model, ap.extract_direction(model, tokenizer(), PAIRS), threshold=0.3)
        return made["router"]

    def monitor(model: nn.Module) -> Monitor:
        return Monitor.from_pairs(model, tokenizer(), PAIRS, heldout=0.5)

    model = build()
    trainer = make(
        tmp_path, Sampled, model=model, config={"max_steps": 2, "learning_rate": 0.1}, router=router, monitor=monitor
    )
    trainer.train()
    assert made["router"].steps == 2
    for name in (UP, DOWN):
        layer = ap.knobs(trainer.model)[name]
        assert layer.delta_s.any()
        assert layer.delta_s_hack.any()
    scores = [line["score"] for line in trainer.state.log_history if "score" in line]
    assert scores
    assert all(0 < abs(score) < 1 for score in scores)


def test_a_saved_adapter_is_shown_expert_by_expert(tmp_path: Path) -> None:
    model = get_peft_model(build(), ap.AntiPastoConfig(target_modules=TARGETS))
    ap.knobs(model)[UP].delta_s.data[2, 5] = 3.0
    model.save_pretrained(tmp_path)
    knobs, others = read_adapter(tmp_path / "adapter_model.safetensors")
    assert others == 0
    assert (knobs[UP].experts, len(knobs[UP].delta_s), norms([knobs[UP]])[:2]) == (4, 64, (1, "16"))
    found = spectrum({UP: knobs[UP].delta_s}, knobs)["gate_up_proj"]
    assert found.nonzero()[0].tolist() == [5]
    console = Console(width=200, record=True, file=io.StringIO())
    for part in adapter_parts(tmp_path):
        console.print(part)
    assert re.search(rf"{re.escape(UP)}\.2 +│ +5 +│ \+3\.000", console.export_text())


def test_what_it_takes_is_counted_expert_by_expert(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"target_modules": TARGETS, "rank": 5}
    console = Console(file=io.StringIO())
    (needs,) = what_it_needs(str(tmp_path / "model"), ap.AntiPastoConfig(**options), console)
    layers = ap.wrap(build("qwen3_moe"), ap.AntiPastoConfig(**options, cache_dir=str(tmp_path / "cache")))
    assert needs.numbers == sum(layer.numbers for layer in layers.values())
    assert needs.basis == sum(t.nbytes for k in layers.values() for t in (k.U, k.S, k.Vh))
    assert needs.adapted == sum(k.layer.base_layer.weight.nbytes for k in layers.values())
    files = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.safetensors"))
    assert needs.basis < files < needs.basis + 1024 * needs.layers


def test_export(family: str, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    build(family).save_pretrained(base)
    tokenizer().save_pretrained(base)
    model = adapted(family)
    with ap.deployed(model):
        want = logits(model)
    run: Any = SimpleNamespace(model=model, dial=0.0, base=str(base), tokenizer=tokenizer())
    with pytest.raises(ValueError, match=r"experts\.\w+ has a matrix for each expert.*leave out --lora"):
        write_lora(run, tmp_path / "lora", 4, torch.float32)
    write_checkpoint(run, out, torch.float32, Dtypes(model), "50GB")
    shipped = transformers.AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(shipped), want, rtol=1e-4, atol=1e-4)
