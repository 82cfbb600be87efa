"""An adapter, a direction and a book belong to one base: another is refused, the same in other clothes is recognised."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import frozen
import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import antipasto as ap
from antipasto.adapter.basis import Basis, load_identified_basis
from antipasto.adapter.config import FORMAT
from antipasto.adapter.fingerprints import (
    BaseWarning,
    Fingerprint,
    Likeness,
    fingerprints_from_json,
    fingerprints_to_json,
    sketch,
)

O, I = 24, 16  # noqa: E741


def weight(spectrum: Tensor | None = None, seed: int = 0) -> Tensor:
    """(O, I) with the given singular values; well separated ones if there are none."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(O, I, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(I, I, generator=generator, dtype=torch.float64)).Q
    return ((U * (torch.linspace(2, 1, I).double() if spectrum is None else spectrum.double())) @ V.T).float()


def fingerprint(W: Tensor) -> Fingerprint:
    return load_identified_basis(W, cache_dir=None)[1]


# ── one fingerprint ──────────────────────────────────────────────────────────────────────────────────────────────────


@given(
    st.tuples(st.integers(1, 9999), st.integers(1, 9999)),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=8, max_size=8),
)
def test_a_line_is_read_as_it_was_written(shape: tuple[int, int], numbers: list[float]) -> None:
    one = Fingerprint(shape, "bfloat16", "0" * 64, "gram-eigh-1", "1" * 16, "f" * 16, tuple(numbers))
    assert Fingerprint.parse(str(one)) == one
    assert fingerprints_from_json(fingerprints_to_json({"a.b": one})) == {"a.b": one}


@given(st.integers(0, 250), st.sampled_from("0 \n€=x"))
def test_a_damaged_line_is_refused_or_another(where: int, with_what: str) -> None:
    line = str(fingerprint(weight()))
    where %= len(line)
    damaged = line[:where] + with_what + line[where + 1 :]
    try:
        one = Fingerprint.parse(damaged)
    except ValueError:
        return
    assert Fingerprint.parse(str(one)) == one
    if "sketch" not in line[where:]:  # a bit of the last letter means nothing
        assert (damaged == line) == (one == fingerprint(weight()))


@pytest.mark.parametrize("what", ["", None, 3, "16x16 float32", "a" * 300])
def test_what_is_no_line_is_refused(what: Any) -> None:
    with pytest.raises(ValueError, match="Not a fingerprint of a layer"):
        Fingerprint.parse(what)


def test_a_fingerprint_is_the_same_in_every_version() -> None:
    """Of a weight made without a random generator. If this fails, every file that users have is refused: raise the format."""
    W = (torch.arange(12.0).reshape(4, 3) / 4).sub(1).square()
    one = fingerprint(W)
    assert one.weight == "3485d19cdc5150b83f013b50fe9f9c83bfe81075909d5a27bb99710a61ab2959"
    assert one.svd == "gram-eigh-1"
    assert one.sketch == (2.25, -6.75, 0.875, 1.125, 7.0, 1.875, 5.25, 2.5)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("shape", [(O, I), (200, 300)])
