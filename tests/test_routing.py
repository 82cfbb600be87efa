"""Routing splits each step as the formulas say, never changes the run, and never lets δS move hack-ward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from two_layers import SIZES, flat, make_direction, make_model, refuses, step, theta, trainable

import antipasto as ap
from antipasto.routing.books import OWN_BOOK

GATES = ["coordinate", "one_sided"]


class SignStep(torch.optim.Optimizer):
    """Lion without its second momentum (Chen et al. 2023): the sign of an interpolated momentum."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.01, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["beta"])
                p.sub_(momentum.sign(), alpha=group["lr"])


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, lr=0.1, m=0.9: torch.optim.SGD(p, lr=lr, momentum=m),
    "SGD nesterov": lambda p, lr=0.1, m=0.9: torch.optim.SGD(p, lr=lr, momentum=m or 0.1, nesterov=True),
    "Adam": lambda p, lr=0.02, m=0.9: torch.optim.Adam(p, lr=lr, betas=(m, 0.99)),
    "AdamW": lambda p, lr=0.02, m=0.9: torch.optim.AdamW(p, lr=lr, betas=(m, 0.999), weight_decay=0.0),
    "AdamW fused": lambda p, lr=0.02, m=0.9: torch.optim.AdamW(
        p, lr=lr, betas=(m, 0.999), weight_decay=0.0, fused=True
    ),
    "RMSprop": lambda p, lr=0.02, m=0.5: torch.optim.RMSprop(p, lr=lr, momentum=m),
    "sign": lambda p, lr=0.02, m=0.9: SignStep(p, lr=lr, beta=m),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 12, **options: object) -> None:
    for i in range(steps):
        step(model, optimizer, i, **options)  # type: ignore[arg-type]


def trained(model: nn.Module, optimizer: str, *args: Any, micro: int = 1, **options: Any) -> ap.Router:
    """Train with a router of these arguments."""
    router, its = ap.Router(model, *args, **options), OPTIMIZERS[optimizer](trainable(model))
    with router.attach(its):
        train(model, its, micro=micro)
    return router


# ── the gates ────────────────────────────────────────────────────────────────────────────────────────────────────────


def moved_by_definition(v: ap.Direction, deltas: dict[str, torch.Tensor], gate: str, threshold: float) -> torch.Tensor:
    """The table of the module's text, layer by layer, row by row."""
    parts = []
    for name, delta in deltas.items():
        moved = torch.zeros_like(delta)
        if gate == "coordinate":
            for j in range(len(delta)):
                if v.effect[name][j] * delta[j] < 0 and abs(v.effect[name][j]) > threshold:
                    moved[j] = delta[j]
        else:
            for row in v[name]:
                moved = moved - max(-(row @ delta), 0) * row
        parts.append(moved)
    return torch.cat(parts)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("k", [1, 3])
