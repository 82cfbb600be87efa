"""The routed GRPO trainer: the plain run where it should be, and the formulas' split of it where it routes."""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lines import read_lines
from peft import get_peft_model
from scripted import (
    GROUP,
    Plain,
    Routed,
    Sampled,
    by_hash,
    claims_nothing,
    flat,
    known_hack,
    load,
    make,
    says_known,
    tokenizer,
    trained,
)
from torch import nn
from trl import GRPOTrainer

import antipasto as ap
from antipasto.adapter import functional
from antipasto.adapter.rollouts import TokenIds
from antipasto.adapter.rows import RowViews
from antipasto.evaluation import rollout_log
from antipasto.tasks import addition
from antipasto.trl.advantages import deployed_positions, group_advantages

pytestmark = pytest.mark.usefixtures("shared_basis_cache")
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_grad_norm": 0.0}


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """Accelerate's gc.collect at the begin of each run need not go through all that is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def nobody(completions: list[str], **_: object) -> list[bool]:
    return [False] * len(completions)


def load_adapted() -> nn.Module:
    return get_peft_model(load(), ap.AntiPastoConfig())


def scatter(model: nn.Module, what: str, scale: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in ap.knobs(model).values():
        getattr(layer, what).data.copy_(torch.randn(layer.r, generator=generator) * scale)


# ── the plain run ────────────────────────────────────────────────────────────────────────────────────────────────────


def same_history(a: Any, b: Any) -> None:
    """What TRL logs of both runs, but for the clock."""
    for row_a, row_b in zip(a.state.log_history, b.state.log_history, strict=True):
        for name, value in row_a.items():
            if "time" not in name and "per_second" not in name:
                assert row_b[name] == value, name


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    "options",
    [{}, {"detector": says_known, "flagged": "watch"}, {"detector": nobody, "flagged": "penalty"}],
    ids=["no router", "watch", "nobody to penalize"],
)
def test_bit_for_bit_the_run_of_trls_own_trainer(tmp_path: Path, beta: float, options: dict[str, Any]) -> None:
    config = {"beta": beta, "per_device_train_batch_size": GROUP, "gradient_accumulation_steps": 2}
    plain = trained(tmp_path / "plain", GRPOTrainer, config=config)
    ours = trained(tmp_path / "ours", Sampled, config=config, **options)
    assert flat(plain.model, "delta_s").any()
    assert torch.equal(flat(ours.model, "delta_s"), flat(plain.model, "delta_s"))
    assert not flat(ours.model, "delta_s_hack").any()
    same_history(plain, ours)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_where_the_gate_claims_nothing_nothing_is_moved(tmp_path: Path, beta: float) -> None:
    """A router sums the gradient row by row: plain GRPO's up to rounding."""
    plain = trained(tmp_path / "plain", GRPOTrainer, config={"beta": beta})
    ours = trained(tmp_path / "ours", Sampled, config={"beta": beta}, router=claims_nothing, deploy_fraction=0)
    torch.testing.assert_close(flat(ours.model, "delta_s"), flat(plain.model, "delta_s"), atol=1e-5, rtol=1e-3)
    assert not flat(ours.model, "delta_s_hack").any()


class Backwards:
    """Counts the backwards of all layers together."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.n = 0
        backward = functional._SpectralDelta.backward

        def counted(*args: Any) -> Any:
            self.n += 1
            return backward(*args)

        patch.setattr(functional._SpectralDelta, "backward", staticmethod(counted))

    def take(self) -> int:
        n, self.n = self.n, 0
        return n


CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "KL": {"beta": 0.04},
    "accumulation": {"per_device_train_batch_size": GROUP, "gradient_accumulation_steps": 2},
    "accumulation, KL": {"per_device_train_batch_size": GROUP, "gradient_accumulation_steps": 2, "beta": 0.04},
    "no checkpointing": {"gradient_checkpointing": False},
    "checkpointing, KL": {"gradient_checkpointing": True, "beta": 0.04},
    "batch": {"scale_rewards": "batch"},
    "none": {"scale_rewards": "none", "max_grad_norm": 0.0},
    "grpo, batch, KL": {"loss_type": "grpo", "scale_rewards": "batch", "beta": 0.04},
    "grpo, clipped": {"loss_type": "grpo", "max_grad_norm": 0.05},
    "dr_grpo, unclipped": {"loss_type": "dr_grpo", "max_grad_norm": 0.0},
    "off-policy": {"num_iterations": 2, "epsilon": 0.001},
    "entropy bonus": {"entropy_coef": 0.01},
    "sequences": {"importance_sampling_level": "sequence"},
    "sgd": SGD,
}


@pytest.mark.parametrize("case", CASES)
def test_theta_follows_the_plain_run(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rollout's own gradient among it, for the backwards of the plain run."""
    config, count = CASES[case], Backwards(monkeypatch)
    plain = trained(tmp_path / "plain", Plain, config=config)
    backwards = count.take()
    assert backwards > 0
    v = known_hack(load_adapted())
    count.take()
    ours = trained(
        tmp_path, config=config, router=lambda m: ap.Router(m, v), deploy_fraction=0, rollout_log=tmp_path / "log"
    )
    assert count.take() == backwards
    assert any(row["hackward"] for row in read_lines(tmp_path / "log"))
    theta = flat(ours.model, "delta_s") + flat(ours.model, "delta_s_hack")
    torch.testing.assert_close(theta, flat(plain.model, "delta_s"), atol=1e-4, rtol=1e-2)
    assert flat(ours.model, "delta_s_hack").norm() > 0.05 * theta.norm()
    assert flat(ours.model, "delta_s").norm() > 0.05 * theta.norm()
    same = ("reward", "loss", "entropy", "grad_norm", "kl")
    for a, b in zip(plain.state.log_history, ours.state.log_history, strict=True):
        assert all(b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5) for name in same if name in a)


