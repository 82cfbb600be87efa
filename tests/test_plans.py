"""However a call is computed it is the formula, and W_θ is never older than the knobs nor kept longer than it should be."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import antipasto as ap
from antipasto.adapter import choice
from antipasto.adapter.basis import decompose
from antipasto.adapter.choice import Asked
from antipasto.adapter.functional import Route, merged_linear, merged_weight, spectral_linear_reference
from antipasto.adapter.plans import Call, Execution, cheapest, route_costs
from antipasto.adapter.views import fixed, mixed

SHAPES = [(7, 5), (5, 7), (6, 6), (6, 1)]
PLANS = ("auto", "factored", "merged", "spectral")


def routes(o: int, i: int, r: int) -> list[Route]:
    call = Call(4, o, i, r, True, True, by_token=False, well_conditioned=True, is_basis=True, weights=1)
    return list(route_costs(call))


CASES = [(shape, rank, route) for shape in SHAPES for rank in (None, 2) for route in routes(*shape, rank or min(shape))]


# ── the function ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("shape", "rank", "route"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_x", [True, False])
def test_every_route_is_the_formula(
    shape: tuple[int, int], rank: int | None, route: Route, dtype: torch.dtype, bias: bool, needs_x: bool
) -> None:
    torch.manual_seed(0)
    o, i = shape
    W = torch.randn(o, i, dtype=dtype)
    b = torch.randn(o, dtype=dtype) if bias else None
    U, S, Vh = decompose(W).truncate(rank or min(shape))
    theta = (0.2 * torch.randn(len(S), dtype=dtype)).requires_grad_()
    x = torch.randn(2, 9, i, dtype=dtype, requires_grad=needs_x)
    y = merged_linear(x, b, theta, [merged_weight(W, U, Vh, theta.detach())], (U, S, Vh), route)
    wanted = [theta, x] if needs_x else [theta]
    weight = torch.randn_like(y)
    got = torch.autograd.grad((y * weight).sum(), wanted)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (x, W, b, U, Vh, theta)]
    reference = spectral_linear_reference(*exact)  # type: ignore[arg-type]
    want = torch.autograd.grad((reference * weight).sum(), [exact[5], exact[0]][: len(wanted)])  # type: ignore[arg-type]
    close = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 3e-5, "rtol": 3e-5}
    torch.testing.assert_close(y.double(), reference, **close)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w.double(), **close)


@pytest.mark.parametrize("route", [route for route in Route if route.by_token])
def test_rows_with_a_theta_each(route: Route) -> None:
    torch.manual_seed(1)
    o, i = (5, 7) if route is Route.OUTPUT else (7, 5)
    W, b = torch.randn(o, i).double(), torch.randn(o).double()
    U, S, Vh = decompose(W)
    thetas = 0.2 * torch.randn(2, 5).double()
    which = torch.tensor([1, 0, 1, 1])
    theta = thetas[which].unsqueeze(1).requires_grad_()  # (4, 1, r)
    x = torch.randn(4, 3, i).double().requires_grad_()
    weights = [merged_weight(W, U, Vh, one) for one in thetas]
    y = merged_linear(x, b, theta, weights, (U, S, Vh), route, which)
    rows = [spectral_linear_reference(x[n], W, b, U, Vh, theta[n, 0]) for n in range(4)]
    torch.testing.assert_close(y, torch.stack(rows))
    probe = torch.randn_like(y)
    got = torch.autograd.grad((y * probe).sum(), [x, theta])
    want = torch.autograd.grad((torch.stack(rows) * probe).sum(), [x, theta])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_what_is_returned_may_be_written_to() -> None:
    """As the output of nn.Linear may, whatever the backward has kept."""
    torch.manual_seed(2)
    W = torch.randn(4, 6)
    U, S, Vh = decompose(W)
    for route in Route:
        if route in (Route.INPUT, Route.INPUT_GRAM):
            continue
        theta = torch.full((4,), 0.1, requires_grad=True)
        x = torch.randn(3, 6, requires_grad=True)
        y = merged_linear(x, None, theta, [merged_weight(W, U, Vh, theta.detach())], (U, S, Vh), route)
        (want,) = torch.autograd.grad(y.relu().sum(), theta, retain_graph=True)
        nn.functional.relu(y, inplace=True)
        (got,) = torch.autograd.grad(y.sum(), theta)
        torch.testing.assert_close(got, want)


# ── the choice ───────────────────────────────────────────────────────────────────────────────────────────────────────


@given(
    tokens=st.integers(1, 10_000),
    shape=st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    cut=st.floats(0.01, 1),
    flags=st.tuples(*[st.booleans()] * 5),
)
@settings(max_examples=300, deadline=None)
def test_the_choice_is_possible_and_the_forward_does_not_depend_on_rollouts(
    tokens: int, shape: tuple[int, int], cut: float, flags: tuple[bool, ...]
) -> None:
    o, i = shape
    r = max(1, int(cut * min(shape)))
    needs_x, needs_theta, by_token, well_conditioned, is_basis = flags
    call = Call(tokens, o, i, r, needs_x, needs_theta, by_token, well_conditioned, is_basis, weights=1)
    execution, route = cheapest(call)
    assert route in route_costs(call)
    assert route.by_token or not by_token
    assert well_conditioned or route in (Route.FACTORED, Route.WEIGHT)
    assert execution is not Execution.SPECTRAL or (is_basis and r == min(shape))
    other = Call(tokens, o, i, r, needs_x, needs_theta, not by_token, well_conditioned, is_basis, weights=1)
    assert cheapest(other)[0] is execution


def make(plan: str = "auto", o: int = 24, i: int = 16, **options: Any) -> tuple[nn.Module, ap.LayerKnobs, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(i, o))
    config = ap.AntiPastoConfig(target_modules=["0"], plan=plan, **options)  # type: ignore[arg-type]
    (knobs,) = ap.wrap(model, config).values()
    with torch.no_grad():
        knobs.delta_s.normal_(std=0.1)
    return model, knobs, torch.randn(4, 16, i, requires_grad=True)


def taken(knobs: ap.LayerKnobs, x: Tensor) -> Execution:
    theta = knobs.layer.theta(["default"])
    assert theta is not None
    layer = knobs.layer
    assert layer.basis is not None
    asked = Asked(layer.plan, layer.hold_weights, by_sequence=False)
    return layer.choice.make(asked, x, theta, layer.base_layer.weight, layer.basis, None, x.dtype)[0]


def test_each_plan_is_taken_where_it_is_named_and_auto_takes_what_is_cheapest() -> None:
    for plan in PLANS[1:]:
        _, knobs, x = make(plan)
        assert taken(knobs, x).value == plan
    _, knobs, x = make()
    assert taken(knobs, x[:2]) is Execution.SPECTRAL
    assert taken(knobs, x) is Execution.MERGED
    with torch.no_grad():
        assert taken(knobs, x[:1, :1]) is Execution.MERGED
    _, knobs, x = make(rank=2)
    assert taken(knobs, x) is Execution.MERGED
    assert taken(knobs, x[:1, :1]) is Execution.FACTORED
    with pytest.raises(ValueError, match="plan must be one of auto, factored, merged, spectral, got 'quick'"):
        ap.AntiPastoConfig(plan="quick")  # type: ignore[arg-type]


def _hook(knobs: ap.LayerKnobs) -> None:
    knobs.layer.base_layer.register_forward_hook(lambda _, __, y: 2 * y)


def _pre_hook(knobs: ap.LayerKnobs) -> None:
    knobs.layer.base_layer.register_forward_pre_hook(lambda _, args: (2 * args[0],))


def _own_forward(knobs: ap.LayerKnobs) -> None:
    old = knobs.layer.base_layer.forward
    knobs.layer.base_layer.forward = lambda x: 2 * old(x)  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("change", [_hook, _pre_hook, _own_forward])
@pytest.mark.parametrize("plan", PLANS)
def test_a_base_layer_that_does_more_than_a_matmul_is_called(plan: str, change: Any) -> None:
    model, knobs, x = make(plan)
    change(knobs)
    y = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)
        base, delta = knobs.layer.base_layer(x), x @ knobs.layer.get_delta_weight("default").T
    torch.testing.assert_close(y, base + delta)


@pytest.mark.parametrize("plan", PLANS)
def test_a_base_layer_that_trains_gets_its_gradient(plan: str) -> None:
    model, knobs, x = make(plan)
    knobs.layer.base_layer.requires_grad_(True)
    model(x).sum().backward()
    want = x.sum((0, 1)).expand(24, 16)
    torch.testing.assert_close(knobs.layer.base_layer.weight.grad, want)


@pytest.mark.parametrize("plan", PLANS)
def test_weights_that_are_written_to_after_wrapping_count(plan: str) -> None:
    model, knobs, x = make(plan)
    model(x).sum().backward()
    base = knobs.layer.base_layer
    for with_grad in (False, True, False):
        with torch.no_grad():
            model(x)  # is held
            base.weight.copy_(torch.randn_like(base.weight))
        with torch.set_grad_enabled(with_grad):
            want = spectral_linear_reference(x, base.weight, base.bias, knobs.U, knobs.Vh, knobs.delta_s)
            torch.testing.assert_close(model(x), want, atol=2e-5, rtol=1e-5)


def test_a_write_is_seen_where_theta_is_the_knob_itself() -> None:
    """Without a quarantine nothing is added up: what is compared with must not be the tensor that was written to."""
    model, knobs, x = make(quarantine=False)
    with torch.no_grad():
        before = model(x)
        knobs.delta_s.data.add_(1)
        want = spectral_linear_reference(
            x, knobs.layer.base_layer.weight, knobs.layer.base_layer.bias, knobs.U, knobs.Vh, knobs.delta_s
        )
        torch.testing.assert_close(model(x), want, atol=2e-5, rtol=1e-5)
        assert not torch.allclose(before, want)


def test_the_same_weights_loaded_again_are_the_basiss() -> None:
    """Else a resumed run, whose weights are loaded into the wrapped model, would not end where the uninterrupted one does."""
    model, knobs, x = make()
    y = model(x[:2])
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert taken(knobs, x[:2]) is Execution.SPECTRAL
    assert torch.equal(model(x[:2]), y)


# ── precision ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("spectrum", ["down to 1e-6", "down to 1e-3", "flat", "theta crosses zero"])
def test_ill_conditioned_weights_lose_no_more_than_the_plain_formula(
    plan: str, shape: tuple[int, int], spectrum: str
) -> None:
    """Output and gradient against fp64, beside what the formula itself loses in fp32."""
    torch.manual_seed(4)
    r = min(shape)
    low = {"down to 1e-6": -6, "down to 1e-3": -3}.get(spectrum, 0)
    S = torch.logspace(0, low, r, dtype=torch.float64)
    U, _ = torch.linalg.qr(torch.randn(shape[0], r, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(shape[1], r, dtype=torch.float64))
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    model[0].weight.data = ((U * S) @ V.T).float()
    (knobs,) = ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"], plan=plan)).values()  # type: ignore[arg-type]
    theta = 0.05 * torch.randn(r)
    if spectrum == "theta crosses zero":
        theta[::3] = -knobs.S[::3] * (1 + 1e-6)
    knobs.delta_s.data.copy_(theta)
    x, probe = torch.randn(128, shape[1], requires_grad=True), torch.randn(128, shape[0])

    def run(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        X, T = x.detach().to(dtype).requires_grad_(), theta.to(dtype).requires_grad_()
        y = spectral_linear_reference(
            X, model[0].base_layer.weight.to(dtype), None, knobs.U.to(dtype), knobs.Vh.to(dtype), T
        )
        return y, *torch.autograd.grad((y * probe).sum(), [X, T])

    y = model(x)
    got = (y, *torch.autograd.grad((y * probe).sum(), [x, knobs.delta_s]))
    for g, plain, exact in zip(got, run(torch.float32), run(torch.float64), strict=True):
        allowed = 10 * (plain - exact).norm() + 3e-7 * exact.norm()
        assert (g - exact).norm() <= allowed


KINDS = {"zero": 0.0, "denormal": 1e-39, "tiny": 1e-25, "huge": 1e20, "usual": 1.0}
THETAS = {
    "zero": lambda S: 0 * S,
    "-S": lambda S: -S,
    "nearly -S": lambda S: -S * (1 + 1e-5),
    "0.1": lambda S: 0 * S + 0.1,
}


def exact_gradient(knobs: ap.LayerKnobs, x: Tensor, probe: Tensor) -> Tensor:
    """∂L/∂θ for L = (y ⊙ probe).sum(), in fp64: of neither W nor θ."""
    return ((probe.double() @ knobs.U.double()) * (x.detach().double() @ knobs.Vh.double().T)).sum(0)


def assert_exact(model: nn.Module, knobs: ap.LayerKnobs, x: Tensor, probe: Tensor, tolerance: float) -> Tensor:
    """The gradient is, to a share of its largest number; returns the output."""
    y = model(x)
    assert y.isfinite().all()
    (got,) = torch.autograd.grad((y * probe).sum(), knobs.delta_s)
    want = exact_gradient(knobs, x, probe)
    torch.testing.assert_close(got.double(), want, atol=tolerance * float(want.abs().max()), rtol=0)
    return y


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6), (6, 1), (1, 6)])
def test_no_singular_value_is_too_small_or_large_for_the_gradient(plan: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(5)
    o, i = shape
    weights = {kind: size * torch.randn(o, i) for kind, size in KINDS.items()}
    weights["of rank 2"] = torch.randn(o, 2) @ torch.randn(2, i)
    for weight in weights.values():
        model = nn.Sequential(nn.Linear(i, o, bias=False))
        model[0].weight.data = weight
        config = ap.AntiPastoConfig(target_modules=["0"], plan=plan, cache_dir=None)  # type: ignore[arg-type]
        (knobs,) = ap.wrap(model, config).values()
        x, probe = torch.randn(64, i, requires_grad=True), torch.randn(64, o)
        for theta in THETAS.values():
            knobs.delta_s.data = theta(knobs.S)
            assert_exact(model, knobs, x, probe, 5e-5)  # a route by one side may lose two digits of seven


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_a_bias_takes_no_digits_from_the_gradient(plan: str, size: float) -> None:
    torch.manual_seed(6)
    model, knobs, _ = make(plan, 16, 24)
    knobs.layer.base_layer.bias.data.normal_(std=size)
    x, probe = torch.randn(128, 24, requires_grad=True), torch.randn(128, 16)
    assert_exact(model, knobs, x, probe, 2e-5)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
def test_the_gradient_is_that_of_the_weights_that_are_there(plan: str, shape: tuple[int, int], size: float) -> None:
    """Written to after wrapping, W is not U diag(S) Vh any more: no route may count on that, however small W is."""
    o, i = shape
    model, knobs, _ = make(plan, o, i)
    base = knobs.layer.base_layer
    with torch.no_grad():
        base.weight.mul_(size)  # and the basis of that weight
        basis = decompose(base.weight)
        knobs.layer._basis = basis
        knobs.layer.choice.trust(base.weight)
        knobs.delta_s.mul_(size)
        base.weight.copy_(torch.randn_like(base.weight) * size)
        base.bias.zero_()
    x, probe = torch.randn(128, i, requires_grad=True), torch.randn(128, o)
    y = assert_exact(model, knobs, x, probe, 2e-5)
    full = spectral_linear_reference(x, base.weight, None, knobs.U, knobs.Vh, knobs.delta_s)
    torch.testing.assert_close(y, full, atol=float(1e-5 * full.detach().abs().max()), rtol=0)


class Tf32(TorchDispatchMode):
    """Products as a GPU may compute them: their operands have 10 bits after the point."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            rounded = [((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for t in args[-2:]]
            args = (*args[:-2], *rounded)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(384, 96), (96, 384)])