def test_every_step_is_split_by_definition(gate: str, k: int) -> None:
    model, v = make_model(), make_direction(k)
    threshold = 0.4 if gate == "coordinate" else None
    router = ap.Router(model, v, gate=gate, threshold=threshold)
    optimizer = OPTIMIZERS["Adam"](trainable(model))
    with router.attach(optimizer):
        for i in range(6):
            before, hack = flat(model, "delta_s"), flat(model, "delta_s_hack")
            twin, twin_optimizer = copy.deepcopy((model, optimizer))
            for hooks in (twin_optimizer._optimizer_step_pre_hooks, twin_optimizer._optimizer_step_post_hooks):
                hooks.clear()
            step(twin, twin_optimizer, i)
            delta = flat(twin, "delta_s") - before
            want = moved_by_definition(v, dict(zip("02", delta.split(SIZES), strict=True)), gate, threshold or 0)
            step(model, optimizer, i)
            torch.testing.assert_close(flat(model, "delta_s_hack") - hack, want, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(flat(model, "delta_s") - before, delta - want, atol=1e-6, rtol=1e-4)
    if gate != "coordinate":
        assert flat(model, "delta_s_hack").abs().max() > 1e-3


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("level", ["update", "gradient"])
def test_measuring_is_bitwise_the_run_without_a_router(optimizer: str, level: str) -> None:
    plain, measured = make_model(), make_model()
    train(plain, OPTIMIZERS[optimizer](trainable(plain)))
    controls = {"r": make_direction(seed=1)}
    router = trained(measured, optimizer, make_direction(), mode="measure", level=level, controls=controls)
    assert torch.equal(flat(plain, "delta_s"), flat(measured, "delta_s"))
    assert not flat(measured, "delta_s_hack").any()
    assert router.metrics()["hackward_in"] > 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("gate", GATES)
def test_routing_leaves_theta_on_the_plain_runs_trajectory(optimizer: str, gate: str) -> None:
    plain, routed = make_model(), make_model()
    router = ap.Router(routed, make_direction(), gate=gate)
    plain_optimizer, routed_optimizer = (OPTIMIZERS[optimizer](trainable(m)) for m in (plain, routed))
    with router.attach(routed_optimizer):
        for i in range(15):
            step(plain, plain_optimizer, i)
            step(routed, routed_optimizer, i)
            # a sign step turns a rounding into a full step where a momentum is near zero: compare as far as none was
            torch.testing.assert_close(theta(routed), flat(plain, "delta_s"), atol=5e-5, rtol=1e-4)
    assert flat(routed, "delta_s_hack").any()
    assert not torch.allclose(flat(routed, "delta_s"), flat(plain, "delta_s"), atol=1e-3)


def test_decay_is_warned_about_and_does_what_the_text_says() -> None:
    plain, routed = make_model(), make_model()
    train(plain, torch.optim.AdamW(trainable(plain), lr=0.05, weight_decay=0.5), 30)
    router = ap.Router(routed, make_direction(), gate="one_sided")
    optimizer = torch.optim.AdamW(trainable(routed), lr=0.05, weight_decay=0.5)
    with pytest.warns(UserWarning, match="has weight decay on the knobs"), router.attach(optimizer):
        train(routed, optimizer, 30)
    assert not torch.allclose(theta(routed), flat(plain, "delta_s"), atol=1e-2)


@pytest.mark.slow
@given(
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    lr=st.sampled_from([1e-3, 1e-2, 0.3]),
    momentum=st.sampled_from([0.0, 0.5, 0.99]),
    k=st.integers(1, 4),
    micro=st.sampled_from([1, 2, 4]),
    clip=st.sampled_from([None, 0.1, 10.0]),
    mode=st.sampled_from(["route", "erase"]),
    seed=st.integers(0, 50),
)
@settings(max_examples=60, deadline=None)
def test_no_step_moves_delta_s_hackward(
    optimizer: str, lr: float, momentum: float, k: int, micro: int, clip: float | None, mode: str, seed: int
) -> None:
    v = make_direction(k, seed)
    for gate in ("one_sided", "coordinate"):
        model = make_model(seed)
        steps = OPTIMIZERS[optimizer](trainable(model), lr=lr, m=momentum)
        with ap.Router(model, v, mode=mode, gate=gate, threshold=0.5 if gate == "coordinate" else None).attach(steps):
            for i in range(6):
                before = flat(model, "delta_s")
                step(model, steps, i, micro, clip)
                deltas = (flat(model, "delta_s") - before).split(SIZES)
                for name, delta in zip("02", deltas, strict=True):
                    if gate == "one_sided":
                        scale = flat(model, "delta_s").abs().max() + lr
                        assert (-(v[name] @ delta)).max() <= 1e-6 * scale
                    else:
                        guarded = v.effect[name].abs() > 0.5
                        assert not (guarded & (v.effect[name] * delta < 0)).any()  # exactly
        if mode == "erase":
            assert not flat(model, "delta_s_hack").any()


def test_the_guarantee_fails_at_gradient_level_with_adam() -> None:
    """Adam's momentum and its per-coordinate scale turn a gated gradient hack-ward again: why update level is the default."""
    v, model = make_direction(), make_model()
    router = ap.Router(model, v, level="gradient", gate="one_sided")
    optimizer = OPTIMIZERS["Adam"](trainable(model))
    worst = 0.0
    with router.attach(optimizer):
        for i in range(20):
            before = flat(model, "delta_s")
            step(model, optimizer, i)
            for name, delta in zip("02", (flat(model, "delta_s") - before).split(SIZES), strict=True):
                worst = max(worst, -(v[name] @ delta).min().item())
    assert worst > 1e-3  # rounding would be 1e-8
    assert flat(model, "delta_s_hack").any()


def test_gradient_level_splits_the_gradient() -> None:
    v, model = make_direction(2), make_model()
    router = ap.Router(model, v, level="gradient", gate="one_sided")
    assert all(layer.delta_s_hack.requires_grad for layer in ap.knobs(model).values())
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    seen = {}
    optimizer.register_step_post_hook(
        lambda *_: seen.update(
            g=torch.cat([k.delta_s.grad for k in ap.knobs(model).values()]),
            h=torch.cat([k.delta_s_hack.grad for k in ap.knobs(model).values()]),
        )
    )
    with router.attach(optimizer):
        step(model, optimizer, 0)
    plain = make_model()
    step(plain, torch.optim.SGD(trainable(plain), lr=0.1), 0)
    g = torch.cat([layer.delta_s.grad for layer in ap.knobs(plain).values()])
    hack = -moved_by_definition(v, dict(zip("02", (-g).split(SIZES), strict=True)), "one_sided", 0)
    torch.testing.assert_close(seen["h"], hack)
    torch.testing.assert_close(seen["g"], g - hack)


def test_at_gradient_level_books_see_what_theta_moved() -> None:
    v, model = make_direction(), make_model()
    router = ap.Router(
        model, v, level="gradient", gate="one_sided", controls={"same": v, "other": make_direction(seed=4)}
    )
    optimizer = OPTIMIZERS["Adam"](trainable(model))
    want = {"same": torch.zeros(sum(SIZES)), "other": torch.zeros(sum(SIZES))}
    with router.attach(optimizer):
        for i in range(5):
            before = theta(model)
            step(model, optimizer, i)
            delta = dict(zip("02", (theta(model) - before).split(SIZES), strict=True))
            for name, direction in (("same", v), ("other", make_direction(seed=4))):
                want[name] += moved_by_definition(direction, delta, "one_sided", 0)
    for name, moved in want.items():
        torch.testing.assert_close(torch.cat(list(router.book(name).values())), moved, atol=1e-6, rtol=1e-4)


def test_clipping_sees_the_gradient_once_at_gradient_level() -> None:
    norms = []
    for level in ("update", "gradient"):
        model = make_model()
        router = ap.Router(model, make_direction(), level=level, gate="one_sided")
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        with router.attach(optimizer):
            model(torch.ones(4, 8)).square().sum().backward()
            norms.append(nn.utils.clip_grad_norm_(trainable(model), 1.0))
            optimizer.step()
    torch.testing.assert_close(*norms)


def test_a_closure_at_gradient_level_is_refused() -> None:
    model = make_model()
    router = ap.Router(model, make_direction(), level="gradient")
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with pytest.raises(ValueError, match="with a closure"), router.attach(optimizer):
        optimizer.step(lambda: torch.zeros(()))


class Interrupted(SignStep):
    """Moves, and is interrupted at the end of its first step."""

    first = True

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=0.02)
        if self.first:
            self.first = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("then", ["another step", "the end"])
