"""The router under a GradScaler, under optimizers that read or write parameters, and after errors."""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from two_layers import flat, loss_of, make_direction, make_model, refuses, step, theta, trainable

import antipasto as ap
from antipasto.routing.probing import RoutingWarning, reads_values

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.03, betas=(0.8, 0.95)),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.03, betas=(0.8, 0.95), weight_decay=0.0, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}


def make_router(model: nn.Module) -> ap.Router:
    return ap.Router(model, make_direction(), threshold=0.3)


def routed_steps(router: ap.Router, optimizer: torch.optim.Optimizer, seeds: Iterable[int]) -> None:
    for seed in seeds:
        step(router.model, optimizer, seed)


def knobs_after(name: str, seeds: Iterable[int]) -> torch.Tensor:
    """Both vectors of an undisturbed run."""
    model = make_model()
    optimizer, router = OPTIMIZERS[name](trainable(model)), make_router(model)
    with router.attach(optimizer):
        routed_steps(router, optimizer, seeds)
    return both(model)


def both(model: nn.Module) -> torch.Tensor:
    return torch.stack([flat(model, "delta_s"), flat(model, "delta_s_hack")])


# ── GradScaler ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("unscaled_before", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("overflow_at", [None, 0, 2])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_under_a_scaler_the_run_is_the_one_without_and_a_skipped_step_was_never_there(
    name: str, unscaled_before: bool, overflow_at: int | None, set_to_none: bool
) -> None:
    model = make_model()
    optimizer, router = OPTIMIZERS[name](trainable(model)), make_router(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with router.attach(optimizer):
        for i in range(5):
            optimizer.zero_grad(set_to_none=set_to_none)
            too_much = torch.inf if i == overflow_at else 1.0
            (scaler.scale(loss_of(model, i)) * too_much).backward()
            if unscaled_before:
                scaler.unscale_(optimizer)
            before = both(model)
            scaler.step(optimizer)
            scaler.update()
            if i == overflow_at:
                assert torch.equal(both(model), before)
    assert scaler.get_scale() == (1024.0 if overflow_at is None else 512.0)
    assert router.steps == (5 if overflow_at is None else 4)
    want = knobs_after(name, [i for i in range(5) if i != overflow_at])
    assert want[1].norm() > 0.05 * want.norm()
    torch.testing.assert_close(both(model), want, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_at_gradient_level_a_scaler_changes_nothing(fused: bool) -> None:
    results = []
    for scale in (1.0, 1024.0):
        model = make_model()
        router = ap.Router(model, make_direction(), level="gradient", threshold=0.3)
        optimizer = torch.optim.Adam(trainable(model), lr=0.03, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with router.attach(optimizer):
            for i in range(4):
                optimizer.zero_grad()
                scaler.scale(loss_of(model, i) * (torch.inf if i == 1 else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
        results.append(both(model))
    assert results[0].isfinite().all()
    assert results[0][1].any()
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-3)


# ── after errors ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_refused_step_moves_nothing_also_at_the_end(name: str) -> None:
    model = make_model()
    optimizer, router = OPTIMIZERS[name](trainable(model)), make_router(model)
    with router.attach(optimizer):
        routed_steps(router, optimizer, range(3))
        before = both(model)
        optimizer.zero_grad()
        loss_of(model, 3).backward()
        ap.knobs(model)["2"].delta_s.grad[1] = torch.nan
        with pytest.raises(ValueError, match="the gradient of 2 has a NaN or Inf in it"):
            optimizer.step()
        assert torch.equal(both(model), before)
    assert torch.equal(both(model), before)
    assert router.steps == 3
    with router.attach(optimizer):  # and the run goes on as if it had not been
        routed_steps(router, optimizer, [3])
    torch.testing.assert_close(both(model), knobs_after(name, range(4)), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_fails_before_it_moved_anything_moves_nothing(name: str) -> None:
    model = make_model()
    optimizer, router = OPTIMIZERS[name](trainable(model)), make_router(model)

    def fail() -> float:
        raise KeyboardInterrupt

    with router.attach(optimizer):
        routed_steps(router, optimizer, range(2))
        before = both(model)
        optimizer.zero_grad()
        loss_of(model, 2).backward()
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(fail)
        failing = optimizer.register_step_pre_hook(lambda *_: fail())  # somebody else's, after the router's own
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        failing.remove()
        optimizer.step()
        torch.testing.assert_close(both(model), knobs_after(name, range(3)), atol=1e-6, rtol=1e-3)
        assert not torch.equal(both(model), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_attached_again_it_goes_on(name: str) -> None:
    model = make_model()
    router, optimizer = make_router(model), OPTIMIZERS[name](trainable(model))
    for stretch in (range(3), range(3, 5)):
        with router.attach(optimizer):
            routed_steps(router, optimizer, stretch)
    assert torch.equal(both(model), knobs_after(name, range(5)))


# ── which way, and what is not finite ────────────────────────────────────────────────────────────────────────────────


def test_maximize_is_refused_at_gradient_level_and_right_at_update_level() -> None:
    v, model = make_direction(), make_model()
    router = ap.Router(model, v, level="gradient", gate="one_sided")
    optimizer = torch.optim.SGD(trainable(model), lr=0.1, maximize=True)
    refuses(router, optimizer, "maximize=True: minimise the negative")
    seen = []
    for maximize in (False, True):
        model = make_model()
        router = ap.Router(model, v, gate="one_sided")
        optimizer = torch.optim.SGD(trainable(model), lr=0.1, maximize=maximize)
        with router.attach(optimizer):
            ((-1 if maximize else 1) * loss_of(model, 0)).backward()
            optimizer.step()
        seen.append((both(model), router.metrics()["hackward_in"]))
    torch.testing.assert_close(seen[0][0], seen[1][0])
    assert seen[0][0].any()
    assert seen[1][1] == pytest.approx(seen[0][1])  # of the gradient of what is minimised


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("make", [OPTIMIZERS["SGD"], lambda p: torch.optim.LBFGS(p, lr=0.1)], ids=["SGD", "LBFGS"])
def test_a_nan_made_in_a_closure_stops_before_the_knobs(make: Make, by_name: bool) -> None:
    model = make_model()
    optimizer, router = make(trainable(model)), ap.Router(model, make_direction(), threshold=0.3)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(0)
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        (loss * (torch.nan if len(calls) == nan_at else 1.0)).backward()
        return loss

    with router.attach(optimizer):
        nan_at = 0
        optimizer.step(closure)
        before = both(model)
        assert before.any()
        nan_at = len(calls) + (2 if isinstance(optimizer, torch.optim.LBFGS) else 1)
        with pytest.raises(ValueError, match="the gradient of 0 has a NaN or Inf in it"):
            optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert torch.equal(both(model), before)
    assert torch.equal(both(model), before)


def test_what_a_closures_gradient_says_is_what_is_measured() -> None:
    measured = []
    for closed in (False, True):
        model = make_model()
        optimizer, router = OPTIMIZERS["SGD"](trainable(model)), ap.Router(model, make_direction(seed=1))

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        with router.attach(optimizer):
            if closed:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        measured.append(router.metrics())
    assert measured[0] == measured[1]
    assert measured[0]["hackward_in"] > 0


@pytest.mark.parametrize("level", ["update", "gradient"])
def test_a_nan_that_the_optimizer_makes_stops_before_the_knobs(level: Any) -> None:
    model = make_model()
    router = ap.Router(model, make_direction(), level=level, threshold=0.3)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with router.attach(optimizer):
        for lr in (0.1, torch.inf):
            before = both(model)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            loss_of(model, 0).backward()
            if lr == 0.1:
                optimizer.step()
        with pytest.raises(ValueError, match="After 1 steps, SGD's step put a NaN or Inf into the knobs of 0"):
            optimizer.step()
        assert torch.equal(both(model), before)
    assert torch.equal(both(model), before)


# ── what a step depends on ───────────────────────────────────────────────────────────────────────────────────────────


class Lamb(torch.optim.Optimizer):
    """The trust ratio of You et al. 2019 (arXiv:1904.00962) on a step of SGD."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            x, u = p.norm(), p.grad.norm()
            p.sub_(p.grad * torch.where((x > 0) & (u > 0), x / u, 1.0), alpha=self.param_groups[0]["lr"])


class ScheduleFree(torch.optim.Optimizer):
    """SGD of Defazio et al. 2024 (arXiv:2405.15682): gradients are taken between the iterates z and their mean x."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.05, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        (group,) = self.param_groups
        c = 1 / (group["k"] + 1)
        for p in group["params"]:
            z = self.state[p].setdefault("z", p.clone())
            p.lerp_(z, c)
            p.sub_(p.grad, alpha=group["lr"] * (1 - group["beta"] * (1 - c)))
            z.sub_(p.grad, alpha=group["lr"])
        group["k"] += 1

    @torch.no_grad()
    def eval(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.lerp_(self.state[p]["z"], 1 - 1 / self.param_groups[0]["beta"])


class Lookahead:
    """Zhang et al. 2019 (arXiv:1907.08610): every k steps, halfway back to where they began."""

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 5) -> None:
        self.optimizer, self.k, self.n = optimizer, k, 0
        self.slow = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]

    def step(self) -> None:
        self.optimizer.step()
        self.n += 1
        if self.n % self.k == 0:
            for p, slow in zip(self.optimizer.param_groups[0]["params"], self.slow, strict=True):
                p.data.lerp_(slow, 0.5)
                slow.copy_(p.data)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


READS: dict[str, Make] = {
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "Lamb": Lamb,
    "ScheduleFree": ScheduleFree,
}
READS_NOT: dict[str, Make] = {
    **OPTIMIZERS,
    "SGD of tiny steps": lambda p: torch.optim.SGD(p, lr=1e-9),
    "AdamW, a usual rate": lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.5),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.02),
}


def plain_and_routed(make: Make, steps: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    plain, model = make_model(), make_model()
    router = ap.Router(model, make_direction(), threshold=0.1)
    ours, theirs = make(trainable(model)), make(trainable(plain))
    with router.attach(ours):
        for i in range(steps):
            for each, optimizer in ((model, ours), (plain, theirs)):
                step(each, optimizer, i)
    assert flat(model, "delta_s_hack").any()
    return theta(model), flat(plain, "delta_s")


@pytest.mark.parametrize("name", READS)
def test_a_step_that_reads_the_knobs_is_warned_about_and_does_leave_the_plain_run(name: str) -> None:
    with pytest.warns(RoutingWarning) as said:
        ours, plain = plain_and_routed(READS[name], 60)
    assert len(said) == 1
    assert f"A step of {name} depends on the values of the knobs" in str(said[0].message)
    assert (ours - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize("name", READS_NOT)
def test_a_step_that_does_not_keeps_theta_on_the_plain_run_and_nothing_is_said(name: str) -> None:
    ours, plain = plain_and_routed(READS_NOT[name])
    torch.testing.assert_close(ours, plain, atol=2e-5, rtol=1e-3)


def test_a_warm_up_from_zero_tells_nothing_and_the_first_step_that_moves_does() -> None:
    model = make_model()
    router = ap.Router(model, make_direction())
    optimizer = torch.optim.Adafactor(trainable(model), lr=0.0)
    with router.attach(optimizer):
        for _ in range(5):
            loss_of(model, 0).backward()
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
        with pytest.warns(RoutingWarning, match="A step of Adafactor depends"):
            optimizer.step()


@pytest.mark.parametrize("options", [{"mode": "erase"}, {"mode": "measure"}])
def test_where_theta_is_not_to_be_the_plain_runs_nothing_is_said(options: dict[str, Any]) -> None:
    model = make_model()
    optimizer = torch.optim.Adafactor(trainable(model), lr=0.1)
    with ap.Router(model, make_direction(), **options).attach(optimizer):
        for i in range(4):
            step(model, optimizer, i)


def test_trying_it_out_leaves_no_trace() -> None:
    """Neither in the knobs, nor in what the optimizer remembers, nor in the generators that it draws from."""

    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.grad.add_(torch.randn_like(p), alpha=0.1)
            super().step(closure)

    model = make_model()
    optimizer = Noisy(trainable(model), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # replaces the optimizer's step
    for i in range(3):
        step(model, optimizer, i)
    kept = [p.detach().clone() for p in trainable(model)], [p.grad.clone() for p in trainable(model)]
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in trainable(model)]
    draws = torch.get_rng_state()
    assert reads_values(optimizer, trainable(model)) is False
    for i, p in enumerate(trainable(model)):
        assert torch.equal(p, kept[0][i])
        assert torch.equal(p.grad, kept[1][i])
        assert torch.equal(optimizer.state[p]["momentum_buffer"], momenta[i])
    assert torch.equal(torch.get_rng_state(), draws)


def test_an_optimizer_that_cannot_be_tried_out_is_told_and_steps() -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            if not any(p is self.mine for p in self.param_groups[0]["params"]):
                raise RuntimeError("not my knobs")
            super().step(closure)

    model = make_model()
    optimizer = Odd(trainable(model), lr=0.1)
    optimizer.mine = trainable(model)[0]
    with ap.Router(model, make_direction()).attach(optimizer):
        loss_of(model, 0).backward()
        with pytest.warns(RoutingWarning, match="Odd's step could not be tried out.*RuntimeError: not my knobs"):
            optimizer.step()
        optimizer.step()
    assert theta(model).any()


def test_a_step_that_calls_its_base_classs_has_quarantine_once() -> None:
    """Torch then runs the hooks of both."""

    class Decaying(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.add_(0.01)
            super().step(closure)

    v, model = make_direction(), make_model()
    optimizer = Decaying(trainable(model), lr=0.1)
    router, t = ap.Router(model, v, threshold=0.1, mode="erase"), torch.cat(list((v.effect or {}).values()))
    with router.attach(optimizer):
        for i in range(5):
            before = flat(model, "delta_s")
            step(model, optimizer, i)
            moved = flat(model, "delta_s") - before
            assert moved.any()
            assert not ((t.abs() > 0.1) & (t * moved < 0)).any()


@pytest.mark.parametrize("mode", ["route", "erase"])
def test_knobs_written_to_outside_of_a_step_are_warned_about_once(mode: Any) -> None:
    model = make_model()
    optimizer = Lookahead(torch.optim.SGD(trainable(model), lr=0.1))
    with (
        ap.Router(model, make_direction(), mode=mode).attach(optimizer),  # type: ignore[arg-type]
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        for i in range(13):
            assert len(said) == (i > 5)
            step(model, optimizer, i)
    assert "its delta_s was written to outside of a step, by up to" in str(said[0].message)
    assert "(optimizer SGD)" in str(said[0].message)
    assert linecache.getline(said[0].filename, said[0].lineno).strip() == "self.optimizer.step()"


@pytest.mark.parametrize("mode", ["route", "erase"])
@pytest.mark.parametrize("kind", ["eval", "sync", "stop"])
def test_knobs_written_to_after_the_last_step_are_warned_about(mode: Any, kind: str) -> None:
    """But not where the run ends in an error, which is what there is to tell."""
    model = make_model()
    optimizer = Lookahead(torch.optim.SGD(trainable(model), lr=0.1), k=4) if kind == "sync" else READS["ScheduleFree"](
        trainable(model)
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as said, suppress(KeyboardInterrupt):
        warnings.simplefilter("always")
        with ap.Router(model, make_direction(), mode=mode).attach(optimizer):
            for i in range(4):
                step(model, optimizer, i)
            if kind != "sync":
                optimizer.eval()
            if kind == "stop":
                raise KeyboardInterrupt
    written = [one for one in said if "its delta_s was written to outside of a step" in str(one.message)]
    assert len(written) == (kind != "stop")
    assert all(one.filename == __file__ for one in written)


def test_a_swap_that_is_taken_back_is_no_write() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["SGD"](trainable(model))
    with ap.Router(model, make_direction()).attach(optimizer):
        for i in range(4):
            step(model, optimizer, i)
            for p in trainable(model):  # weights for an evaluation, and back, up to rounding
                p.data.add_(0.1)
                p.data.sub_(0.1)