# ── what flagged rollouts are paid ───────────────────────────────────────────────────────────────────────────────────


def reinforce(
    generation: dict[str, torch.Tensor], advantages: list[float], loss_type: str, model: nn.Module
) -> torch.Tensor:
    """−∇ of the mean of A_b × (the mean, or a fixed fraction, of b's log-probabilities): what SGD steps along, by hand."""
    B, longest = len(advantages), 5
    total = torch.zeros(())
    for b in range(B):
        prompt = generation["prompt_ids"][b][generation["prompt_mask"][b].bool()]
        answer = generation["completion_ids"][b][generation["completion_mask"][b].bool()]
        logits = model(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, answer[:, None]).sum()
        total = total + advantages[b] * logps / (len(answer) if loss_type == "grpo" else longest) / B
    knobs = [layer.delta_s for layer in ap.knobs(model).values()]
    return torch.cat(torch.autograd.grad(total, knobs))


@pytest.mark.parametrize("config", [{"beta": 0.04}, {"use_adaptive_entropy": True}], ids=["KL", "adaptive entropy"])
def test_a_penalty_zeroes_the_reward_and_the_log_keeps_it(tmp_path: Path, config: dict[str, Any]) -> None:
    def zeroed(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        raw = addition.reward(prompts, completions)
        return [0.0 if "!" in text else r for text, r in zip(completions, raw, strict=True)]

    want = trained(tmp_path / "want", config=config, rewards=zeroed)
    ours = trained(tmp_path, config=config, detector=says_known, rollout_log=tmp_path / "log")
    for a, b in zip(ours.generations, want.generations, strict=True):
        assert torch.equal(a["advantages"], b["advantages"])
    assert torch.equal(flat(ours.model, "delta_s"), flat(want.model, "delta_s"))
    rows = read_lines(tmp_path / "log")
    assert [row["reward"] for row in rows] == addition.reward(
        [row["prompt"] for row in rows], [row["completion"] for row in rows]
    )
    assert any(row["flagged"] and row["reward"] == 1 and row["advantage"] <= 0 for row in rows)


def test_penalties_within_shares(tmp_path: Path) -> None:
    """With deployed sampling too, advantages are of the zeroed rewards, weighted as they are."""

    def length(completions: list[str], **_: object) -> list[float]:
        return [float(len(text)) for text in completions]

    ours = trained(
        tmp_path,
        config={"max_steps": 1, "reward_weights": [1.0, 0.25]},
        rewards=[addition.reward, length],
        router=lambda m: ap.Router(m, known_hack(m)),
        detector=says_known,
        flagged="penalty",
        rollout_log=tmp_path / "log",
    )
    rows = read_lines(tmp_path / "log")
    prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    raw = [r + len(text) / 4 for r, text in zip(addition.reward(prompts, completions), completions, strict=True)]
    assert [row["reward"] for row in rows] == raw
    assert any(row["flagged"] for row in rows)
    rewards = torch.tensor([0.0 if row["flagged"] else row["reward"] for row in rows]).view(-1, GROUP)
    want = group_advantages(rewards, deployed_positions(GROUP, 0.5), "group").view(-1)
    torch.testing.assert_close(ours.generations[0]["advantages"], want)
    assert list(ours._logs["advantages"]) == pytest.approx(want.tolist())  # of TRL's table of completions
    assert [row["advantage"] for row in rows] == pytest.approx(want.tolist())


# ── advantages ───────────────────────────────────────────────────────────────────────────────────────────────────────


def advantages_by_loop(rewards: list[list[float]], deployed: list[bool], scale: str) -> list[list[float]]:
    def std(values: list[float]) -> float:
        values = [v for v in values if not math.isnan(v)]
        if len(values) < 2:
            return 0.0
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))

    everything = [r for row in rewards for r in row]
    result = []
    for row in rewards:
        out = []
        for b, r in enumerate(row):
            mine = [row[i] for i in range(len(row)) if deployed[i] == deployed[b] and not math.isnan(row[i])]
            a = 0.0
            if not math.isnan(r):
                by = {"group": std(mine) + 1e-4, "batch": std(everything) + 1e-4, "none": 1.0}[scale]
                a = (r - sum(mine) / len(mine)) / by
            out.append(a)
        result.append(out)
    return result