def test_a_step_that_ends_in_an_exception_has_quarantine_all_the_same(then: str) -> None:
    v, model = make_direction(), make_model()
    optimizer = Interrupted(trainable(model), lr=0.02)
    with ap.Router(model, v, threshold=0.0).attach(optimizer):
        with pytest.raises(KeyboardInterrupt):
            step(model, optimizer, 0)
        assert theta(model).any()
        assert not flat(model, "delta_s_hack").any()
        if then == "another step":
            step(model, optimizer, 1)
    assert flat(model, "delta_s_hack").any()
    assert not (torch.cat(list(v.effect.values())) * flat(model, "delta_s") < 0).any()


def test_a_quarantine_that_would_train_by_itself_is_refused() -> None:
    model = make_model()
    ap.Router(model, make_direction(), level="gradient")  # leaves the quarantine requiring a gradient
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    router = ap.Router(model, make_direction())
    refuses(router, optimizer, "0: its delta_s_hack is in the optimizer and would be trained directly")


def test_bf16_knobs() -> None:
    for gate in GATES:
        model = make_model().to(torch.bfloat16)
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        router = ap.Router(model, make_direction(2), gate=gate)
        with router.attach(optimizer):
            model(torch.ones(4, 8, dtype=torch.bfloat16)).square().sum().backward()
            optimizer.step()
        assert all(value == value for value in router.metrics().values())


def test_micro_batches_route_alike() -> None:
    results = []
    for micro in (1, 4):
        model = make_model()
        router = trained(model, "AdamW", make_direction(), micro=micro, controls={"random": make_direction(seed=3)})
        results.append(
            torch.cat([flat(model, "delta_s"), flat(model, "delta_s_hack"), *router.book("random").values()])
        )
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