def test_no_route_divides_where_products_are_rounded(shape: tuple[int, int]) -> None:
    """In TF32 the factor of up to 100 by which a one-sided route may amplify errors would leave one digit of three."""
    o, i = shape
    torch.manual_seed(0)
    layer = nn.Linear(i, o, bias=False)
    U, _, Vh = decompose(layer.weight)
    layer.weight.data.copy_((U * torch.logspace(0, -1.8, 96)) @ Vh)
    (knobs,) = ap.wrap(model := nn.Sequential(layer), ap.AntiPastoConfig(target_modules=["0"], cache_dir=None)).values()
    knobs.delta_s.data.normal_(std=1e-3)
    x, G = torch.randn(2048, i, requires_grad=True), torch.randn(2048, o)

    def gradient(plan: Any) -> Tensor:
        knobs.layer.plan = plan
        return torch.autograd.grad(model(x), knobs.delta_s, G)[0]

    want = gradient("factored")
    torch.testing.assert_close(gradient("auto"), want, rtol=1e-4, atol=1e-3)
    backend = torch.backends.mkldnn.matmul
    before, backend.fp32_precision = backend.fp32_precision, "tf32"
    try:
        with Tf32():
            factored, auto = ((gradient(plan) - want).norm() for plan in ("factored", "auto"))
    finally:
        backend.fp32_precision = before
    assert 0 < auto < 2 * factored


