"""The autograd function and the layer against the plain formula: every dtype, rank, bias, shape and kind of layer."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import antipasto as ap
from antipasto.adapter.functional import delta_weight, spectral_delta, spectral_linear_reference
from antipasto.adapter.layer import as_matrix
from antipasto.names import PlanName

O, I = 7, 5  # noqa: E741
# how far a layer's output may be from fp64, relative to its scale: a few roundings of the dtype
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LEADING = [(), (3,), (2, 3), (2, 1, 3), (0, 3)]


def make_layer(
    kind: type[nn.Module] = nn.Linear,
    *,
    bias: bool = True,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    plan: PlanName = "auto",
) -> ap.LayerKnobs:
    """One adapted layer with random weight, bias and knobs."""
    torch.manual_seed(0)
    base = nn.Linear(I, O, bias=bias) if kind is nn.Linear else Conv1D(O, I)
    if base.bias is not None:
        nn.init.normal_(base.bias)
    model = nn.Sequential(base).to(dtype)
    (knobs,) = ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"], rank=rank, plan=plan)).values()
    with torch.no_grad():
        knobs.delta_s.normal_(std=0.3)
        knobs.delta_s_hack.normal_(std=0.3)
    return knobs


def expected(knobs: ap.LayerKnobs, x: torch.Tensor) -> torch.Tensor:
    """The formula in fp64, with the knobs as they are now."""
    bias = knobs.layer.base_layer.bias
    return spectral_linear_reference(
        x.double(),
        as_matrix(knobs.layer.base_layer).double(),
        None if bias is None else bias.double(),
        knobs.U.double(),
        knobs.Vh.double(),
        (knobs.delta_s + knobs.delta_s_hack).double(),
    )


@pytest.mark.parametrize("plan", get_args(PlanName))
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("leading", LEADING)
def test_layer_is_the_formula(
    plan: PlanName, kind: type[nn.Module], bias: bool, rank: int | None, dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    bias = bias or kind is Conv1D  # a Conv1D always has one
    knobs = make_layer(kind, bias=bias, rank=rank, dtype=dtype, plan=plan)
    if kind is Conv1D and leading == (0, 3):
        leading = (3,)  # Conv1D itself takes no empty batch
    x = torch.randn(*leading, I).to(dtype).requires_grad_()

    y = knobs.layer(x)
    with torch.no_grad():
        y_without = knobs.layer(x)
    reference = expected(knobs, x)
    assert y.dtype == y_without.dtype == dtype
    assert y.shape == (*leading, O)
    close = {"atol": TOLERANCE[dtype] * 3, "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(y.double(), reference, **close)
    torch.testing.assert_close(y_without.double(), reference, **close)

    weight = torch.randn_like(reference)
    got = torch.autograd.grad((y * weight.to(dtype)).sum(), [x, knobs.delta_s])
    want = torch.autograd.grad((reference * weight).sum(), [x, knobs.delta_s])
    assert got[1].dtype == knobs.delta_s.dtype
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), atol=TOLERANCE[dtype] * 20, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("plan", get_args(PlanName))
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_zero_knobs_give_the_base_layers_output(
    plan: PlanName, kind: type[nn.Module], rank: int | None, dtype: torch.dtype
) -> None:
    knobs = make_layer(kind, rank=rank, dtype=dtype, plan=plan)
    x = torch.randn(4, I).to(dtype)
    base = knobs.layer.base_layer(x)
    assert not torch.equal(knobs.layer(x), base)
    nn.init.zeros_(knobs.delta_s)
    nn.init.zeros_(knobs.delta_s_hack)
    assert torch.equal(knobs.layer(x), base)
    with torch.no_grad():
        assert torch.equal(knobs.layer(x), base)


def test_knobs_are_fp32_zeros_whatever_the_weight_is() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model = nn.Sequential(nn.Linear(4, 4)).to(dtype)
        (knobs,) = ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"])).values()
        for knob in (knobs.delta_s, knobs.delta_s_hack):
            assert knob.dtype == torch.float32
            assert not knob.any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [None, 2])
def test_gradcheck(bias: bool, rank: int | None) -> None:
    knobs = make_layer(bias=bias, rank=rank, dtype=torch.float64)
    x = torch.randn(2, 3, I, dtype=torch.float64, requires_grad=True)
    theta = torch.randn(knobs.r, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        return spectral_delta(x, knobs.U, knobs.Vh, theta, torch.float64)

    assert torch.autograd.gradcheck(run, (x, theta))
    assert torch.autograd.gradgradcheck(run, (x, theta))


def test_per_sample_gradients_by_vmap() -> None:
    knobs = make_layer(dtype=torch.float64)
    x, delta_s = torch.randn(4, I).double(), knobs.delta_s.detach()

    def loss(delta_s: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(knobs.layer, {"delta_s.default.weight": delta_s}, (row,)).square().sum()

    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(delta_s, x)
    for row, sample in zip(rows, x, strict=True):
        (want,) = torch.autograd.grad(expected(knobs, sample).square().sum(), knobs.delta_s)
        torch.testing.assert_close(row, want)


@given(
    o=st.integers(1, 6), i=st.integers(1, 6), tokens=st.integers(0, 4), seed=st.integers(0, 99), cut=st.integers(0, 5)
)
@settings(max_examples=100, deadline=None)
def test_function_is_the_formula_for_any_shape(o: int, i: int, tokens: int, seed: int, cut: int) -> None:
    torch.manual_seed(seed)
    U, S, Vh = ap.load_basis(torch.randn(o, i, dtype=torch.float64), cache_dir=None).truncate(max(1, min(o, i) - cut))
    x, theta = torch.randn(tokens, i).double(), torch.randn_like(S).requires_grad_()
    y = spectral_delta(x, U, Vh, theta, torch.float64)
    reference = spectral_linear_reference(x, torch.zeros(o, i).double(), None, U, Vh, theta)
    torch.testing.assert_close(y, reference)
    torch.testing.assert_close(x @ delta_weight(U, Vh, theta).T, reference)
    grad, want = (torch.autograd.grad(f.square().sum(), theta)[0] for f in (y, reference))
    torch.testing.assert_close(grad, want)


def test_both_knobs_get_the_gradient_of_theta_if_the_quarantine_asks() -> None:
    knobs = make_layer()
    assert not knobs.delta_s_hack.requires_grad
    knobs.delta_s_hack.requires_grad_(True)
    knobs.layer(torch.randn(4, I)).square().sum().backward()
    assert knobs.delta_s.grad.abs().min() > 0
    assert torch.equal(knobs.delta_s.grad, knobs.delta_s_hack.grad)


def test_nothing_but_delta_s_gets_a_gradient() -> None:
    knobs = make_layer()
    knobs.layer(torch.randn(4, I)).sum().backward()
    assert {n for n, p in knobs.layer.named_parameters() if p.grad is not None} == {"delta_s.default.weight"}


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast(weight_dtype: torch.dtype) -> None:
    knobs = make_layer(dtype=weight_dtype)
    x = torch.randn(6, I).to(weight_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, base = knobs.layer(x), knobs.layer.base_layer(x)
        y.float().square().sum().backward()  # inside the region, where a careless backward would cast again
    assert y.dtype == base.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected(knobs, x), atol=0.1, rtol=3e-2)
    assert knobs.delta_s.grad.dtype == torch.float32
    nn.init.zeros_(knobs.delta_s)
    nn.init.zeros_(knobs.delta_s_hack)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(knobs.layer(x), knobs.layer.base_layer(x))


@pytest.mark.parametrize(("plan", "rtol"), [("factored", 1e-5), ("auto", 2**-7)])
def test_the_gradient_sums_over_many_bf16_tokens_in_fp32(plan: PlanName, rtol: float) -> None:
    """The weight route rounds the sum over the tokens to bf16, once."""
    knobs = make_layer(dtype=torch.bfloat16, plan=plan)
    x = torch.ones(20_001, I, dtype=torch.bfloat16)  # equal terms, whose sum needs more digits than bf16 has
    knobs.layer(x).sum().backward()
    (one,) = torch.autograd.grad(knobs.layer(x[:1]).sum(), knobs.delta_s)
    torch.testing.assert_close(knobs.delta_s.grad, 20_001 * one, rtol=rtol, atol=0)


def test_fp16_gradients_do_not_underflow() -> None:
    knobs, exact = make_layer(dtype=torch.float16), make_layer(dtype=torch.float64)
    x = torch.randn(4096, I).half() * 1e-2
    for layer, cast in ((knobs, torch.float16), (exact, torch.float64)):
        layer.layer(x.to(cast)).backward(torch.full((4096, O), 1e-6, dtype=cast))
    error = (knobs.delta_s.grad - exact.delta_s.grad).norm() / exact.delta_s.grad.norm()
    assert error < 0.1  # the incoming gradient itself is rounded to fp16; products in fp16 would be off by 0.8


def test_fp16_activations_that_overflow_in_the_singular_basis_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4, bias=False))
    (knobs,) = ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"])).values()
    model.half()
    knobs.layer.base_layer.weight.data.mul_(1e-3)
    x = (knobs.Vh[0].sign() * 1.5e4)[None]  # Vh x reaches 10^5, W x a few hundred
    base = knobs.layer.base_layer(x)
    assert torch.isfinite(base).all()
    assert not torch.isfinite(x @ knobs.Vh.T).all()
    assert torch.equal(model(x), base)


class FullPrecisionLinear(nn.Linear):
    """A layer that steps out of autocast, as routers and some heads do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


def test_a_layer_that_steps_out_of_autocast_keeps_its_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(FullPrecisionLinear(I, O))
    (knobs,) = ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"])).values()
    knobs.delta_s.data.normal_()
    x = torch.randn(6, I, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.square().sum().backward()
    want = expected(knobs, x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), want, atol=1e-6, rtol=1e-6)
    (grad,) = torch.autograd.grad(want.square().sum(), x)
    torch.testing.assert_close(x.grad, grad, atol=1e-5, rtol=1e-5)