def test_two_sketches_tell_the_distance(size: float, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ratios = []
    for _ in range(50):
        W, D = torch.randn(shape).double(), size * torch.randn(shape).double()
        blank = Fingerprint(shape, "float64", "", "", "", "", sketch(W))
        ratios.append(blank.distance(blank._replace(sketch=sketch(W + D))) / float(D.norm() / W.norm()))
    assert 0.8 < sum(ratios) / len(ratios) < 1.3
    assert min(ratios) > 0.25
    assert max(ratios) < 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_weight_in_another_dtype_is_recognised(dtype: torch.dtype) -> None:
    for seed in range(20):
        W = weight(seed=seed)
        assert fingerprint(W).likeness(fingerprint(W.to(dtype))) is Likeness.ROUNDED
        assert fingerprint(W.to(dtype)).likeness(fingerprint(W)) is Likeness.ROUNDED
        tuned = W + 0.05 * weight(seed=seed + 1)
        assert fingerprint(W).likeness(fingerprint(tuned.to(dtype))) is Likeness.OTHER
        assert fingerprint(W).likeness(fingerprint(tuned)) is Likeness.OTHER


def test_one_changed_number_is_another_weight() -> None:
    W = weight()
    other = W.clone()
    other[3, 5] = torch.nextafter(other[3, 5], torch.tensor(9.0))
    assert fingerprint(W).likeness(fingerprint(W.clone())) is Likeness.SAME
    assert fingerprint(W).likeness(fingerprint(other)) is Likeness.OTHER
    assert fingerprint(W).likeness(fingerprint(W[:, :-1])) is Likeness.OTHER
    assert math.isinf(fingerprint(W).distance(fingerprint(W[:, :-1])))
    assert fingerprint(W).likeness(fingerprint(W)._replace(basis="0" * 16)) is Likeness.OTHER_BASIS


# ── what stays valid ─────────────────────────────────────────────────────────────────────────────────────────────────


def delta(basis: Basis, theta: Tensor) -> Tensor:
    return (basis.U * theta) @ basis.Vh


def error_of(W: Tensor, other: Basis, theta: Tensor) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW‖ of the same numbers in two bases."""
    want = delta(load_identified_basis(W, cache_dir=None)[0], theta).double()
    return float((delta(other, theta).double() - want).norm() / want.norm())


def lapack(W: Tensor) -> Basis:
    """Another library's SVD, in fp32, with the signs put where ours are."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    sign = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign().squeeze(1)
    return Basis(U * sign, S, Vh * sign[:, None])


@pytest.mark.parametrize("rounded", [False, True])
def test_numbers_on_well_separated_directions_stay_valid(rounded: bool) -> None:
    torch.manual_seed(1)
    W, theta = weight(), torch.randn(I)  # gaps of 1/15, of a largest of 2
    other = load_identified_basis(W.bfloat16(), cache_dir=None)[0] if rounded else lapack(W)
    assert error_of(W, other, theta) < (0.1 if rounded else 1e-5)
    there, here = fingerprint(W), fingerprint(W.bfloat16()) if rounded else fingerprint(W)._replace(basis="0" * 16)
    assert there.unsettled(here, torch.linspace(2, 1, I)) == 0


@pytest.mark.parametrize("rounded", [False, True])
def test_numbers_on_near_equal_singular_values_do_not_unless_they_are_equal_too(rounded: bool) -> None:
    torch.manual_seed(1)
    S = torch.linspace(2, 1, I)
    S[4:8] = S[4] + torch.tensor([0, -1e-7, -2e-7, -3e-7])
    W, theta = weight(S), torch.randn(I)
    other = load_identified_basis(W.bfloat16(), cache_dir=None)[0] if rounded else lapack(W)
    assert error_of(W, other, theta) > 0.2
    theta[4:8] = 0.5  # what is turned within them is then the same
    assert error_of(W, other, theta) < (0.1 if rounded else 1e-5)
    there, here = fingerprint(W), fingerprint(W.bfloat16()) if rounded else fingerprint(W)._replace(basis="0" * 16)
    assert there.unsettled(here, S) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_unsettled_is_counted_as_it_turns_out(dtype: torch.dtype) -> None:
    """With gaps from 1e-6 to 0.1, so that some directions turn and some do not."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(80, 80, dtype=torch.float64)).Q for _ in range(2))
    S = torch.cat([torch.zeros(1), torch.logspace(-6, -1, 79)]).double().cumsum(0).flip(0) + 1
    W = ((U * S) @ V.T).float()
    basis, there = load_identified_basis(W, cache_dir=None)
    rounded, here = load_identified_basis(W.to(dtype), cache_dir=None)
    turned = torch.arccos((basis.Vh @ rounded.Vh.T).diagonal().abs().clamp_max(1)) > 1 / 3
    count = there.unsettled(here, basis.S)
    assert 10 < count < 70
    assert int(turned.sum()) == pytest.approx(count, rel=0.25)
    assert there.unsettled(there, basis.S) < count


# ── a whole adapter ──────────────────────────────────────────────────────────────────────────────────────────────────


def build(dtype: torch.dtype = torch.float32) -> nn.Module:
    return FAMILIES["llama"].build().to(dtype)


def trained(model: nn.Module, **options: Any) -> PeftModel:
    adapted = get_peft_model(model, ap.AntiPastoConfig(**options))
    torch.manual_seed(2)
    for layer in ap.knobs(adapted).values():
        layer.delta_s.data.normal_(std=0.3)
    return adapted


def logits(model: nn.Module) -> Tensor:
    return families.logits(model).float()


def tune(model: nn.Module) -> nn.Module:
    """Another base: one layer of it is."""
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trained(build()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


LOADERS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "PeftModel.from_pretrained": lambda model, path: PeftModel.from_pretrained(model, path),
    "PeftModel.load_adapter": lambda model, path: _load_second(model, path),
    "low_cpu_mem_usage": lambda model, path: PeftModel.from_pretrained(model, path, low_cpu_mem_usage=True),
    "transformers' load_adapter": lambda model, path: _load_by_transformers(model, path),
}


def _load_second(model: nn.Module, path: Path) -> nn.Module:
    peft_model = get_peft_model(model, ap.AntiPastoConfig(rank=2))
    peft_model.load_adapter(path, "second")
    peft_model.set_adapter("second")
    return peft_model


def _load_by_transformers(model: nn.Module, path: Path) -> nn.Module:
    model.load_adapter(path)  # type: ignore[operator]
    return model


@pytest.mark.parametrize("load", LOADERS.values(), ids=list(LOADERS))
def test_another_base_is_refused_by_name(saved: Path, load: Callable[[nn.Module, Path], nn.Module]) -> None:
    torch.testing.assert_close(logits(load(build(), saved)), logits(trained(build())))
    with pytest.raises(
        ValueError, match=r"1 of its 14 layers differ\. model\.layers\.1\.mlp\.up_proj: other weights, about 0\.0\d+ of"
    ):
        load(tune(build()), saved)


def test_a_refused_base_is_left_as_it_was(saved: Path) -> None:
    model = tune(build())
    before = logits(model)
    with pytest.raises(ValueError, match="another base"):
        PeftModel.from_pretrained(model, saved)
    assert not any("Pasto" in type(module).__name__ for module in model.modules())
    assert torch.equal(logits(model), before)


def test_all_ways_to_differ_are_told(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    lines = config["base_fingerprints"]
    first, second, third = list(lines)[:3]
    lines["model.layers.9.gone"] = lines[first]
    lines[second] = lines[second].replace(lines[second].split()[0], "7x5")
    del config["base_fingerprints"][third]  # a file may know less than the config adapts
    (saved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{second}: shape 7x5 there") as error:
        PeftModel.from_pretrained(build(), saved)
    assert f"model.layers.9.gone: of shape {lines[first].split()[0]}, which is not among the adapted layers" in str(
        error.value
    )


def test_another_base_can_be_forced(saved: Path) -> None:
    config = ap.AntiPastoConfig.from_pretrained(saved)
    config.check_base = False
    model = PeftModel.from_pretrained(tune(build()), saved, config=config)
    assert not torch.equal(logits(model), logits(trained(build())))
    assert "check_base" not in json.loads((saved / "adapter_config.json").read_text())


def test_a_config_can_be_used_for_several_models(tmp_path: Path) -> None:
    """It stays the caller's own object, as everywhere in PEFT; and what each model saves is of that model's base."""
    config = ap.AntiPastoConfig()
    first, second = get_peft_model(build(), config), get_peft_model(tune(build()), config)
    assert first.peft_config["default"] is second.peft_config["default"] is config
    prints = []
    for name, model in (("first", first), ("second", second)):
        model.save_pretrained(tmp_path / name)
        prints.append(json.loads((tmp_path / name / "adapter_config.json").read_text())["base_fingerprints"])
    assert [name for name in prints[0] if prints[0][name] != prints[1][name]] == ["model.layers.1.mlp.up_proj"]
    PeftModel.from_pretrained(build(), tmp_path / "first")
    with pytest.raises(ValueError, match="another base"):
        PeftModel.from_pretrained(build(), tmp_path / "second")


def test_a_config_that_was_read_keeps_expecting_its_base(saved: Path) -> None:
    config = ap.AntiPastoConfig.from_pretrained(saved)
    model = PeftModel.from_pretrained(build(), saved, config=config)
    assert model.peft_config["default"] is config
    with pytest.raises(ValueError, match="another base"):
        get_peft_model(tune(build()), config)


def test_a_later_format_is_refused(saved: Path) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match=r"format 2; this version of antipasto reads formats 1 to 1.*update antipasto"):
        PeftModel.from_pretrained(build(), saved)


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16])
def test_another_dtype_is_recognised_and_told(tmp_path: Path, there: torch.dtype) -> None:
    here = torch.bfloat16 if there is torch.float32 else torch.float32
    torch.manual_seed(0)
    near_equal = 0.1 * torch.linalg.qr(torch.randn(16, 16)).Q
    models = {dtype: build() for dtype in (there, here)}
    for dtype, model in models.items():
        model.model.layers[0].self_attn.q_proj.weight.data = near_equal.clone()
        model.to(dtype)
    trained(models[there]).save_pretrained(tmp_path)
    with pytest.warns(
        BaseWarning, match=r"to another dtype \(.*\), in 14 of its 14 layers\. (16|17|18|19|2\d) of their 192"
    ):
        PeftModel.from_pretrained(models[here], tmp_path)


def test_another_decomposition_of_the_same_weights_is_recognised(saved: Path, recwarn: pytest.WarningsRecorder) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    for name, line in config["base_fingerprints"].items():
        config["base_fingerprints"][name] = str(Fingerprint.parse(line)._replace(basis="0" * 16, svd="gesdd-7"))
    (saved / "adapter_config.json").write_text(json.dumps(config))
    model = PeftModel.from_pretrained(build(), saved)
    torch.testing.assert_close(logits(model), logits(trained(build())))
    assert not [w for w in recwarn if issubclass(w.category, BaseWarning)]  # no two singular values are that close


# ── an adapter that carries its basis ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("load", LOADERS.values(), ids=list(LOADERS))
@pytest.mark.parametrize("rank", [None, 5])
def test_an_adapter_that_carries_its_basis_means_the_same_in_another_dtype(
    tmp_path: Path, load: Callable[[nn.Module, Path], nn.Module], rank: int | None
) -> None:
    """Its error is that of the base's own rounding; without the basis it is several times that."""
    plain, carried = trained(build(), rank=rank), trained(build(), rank=rank, save_basis=True)
    want = logits(plain) - logits(build())
    assert torch.equal(logits(carried), logits(plain))
    plain.save_pretrained(tmp_path / "plain")
    carried.save_pretrained(tmp_path / "carried")
    base = build(torch.bfloat16).float()  # rounded weights, computed in fp32: what is left is the adapter's error
    if load is LOADERS["PeftModel.load_adapter"]:
        with pytest.raises(ValueError, match="uses another singular basis"):
            load(build().double(), tmp_path / "carried")
        return
    errors = {}
    for name in ("plain", "carried"):
        config_path = tmp_path / name / "adapter_config.json"
        config = json.loads(config_path.read_text()) | {"base_fingerprints": None}  # it is fp32 both there and here
        config_path.write_text(json.dumps(config))
        model = load(copy.deepcopy(base), tmp_path / name)
        errors[name] = float((logits(model) - logits(base) - want).norm() / want.norm())
    assert errors["carried"] < 0.02
    assert errors["plain"] > (5 if rank is None else 1.5) * errors["carried"]


def test_a_carried_basis_is_of_the_state_and_not_trained(tmp_path: Path) -> None:
    model = trained(build(), save_basis=True)
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"delta_s"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    for name, layer in ap.knobs(loaded).items():
        assert torch.equal(layer.U, ap.knobs(model)[name].U)
        assert not layer.U.requires_grad


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.bfloat16().float(),
        copy.deepcopy,
        lambda model: model.load_state_dict(model.state_dict()) and model,
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True) and model,
    ],
)
def test_a_carried_basis_goes_where_the_model_goes(change: Callable[[nn.Module], nn.Module]) -> None:
    plain, carried = trained(build()), trained(build(), save_basis=True)
    want = logits(plain)
    logits(carried)  # there is something held now
    assert want.shape == logits(carried).shape
    if change is not copy.deepcopy:
        plain = change(plain)
    changed = change(carried)
    torch.testing.assert_close(logits(changed), logits(plain))
    for layer in ap.knobs(changed).values():
        assert layer.U.data_ptr() == layer.layer.delta_s_basis["default"].basis_U.data_ptr()