def test_autocast_leaves_fp64_alone() -> None:
    model, _, x = make()
    model.double()
    want = model(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x.double())
        with torch.no_grad(), fixed(model):
            held = [model(x.double()), model(x.double())]
    assert torch.equal(got, want)
    for y in held:
        torch.testing.assert_close(y, want)


def test_a_second_derivative_needs_the_factored_plan() -> None:
    model, knobs, x = make("merged")
    (g,) = torch.autograd.grad(model(x).square().sum(), knobs.delta_s, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
    for plan in ("factored", "spectral"):
        model, knobs, x = make(plan)
        (g,) = torch.autograd.grad(model(x).square().sum(), knobs.delta_s, create_graph=True)
        g.sum().backward()
        assert knobs.delta_s.grad.any()


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────────────


def alive(knobs: ap.LayerKnobs) -> list[bool]:
    """Of each W_θ that is known of, in the order in which they were made."""
    gc.collect()
    return [entry.weak() is not None for entry in knobs.layer.choice.held._entries]


def test_a_backward_frees_the_weight_and_an_evaluation_holds_it_until_the_knobs_change() -> None:
    model, knobs, x = make("merged")
    loss = model(x).sum()
    assert alive(knobs) == [True]  # in the graph
    loss.backward()
    assert alive(knobs) == [False]
    with torch.no_grad():
        model(x)
        assert alive(knobs) == [True]
        (entry,) = knobs.layer.choice.held._entries
        model(x[:1])
        assert knobs.layer.choice.held._entries == [entry]
        for _ in range(5):
            knobs.delta_s.data.add_(0.1)
            model(x)
        assert alive(knobs) == [True, True]  # as many as there are views that take turns
        assert entry.weak() is not None or entry not in knobs.layer.choice.held._entries
    loss = model(x).sum()  # what an evaluation has built serves the training step, which then frees it
    assert alive(knobs) == [True, True]
    loss.backward()
    assert alive(knobs) == [True, False]


def test_what_inference_mode_has_built_serves_a_step_with_gradient() -> None:
    model, _, x = make("merged")
    with torch.inference_mode():
        y = model(x)
    model(x).sum().backward()
    assert torch.equal(model(x), y)
    with torch.inference_mode():
        model.load_state_dict(copy.deepcopy(model.state_dict()))


def test_merging_frees_what_is_held() -> None:
    model, knobs, x = make("merged")
    with torch.no_grad():
        y = model(x)
        assert alive(knobs) == [True]
        knobs.layer.merge()
        assert alive(knobs) == []
        torch.testing.assert_close(model(x), y)


def test_nothing_is_held_where_the_config_says_so() -> None:
    model, knobs, x = make("merged", hold_weights=False)
    with torch.no_grad():
        model(x)
    assert all(entry.weak() is None for entry in knobs.layer.choice.held._entries)


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_call_gives_the_same_bits_whatever_came_before(plan: str) -> None:
    model, knobs, x = make(plan)
    other, _, _ = make(plan)
    with torch.no_grad():
        for _ in range(3):
            other(x), other(x[:1])  # now it holds what it will
        assert torch.equal(model(x), other(x))
    assert torch.equal(model(x), other(x))
    for m in (model, other):
        m(x).square().sum().backward()
    assert torch.equal(knobs.delta_s.grad, next(iter(ap.knobs(other).values())).delta_s.grad)


def test_a_copy_holds_nothing_of_the_original() -> None:
    model, knobs, x = make()
    with torch.no_grad():
        model(x)
        twin = copy.deepcopy(model)
        (theirs,) = ap.knobs(twin).values()
        assert theirs.layer.choice.held._entries == []
        assert torch.equal(twin(x), model(x))
    held = weakref.ref(knobs.layer.choice.held._entries[0].weak())  # type: ignore[arg-type]
    model.double()  # and what is moved or cast lets go
    assert held() is None


@pytest.mark.parametrize("plan", PLANS)
def test_rows_that_see_other_knobs_in_one_batch(plan: str) -> None:
    model, knobs, x = make(plan)
    knobs.delta_s_hack.data.normal_(std=0.1)
    x.requires_grad_()
    deployed = torch.tensor([True, False, False, True])
    with mixed(model) as rows:
        rows.set(deployed)
        y = model(x)
        g = torch.autograd.grad(y.square().sum(), [x, knobs.delta_s])
        with torch.no_grad():
            torch.testing.assert_close(model(x), y)
    alone = model(x)
    with ap.deployed(model):
        alone = torch.where(deployed[:, None, None], model(x), alone)
    torch.testing.assert_close(y, alone)
    for got, want in zip(g, torch.autograd.grad(alone.square().sum(), [x, knobs.delta_s]), strict=True):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("with_grad", [True, False])
def test_rows_whose_theta_is_zero_are_the_base_layers_to_the_bit(plan: str, with_grad: bool) -> None:
    model, knobs, x = make(plan)
    knobs.delta_s.data.zero_()
    knobs.delta_s_hack.data.normal_(std=0.1)
    deployed = torch.tensor([True, False, False, True])
    with mixed(model) as rows, torch.set_grad_enabled(with_grad):
        rows.set(deployed)
        y = model(x)
        assert torch.equal(y[deployed], knobs.layer.base_layer(x)[deployed])
        assert not torch.allclose(y[~deployed], knobs.layer.base_layer(x)[~deployed])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:.*:torch.jit.TracerWarning")
@pytest.mark.parametrize("with_grad", [True, False])
def test_a_trace_sees_a_layer_without_a_choice(with_grad: bool) -> None:
    """A W_θ that is held would be a constant of it."""
    model, knobs, x = make()
    with torch.no_grad():
        model(x)
    with torch.set_grad_enabled(with_grad):
        traced = torch.jit.trace(model, x.detach(), check_trace=False)
    knobs.delta_s.data.mul_(2)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("plan", PLANS)
def test_torch_compile_and_vmap_see_a_layer_without_a_choice(plan: str) -> None:
    """Which knobs there are cannot be looked at inside a graph: there the plan is factored, without a break."""
    model, knobs, x = make(plan)
    y = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), y)

    def loss(delta_s: Tensor, row: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"0.delta_s.default.weight": delta_s}, (row,)).square().sum()

    got = torch.vmap(torch.func.grad(loss), (None, 0))(knobs.delta_s.detach(), x.detach())
    for row, g in zip(x, got, strict=True):
        (want,) = torch.autograd.grad(model(row).square().sum(), knobs.delta_s)
        torch.testing.assert_close(g, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_every_sequences_own_gradient(plan: str, shape: tuple[int, int]) -> None:
    o, i = shape
    model, knobs, x = make(plan, o, i)
    plain = model(x)
    with ap.rollout_grads(model) as grads:
        y = model(x)
        y.square().sum().backward()
    assert torch.equal(y, plain)  # to be asked for them does not change the forward
    torch.testing.assert_close(grads["0"].sum(0), knobs.delta_s.grad)
    for row in range(len(x)):
        knobs.delta_s.grad = None
        model(x[row : row + 1]).square().sum().backward()
        torch.testing.assert_close(grads["0"][row], knobs.delta_s.grad, atol=2e-4, rtol=1e-4)


# ── low precision ────────────────────────────────────────────────────────────────────────────────────────────────────


def low_precision(shape: tuple[int, int], plan: str, *, autocast: bool) -> tuple[nn.Module, Any]:
    """A layer in bf16, or in fp32 under autocast to it; its θ is not zero."""
    torch.manual_seed(0)
    o, i = shape
    model = nn.Sequential(nn.Linear(i, o)).to(torch.float32 if autocast else torch.bfloat16)
    ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"], cache_dir=None, plan=plan))  # type: ignore[arg-type]
    (layer,) = ap.knobs(model).values()
    layer.delta_s.data.copy_(0.1 * layer.S.float() * torch.randn(layer.r))
    return model, layer


LOW = pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])


