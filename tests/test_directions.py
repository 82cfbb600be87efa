"""The direction of the labelled pairs: extracted right, ordered right, saved right, and refused where it means nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import save_file
from scripted import load
from torch import nn

import antipasto as ap
from antipasto.routing.directions import _estimate, effect_size, pair_differences
from antipasto.routing.gates import Control, Gate
from antipasto.tasks import addition

ESTIMATORS = ["tstat", "mean", "svd"]


PAIRS = ap.load_pairs(addition.hack_pairs(64, seed=0))


@pytest.fixture(scope="module")
def known(model: nn.Module, tokenizer: object) -> ap.Direction:
    return ap.extract_direction(model, tokenizer, PAIRS[:48], heldout=PAIRS[48:])


# ── pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pairs_from_a_file_a_list_and_a_dataset(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "hack": "b", "clean": "c", "more": 1},
        {"prompt": "d", "hack": "e", "clean": "f", "more": 2},
    ]
    want = [ap.ContrastPair("a", "b", "c"), ap.ContrastPair("d", "e", "f")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert ap.load_pairs(path) == ap.load_pairs(str(path)) == want
    assert ap.load_pairs(rows) == ap.load_pairs(want) == want
    assert ap.load_pairs(Dataset.from_list(rows)) == want
    chat = [{"role": "user", "content": "hi"}]
    assert ap.load_pairs([{"prompt": chat, "hack": "b", "clean": "c"}])[0].prompt == chat


def test_line_separators_inside_texts_are_no_new_lines(tmp_path: Path) -> None:
    row = {"prompt": "a\u2028b", "hack": "c\u0085d", "clean": "e"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert ap.load_pairs(tmp_path / "pairs.jsonl") == [ap.ContrastPair(**row)]


def test_no_pair_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"no pair in .*empty\.jsonl"):
        ap.load_pairs(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError):
        ap.load_pairs(tmp_path / "missing.jsonl")


# ── extraction ───────────────────────────────────────────────────────────────────────────────────────────────────────


def nll(model: nn.Module, tokenizer: object, prompt: str, completion: str, *, mean: bool) -> torch.Tensor:
    prompt_ids, ids = tokenizer(prompt).input_ids, [*tokenizer(prompt + completion).input_ids, tokenizer.eos_token_id]
    ids = torch.tensor([ids])
    logprobs = ap.token_logprobs(model(ids).logits, ids)[0, len(prompt_ids) - 1 :]
    return -(logprobs.mean() if mean else logprobs.sum())


def test_extraction_leaves_the_model_alone(model: nn.Module, tokenizer: object) -> None:
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    ap.extract_direction(model, tokenizer, PAIRS[:4])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_neither_batches_nor_the_tokenizers_padding_side_matter(
    model: nn.Module, tokenizer: object, estimator: str
) -> None:
    want = ap.extract_direction(model, tokenizer, PAIRS[:9], estimator=estimator, batch_size=9)
    other = copy.deepcopy(tokenizer)
    for side, batch_size in (("left", 1), ("right", 4), ("left", 100)):
        other.padding_side = side
        got = ap.extract_direction(model, other, PAIRS[:9], estimator=estimator, batch_size=batch_size)
        assert got.overlap(want).overall > 0.999
    with torch.no_grad():  # a caller's mode is no obstacle
        assert ap.extract_direction(model, tokenizer, PAIRS[:9], estimator=estimator).overlap(want).overall > 0.999


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rows_are_unit_and_effect_sizes_are_there(model: nn.Module, tokenizer: object, estimator: str) -> None:
    k = 3 if estimator == "svd" else 1
    v = ap.extract_direction(model, tokenizer, PAIRS[:12], estimator=estimator, k=k)
    D = pair_differences(model, tokenizer, PAIRS[:12])
    for name, layer in ap.knobs(model).items():
        assert v[name].shape == (k, layer.r)
        torch.testing.assert_close(v[name] @ v[name].T, torch.eye(k), atol=1e-4, rtol=0)
        torch.testing.assert_close(v.effect[name], D[name].mean(0) / D[name].std(0), atol=1e-4, rtol=1e-3)
        assert v.strength[name].shape == (k,)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_swapping_hack_and_clean_negates(model: nn.Module, tokenizer: object, estimator: str) -> None:
    swapped = [ap.ContrastPair(p.prompt, p.clean, p.hack) for p in PAIRS[:12]]
    one, other = (ap.extract_direction(model, tokenizer, p, estimator=estimator) for p in (PAIRS[:12], swapped))
    for name in one:
        torch.testing.assert_close(other[name], -one[name], atol=1e-4, rtol=0)
        torch.testing.assert_close(other.effect[name], -one.effect[name], atol=1e-3, rtol=1e-3)
    assert (-one).overlap(other).overall > 0.999


@given(seed=st.integers(0, 1000), estimator=st.sampled_from(ESTIMATORS))
@settings(max_examples=60, deadline=None)
def test_a_planted_direction_is_recovered_and_shuffled_labels_lose_it(seed: int, estimator: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    planted = torch.randn(24, generator=generator)
    planted /= planted.norm()
    D = torch.randn(200, 24, generator=generator) * 0.3 + 2 * planted
    assert (_estimate(D, effect_size(D), estimator, 1) @ planted).item() > 0.98
    coin = torch.ones(200)
    coin[torch.randperm(200, generator=generator)[:100]] = -1
    shuffled = D * coin[:, None]
    if estimator == "svd":
        # the axis is still there: shuffling takes away its sign, so that it is no null for a gate by magnitude
        assert (_estimate(shuffled, effect_size(shuffled), estimator, 1) @ planted).abs().item() > 0.98
    else:
        assert effect_size(shuffled).abs().max() < 0.5
        assert (effect_size(D).abs() > 1).any()


def test_the_known_hack_orders_held_out_pairs_and_shuffled_labels_do_not(
    model: nn.Module, tokenizer: object, known: ap.Direction
) -> None:
    assert known.heldout.pairs == 16
    assert known.heldout.overall == 1.0
    assert 0.2 < known.heldout.random < 0.8
    assert set(known.heldout.layers) == set(known)
    shuffled = ap.extract_direction(model, tokenizer, PAIRS[:48], heldout=PAIRS[48:], shuffle_labels=0)
    strong = lambda v: torch.cat([t.abs() for t in v.effect.values()])  # noqa: E731
    assert strong(shuffled).quantile(0.9) < 0.5 * strong(known).quantile(0.9)


def test_moving_against_the_direction_makes_the_hack_likelier(
    model: nn.Module, tokenizer: object, known: ap.Direction
) -> None:
    moved = copy.deepcopy(model)
    for name, layer in ap.knobs(moved).items():
        layer.delta_s.data -= 0.5 * known[name][0]

    def margin(m: nn.Module) -> float:
        with torch.no_grad():
            pairs = [
                (nll(m, tokenizer, p.prompt, p.hack, mean=True), nll(m, tokenizer, p.prompt, p.clean, mean=True))
                for p in PAIRS[48:]
            ]
        return sum((clean - hack).item() for hack, clean in pairs) / len(pairs)

    assert margin(moved) > margin(model) + 0.1


def test_chats_go_through_the_template(model: nn.Module, tokenizer: object) -> None:
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    chats = [ap.ContrastPair([{"role": "user", "content": p.prompt[:-1]}], p.hack, p.clean) for p in PAIRS[:6]]
    want, got = pair_differences(model, tokenizer, PAIRS[:6]), pair_differences(model, chatty, chats)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_inside_deployed_the_quarantine_does_not_count(model: nn.Module, tokenizer: object) -> None:
    adapted = copy.deepcopy(model)
    want = pair_differences(adapted, tokenizer, PAIRS[:4])
    for layer in ap.knobs(adapted).values():
        layer.delta_s_hack.data.normal_(std=0.1)
    with ap.deployed(adapted):
        got = pair_differences(adapted, tokenizer, PAIRS[:4])
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "median"}, "one of tstat, mean, svd, got 'median'"),
        ({"k": 2}, "k=2 rows need estimator='svd'"),
        ({"k": 0}, "k=0"),
        ({"k": 5, "estimator": "svd"}, "at least as many pairs, got 4"),
    ],
)
def test_what_cannot_be_extracted(
    model: nn.Module, tokenizer: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ap.extract_direction(model, tokenizer, PAIRS[:4], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least two"):
        ap.extract_direction(model, tokenizer, PAIRS[:1])
    with pytest.raises(ValueError, match="no AntiPaSTO layers"):
        ap.extract_direction(FAMILIES["llama"].build(), tokenizer, PAIRS[:4])


def test_a_smaller_adapter_beside_a_larger_one_has_directions_of_its_own_rank(tokenizer: object) -> None:
    model = get_peft_model(load(), ap.AntiPastoConfig(rank=3))
    model.add_adapter("large", ap.AntiPastoConfig())
    v = ap.extract_direction(model, tokenizer, PAIRS[:4])
    assert {V.shape for V in v.values()} == {(1, 3)}
    router = ap.Router(model, v, controls={"c": v.random(0)})
    with router.deployed("c"), ap.scaled(model, 0.5):
        model(torch.tensor([[2, 3]]))
    model.set_adapter("large")
    with pytest.raises(ValueError, match="routes the adapter 'default', but 'large' is active"):
        router.deployed("c")
    with pytest.raises(ValueError, match="the direction has r=3, the layer 96"):
        ap.Router(model, v)


def test_reentrant_checkpointing_is_named(tokenizer: object) -> None:
    model = get_peft_model(load(), ap.AntiPastoConfig()).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        ap.extract_direction(model, tokenizer, PAIRS[:4])


# ── the mapping ──────────────────────────────────────────────────────────────────────────────────────────────────────


def make(k: int = 1, r: int = 8, layers: int = 3, seed: int = 0) -> ap.Direction:
    generator = torch.Generator().manual_seed(seed)
    names = [f"layer.{i}" for i in range(layers)]
    return ap.Direction(
        {n: torch.linalg.qr(torch.randn(r, k, generator=generator)).Q.T for n in names},
        effect={n: torch.randn(r, generator=generator) for n in names},
        strength={n: torch.rand(k, generator=generator) + i for i, n in enumerate(names)},
    )


@given(k=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_controls_have_the_shape_and_spread_of_the_real_one(k: int, seed: int) -> None:
    v = make(k, r=64, seed=seed)
    random, permuted = v.random(seed), v.permuted(seed)
    for name in v:
        for control in (random, permuted):
            assert control[name].shape == v[name].shape
        assert torch.equal(permuted.effect[name].sort().values, v.effect[name].sort().values)
        ratio = random.effect[name].square().mean() / v.effect[name].square().mean()
        assert 0.3 < ratio < 3
    assert torch.equal(v.random(seed)["layer.0"], random["layer.0"])
    assert not torch.equal(v.random(seed + 1)["layer.0"], random["layer.0"])
    # rows and effect sizes are shuffled alike
    one = ap.Direction({"l": v.effect["layer.0"] / v.effect["layer.0"].norm()}, effect={"l": v.effect["layer.0"]})
    torch.testing.assert_close(one.permuted(seed)["l"][0], one.permuted(seed).effect["l"] / one.effect["l"].norm())


def test_overlap() -> None:
    v, other = make(), make(seed=1)
    assert v.overlap(v).overall == pytest.approx(1)
    assert v.overlap(-v).overall == pytest.approx(-1)
    assert v.overlap(other).layers["layer.1"] == pytest.approx((v["layer.1"] @ other["layer.1"].T).item(), abs=1e-6)
    wide = make(k=3)
    turned = ap.Direction({n: torch.linalg.qr(torch.randn(3, 3)).Q @ V for n, V in wide.items()})
    assert abs(wide.overlap(turned).overall) == pytest.approx(1, abs=0.7)
    assert all(abs(x) == pytest.approx(1, abs=1e-4) for x in wide.overlap(turned).layers.values())
    with pytest.raises(ValueError, match="no layer in common"):
        v.overlap(ap.Direction({"other": torch.eye(8)[0]}))
    with pytest.raises(ValueError, match="r=8, the other 4"):
        v.overlap(ap.Direction({"layer.0": torch.eye(4)[0]}))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({}, {}, "at least one layer"),
        ({"l": torch.ones(4)}, {}, "l: the rows of V must have unit length"),
        ({"l": torch.eye(4)[[0, 0]]}, {}, "orthogonal"),
        ({"l": torch.eye(4)[0]}, {"effect": {"l": torch.ones(3)}}, r"effect has shape \(3,\), expected \(4,\)"),
        ({"l": torch.eye(4)[0]}, {"strength": {"l": torch.ones(3)}}, r"strength has shape \(3,\), expected \(1,\)"),
        ({"l": torch.tensor([float("nan"), 1])}, {}, "NaN, an Inf or"),
    ],
)
def test_what_is_no_direction(rows: dict[str, torch.Tensor], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ap.Direction(rows, **options)  # type: ignore[arg-type]


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_save_and_load(tmp_path: Path, known: ap.Direction) -> None:
    known.save(tmp_path / "v.safetensors")
    loaded = ap.Direction.load(tmp_path / "v.safetensors")
    assert list(loaded) == sorted(known)
    for name in known:
        assert torch.equal(loaded[name], known[name])
        assert torch.equal(loaded.effect[name], known.effect[name])
        assert torch.equal(loaded.strength[name], known.strength[name])
    assert loaded.fingerprints == known.fingerprints
    assert loaded.heldout == known.heldout
    bare = ap.Direction({"l": torch.eye(3)[0]})
    bare.save(tmp_path / "bare.safetensors")
    assert ap.Direction.load(tmp_path / "bare.safetensors").effect is None


def test_a_direction_of_another_model_is_refused_by_name(model: nn.Module, known: ap.Direction) -> None:
    known.check_base(model)
    other = copy.deepcopy(model)
    other.model.layers[1].mlp.up_proj.base_layer.weight.data[0, 0] += 1e-3
    with pytest.raises(
        ValueError,
        match=r"made on another base: 1 of its 21 layers differ\. model\.layers\.1\.mlp\.up_proj: other weights",
    ):
        known.check_base(other)
    tiny = FAMILIES["llama"].build()
    ap.wrap(tiny)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: the direction has r=96, the layer 16"):
        ap.Direction({"model.layers.0.self_attn.q_proj": torch.eye(96)[0]}).check_base(tiny)
    ap.wrap(half := FAMILIES["llama"].build(), ap.AntiPastoConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="not among the adapted layers"):
        ap.Direction({"model.layers.0.mlp.up_proj": torch.eye(16)[0]}).check_base(half)


@pytest.mark.parametrize("damage", ["truncate", "garbage", "another format", "no metadata", "a key of nothing"])
def test_a_file_that_is_no_direction_is_named(tmp_path: Path, known: ap.Direction, damage: str) -> None:
    path = tmp_path / "v.safetensors"
    known.save(path)
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "garbage":
        path.write_bytes(b"\x00" * 100)
    elif damage == "another format":
        save_file({"V l": torch.eye(3)[:1]}, path, metadata={"format": "x"})
    elif damage == "no metadata":
        save_file({"V l": torch.eye(3)[:1]}, path)
    else:
        save_file(
            {"W l": torch.eye(3)[:1]},
            path,
            metadata={"format": "antipasto-direction-1", "heldout": "null", "fingerprints": "{}"},
        )
    with pytest.raises(ValueError, match=r"v\.safetensors is not a valid direction"):
        ap.Direction.load(path)


def test_a_direction_is_of_single_precision_whatever_the_default_is() -> None:
    rows = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        v = ap.Direction({"0": rows}, effect={"0": rows[0]})
        others = [v, -v, v.random(0), v.permuted(0)]
        gates = [Gate(Control(one), {"0": 2}, torch.device("cpu")) for one in others]
    finally:
        torch.set_default_dtype(torch.float32)
    for one, gate in zip(others, gates, strict=True):
        tensors = [
            one["0"],
            one.strength["0"],
            (one.effect or {})["0"],
            gate.V,
            gate.effect,
            gate.moved(rows[0].float())[0],
        ]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