def test_another_basis_may_be_loaded_over_the_one_that_is_carried() -> None:
    model = trained(build(), save_basis=True)
    before = logits(model)
    state = {n: -t for n, t in model.state_dict().items() if n.endswith("basis_U")}
    model.load_state_dict(state, strict=False)
    after = logits(model)
    assert not torch.allclose(before, after)
    base = logits(build())
    for layer in ap.knobs(model).values():
        layer.delta_s.data.neg_()
    torch.testing.assert_close(logits(model), before)
    assert not torch.allclose(base, before)


def test_the_basis_stays_when_the_adapter_that_carried_it_goes() -> None:
    model = trained(build(), save_basis=True)
    model.add_adapter("second", ap.AntiPastoConfig(rank=3))
    model.set_adapter("second")
    for layer in ap.knobs(model).values():
        layer.delta_s.data.fill_(0.2)
    before = logits(model)
    model.delete_adapter("default")
    assert torch.equal(logits(model), before)
    with pytest.raises(AttributeError):
        next(iter(ap.knobs(model).values())).layer.delta_s_basis.default  # noqa: B018


# ── weights that change under an adapter ─────────────────────────────────────────────────────────────────────────────


def test_other_weights_are_not_loaded_under_an_adapter() -> None:
    model = trained(build())
    model.load_state_dict(model.state_dict())
    state = model.state_dict()
    name = "base_model.model.model.layers.1.mlp.up_proj.base_layer.weight"
    with pytest.raises(ValueError, match=f"{name} of the state dict is not the weight"):
        model.load_state_dict(state | {name: state[name] * 1.001})


