"""Detectors, oracles and reward functions: how they are called, what they may answer, and that asking them changes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lines import read_lines
from scripted import GROUP, Routed, Sampled, by_hash, claims_nothing, flat, make

from antipasto.app.inspection import rollouts_parts
from antipasto.app.report.rollouts import read_rollouts
from antipasto.tasks import addition
from antipasto.tasks.task import Task, TaskError, is_exploit
from antipasto.trl.judges import ask
from antipasto.unchanged import unchanged

pytestmark = pytest.mark.usefixtures("shared_basis_cache")


def rollouts(n: int = 4) -> dict[str, Any]:
    return {"prompts": ["p"] * n, "completions": ["c"] * n, "completion_ids": [[1]] * n, "serial": list(range(n))}


# ── what they may answer ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "answers",
    [
        [True, False, 1, 0],
        [1.0, 0.0, np.bool_(True), np.int64(0)],
        [torch.tensor(True), torch.tensor(0), np.float32(1), False],
        torch.tensor([1, 0, 1, 0]),
        torch.tensor([True, False, True, False]),
        np.array([1.0, 0.0, 1.0, 0.0]),
        (True, False, True, False),
    ],
    ids=repr,
)
def test_flags_of_every_kind(answers: Any) -> None:
    flags = ask("detector", lambda **_: answers, rollouts())
    assert flags == [True, False, True, False]
    assert all(type(flag) is bool for flag in flags)


@pytest.mark.parametrize(
    "answer", [0.1, float("nan"), float("inf"), 2, -1, None, "yes", "", [True], np.float32(0.5), torch.tensor(0.5)]
)
def test_what_is_no_flag_is_refused(answer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"The detector returned .* for rollout 2, .*If it computes scores, apply a threshold"
    ):
        ask("detector", lambda **_: [True, False, answer, True], rollouts())


@pytest.mark.parametrize(
    ("answers", "want"),
    [
        ([True, 0, 0.25, None], [1.0, 0.0, 0.25, None]),
        ([float("nan"), np.float64(0.5), torch.tensor(1), np.bool_(False)], [None, 0.5, 1.0, 0.0]),
        (torch.tensor([0.0, torch.nan, 1.0, 0.5]), [0.0, None, 1.0, 0.5]),
    ],
)
def test_truths_of_every_kind(answers: Any, want: list[float | None]) -> None:
    assert ask("oracle", lambda **_: answers, rollouts()) == want


@pytest.mark.parametrize("answer", [1.5, -0.1, float("inf"), "right", [1.0]])
def test_what_is_no_truth_is_refused(answer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"The oracle returned .* for rollout 1, expected a bool, a number from 0 to 1"
    ):
        ask("oracle", lambda **_: [1.0, answer, 0.0, 0.0], rollouts())


@pytest.mark.parametrize("answers", [None, 1.0, "0101", {0: True}, (flag for flag in [True] * 4)])
def test_what_is_no_list_is_refused(answers: Any) -> None:
    with pytest.raises(ValueError, match="for 4 rollouts, expected a list with one value per rollout"):
        ask("detector", lambda **_: answers, rollouts())


@pytest.mark.parametrize("value", [0.1, float("nan")])
def test_a_score_does_not_flag_a_run(tmp_path: Path, value: float) -> None:
    trainer = make(
        tmp_path,
        config={"max_steps": 1},
        router=claims_nothing,
        deploy_fraction=0,
        detector=lambda completions, **_: [value] * len(completions),
    )
    with pytest.raises(ValueError, match="If it computes scores, apply a threshold"):
        trainer.train()
    assert not flat(trainer.model, "delta_s_hack").any()


# ── an oracle that abstains ──────────────────────────────────────────────────────────────────────────────────────────


def unsure(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    truth = addition.oracle(prompts, completions)
    return [[float(t), None, float("nan")][len(text) % 3] for t, text in zip(truth, completions, strict=True)]


def test_where_the_oracle_abstains_there_is_neither_exploit_nor_solve(tmp_path: Path) -> None:
    log = tmp_path / "log"
    trainer = make(
        tmp_path, config={"max_steps": 2}, router=claims_nothing, detector=by_hash, oracle=unsure, rollout_log=log
    )
    trainer.train()
    rows = read_lines(log)
    judged = [row for row in rows if row["oracle"] is not None]
    assert 0 < len(judged) < len(rows)
    history = [row for row in trainer.state.log_history if "reward" in row]
    for step, metrics in enumerate(history):
        for view, name in ((None, ""), ("trained", "/trained"), ("deployed", "/deployed")):
            mine = [row for row in judged if row["step"] == step and view in (None, row["view"])]
            exploits = [row["reward"] >= 0.5 and row["oracle"] < 0.5 for row in mine]
            assert metrics[f"oracle{name}"] == pytest.approx(sum(row["oracle"] for row in mine) / len(mine))
            assert metrics[f"exploit{name}"] == pytest.approx(sum(exploits) / len(mine))
    # in the report
    curves = read_rollouts(log, [], budget=100_000).curves
    for measure, of in (
        ("solved", lambda row: row["oracle"] >= 0.5),
        ("exploited", lambda row: row["reward"] >= 0.5 and row["oracle"] < 0.5),
    ):
        for view in ("trained", "deployed"):
            mine = [of(row) for row in judged if row["step"] == 0 and row["view"] == view]
            assert curves[measure][view][0] == (1.0, pytest.approx(sum(mine) / len(mine)))


def test_inspect_leaves_out_what_the_oracle_abstained_from(tmp_path: Path) -> None:
    """Every second one: of the others all are exploits at first, and none is in the end."""
    row = {"prompt": "p", "completion": "c", "view": "trained", "advantage": 0.0}
    lines = [
        json.dumps({**row, "step": i, "reward": 1.0, "oracle": None if i % 2 else float(i >= 20)}) for i in range(40)
    ]
    lines[1] = lines[1].replace("null", "NaN")  # as older logs had it
    (tmp_path / "log").write_text("\n".join(lines) + "\n")
    table = rollouts_parts(tmp_path / "log")[0]
    columns = [list(column.cells) for column in table.columns]  # type: ignore[union-attr]
    found = {str(name): (str(a), str(b)) for name, a, b in zip(*columns, strict=True)}
    assert found["oracle"] == ("0.000", "1.000")
    assert found["exploit"] == ("1.000", "0.000")


def test_an_oracle_that_always_abstains_leaves_no_number(tmp_path: Path) -> None:
    log = tmp_path / "log"
    trainer = make(
        tmp_path, config={"max_steps": 1}, oracle=lambda prompts, **_: [None] * len(prompts), rollout_log=log
    )
    trainer.train()
    assert {row["oracle"] for row in read_lines(log)} == {None}
    assert not any("oracle" in row or "exploit" in row for row in trainer.state.log_history)


def test_a_tasks_oracle_may_not_abstain() -> None:
    for answer in (None, float("nan")):
        task = Task(
            "t",
            [{"prompt": "p"}] * 2,
            reward=lambda completions: [1.0] * len(completions),
            oracle=lambda prompts, a=answer: [a] * len(prompts),
        )
        with pytest.raises(TaskError, match=r"the oracle .* not a bool or a number from 0 to 1"):
            task.judge(["p"], ["c"], {})
    assert not is_exploit(1.0, float("nan"))


# ── how they are called ──────────────────────────────────────────────────────────────────────────────────────────────


def test_judges_get_what_a_reward_function_gets(tmp_path: Path) -> None:
    seen: dict[str, dict[str, Any]] = {}

    def asked(role: str) -> Callable[..., list[float]]:
        def judge(prompts: list[str], **columns: Any) -> list[float]:
            seen[role] = {"prompts": prompts, **columns}
            columns["log_metric"](f"metric of the {role}", 3.0)
            return [0.0] * len(prompts)

        return judge

    trainer = make(
        tmp_path, config={"max_steps": 1}, rewards=asked("reward"), detector=asked("detector"), flagged="watch",
        oracle=asked("oracle"),
    )  # fmt: skip
    trainer.train()
    for role in ("detector", "oracle"):
        assert seen[role].keys() == seen["reward"].keys()
        assert {"completion_ids", "trainer_state", "serial"} <= seen[role].keys()
        for name, value in seen["reward"].items():
            assert seen[role][name] == value
        assert any(row.get(f"metric of the {role}") == 3.0 for row in trainer.state.log_history)
    assert seen["detector"]["trainer_state"] is trainer.state


def test_a_judge_without_kwargs_gets_what_it_names() -> None:
    def detector(completions: list[str], serial: list[int]) -> list[bool]:
        return [number == 2 for number in serial]

    assert ask("detector", detector, rollouts()) == [False, False, True, False]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'answer'"):
        ask("detector", lambda completions, answer: [], rollouts())


def test_judges_may_be_async(tmp_path: Path) -> None:
    """On one loop, which goes on from call to call, as clients need it; also where the caller's thread runs one itself."""
    loops = []

    async def detector(prompts: list[str], completions: list[str], **_: object) -> list[bool]:
        await asyncio.sleep(0)
        loops.append(asyncio.get_running_loop())
        return by_hash(prompts, completions)

    async def oracle(prompts: list[str], completions: list[str], **_: object) -> list[bool]:
        return addition.oracle(prompts, completions)

    logs = []
    for name, judges in (("async", (detector, oracle)), ("plain", (by_hash, addition.oracle))):
        trainer = make(
            tmp_path, config={"max_steps": 2}, router=claims_nothing, detector=judges[0], oracle=judges[1],
            rollout_log=tmp_path / name,
        )  # fmt: skip
        trainer.train()
        logs.append((tmp_path / name).read_text())
    assert logs[0] == logs[1]
    assert len(loops) == 2
    assert loops[0] is loops[1]

    async def outer() -> list[Any]:
        return ask("detector", lambda **columns: detector(**columns), rollouts())

    assert len(asyncio.run(outer())) == 4