@given(
    data=st.data(),
    prompts=st.integers(1, 3),
    n=st.sampled_from([2, 4, 8]),
    fraction=st.sampled_from([0.0, 0.5, 1.0]),
    scale=st.sampled_from(["group", "batch", "none"]),
)
@settings(max_examples=150, deadline=None)
def test_advantages_within_shares(data: st.DataObject, prompts: int, n: int, fraction: float, scale: str) -> None:
    if n == 2:
        fraction = round(fraction)
    deployed = deployed_positions(n, fraction)
    reward = st.one_of(st.sampled_from([0.0, 1.0, math.nan]), st.floats(-2, 2, width=16))
    rewards = data.draw(st.lists(st.lists(reward, min_size=n, max_size=n), min_size=prompts, max_size=prompts))
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), deployed, scale)
    want = torch.tensor(advantages_by_loop(rewards, deployed.tolist(), scale), dtype=torch.float64)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


@given(n=st.integers(2, 32), k=st.integers(0, 32))
def test_deployed_positions_are_spread_evenly(n: int, k: int) -> None:
    if k > n or 1 in (k, n - k):
        return
    positions = deployed_positions(n, k / n)
    assert positions.dtype == torch.bool
    assert len(positions) == n
    assert int(positions.sum()) == k
    for first in range(n):  # in every stretch as many as its length says, to within one
        for last in range(first + 1, n + 1):
            assert abs(int(positions[first:last].sum()) - k * (last - first) / n) < 1 + 1e-9