@LOW
@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 64)])
@pytest.mark.parametrize(("length", "route"), [(2, Route.FACTORED), (60, Route.WEIGHT)])
def test_in_low_precision_one_matmul_is_as_near_to_the_formula_as_two(
    shape: tuple[int, int], length: int, route: Route, autocast: bool
) -> None:
    """Output and both gradients, against fp64, to within half as much again: W_θ is rounded, and W need not be."""
    o, i = shape
    call = Call(4 * length, o, i, min(shape), True, True, False, False, False, weights=1, low=True)
    assert cheapest(call) == (Execution.MERGED, route)
    errors: dict[str, list[float]] = {}
    for plan in ("auto", "factored"):
        model, layer = low_precision(shape, plan, autocast=autocast)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(4, length, i, generator=generator).to(layer.layer.base_layer.weight.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x.requires_grad_())
        assert y.dtype is torch.bfloat16
        weight = torch.randn(y.shape, generator=generator).to(y)
        got = [y, *torch.autograd.grad(y, [x, layer.delta_s], weight)]
        base = layer.layer.base_layer
        exact = [
            t.detach().double().requires_grad_() for t in (x, base.weight, base.bias, layer.U, layer.Vh, layer.delta_s)
        ]
        want_y = spectral_linear_reference(*exact)
        want = [want_y, *torch.autograd.grad(want_y, [exact[0], exact[5]], weight.double())]
        errors[plan] = [
            float((g.double() - w).detach().norm() / w.detach().norm()) for g, w in zip(got, want, strict=True)
        ]
    for merged, factored in zip(errors["auto"], errors["factored"], strict=True):
        assert 0 < merged <= 1.5 * factored


