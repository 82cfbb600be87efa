"""A step's split between two parts of the gradient is the formula's, under every optimizer that can be split."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import antipasto as ap
from antipasto.routing.momentum import MomentumSplit

SIZES = (5, 3)
EPS = 1e-8
Make = Callable[..., torch.optim.Optimizer]


def adam(kind: type[torch.optim.Adam], **options: Any) -> Make:
    return lambda p, lr=0.03, wd=0.0: kind(p, lr=lr, betas=(0.8, 0.95), eps=EPS, weight_decay=wd, **options)


def sgd(**options: Any) -> Make:
    return lambda p, lr=0.1, wd=0.0: torch.optim.SGD(p, lr=lr, weight_decay=wd, **options)


OPTIMIZERS: dict[str, Make] = {
    "Adam": adam(torch.optim.Adam),
    "Adam amsgrad": adam(torch.optim.Adam, amsgrad=True),
    "AdamW": adam(torch.optim.AdamW),
    "AdamW foreach": adam(torch.optim.AdamW, foreach=True),
    "AdamW fused": adam(torch.optim.AdamW, fused=True),
    "AdamW fused amsgrad": adam(torch.optim.AdamW, fused=True, amsgrad=True),
    "SGD": sgd(),
    "SGD momentum": sgd(momentum=0.9),
    "SGD momentum, foreach": sgd(momentum=0.9, foreach=True),
    "SGD fused": sgd(momentum=0.9, fused=True),
    "SGD dampening": sgd(momentum=0.9, dampening=0.4),
    "SGD nesterov": sgd(momentum=0.9, nesterov=True),
}


class Reference:
    """The formulas of the module's text, in fp64, one number after the other; weight decay in the deployed part."""

    def __init__(self, optimizer: torch.optim.Optimizer, n: int) -> None:
        self.group = optimizer.param_groups[0]
        self.is_adam = isinstance(optimizer, torch.optim.Adam)
        self.decoupled = isinstance(optimizer, torch.optim.AdamW)
        self.m = {"D": torch.zeros(n, dtype=torch.float64), "Q": torch.zeros(n, dtype=torch.float64)}
        self.v = torch.zeros(n, dtype=torch.float64)
        self.v_max = torch.zeros(n, dtype=torch.float64)
        self.t = 0

    def step(self, g_D: torch.Tensor, g_Q: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.t += 1
        lr, decay = self.group["lr"], self.group["weight_decay"]
        g = {"D": g_D.double(), "Q": g_Q.double()}
        if not self.decoupled:
            g["D"] = g["D"] + decay * x.double()
        moved = self._adam(g, lr) if self.is_adam else self._sgd(g, lr)
        if self.decoupled:
            moved["D"] = moved["D"] - lr * decay * x.double()
        if self.is_adam:
            whole = moved["D"] + moved["Q"]
            limit = whole.abs().clamp_min(lr)
            moved["D"] = moved["D"].clamp(-limit, limit)
            moved["Q"] = whole - moved["D"]
        return moved["D"], moved["Q"]

    def _adam(self, g: dict[str, torch.Tensor], lr: float) -> dict[str, torch.Tensor]:
        beta1, beta2 = self.group["betas"]
        self.v = beta2 * self.v + (1 - beta2) * (g["D"] + g["Q"]) ** 2
        self.v_max = torch.maximum(self.v, self.v_max)
        v = self.v_max if self.group["amsgrad"] else self.v
        moved = {}
        for part in "DQ":
            self.m[part] = beta1 * self.m[part] + (1 - beta1) * g[part]
            m_hat = self.m[part] / (1 - beta1**self.t)
            moved[part] = -lr * m_hat / ((v / (1 - beta2**self.t)).sqrt() + self.group["eps"])
        return moved

    def _sgd(self, g: dict[str, torch.Tensor], lr: float) -> dict[str, torch.Tensor]:
        mu, moved = self.group["momentum"], {}
        for part in "DQ":
            new = 1.0 if self.t == 1 else 1 - self.group["dampening"]
            self.m[part] = mu * self.m[part] + new * g[part]
            step = g[part] + mu * self.m[part] if self.group["nesterov"] else self.m[part]
            moved[part] = -lr * (step if mu else g[part])
        return moved


class Run:
    """An optimizer of two knobs, and its split."""

    def __init__(self, make: Make, wd: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(7)
        self.knobs = [nn.Parameter(torch.randn(n, generator=generator)) for n in SIZES]
        self.optimizer = make(self.knobs, wd=wd)
        self.split: MomentumSplit | None = None

    @property
    def flat(self) -> torch.Tensor:
        return torch.cat([knob.detach() for knob in self.knobs])

    def step(self, g_D: torch.Tensor, g_Q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Δ and Δ_Q."""
        if self.split is None:
            self.split = MomentumSplit(self.optimizer, self.knobs)
        for knob, g in zip(self.knobs, (g_D + g_Q).split(SIZES), strict=True):
            knob.grad = g.clone()
        before = self.flat
        self.split.begin()
        self.optimizer.step()
        delta = self.flat - before
        return delta, self.split.end(g_D, g_Q, delta)


def parts(seed: int, steps: int, scales: Sequence[float] = (1.0, 1.0)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(scale * torch.randn(sum(SIZES), generator=generator) for scale in scales) for _ in range(steps)]


# ── the formula ──────────────────────────────────────────────────────────────────────────────────────────────────────


@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    seed=st.integers(0, 1000),
    lrs=st.lists(st.sampled_from([0.0, 1e-3, 0.05, 0.3]), min_size=1, max_size=8),
    scales=st.tuples(st.sampled_from([1e-3, 1.0, 30.0]), st.sampled_from([0.0, 1e-3, 1.0, 30.0])),
    silent=st.sets(st.integers(0, 7)),
    decay=st.sampled_from([0.0, 0.0, 0.1]),
)
@settings(max_examples=150, deadline=None)
def test_the_split_is_the_formulas(
    name: str, seed: int, lrs: list[float], scales: tuple[float, float], silent: set[int], decay: float
) -> None:
    run = Run(OPTIMIZERS[name], wd=decay)
    reference = Reference(run.optimizer, sum(SIZES))
    for i, (lr, (g_D, g_Q)) in enumerate(zip(lrs, parts(seed, len(lrs), scales), strict=True)):
        run.optimizer.param_groups[0]["lr"] = lr
        if i in silent:
            g_Q = torch.zeros_like(g_Q)
        x = run.flat
        want_D, want_Q = reference.step(g_D, g_Q, x)
        delta, delta_Q = run.step(g_D, g_Q)
        tolerance = {"atol": 2e-6 * (1 + lr * max(scales) * 10), "rtol": 2e-4}
        torch.testing.assert_close(delta_Q.double(), want_Q, **tolerance)
        torch.testing.assert_close((delta - delta_Q).double(), want_D, **tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_all_the_quarantines_is_moved_exactly_and_nothing_else_is(name: str) -> None:
    nothing = torch.zeros(sum(SIZES))
    all_Q, all_D = Run(OPTIMIZERS[name]), Run(OPTIMIZERS[name])
    for g, _ in parts(0, 5):
        delta, delta_Q = all_Q.step(nothing, g)
        assert torch.equal(delta_Q, delta)
        delta, delta_Q = all_D.step(g, nothing)
        assert delta.any()
        assert torch.equal(delta_Q, nothing)


@pytest.mark.parametrize("name", ["Adam", "AdamW fused"])
def test_a_tiny_part_gets_a_tiny_step_where_an_adam_of_its_own_takes_a_full_one(name: str) -> None:
    run, alone = Run(OPTIMIZERS[name]), Run(OPTIMIZERS[name])
    lr = run.optimizer.param_groups[0]["lr"]
    for g_D, g_Q in parts(3, 6, (1.0, 1e-6)):
        delta, delta_Q = run.step(g_D, g_Q)
        own, _ = alone.step(torch.zeros_like(g_Q), g_Q)
        assert delta_Q.abs().max() < 1e-4 * lr
        assert delta.norm() > 0.1 * lr
        assert own.norm() > 0.1 * lr


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name.startswith("Adam")])
def test_two_parts_that_nearly_cancel_do_not_make_the_deployed_one_jump(name: str) -> None:
    """Adam's first step is lr in every coordinate; the unbounded part would be a thousand times that, for good."""
    run = Run(OPTIMIZERS[name])
    lr = run.optimizer.param_groups[0]["lr"]
    for g, small in parts(9, 4):
        delta, delta_Q = run.step(g + 1e-3 * small, -g)
        assert (delta - delta_Q).abs().max() <= 1.001 * torch.maximum(delta.abs().max(), torch.tensor(lr))
        assert delta.norm() > 0.1 * lr


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD momentum", "SGD"])
def test_decay_is_the_deployed_parts(name: str) -> None:
    run, plain = Run(OPTIMIZERS[name], wd=0.5), Run(OPTIMIZERS[name])
    nothing = torch.zeros(sum(SIZES))
    delta, delta_Q = run.step(nothing, nothing)
    assert delta.any()  # the decay alone
    assert not delta_Q.any()
    if name == "SGD":  # there the decay is all that comes on top
        for _, g_Q in parts(1, 3):
            at = run.flat
            delta, delta_Q = run.step(nothing, g_Q)
            torch.testing.assert_close(delta_Q, plain.step(nothing, g_Q)[1])
            torch.testing.assert_close(delta - delta_Q, -0.1 * 0.5 * at)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_was_learned_before_is_the_deployed_parts(name: str) -> None:
    run = Run(OPTIMIZERS[name])
    reference = Reference(run.optimizer, sum(SIZES))
    nothing = torch.zeros(sum(SIZES))
    for g, _ in parts(4, 3):  # without a split
        reference.step(g, nothing, run.flat)
        for knob, part in zip(run.knobs, g.split(SIZES), strict=True):
            knob.grad = part.clone()
        run.optimizer.step()
    for g_D, g_Q in [
        (nothing, parts(5, 1)[0][1]),
        *parts(6, 3),
    ]:  # nothing but the history is the deployed part's at first
        want_D, want_Q = reference.step(g_D, g_Q, run.flat)
        delta, delta_Q = run.step(g_D, g_Q)
        torch.testing.assert_close(delta_Q.double(), want_Q, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close((delta - delta_Q).double(), want_D, atol=1e-5, rtol=1e-4)


def test_every_group_has_its_own_options() -> None:
    knobs = [nn.Parameter(torch.zeros(n)) for n in SIZES]
    optimizer = torch.optim.SGD([{"params": [knobs[1]], "lr": 0.5}, {"params": [knobs[0]], "lr": 0.25}], lr=1.0)
    split = MomentumSplit(optimizer, knobs)
    g = torch.ones(sum(SIZES))
    for knob, part in zip(knobs, g.split(SIZES), strict=True):
        knob.grad = part.clone()
    split.begin()
    optimizer.step()
    delta_Q = split.end(0.75 * g, 0.25 * g, torch.cat([knob.detach() for knob in knobs]))
    torch.testing.assert_close(delta_Q, -0.25 * torch.tensor([0.25] * SIZES[0] + [0.5] * SIZES[1]))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "SGD fused"])  # torch's own TypeError
def test_a_knob_without_a_gradient_is_left_alone_by_both(name: str) -> None:
    """As the optimizer leaves it: neither its momentum nor the knob moves, at the first step and later."""
    run, twin = Run(OPTIMIZERS[name]), Run(OPTIMIZERS[name])
    run.split = MomentumSplit(run.optimizer, run.knobs)
    for i, (g_D, g_Q) in enumerate(parts(6, 5)):
        g_D[SIZES[0] :] *= i % 2
        g_Q[SIZES[0] :] *= i % 2
        for knob, g in zip(run.knobs, (g_D + g_Q).split(SIZES), strict=True):
            knob.grad = g.clone()
        if i % 2 == 0:
            run.knobs[1].grad = None
        before = run.flat
        run.split.begin()
        run.optimizer.step()
        delta = run.flat - before
        delta_Q = run.split.end(g_D, g_Q, delta)
        if i % 2 == 0:
            assert not delta[SIZES[0] :].any()
            assert not delta_Q[SIZES[0] :].any()
        else:  # as if the steps in between had not been
            _, want = twin.step(g_D, g_Q)
            torch.testing.assert_close(delta_Q[SIZES[0] :], want[SIZES[0] :])


def test_optimizers_that_cannot_be_split_are_refused() -> None:
    knobs = [nn.Parameter(torch.zeros(n)) for n in SIZES]
    for other in (torch.optim.RMSprop(knobs), torch.optim.NAdam(knobs), torch.optim.Adagrad(knobs)):
        with pytest.raises(ValueError, match=f"cannot be routed under {type(other).__name__}.*AdamW"):
            MomentumSplit(other, knobs)
    for optimizer in (torch.optim.Adam(knobs, maximize=True), torch.optim.SGD(knobs, maximize=True)):
        with pytest.raises(ValueError, match="under maximize=True"):
            MomentumSplit(optimizer, knobs)


# ── through the router ───────────────────────────────────────────────────────────────────────────────────────────────


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    ap.wrap(model, ap.AntiPastoConfig(target_modules=["0", "2"], cache_dir=None))
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def flat(model: nn.Module, what: str) -> torch.Tensor:
    return torch.cat([getattr(layer, what).detach() for layer in ap.knobs(model).values()])


def routed_step(
    router: ap.Router, optimizer: torch.optim.Optimizer, seed: int, clip: float | None = None, micro: int = 1
) -> None:
    """A step in which the first half of the samples teaches the quarantine."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 8, generator=generator), torch.randn(8, 5, generator=generator)
    optimizer.zero_grad()
    order = torch.arange(8).view(2, micro, -1).transpose(0, 1).reshape(-1)  # halves of halves
    for rows in order.chunk(micro):
        with ap.rollout_grads(router.model) as grads:
            ((router.model(x[rows]) - y[rows]).square().sum() / 8).backward()
        G = router.flatten(grads)
        ours = (rows >= 4).float()
        router.add_gradients(ours @ G, (1 - ours) @ G)
    if clip is not None:
        nn.utils.clip_grad_norm_(trainable(router.model), clip)
    optimizer.step()


ROUTED: dict[str, Make] = {name: OPTIMIZERS[name] for name in ("Adam", "AdamW fused", "SGD momentum", "SGD nesterov")}


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize(("clip", "micro"), [(None, 1), (0.05, 1), (0.05, 4)])
def test_the_router_splits_the_step_that_the_optimizer_made(name: str, clip: float | None, micro: int) -> None:
    """δS_hack is what the formula says of the clipped gradient, and θ the plain run's."""
    model, plain = make_model(), make_model()
    optimizer, plain_optimizer = ROUTED[name](trainable(model)), ROUTED[name](trainable(plain))
    reference = Reference(optimizer, len(flat(model, "delta_s")))
    router = ap.Router(model, None)
    hack = torch.zeros(len(flat(model, "delta_s")), dtype=torch.float64)
    with router.attach(optimizer):
        for i in range(5):
            generator = torch.Generator().manual_seed(i)
            x, y = torch.randn(8, 8, generator=generator), torch.randn(8, 5, generator=generator)
            g = []
            for rows in (slice(4, 8), slice(0, 4)):
                plain_optimizer.zero_grad()
                ((plain(x[rows]) - y[rows]).square().sum() / 8).backward()
                g.append(torch.cat([layer.delta_s.grad for layer in ap.knobs(plain).values()]))
            scale = 1.0 if clip is None else min(1.0, clip / float((g[0] + g[1]).norm()))
            assert clip is None or scale < 1
            hack += reference.step(scale * g[0], scale * g[1], flat(plain, "delta_s"))[1]
            for layer, part in zip(ap.knobs(plain).values(), (scale * (g[0] + g[1])).split([6, 5]), strict=True):
                layer.delta_s.grad = part.clone()
            plain_optimizer.step()
            routed_step(router, optimizer, i, clip, micro)
            theta = flat(model, "delta_s") + flat(model, "delta_s_hack")
            torch.testing.assert_close(theta, flat(plain, "delta_s"), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(flat(model, "delta_s_hack").double(), hack, atol=1e-5, rtol=1e-3)
    assert router.metrics()["flagged_update"] > 0
    assert not torch.allclose(flat(model, "delta_s"), flat(plain, "delta_s"), atol=1e-3)


@pytest.mark.parametrize("off", [0.5, 1.0])
def test_parts_that_do_not_add_up_are_an_error(off: float) -> None:
    model = make_model()
    router, optimizer = ap.Router(model, None), torch.optim.SGD(trainable(model), lr=0.1)
    with router.attach(optimizer):
        model(torch.ones(4, 8)).square().sum().backward()
        g = torch.cat([layer.delta_s.grad for layer in ap.knobs(model).values()])
        other = torch.randn(len(g), generator=torch.Generator().manual_seed(0))
        router.add_gradients((1 - off) * g, off * other * g.norm() / other.norm())
        with pytest.raises(ValueError, match="do not add up to the gradient of the knobs"):
            optimizer.step()


def test_parts_are_refused_at_gradient_level_and_under_another_optimizer() -> None:
    v = ap.Direction({"0": torch.eye(6)[0]})
    router = ap.Router(make_model(), v, level="gradient", gate="one_sided")
    with pytest.raises(ValueError, match="routed at level='update'"):
        router.add_gradients(torch.zeros(11), torch.zeros(11))
    model = make_model()
    router, optimizer = ap.Router(model, None), torch.optim.RMSprop(trainable(model))
    with router.attach(optimizer), pytest.raises(ValueError, match="cannot be routed under RMSprop"):
        routed_step(router, optimizer, 0)


@pytest.mark.parametrize("name", ROUTED)
def test_a_step_without_parts_is_the_deployed_knobs_and_the_quarantines_momentum_runs_on(name: str) -> None:
    model = make_model()
    router, optimizer = ap.Router(model, None), ROUTED[name](trainable(model))
    with router.attach(optimizer):
        routed_step(router, optimizer, 0)
        after_one = flat(model, "delta_s_hack")
        assert after_one.any()
        optimizer.zero_grad()
        model(torch.ones(4, 8)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(flat(model, "delta_s_hack"), after_one)  # what the first step still moves


def direction() -> ap.Direction:
    generator = torch.Generator().manual_seed(0)
    rows = {"0": torch.eye(6)[0], "2": torch.eye(5)[1]}
    return ap.Direction(rows, effect={n: torch.randn(len(v), generator=generator) for n, v in rows.items()})


def test_the_gate_sees_what_the_rollouts_leave() -> None:
    """What is moved is Δ_Q + gate(Δ_D); a control's book too, and in measure mode the direction's own."""
    v = direction()
    results = {}
    for mode in ("route", "erase", "measure"):
        model = make_model()
        router = ap.Router(model, v, mode=mode, threshold=0.3, controls={"far": ap.Control(v, gate="no_gate")})
        optimizer = OPTIMIZERS["Adam"](trainable(model))
        with router.attach(optimizer):
            routed_step(router, optimizer, 0)
        results[mode] = model, router
    model, router = results["route"]
    plain = make_model()
    reference = Reference(OPTIMIZERS["Adam"](trainable(plain)), 11)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 8, generator=generator), torch.randn(8, 5, generator=generator)
    g = []
    for rows in (slice(4, 8), slice(0, 4)):
        plain.zero_grad()
        ((plain(x[rows]) - y[rows]).square().sum() / 8).backward()
        g.append(torch.cat([layer.delta_s.grad for layer in ap.knobs(plain).values()]))
    delta_D, delta_Q = (part.float() for part in reference.step(*g, flat(plain, "delta_s")))
    t = torch.cat(list(v.effect.values()))
    gated = torch.where((t * delta_D < 0) & (t.abs() > 0.3), delta_D, 0)
    assert gated.any()
    assert (gated != delta_D).any()
    close = {"atol": 1e-6, "rtol": 1e-4}
    torch.testing.assert_close(flat(model, "delta_s_hack"), delta_Q + gated, **close)
    torch.testing.assert_close(flat(model, "delta_s"), delta_D - gated, **close)
    along = torch.cat([-(row.T @ (-(row @ d))) for row, d in zip(v.values(), delta_D.split([6, 5]), strict=True)])
    torch.testing.assert_close(torch.cat(list(router.book("far").values())), delta_Q + along, **close)
    erased, _ = results["erase"]
    assert torch.equal(flat(erased, "delta_s"), flat(model, "delta_s"))
    assert not flat(erased, "delta_s_hack").any()
    measured, router = results["measure"]
    torch.testing.assert_close(flat(measured, "delta_s"), delta_D + delta_Q, **close)
    torch.testing.assert_close(torch.cat(list(router.book("direction").values())), delta_Q + gated, **close)


@pytest.mark.parametrize("name", ROUTED)
def test_stopped_and_continued_is_the_uninterrupted_run(name: str, tmp_path: Path) -> None:
    def start(model: nn.Module) -> tuple[ap.Router, torch.optim.Optimizer]:
        return ap.Router(model, direction(), controls={"x": direction().random(1)}), ROUTED[name](trainable(model))

    whole, half, rest = make_model(), make_model(), make_model()
    router, optimizer = start(whole)
    with router.attach(optimizer):
        for i in range(6):
            routed_step(router, optimizer, i)
    first, first_optimizer = start(half)
    with first.attach(first_optimizer):
        for i in range(3):
            routed_step(first, first_optimizer, i)
        first.save(tmp_path / "books.safetensors")
    rest.load_state_dict(half.state_dict())
    second, second_optimizer = start(rest)
    second_optimizer.load_state_dict(copy.deepcopy(first_optimizer.state_dict()))
    second.load(tmp_path / "books.safetensors")
    for steps in (range(3, 5), range(5, 6)):  # attached anew in between, it goes on
        with second.attach(second_optimizer):
            for i in steps:
                routed_step(second, second_optimizer, i)
    for what in ("delta_s", "delta_s_hack"):
        assert torch.equal(flat(rest, what), flat(whole, what))
    assert flat(whole, "delta_s_hack").any()
    for layer, part in router.book("x").items():
        assert torch.equal(second.book("x")[layer], part)
    assert second.metrics() == router.metrics()