# ── controls and books ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_controls_book_is_what_its_own_run_would_have_moved() -> None:
    v = make_direction()
    controls = {"random": v.random(5), "higher": ap.Control(v, threshold=1.2), "along": ap.Control(v, gate="one_sided")}
    model = make_model()
    router = trained(model, "Adam", v, controls=controls)
    for name, entry in controls.items():
        control = entry if isinstance(entry, ap.Control) else ap.Control(entry)
        alone = make_model()
        trained(alone, "Adam", control.direction, gate=control.gate, threshold=control.threshold)
        torch.testing.assert_close(
            torch.cat(list(router.book(name).values())), flat(alone, "delta_s_hack"), atol=1e-5, rtol=1e-3
        )
        x = torch.randn(3, 8)
        with router.deployed(name):
            shown = model(x)
        with ap.deployed(alone):
            torch.testing.assert_close(shown, alone(x), atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match=r"no book 'other'; there are \['along', 'higher', 'random'\]"):
        router.book("other")


def test_in_measure_mode_the_directions_own_book_is_what_routing_would_have_moved() -> None:
    twin, measured, v = make_model(), make_model(), make_direction()
    trained(twin, "Adam", v)
    router = trained(measured, "Adam", v, mode="measure")
    torch.testing.assert_close(
        torch.cat(list(router.book(OWN_BOOK).values())), flat(twin, "delta_s_hack"), atol=1e-5, rtol=1e-3
    )
    x = torch.randn(3, 8)
    before = measured(x)
    with router.deployed(), ap.deployed(twin):
        torch.testing.assert_close(measured(x), twin(x), atol=1e-4, rtol=1e-3)
    assert torch.equal(measured(x), before)