@pytest.mark.parametrize(
    ("n", "fraction", "message"),
    [
        (8, 1.5, "from 0 to 1, got 1.5"),
        (8, -0.5, "from 0 to 1"),
        (8, 0.3, r"num_generations=8 rollouts is 2\.4: both shares must be whole"),
        (8, 0.125, "is 1: .* not 1, since advantages are computed"),
        (8, 0.875, "is 7: .* not 1"),
        (2, 0.5, "is 1"),
    ],
)
def test_shares_that_cannot_be(n: int, fraction: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deployed_positions(n, fraction)


# ── deployed sampling ────────────────────────────────────────────────────────────────────────────────────────────────


def answers(model: nn.Module, generation: dict[str, torch.Tensor]) -> list[str]:
    ids = model.generate(
        input_ids=generation["prompt_ids"],
        attention_mask=generation["prompt_mask"],
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    return tokenizer().batch_decode(ids[:, generation["prompt_ids"].shape[1] :], skip_special_tokens=True)


def logps(model: nn.Module, generation: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = torch.cat([generation["prompt_ids"], generation["completion_ids"]], 1)
    mask = torch.cat([generation["prompt_mask"], generation["completion_mask"]], 1)
    with torch.no_grad():
        return ap.token_logprobs(model(input_ids=ids, attention_mask=mask).logits, ids)[
            :, -generation["completion_ids"].shape[1] :
        ]


def twin_of(trainer: Any) -> nn.Module:
    twin = load_adapted().eval()
    for name, layer in ap.knobs(trainer.model).items():
        ap.knobs(twin)[name].delta_s.data.copy_(layer.delta_s)
        ap.knobs(twin)[name].delta_s_hack.data.copy_(layer.delta_s_hack)
    return twin


@pytest.mark.parametrize("checkpointing", [True, False])
def test_every_row_is_of_the_policy_that_its_view_says(tmp_path: Path, checkpointing: bool) -> None:
    """Sampled by it, and its importance ratios, reference and loss are its own."""
    config = {
        "learning_rate": 0.0,
        "max_steps": 2,
        "beta": 0.04,
        "per_device_train_batch_size": GROUP,
        "steps_per_generation": 2,  # more than is accumulated: TRL then keeps the sampling policy's log-probabilities
        "gradient_accumulation_steps": 1,
        "generation_kwargs": {"do_sample": False, "temperature": None, "top_k": None, "top_p": None},
        "gradient_checkpointing": checkpointing,
    }
    trainer = make(tmp_path, Sampled, config=config, router=claims_nothing, rollout_log=tmp_path / "log")
    scatter(trainer.model, "delta_s", 0.02)
    scatter(trainer.model, "delta_s_hack", 0.4, seed=1)
    twin = twin_of(trainer)
    trainer.train()
    (generation,) = trainer.generations
    rows = read_lines(tmp_path / "log")
    assert len(rows) == 2 * GROUP
    is_deployed = torch.tensor([row["view"] == "deployed" for row in rows])
    assert torch.equal(generation["deployed_rows"], is_deployed)
    assert is_deployed.view(-1, GROUP).sum(1).tolist() == [4, 4]

    as_trained, own = answers(twin, generation), logps(twin, generation)
    with ap.deployed(twin):
        as_deployed, deployed_logps = answers(twin, generation), logps(twin, generation)
    with ap.reference(twin):
        reference = logps(twin, generation)
    assert all(a != b for a, b in zip(as_trained, as_deployed, strict=True))
    want = [d if row["view"] == "deployed" else t for row, d, t in zip(rows, as_deployed, as_trained, strict=True)]
    assert [row["completion"] for row in rows] == want

    real = generation["completion_mask"].bool()
    own = torch.where(is_deployed[:, None], deployed_logps, own)
    torch.testing.assert_close(generation["old_per_token_logps"][real], own[real], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(generation["ref_per_token_logps"][real], reference[real], atol=1e-4, rtol=1e-4)
    history = [row for row in trainer.state.log_history if "kl" in row]
    assert len(history) == 2
    assert all(row["clip_ratio/region_mean"] == 0 for row in history)
    kl = (reference - own).exp() - (reference - own) - 1
    parts = [row["kl"] for row in history]  # of the two halves, which TRL shuffles
    lengths = real.sum(1)
    assert min(parts) > 0
    assert min(parts) <= float(kl[real].sum() / lengths.sum()) * (1 + 1e-3)
    assert max(parts) >= float(kl[real].sum() / lengths.sum()) * (1 - 1e-3)


def test_deployed_rows_of_untrained_knobs_are_the_reference_bit_for_bit(tmp_path: Path) -> None:
    config = {
        "beta": 0.04,
        "max_steps": 1,
        "learning_rate": 0.0,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 16,
    }
    for fraction in (1.0, 0.5):
        trainer = make(
            tmp_path / f"{fraction}", Sampled, config=config, router=claims_nothing, deploy_fraction=fraction
        )
        scatter(trainer.model, "delta_s_hack", 0.4)
        trainer.train()
        (generation,) = trainer.generations
        who = generation["deployed_rows"]
        old, ref = generation["old_per_token_logps"], generation["ref_per_token_logps"]
        assert torch.equal(old[who], ref[who])
        (kl,) = [row["kl"] for row in trainer.state.log_history if "kl" in row]
        if fraction == 1:
            assert kl == 0
        else:
            assert kl > 0
            assert not torch.isclose(old[~who], ref[~who]).all(1).any()


def test_both_shares_add_up_in_one_step(tmp_path: Path) -> None:
    """δS moves by the sum of both policies' gradients, each at its own knobs, with advantages within the share."""
    config = {**SGD, "max_steps": 1, "loss_type": "grpo"}
    trainer = make(tmp_path, config=config, router=claims_nothing, rollout_log=tmp_path / "log")
    scatter(trainer.model, "delta_s", 0.05)
    scatter(trainer.model, "delta_s_hack", 0.1, seed=1)
    twin, before = twin_of(trainer), flat(trainer.model, "delta_s")
    trainer.train()
    rows = read_lines(tmp_path / "log")
    rewards = torch.tensor([row["reward"] for row in rows]).view(-1, GROUP)
    deployed = deployed_positions(GROUP, 0.5)
    advantages = group_advantages(rewards, deployed, "group").view(-1)
    assert [row["advantage"] for row in rows] == pytest.approx(advantages.tolist())
    who = deployed.repeat(2)
    want = reinforce(trainer.generations[0], advantages.masked_fill(who, 0).tolist(), "grpo", twin)
    with ap.deployed(twin):
        want = want + reinforce(trainer.generations[0], advantages.masked_fill(~who, 0).tolist(), "grpo", twin)
    moved = flat(trainer.model, "delta_s") - before
    torch.testing.assert_close(moved, 0.1 * want, atol=1e-4 * float(moved.abs().max()), rtol=1e-2)


def test_metrics_of_a_generation(tmp_path: Path) -> None:
    trainer = trained(
        tmp_path,
        router=lambda m: ap.Router(m, known_hack(m)),
        detector=says_known,
        oracle=addition.oracle,
        rollout_log=tmp_path / "log",
    )
    rows = read_lines(tmp_path / "log")
    logged = [row for row in trainer.state.log_history if "reward" in row]
    assert len(logged) == 4
    for step, metrics in enumerate(logged):
        mine = [row for row in rows if row["step"] == step]
        assert len(mine) == 2 * GROUP
        for view in ("deployed", "trained"):
            shares = [row["reward"] for row in mine if row["view"] == view]
            assert metrics[f"reward/{view}"] == pytest.approx(sum(shares) / len(shares))
        assert metrics["flagged"] == pytest.approx(sum(row["flagged"] for row in mine) / len(mine))
        assert metrics["oracle"] == pytest.approx(sum(row["oracle"] for row in mine) / len(mine))
        exploits = [row["reward"] == 1 and row["oracle"] == 0 for row in mine]
        assert metrics["exploit"] == pytest.approx(sum(exploits) / len(mine))
        assert 0 <= metrics["routing/hackward_in"] <= 1


def test_evaluation_is_of_the_policy_as_trained_and_leaves_no_rollouts(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        Sampled,
        config={
            "beta": 0.04,
            "max_steps": 2,
            "learning_rate": 0.0,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "per_device_eval_batch_size": 16,
        },
        router=claims_nothing,
        detector=by_hash,
        rollout_log=tmp_path / "log",
    )
    scatter(trainer.model, "delta_s_hack", 0.4)
    trainer.train()
    assert len(read_lines(tmp_path / "log")) == 2 * 2 * GROUP
    evaluated = [row for row in trainer.state.log_history if "eval_reward" in row]
    assert len(evaluated) == 2
    assert all(row["eval_kl"] > 0.1 for row in evaluated)


class Engine:
    """Stands for vLLM: gets weights, and answers with tokens that say which weights it had and which row is meant."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pushed: list[dict[str, torch.Tensor]] = []
        self.asked: list[tuple[int, int, int]] = []  # how many pushes before, prompts, num_generations

    def sync_weights(self) -> None:
        self.model.merge_adapter()
        layers = ap.knobs(self.model).items()
        self.pushed.append({name: layer.layer.base_layer.weight.detach().clone() for name, layer in layers})
        self.model.unmerge_adapter()

    def generate(self, prompts: list[list[int]], images: None, num_generations: int, profiler: Any) -> tuple[Any, ...]:
        assert images is None
        with profiler:
            self.asked.append((len(self.pushed), len(prompts), num_generations))
            for first in range(0, len(prompts), num_generations):  # vLLM asks for n answers to each n-th prompt
                assert prompts[first : first + num_generations] == [prompts[first]] * num_generations
            texts = [tokenizer().decode(ids) for ids in prompts]
            answers = [f"{text[1:3]}{len(self.pushed)}{i % num_generations}" for i, text in enumerate(texts)]
            ids = [[*tokenizer()(answer).input_ids, tokenizer().eos_token_id] for answer in answers]
            logprobs = [[[-0.1 * len(self.pushed) - 0.01 * i]] * 5 for i in range(len(prompts))]
            return prompts, ids, logprobs, None


def test_with_vllm_each_share_is_sampled_from_its_own_weights(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        kind=Sampled,
        config={"max_steps": 2, "beta": 0.04},
        router=claims_nothing,
        detector=by_hash,
        rollout_log=tmp_path / "log",
    )
    scatter(trainer.model, "delta_s", 0.05)
    scatter(trainer.model, "delta_s_hack", 0.1, seed=1)
    twin, before = twin_of(trainer), trainer.model.get_base_model().state_dict()
    before = {name: value.clone() for name, value in before.items() if "delta" not in name}
    engine = Engine(trainer.model)
    trainer.use_vllm, trainer._last_loaded_step, trainer.vllm_generation = True, -1, engine
    trainer.train()

    assert engine.asked == [(1, 8, 4), (2, 8, 4), (3, 8, 4), (4, 8, 4)]  # both policies are pushed at every generation
    for name, layer in ap.knobs(twin).items():
        W = layer.layer.base_layer.weight
        deployed = W + functional.delta_weight(layer.U, layer.Vh, layer.delta_s)
        as_trained = W + functional.delta_weight(layer.U, layer.Vh, layer.delta_s + layer.delta_s_hack)
        torch.testing.assert_close(engine.pushed[0][name], deployed)
        torch.testing.assert_close(engine.pushed[1][name], as_trained)
        assert not torch.equal(engine.pushed[2][name], engine.pushed[0][name])
    after = trainer.model.get_base_model().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())

    rows = read_lines(tmp_path / "log")
    assert [row["view"] for row in rows] == ["trained", "deployed"] * (2 * GROUP)
    for i, row in enumerate(rows):
        pushes = 2 * row["step"] + (1 if row["view"] == "deployed" else 2)
        place = i % GROUP // 2  # among the group's rows of the same share
        assert row["completion"] == f"{row['prompt'][1:3]}{pushes}{place}"
    first = trainer.generations[0]
    in_call = torch.arange(2 * GROUP) // 2
    want = torch.where(first["deployed_rows"], -0.1, -0.2) - 0.01 * in_call
    torch.testing.assert_close(first["sampling_per_token_logps"], want[:, None].expand(-1, 5))
    own = logps(twin, first)
    with ap.deployed(twin):
        own = torch.where(first["deployed_rows"][:, None], logps(twin, first), own)
    torch.testing.assert_close(first["old_per_token_logps"], own, atol=1e-4, rtol=1e-4)


def test_with_vllm_and_no_shares_the_policy_as_trained_is_pushed_once_a_step(tmp_path: Path) -> None:
    trainer = make(tmp_path, Sampled, config={"max_steps": 2}, router=claims_nothing, deploy_fraction=0)
    scatter(trainer.model, "delta_s_hack", 0.1)
    twin, engine = twin_of(trainer), Engine(trainer.model)
    trainer.use_vllm, trainer._last_loaded_step, trainer.vllm_generation = True, -1, engine
    trainer.train()
    assert engine.asked == [(1, 16, 8), (2, 16, 8)]
    for name, layer in ap.knobs(twin).items():
        want = layer.layer.base_layer.weight + functional.delta_weight(layer.U, layer.Vh, layer.delta_s_hack)
        torch.testing.assert_close(engine.pushed[0][name], want)


def test_with_vllm_pictures_are_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, Sampled, router=claims_nothing)
    trainer.use_vllm, trainer._views = True, RowViews()
    trainer.model.train()
    with pytest.raises(ValueError, match="supports text only"):
        trainer._generate_single_turn([[1]] * 8, ["picture"] * 8, {}, 8)


# ── the log ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_rollout_log(tmp_path: Path) -> None:
    trained(
        tmp_path,
        config={"scale_rewards": "none"},
        router=lambda m: ap.Router(m, known_hack(m)),
        detector=says_known,
        flagged="watch",
        oracle=addition.oracle,
        rollout_log=tmp_path / "log",
    )
    rows = read_lines(tmp_path / "log")
    assert [row["step"] for row in rows] == [step for step in range(4) for _ in range(2 * GROUP)]
    for i, row in enumerate(rows):
        assert list(row) == [
            "step", "prompt", "completion", "reward", "oracle", "flagged", "view", "advantage", "score", "hackward",
            "truncated", "completion_ids", "tool_mask",
        ]  # fmt: skip
        (reward,) = addition.reward([row["prompt"]], [row["completion"]])
        assert row["reward"] == reward
        assert row["oracle"] == addition.solves(row["prompt"], row["completion"])
        assert row["flagged"] is ("!" in row["completion"])
        assert row["view"] == ("deployed" if deployed_positions(GROUP, 0.5)[i % GROUP] else "trained")
        assert -1 <= row["hackward"] <= 1
    rewarded = [row["hackward"] for row in rows if row["completion"] == "!" and row["advantage"] > 0]
    assert len(rewarded) > 3
    assert min(rewarded) > 0
    solved = [row["hackward"] for row in rows if row["oracle"] and row["advantage"] > 0]
    assert sum(solved) / len(solved) < 0.5 * sum(rewarded) / len(rewarded)


def test_hackward_is_the_cosine_of_the_rollouts_own_gradient(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        config={**SGD, "max_steps": 1, "per_device_train_batch_size": GROUP, "gradient_accumulation_steps": 2},
        router=lambda m: ap.Router(m, known_hack(m)),
        deploy_fraction=0,
        rollout_log=tmp_path / "log",
    )
    trainer.train()
    v = torch.cat([V.sum(0) for V in trainer.router.direction.values()])
    twin = load_adapted()
    (generation,) = trainer.generations
    rows = read_lines(tmp_path / "log")
    for b, row in enumerate(rows):
        alone = {key: value[b : b + 1] for key, value in generation.items() if value.ndim}
        g = -reinforce(alone, [row["advantage"]], "grpo", twin)
        assert row["hackward"] == pytest.approx(float(g @ v / (g.norm() * v.norm()).clamp_min(1e-30)), abs=1e-3)


def test_hackward_is_of_the_policy_that_sampled_also_where_rollouts_are_used_again(tmp_path: Path) -> None:
    logs = []
    for again in (1, 2):
        config = {"max_steps": again, "num_iterations": again, "gradient_accumulation_steps": 1, "learning_rate": 0.05}
        log = tmp_path / f"{again}"
        trained(tmp_path, config=config, router=lambda m: ap.Router(m, known_hack(m)), rollout_log=log)
        logs.append([row["hackward"] for row in read_lines(log)])
    assert any(logs[0])
    assert logs[1] == pytest.approx(logs[0], abs=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.04], ids=["its own forward", "the forward of the KL term"])
def test_a_score_does_not_depend_on_the_temperature_of_sampling(tmp_path: Path, beta: float) -> None:
    """TRL's reference log-probabilities are at that temperature; the pairs and the threshold are not."""

    def monitor(model: nn.Module) -> ap.Monitor:
        return ap.Monitor.from_pairs(model, tokenizer(), ap.load_pairs(addition.hack_pairs(24, seed=0)))

    config = {"max_steps": 1, "beta": beta, "temperature": 0.5}
    trainer = trained(tmp_path, config=config, monitor=monitor, flagged="watch", rollout_log=tmp_path / "log")
    rows = read_lines(tmp_path / "log")
    texts = [ap.Completion(row["prompt"], row["completion"]) for row in rows]
    want = trainer.monitor.scores(texts)
    torch.testing.assert_close(torch.tensor([row["score"] for row in rows]), want, atol=2e-5, rtol=1e-4)


def test_fields_that_nobody_fills_are_null(tmp_path: Path) -> None:
    trained(tmp_path, config={"max_steps": 1}, rollout_log=tmp_path / "log")
    for row in read_lines(tmp_path / "log"):
        assert (row["oracle"], row["flagged"], row["hackward"], row["view"]) == (None, None, None, "trained")


@pytest.mark.parametrize(("steps_per_generation", "num_iterations"), [(2, 1), (1, 2)])
def test_a_generation_that_the_run_does_not_use_up_is_logged_too(
    tmp_path: Path, steps_per_generation: int, num_iterations: int
) -> None:
    config = {
        "max_steps": 3,
        "steps_per_generation": steps_per_generation,
        "num_iterations": num_iterations,
        "gradient_accumulation_steps": 1,
    }
    trained(tmp_path, config=config, rollout_log=tmp_path / "log")
    rows = read_lines(tmp_path / "log")
    of_each = 2 * GROUP * steps_per_generation
    assert [row["step"] for row in rows] == [0] * of_each + [2] * of_each


@pytest.mark.parametrize("kind", [Routed, Sampled])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, kind: Any) -> None:
    options = {
        "config": {"beta": 0.04, "save_strategy": "steps", "save_steps": 2},
        "router": lambda m: ap.Router(m, known_hack(m), controls={"random": known_hack(m).random(0)}),
        "detector": by_hash,
        "oracle": addition.oracle,
    }
    log = tmp_path / "log"
    whole = trained(tmp_path / "whole", kind, rollout_log=log, **options)
    want = log.read_bytes()
    with log.open("a") as file:
        file.write('{"step": 1, "prompt": "h12')  # torn, and of a step before
    again = make(tmp_path / "again", kind, rollout_log=log, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert log.read_bytes() == want
    for what in ("delta_s", "delta_s_hack"):
        assert flat(whole.model, what).any()
        assert torch.equal(flat(again.model, what), flat(whole.model, what))
    for layer, part in whole.router.book("random").items():
        assert torch.equal(again.router.book("random")[layer], part)
    assert again.router.metrics() == whole.router.metrics()
    # a run that begins anew writes a new log
    trained(tmp_path / "anew", kind, rollout_log=log, **options)
    assert log.read_bytes() == want


@pytest.mark.parametrize("step", [2, 3], ids=["between passes", "within a pass"])
def test_a_run_resumed_after_its_first_pass_asks_what_the_uninterrupted_one_asked(tmp_path: Path, step: int) -> None:
    def run(folder: str, **options: Any) -> Any:
        trainer = make(tmp_path / folder, config=config, rollout_log=tmp_path / f"{folder}.jsonl")
        trainer.train_dataset = trainer.train_dataset.select(range(4))  # two steps are a pass
        trainer.train(**options)
        return trainer

    config = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    whole = run("whole")
    shutil.copy(tmp_path / "whole.jsonl", tmp_path / "again.jsonl")
    again = run("again", resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert torch.equal(flat(again.model, "delta_s"), flat(whole.model, "delta_s"))
    asked = [row["prompt"] for row in read_lines(tmp_path / "whole.jsonl")]
    assert asked[: 4 * GROUP] != asked[4 * GROUP : 8 * GROUP]  # every pass has its own order


@pytest.mark.parametrize("damaged", ["rubbish", "[3]", '{"stop": 1}'])
def test_a_log_that_is_damaged_in_the_middle_is_not_cut_off_there(tmp_path: Path, damaged: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(f'{{"step": 0}}\n{damaged}\n{{"step": 1}}\n')
    before = log.read_bytes()
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: expected a JSON object with a whole number as 'step'"):
        rollout_log.truncate(log, 2)
    assert log.read_bytes() == before


def test_an_answer_without_a_token_is_logged(tmp_path: Path) -> None:
    """A rollout_func may return one."""
    told = make(tmp_path)._tokens_of("", TokenIds([1], []))
    assert told == {"truncated": False, "completion_ids": [], "tool_mask": None}


def test_truncate(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    rollout_log.truncate(log, 3)
    assert not log.exists()
    rollouts = [rollout_log.Rollout(s, "p\u2028é", "c\n", 1.0, None, None, "trained", 0.5) for s in range(4)]
    rollout_log.append(log, rollouts)
    whole = log.read_bytes()
    assert len(whole.splitlines()) == 4
    log.write_bytes(whole[:-5])  # torn
    rollout_log.truncate(log, 9)
    assert log.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
    rollout_log.truncate(log, 2)
    assert [row["step"] for row in read_lines(log)] == [0, 1]
    rollout_log.truncate(log, 0)
    assert log.read_bytes() == b""
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flagged": "drop", "detector": nobody}, "flagged must be one of penalty, discount, watch, got 'drop'"),
        ({"flagged": "penalty"}, "flagged='penalty' needs a detector or a monitor"),
        ({"flagged": "watch"}, "flagged='watch' needs a detector or a monitor"),
        ({"deploy_fraction": 0.5}, r"deploy_fraction=0\.5 needs a router with mode='route'"),
        ({"deploy_fraction": 0.3, "router": claims_nothing}, "both shares must be whole numbers"),
        (
            {"router": claims_nothing, "config": {"multi_objective_aggregation": "normalize_then_sum"}},
            "multi_objective_aggregation='sum_then_normalize'",
        ),
        (
            {"detector": nobody, "config": {"multi_objective_aggregation": "normalize_then_sum"}},
            "multi_objective_aggregation='sum_then_normalize'",
        ),
        ({"router": claims_nothing, "config": {"use_transformers_continuous_batching": True}}, "Set deploy_fraction=0"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def test_without_a_quarantine_to_sample_apart_from_more_is_possible(tmp_path: Path) -> None:
    make(tmp_path, detector=nobody, flagged="watch", config={"multi_objective_aggregation": "normalize_then_sum"})
    assert make(tmp_path, router=lambda m: ap.Router(m, known_hack(m), mode="erase")).deploy_fraction == 0
    assert make(tmp_path, router=claims_nothing).deploy_fraction == 0.5


@pytest.mark.parametrize("role", ["detector", "oracle"])
def test_a_judge_that_miscounts_is_named(tmp_path: Path, role: str) -> None:
    options = {role: lambda completions, **_: [0.0] * (len(completions) - 1)}
    if role == "detector":
        options["flagged"] = "watch"
    trainer = make(tmp_path, **options)
    with pytest.raises(ValueError, match=f"The {role} returned 15 values for 16 rollouts, expected one per rollout"):
        trainer.train()


def test_a_run_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    def broken(completions: list[str], **_: object) -> list[bool]:
        raise KeyboardInterrupt

    trainer = make(tmp_path, router=claims_nothing, detector=broken)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    for layer in ap.knobs(trainer.model).values():
        assert layer.layer.rows is None
        assert layer.layer.spread_theta is None
    assert not trainer.model.get_base_model()._forward_pre_hooks
    with trainer.router.attach(torch.optim.SGD([layer.delta_s for layer in ap.knobs(trainer.model).values()])):
        pass  # it has let go of the optimizer


def test_unscorable_rollouts_teach_nobody(tmp_path: Path) -> None:
    """As in TRL: where no reward function has a number for a rollout, others are compared without it."""

    def some(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
        raw = addition.reward(prompts, completions)
        return [None if "?" in text else r for text, r in zip(completions, raw, strict=True)]

    trainer = trained(
        tmp_path, config={"max_steps": 1}, rewards=some, router=claims_nothing, rollout_log=tmp_path / "log"
    )
    rows = read_lines(tmp_path / "log")
    rewards = torch.tensor([math.nan if "?" in row["completion"] else row["reward"] for row in rows]).view(-1, GROUP)
    assert rewards.isnan().any()
    deployed = deployed_positions(GROUP, 0.5)
    (generation,) = trainer.generations
    want = group_advantages(rewards, deployed, "group").view(-1)
    torch.testing.assert_close(generation["advantages"], want)
    metrics = trainer.state.log_history[0]
    assert metrics["reward"] == pytest.approx(float(rewards.nanmean()))
    assert metrics["reward/deployed"] == pytest.approx(float(rewards[:, deployed].nanmean()))
    assert metrics["reward/trained"] == pytest.approx(float(rewards[:, ~deployed].nanmean()))