@LOW
def test_in_low_precision_what_samples_is_what_is_differentiated(autocast: bool) -> None:
    """The same bits with gradient and without, whatever came before; and at θ = 0 those of the base layer."""
    model, layer = low_precision((48, 96), "auto", autocast=autocast)
    x = torch.randn(3, 7, 96).to(layer.layer.base_layer.weight.dtype)

    def run(module: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return module(x)

    with torch.no_grad():
        sampled = run(model)
    assert torch.equal(run(model), sampled)
    layer.layer.plan = "factored"
    assert not torch.equal(run(model), sampled)
    layer.layer.plan = "auto"
    layer.delta_s.data.zero_()
    assert torch.equal(run(model), run(layer.layer.base_layer))
    with torch.no_grad():
        assert torch.equal(run(model), run(layer.layer.base_layer))


def test_autocast_and_no_autocast_have_a_held_weight_each() -> None:
    model, _ = low_precision((48, 96), "auto", autocast=True)
    x = torch.randn(3, 96)
    with torch.no_grad():
        full = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        assert (full.dtype, low.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(model(x), full)
        torch.testing.assert_close(low.float(), full, atol=2e-2, rtol=2e-2)


@LOW
def test_in_low_precision_a_weight_is_built_once_an_optimizer_step(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layer = low_precision((48, 96), "auto", autocast=autocast)
    built: list[Tensor] = []
    monkeypatch.setattr(choice, "merged_weight", lambda *args: built.append(merged_weight(*args)) or built[-1])
    optimizer = torch.optim.SGD([layer.delta_s], lr=0.1)
    for step in range(1, 4):
        for _ in range(2):  # it samples, and two micro-batches are differentiated
            x = torch.randn(3, 96).to(layer.layer.base_layer.weight.dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                with torch.no_grad():
                    model(x)
                model(x).float().square().sum().backward()
        optimizer.step()
        assert len(built) == step
    layer.layer.hold_weights = False
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        alone = model(x)
        layer.layer.plan = "factored"
        assert torch.equal(model(x), alone)
    assert len(built) == 3


def test_a_carried_basis_that_is_wider_than_the_weights_is_merged_and_held_as_any_other() -> None:
    """PEFT keeps what is saved in fp32."""
    outputs, gradients = [], []
    for save_basis in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 96)).to(torch.bfloat16)
        config = ap.AntiPastoConfig(target_modules=["0"], cache_dir=None, save_basis=save_basis)
        model = get_peft_model(model, config)
        (layer,) = ap.knobs(model).values()
        assert layer.U.dtype == (torch.float32 if save_basis else torch.bfloat16)
        layer.delta_s.data.normal_(std=0.1)
        x = torch.randn(3, 7, 48).bfloat16()
        with torch.no_grad():
            outputs.append(model(x))
        assert [entry.strong is not None for entry in layer.layer.choice.held._entries] == [True]
        y = model(x)
        assert torch.equal(y, outputs[-1])
        gradients.append(torch.autograd.grad(y.float().square().sum(), layer.delta_s)[0])
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)


def test_fp16_is_computed_by_the_factored_form() -> None:
    """W_θ x may overflow where U (θ ⊙ (Vh x)), in fp32, does not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).half()
    ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"], cache_dir=None))
    (layer,) = ap.knobs(model).values()
    layer.delta_s.data.fill_(0.5)
    auto = model(torch.ones(2, 8).half())
    layer.layer.plan = "factored"
    assert torch.equal(model(torch.ones(2, 8).half()), auto)


@pytest.mark.parametrize("with_grad", [True, False])
def test_in_low_precision_rows_that_see_other_knobs_are_factored_also_where_they_are_sampled(with_grad: bool) -> None:
    call = Call(7, 64, 48, 48, with_grad, with_grad, with_grad, False, False, weights=2, low=True)
    assert cheapest(call)[0] is Execution.FACTORED
    alike = Call(7, 64, 48, 48, with_grad, with_grad, with_grad, False, False, weights=1, low=True)
    assert cheapest(alike)[0] is Execution.MERGED
    assert cheapest(alike, "factored")[0] is Execution.FACTORED


# ── while nobody writes to the knobs ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_knobs_are_looked_at_once_for_each_view(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward after the first compares anything on the device; the bits are those of a forward that does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).to(dtype)
    layers = ap.wrap(model, ap.AntiPastoConfig(target_modules=["0", "2"], cache_dir=None)).values()
    for layer in layers:
        layer.delta_s.data.normal_()
        layer.delta_s_hack.data.normal_()
    x, want = torch.randn(3, 6, dtype=dtype), {}
    views = {"trained": nullcontext, "deployed": lambda: ap.deployed(model), "base": lambda: ap.reference(model)}
    with torch.no_grad():
        for name, view in views.items():
            with view():
                want[name] = model(x)
        with ap.fixed(model):
            for name, view in views.items():
                with view():
                    assert torch.equal(model(x), want[name])
            with monkeypatch.context() as patch:
                for function in ("equal", "any", "all"):
                    patch.setattr(torch, function, None)
                    patch.setattr(Tensor, function, None)
                again = {}
                for name in views:
                    with views[name]():
                        again[name] = [model(x) for _ in range(3)]
            assert all(torch.equal(y, want[name]) for name, ys in again.items() for y in ys)
        for layer in layers:
            layer.delta_s.data.mul_(2)
        assert not torch.equal(model(x), want["trained"])
    assert all(layer.layer.fixed is None for layer in layers)


def test_fixed_keeps_no_weight_of_a_context_that_is_over() -> None:
    model, knobs, x = make("merged")
    knobs.delta_s_hack.data.normal_()
    with torch.no_grad(), fixed(model):
        model(x)
        for dial in (0.25, 0.5, 0.75, 1.25):
            with ap.deployed(model, dial):
                y, again = model(x), model(x)
            assert torch.equal(y, again)
            torch.testing.assert_close(y, nn.functional.linear(x, weight_of(knobs, dial), knobs.layer.bias))
        assert len(knobs.layer.fixed) == 2
        torch.testing.assert_close(model(x), nn.functional.linear(x, weight_of(knobs, 1.0), knobs.layer.bias))
        assert len(knobs.layer.fixed) == 2


def weight_of(knobs: ap.LayerKnobs, dial: float) -> Tensor:
    return merged_weight(knobs.layer.base_layer.weight, knobs.U, knobs.Vh, knobs.delta_s + dial * knobs.delta_s_hack)


def test_a_gradient_and_rows_that_differ_are_as_without() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8))
    (layer,) = ap.wrap(model, ap.AntiPastoConfig(target_modules=["0"], cache_dir=None)).values()
    layer.delta_s.data.normal_()
    layer.delta_s_hack.data.normal_()
    x = torch.randn(2, 6)
    with mixed(model) as rows, ap.fixed(model):
        with torch.no_grad():
            model(x)
            rows.set(torch.tensor([True, False]))
            shown = model(x)
        with ap.deployed(model, 1.0):
            pass
        rows.set(None)
        model(x).sum().backward()
    assert layer.delta_s.grad is not None
    with torch.no_grad():
        both = model(x)
        with ap.deployed(model):
            deployed = model(x)
    torch.testing.assert_close(shown, torch.stack([deployed[0], both[1]]))