def test_a_direction_and_books_know_when_the_weight_under_them_changed(tmp_path: Path) -> None:
    model = trained(build())
    generator = torch.Generator().manual_seed(0)
    effect = {name: torch.randn(layer.r, generator=generator) for name, layer in ap.knobs(model).items()}
    prints = {name: layer.layer.current_fingerprint() for name, layer in ap.knobs(model).items()}
    v = ap.Direction({name: t / t.norm() for name, t in effect.items()}, effect=effect, fingerprints=prints)
    ap.Router(model, v, controls={"random": v.random(0)}).save(tmp_path / "books")
    v.save(tmp_path / "v")
    assert ap.Direction.load(tmp_path / "v").fingerprints == prints

    model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.data.mul_(1.02)
    with pytest.raises(ValueError, match=r"direction was made on another base: 1 of its 14.*layers\.0\.mlp\.up_proj"):
        ap.Router(model, v)
    v.fingerprints.clear()
    router = ap.Router(model, v, controls={"random": v.random(0)})
    with pytest.raises(ValueError, match=r"does not belong to this run: It was made on another base: 1 of its 14"):
        router.load(tmp_path / "books")


def test_a_merged_adapter_does_not_change_the_fingerprint() -> None:
    for family in ("llama", "gpt2"):
        model = get_peft_model(FAMILIES[family].build(), ap.AntiPastoConfig(target_modules="all-linear"))
        for layer in ap.knobs(model).values():
            layer.delta_s.data.fill_(0.1)
        before = {name: layer.layer.current_fingerprint() for name, layer in ap.knobs(model).items()}
        assert all(str(one) == model.peft_config["default"].base_fingerprints[name] for name, one in before.items())
        model.merge_adapter()
        assert {name: layer.layer.current_fingerprint() for name, layer in ap.knobs(model).items()} == before


# ── files that an earlier version wrote ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("folder", sorted(frozen.HERE.glob("format-*")), ids=lambda path: path.name)
def test_what_an_earlier_version_wrote_is_read(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Adapter (plain, and with its basis), direction and books. If it fails: raise the format, and read the old one still."""
    want = json.loads((folder / "expected.json").read_text())
    for kind in ("plain", "carried"):
        model = PeftModel.from_pretrained(frozen.build(), folder / kind)
        torch.testing.assert_close(model(frozen.inputs()), torch.tensor(want["trained"]), atol=1e-5, rtol=1e-5)
        with ap.deployed(model):
            torch.testing.assert_close(model(frozen.inputs()), torch.tensor(want["deployed"]), atol=1e-5, rtol=1e-5)
        v = ap.Direction.load(folder / "direction.safetensors")
        router = ap.Router(model, v, controls={"random": v.random(0)})
        router.load(folder / "books.safetensors")
        assert router.steps == 3
        assert float(router.book("random")["0"].norm()) == pytest.approx(want["book"], rel=1e-4)
    assert not recwarn.list


def test_the_frozen_files_are_of_the_present_format() -> None:
    assert sorted(path.name for path in frozen.HERE.glob("format-*"))[-1] == f"format-{FORMAT}"