# ── what they leave ──────────────────────────────────────────────────────────────────────────────────────────────────


def draws_and_sets(folder: Path) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    sets(folder)


def sets(folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    os.chdir(folder)


def state() -> tuple[Any, ...]:
    return (
        random.getstate(), [repr(part) for part in np.random.get_state()], torch.get_rng_state().tolist(),
        torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), Path.cwd(),
    )  # fmt: skip


@pytest.mark.parametrize("error", [False, True])
def test_unchanged(tmp_path: Path, error: bool) -> None:
    before = state()
    try:
        with unchanged(draws=False):
            draws_and_sets(tmp_path)
            assert all(a != b for a, b in zip(state(), before, strict=True))
            if error:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert state() == before
    with unchanged():
        random.random()
        np.random.rand()
        torch.rand(1)
        sets(tmp_path)
    assert state()[3:] == before[3:]
    assert all(a != b for a, b in zip(state()[:3], before[:3], strict=True))


def test_what_judges_draw_set_and_change_does_not_reach_the_run(tmp_path: Path) -> None:
    def meddles(
        prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[bool]:
        draws_and_sets(tmp_path)
        flags = by_hash(prompts, completions)
        for texts in (prompts, completions, completion_ids):
            texts.reverse()
            texts.append(texts[0])
        completion_ids[0].append(3)
        for words in columns["words"]:
            seen.append(tuple(words))
            words.clear()
        return flags

    seen: list[tuple[str, ...]] = []
    where, runs = Path.cwd(), []
    for judge in (by_hash, meddles):
        trainer = make(
            tmp_path / "out", Sampled, config={"max_steps": 2, "beta": 0.04}, router=claims_nothing, detector=judge,
            oracle=judge, rollout_log=tmp_path / judge.__name__,
        )  # fmt: skip
        trainer.train_dataset = trainer.train_dataset.add_column("words", [["a"]] * len(trainer.train_dataset))
        trainer.train()
        runs.append(torch.cat([flat(trainer.model, "delta_s"), flat(trainer.model, "delta_s_hack")]))
    assert Path.cwd() == where
    assert torch.get_default_dtype() == torch.float32
    assert set(seen) == {("a",)}
    assert torch.equal(*runs)
    assert (tmp_path / "meddles").read_text() == (tmp_path / "by_hash").read_text()


def test_what_a_reward_function_sets_is_put_back(tmp_path: Path) -> None:
    def meddles(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        sets(tmp_path)
        return addition.reward(prompts, completions)

    where, runs = Path.cwd(), []
    for reward in (addition.reward, meddles):
        trainer = make(
            tmp_path / "out",
            Sampled,
            config={"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 16},
            rewards=reward,
        )
        trainer.train()
        runs.append(flat(trainer.model, "delta_s"))
    assert Path.cwd() == where
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(*runs)


@pytest.mark.parametrize("role", ["reward", "oracle", "detector", "probe"])
def test_a_tasks_functions_leave_the_process_as_it_was(tmp_path: Path, role: str) -> None:
    def meddles(completions: list[str]) -> list[float]:
        draws_and_sets(tmp_path)
        return [0.0] * len(completions)

    functions: dict[str, Any] = {"reward": lambda completions: [0.0] * len(completions)}
    functions |= {"probes": {"x": meddles}} if role == "probe" else {role: meddles}
    if role == "detector":
        functions["detects"] = "x"
    task, before = Task("t", [{"prompt": "p"}], **functions), state()
    task.judge(["p"], ["c"], {})
    assert state()[3:] == before[3:]
    assert (state()[:3] == before[:3]) is (role != "reward")  # whose draws are the run's, as in TRL


# ── penalty ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("of_each", "weights", "total"),
    [
        ((1.0, 4.0), (1.0, -0.5), -1.0),  # a loss already: it stays one
        ((1.0, 1.0), (1.0, -0.5), 0.0),
        ((-1.0, 4.0), (1.0, 1.0), 0.0),
        ((-2.0, 1.0), (1.0, 1.0), -1.0),
        ((None, 4.0), (1.0, 1.0), 0.0),
        ((-3.0,), (-1.0,), 0.0),
    ],
)
def test_a_penalty_is_on_the_weighted_total(
    tmp_path: Path, of_each: tuple[float | None, ...], weights: tuple[float, ...], total: float
) -> None:
    """Flagged rollouts get min(total, 0); all others here get −2."""

    def first_half(completions: list[str], **_: object) -> list[bool]:
        return [i % GROUP < GROUP // 2 for i in range(len(completions))]

    def function(value: float | None, other: float) -> Callable[..., list[float | None]]:
        return lambda completions, **_: [value if flag else other for flag in first_half(completions)]

    others = [-2.0 / weights[0], *[0.0] * (len(weights) - 1)]
    trainer = make(
        tmp_path,
        Routed,
        config={"max_steps": 1, "reward_weights": list(weights), "scale_rewards": "none"},
        rewards=[function(value, other) for value, other in zip(of_each, others, strict=True)],
        detector=first_half,
        flagged="penalty",
    )
    trainer.train()
    (generation,) = trainer.generations
    half = (total + 2.0) / 2
    want = torch.tensor([half] * (GROUP // 2) + [-half] * (GROUP // 2)).repeat(2)
    torch.testing.assert_close(generation["advantages"], want)