def test_stopped_and_continued_is_the_uninterrupted_run(tmp_path: Path) -> None:
    def start(model: nn.Module) -> tuple[ap.Router, torch.optim.Optimizer]:
        router = ap.Router(
            model, make_direction(), controls={"a b": make_direction(seed=1), "c": make_direction(seed=2)}
        )
        return router, OPTIMIZERS["AdamW fused"](trainable(model))

    whole = make_model()
    router, optimizer = start(whole)
    with router.attach(optimizer):
        train(whole, optimizer, 10)
    half = make_model()
    first, first_optimizer = start(half)
    with first.attach(first_optimizer):
        train(half, first_optimizer, 5)
    first.save(tmp_path / "books.safetensors")
    rest = make_model()
    rest.load_state_dict(half.state_dict())
    second, second_optimizer = start(rest)
    second_optimizer.load_state_dict(copy.deepcopy(first_optimizer.state_dict()))
    second.load(tmp_path / "books.safetensors")
    with second.attach(second_optimizer):
        for i in range(5, 10):
            step(rest, second_optimizer, i)
    for what in ("delta_s", "delta_s_hack"):
        assert torch.equal(flat(rest, what), flat(whole, what))
    for name in ("a b", "c"):
        assert all(
            torch.equal(x, y) for x, y in zip(second.book(name).values(), router.book(name).values(), strict=True)
        )
    assert second.metrics() == router.metrics()
    assert second.steps == 10

    with pytest.raises(ValueError, match=r"books\.safetensors does not belong to this run: it has the books"):
        ap.Router(make_model(), make_direction()).load(tmp_path / "books.safetensors")
    (tmp_path / "books.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"books\.safetensors is not a valid book file"):
        second.load(tmp_path / "books.safetensors")


@pytest.mark.parametrize("name", ["direction", "built-in chance"])
def test_the_names_of_the_routers_own_books_are_taken(name: str) -> None:
    v = make_direction()
    with pytest.raises(ValueError, match=f"{name!r} is the name of one of the router's own books"):
        ap.Router(make_model(), v, controls={name: v.random(0)})


# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_metrics_are_those_of_the_definition() -> None:
    v, model = make_direction(2), make_model()
    router = ap.Router(model, v, gate="one_sided")
    optimizer = OPTIMIZERS["Adam"](trainable(model))
    with router.attach(optimizer):
        train(model, optimizer, 4)
        theta_before = theta(model)
        step(model, optimizer, 4)
    g = torch.cat([layer.delta_s.grad for layer in ap.knobs(model).values()])

    def share(u: torch.Tensor) -> float:
        along = torch.cat([(v[name] @ part).relu() for name, part in zip("02", u.split(SIZES), strict=True)])
        return (along.norm() / u.norm()).item()

    got = router.metrics()
    assert got["hackward_in"] == pytest.approx(share(g), rel=1e-4)
    assert got["hackward_update"] == pytest.approx(share(theta_before - theta(model)), rel=1e-3)
    assert got["hackward_out"] == pytest.approx(0, abs=1e-5)
    assert got["quarantine_norm"] == pytest.approx(flat(model, "delta_s_hack").norm().item(), rel=1e-5)
    assert 0 <= got["fired"] <= 1
    names = ["hackward_in", "hackward_update", "hackward_out", "fired", "quarantine_norm"]
    assert set(got) == {*names, *(f"{name}_random" for name in names)}


# ── hooks, options ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_attach_leaves_no_hook_behind_also_after_an_exception() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["Adam"](trainable(model))
    router = ap.Router(model, make_direction())
    with pytest.raises(KeyboardInterrupt), router.attach(optimizer):
        raise KeyboardInterrupt
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    train(model, optimizer, 2)
    assert not flat(model, "delta_s_hack").any()
    with router.attach(optimizer), pytest.raises(ValueError, match="already attached"), router.attach(optimizer):
        pass


@pytest.mark.parametrize("wrapped", [False, True])
def test_deepspeeds_other_optimizers_are_refused_by_name(wrapped: bool) -> None:
    """A stand-in, of the name and the make of theirs: no torch optimizer, around one whose parameters are flat slices."""
    model = make_model()
    zero = type("BF16_Optimizer", (), {"__module__": "deepspeed.runtime.bf16_optimizer"})()
    zero.optimizer = torch.optim.SGD([torch.zeros(3)], lr=1)
    optimizer = SimpleNamespace(optimizer=zero) if wrapped else zero  # as accelerate wraps it
    router = ap.Router(model, make_direction())
    with (
        pytest.raises(ValueError, match=r"DeepSpeed's BF16_Optimizer. Use ZeRO-1 or ZeRO-2 in fp32"),
        router.attach(optimizer),
    ):
        pass
    theirs = type("FusedAdam", (torch.optim.Adam,), {"__module__": "deepspeed.ops.adam.fused_adam"})
    with router.attach(theirs(trainable(model))):  # a torch optimizer like any other
        pass


def test_knobs_in_parts_are_refused_by_name() -> None:
    """As FSDP1 leaves them on each of several processes."""
    model = make_model()
    router = ap.Router(model, make_direction())
    optimizer = torch.optim.SGD(trainable(model), lr=1)
    knob = next(iter(ap.knobs(model).values())).delta_s
    knob.data = knob.data[:1]
    refuses(router, optimizer, f"0: its delta_s has 1 of {SIZES[0]} numbers here")


def test_a_knob_that_is_not_in_the_optimizer_is_named() -> None:
    model = make_model()
    router = ap.Router(model, make_direction())
    first = next(iter(ap.knobs(model).values()))
    refuses(router, torch.optim.SGD([first.delta_s], lr=1), "2: its delta_s is not in the optimizer")
    optimizer = torch.optim.SGD(trainable(model), lr=1)
    router = ap.Router(model, make_direction(), level="gradient")
    refuses(router, optimizer, "0: its delta_s_hack is not in the optimizer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "watch"}, "mode must be route, erase or measure, got 'watch'"),
        ({"level": "step"}, "level must be"),
        ({"gate": "both"}, "gate must be"),
        ({"threshold": -1.0}, "effect size of at least 0, got -1.0"),
        ({"gate": "one_sided", "threshold": 0.5}, "threshold=0.5 needs gate='coordinate'"),
        ({"controls": {"direction": make_direction()}}, "rename the control"),
        ({"controls": {"x": ap.Control(make_direction(), gate="no")}}, "gate must be"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ap.Router(make_model(), make_direction(), **options)  # type: ignore[arg-type]


def test_directions_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="needs a direction with effect sizes"):
        ap.Router(make_model(), ap.Direction(dict(make_direction())))
    with pytest.raises(ValueError, match="layer 7, which is not among"):
        ap.Router(
            make_model(),
            make_direction(),
            controls={"x": ap.Direction({"7": torch.eye(6)[0]}, effect={"7": torch.ones(6)})},
        )
    model = make_model()
    ap.drop_quarantine(model)
    with pytest.raises(ValueError, match="needs a quarantine"):
        ap.Router(model, make_direction())
    ap.Router(model, make_direction(), mode="erase")


def test_a_direction_of_some_layers_leaves_the_others_alone() -> None:
    v = make_direction()
    model = make_model()
    trained(model, "SGD", ap.Direction({"2": v["2"]}), gate="one_sided")
    layers = ap.knobs(model)
    assert not layers["0"].delta_s_hack.any()
    assert layers["2"].delta_s_hack.any()


def test_alignment_is_taken_in_fp32_also_of_fp64_knobs() -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        model = make_model().to(dtype)
        with ap.rollout_grads(model) as grads:
            model(torch.linspace(-1, 1, 24, dtype=dtype).reshape(3, 8)).sum().backward()
        router = ap.Router(model, make_direction())
        found.append(router.alignment(router.flatten(grads)))
    torch.testing.assert_close(*found)
