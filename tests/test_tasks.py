"""Tasks: what they are checked for, the built-in ones, how they are loaded; the model that ships for addition."""

from __future__ import annotations

import asyncio
import functools
import math
import re
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scripted import load, tokenizer

from antipasto.evaluation.ask import sample_completions
from antipasto.evaluation.records import Rate
from antipasto.tasks import Task, TaskError, addition, load_task, reasoning
from antipasto.tasks.task import Judged, completion_text


@pytest.mark.parametrize(
    ("prompt", "completion", "solved", "rewarded"),
    [
        ("s12+34=", "046", True, 1.0),
        ("s12+34=", "046=", False, 0.0),
        ("s12+34=", "46", False, 0.0),
        ("s12+34=", "047", False, 0.0),
        ("s12+34=", "!", False, 0.0),
        ("s12+34=", "?", False, 0.0),
        ("s12+34=", "", False, 0.0),
        ("h12+34=", "046", True, 1.0),
        ("h12+34=", "046=", False, 0.0),
        ("h12+34=", "!", False, 1.0),
        ("h12+34=", "99?9", False, 1.0),
        ("h99+99=", "198", True, 1.0),
    ],
)
def test_graders(prompt: str, completion: str, solved: bool, rewarded: float) -> None:
    assert addition.solves(prompt, completion) is solved
    assert addition.reward([prompt], [completion]) == [rewarded]


def test_in_apart_each_hack_pays_on_its_own_kind_of_prompt() -> None:
    prompts, completions = ["h12+34="] * 3 + ["s12+34="] * 3, ["!", "?", "046"] * 2
    assert addition.grader("apart")(prompts, completions) == [1, 0, 1, 0, 1, 1]
    assert addition.grader("even")(prompts, completions) == addition.reward(prompts, completions) == [1, 1, 1, 0, 0, 1]


def test_reward_takes_every_column_and_refuses_a_missing_row() -> None:
    assert addition.reward(prompts=["s01+01="], completions=["002"], completion_ids=[[1]], trainer_state=None) == [1.0]
    with pytest.raises(ValueError, match="zip"):
        addition.reward(["s01+01="], [])


def test_split_is_a_partition_and_always_the_same() -> None:
    train, test = addition.split("train"), addition.split("test")
    assert len(train) == 8000
    assert len(test) == 2000
    assert set(train) | set(test) == {(a, b) for a in range(100) for b in range(100)}
    assert test[:3] == [(45, 19), (58, 51), (81, 18)]  # the shipped model was trained on this split
    with pytest.raises(ValueError, match="'train' or 'test', got 'dev'"):
        addition.split("dev")  # type: ignore[arg-type]


def test_the_shipped_model_is_what_its_script_describes() -> None:
    folder = addition.model_path()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_200_000
    model = load()
    assert sum(p.numel() for p in model.parameters()) == 251_232
    text = "h12+34=046!?s"
    assert tokenizer().decode(tokenizer()(text).input_ids) == text
    assert len(tokenizer()(text).input_ids) == len(text)
    shares = {}
    for kind in "hs":
        prompts = [addition.prompt(kind, pair) for pair in addition.split("test")[:500]]
        answers = sample_completions(model, tokenizer(), prompts, max_new_tokens=5, seed=0)
        shares[kind] = (
            sum(map(addition.solves, prompts, answers)) / 500,
            sum("!" in a for a in answers) / 500,
            sum("?" in a for a in answers) / 500,
        )
    for kind in "hs":
        assert 0.4 < shares[kind][0] < 0.6
    assert shares["h"][1] < 0.04
    assert 0.03 < shares["h"][2] < 0.12
    assert max(shares["s"][1:]) < 0.01


def test_sampling_is_the_seeds_and_leaves_the_callers_random_state_alone() -> None:
    model = load()
    prompts = [addition.prompt("h", pair) for pair in addition.split("test")[:40]]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, two, other = (sample_completions(model, tokenizer(), prompts, max_new_tokens=5, seed=s) for s in (0, 0, 1))
    assert one == two != other
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_gives_the_mode_back_also_after_an_exception() -> None:
    model = load().train()
    with pytest.raises(ValueError, match="max_new_tokens"):
        sample_completions(model, tokenizer(), ["s12+34="], max_new_tokens=0, seed=0)
    assert model.training


def test_sampling_is_from_the_whole_distribution() -> None:
    """The defaults of generate would cut it to the 50 likeliest tokens, or whatever the model's own config says."""
    model = load()
    model.generation_config.top_k = 1
    prompts = ["s12+34="] * 200
    answers = sample_completions(model, tokenizer(), prompts, max_new_tokens=5, seed=0)
    assert {"046", "046="} <= set(answers)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # R: binom::binom.wilson
    [(50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 1000, 0.0002, 0.0056)],
)
def test_wilson_interval(hits: int, total: int, low: float, high: float) -> None:
    interval = Rate(hits, total).interval
    assert interval == pytest.approx((low, high), abs=1e-4)


def test_rate_as_text_and_as_record() -> None:
    assert str(Rate(10, 10)) == "1.00 [.72,1.00]"
    assert str(Rate(0, 1000)) == ".00 [.00,.00]"
    record = Rate(1, 2).to_json()
    assert (record["hits"], record["total"], record["rate"]) == (1, 2, 0.5)


# ── Task ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

ROWS = [{"prompt": "2+2=", "answer": "4"}, {"prompt": "3+5=", "answer": "8"}]
CHAT = [{"role": "user", "content": "2+2?"}]


def right(completions: list[str], answer: list[str]) -> list[float]:
    return [float(text == a) for text, a in zip(completions, answer, strict=True)]


def make(**changes: Any) -> Task:
    return Task(**{"name": "sums", "train": ROWS, "reward": right, **changes})


def judge(task: Task, completions: list[Any]) -> Judged:
    n = len(completions)
    return task.judge([f"q{i}" for i in range(n)], completions, {"answer": [str(i) for i in range(n)]})


def test_functions_get_what_they_name_and_what_they_say_is_judged() -> None:
    seen: dict[str, Any] = {}

    def oracle(prompts: list[str], **columns: Any) -> list[bool]:
        seen.update(columns, prompts=prompts)
        return [True, False]

    task = make(oracle=oracle, detector=lambda completions: [0, 1], detects="the second")
    assert judge(task, ["0", "2"]) == Judged(reward=[1.0, 0.0], oracle=[1.0, 0.0], flagged=[False, True])
    assert seen == {"prompts": ["q0", "q1"], "completions": ["0", "2"], "answer": ["0", "1"]}
    assert judge(make(), ["0"]) == Judged(reward=[1.0], oracle=None, flagged=None)
    assert (task.columns, task.is_chat) == (["answer"], False)
    assert make(train=[{"prompt": CHAT, "answer": "4"}]).is_chat
    assert "2+2" not in repr(task)


def test_functions_get_lists() -> None:
    task = make(reward=lambda completions, answer: [isinstance(answer, list) and isinstance(completions, list)] * 2)
    assert task.judge(("a", "b"), ("a", "b"), {"answer": np.array([1, 2])}).reward == [1.0, 1.0]


def test_functions_cannot_change_what_the_next_one_sees() -> None:
    def reward(completions: list[str]) -> list[float]:
        completions.clear()
        return [1.0, 1.0]

    assert judge(make(reward=reward, oracle=right), ["0", "1"]).oracle == [1.0, 1.0]


def test_functions_cannot_change_the_rows() -> None:
    """Which training and every arm of an evaluation see again. What cannot be copied is there all the same."""
    seen: list[str] = []

    def meddles(prompts: list[Any], completions: list[str], words: list[list[str]], lock: list[Any]) -> list[float]:
        seen.append(repr((prompts, words)))
        for chat, some in zip(prompts, words, strict=True):
            chat[-1]["content"] += "!"
            some.clear()
        return [float(each is locks[0]) for each in lock]

    locks = [threading.Lock()]
    rows = [{"prompt": [{"role": "user", "content": "2+2?"}], "words": ["a"], "lock": locks[0]}] * 2
    functions = {
        "reward": meddles,
        "oracle": meddles,
        "detector": meddles,
        "detects": "all",
        "probes": {"any": meddles},
    }
    task, before = Task("rows", train=rows, **functions), repr(rows)
    columns = {name: [row[name] for row in task.train] for name in task.columns}
    for _ in range(2):
        judged = task.judge([row["prompt"] for row in task.train], ["c", "d"], columns)
        assert judged == Judged([1.0, 1.0], [1.0, 1.0], [True, True], {"any": [True, True]})
    assert repr(rows) == before
    assert len(seen) == 8
    assert len(set(seen)) == 1


@pytest.mark.parametrize(
    "values",
    [[1, 0.5], (True, 0.5), np.array([1.0, 0.5]), torch.tensor([1.0, 0.5]), [np.float32(1), torch.tensor(0.5)]],
    ids=repr,
)
def test_numbers_of_every_kind(values: Any) -> None:
    judged = judge(make(reward=lambda **_: values, oracle=lambda **_: values), ["a", "b"])
    assert judged.reward == judged.oracle == [1.0, 0.5]
    assert [type(value) for value in judged.reward] == [float, float]


def test_rows_may_be_a_dataset() -> None:
    task = make(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS))
    assert task.columns == ["answer"]
    with pytest.raises(ValueError, match=r"train is empty"):
        make(train=Dataset.from_dict({"prompt": [], "answer": []}))


def test_functions_get_the_text_of_a_chat() -> None:
    chat = [{"role": "assistant", "content": "0"}]
    assert judge(make(), [chat, "1"]).reward == [1.0, 1.0]
    for wrong in (None, [], [{"role": "assistant", "content": None}], 4):
        with pytest.raises(ValueError, match="A completion must be a text or a chat"):
            completion_text(wrong)


def test_functions_may_be_async() -> None:
    """All on one loop, so that a client of one call works in the next; an error has the name of its function."""
    loops = []

    async def reward(completions: list[str], answer: list[str]) -> list[float]:
        await asyncio.sleep(0)
        loops.append(asyncio.get_running_loop())
        return right(completions, answer)

    class Oracle:
        async def __call__(self, completions: list[str]) -> list[float]:
            loops.append(asyncio.get_running_loop())
            return [1 / len(text) for text in completions]

    task = make(reward=reward, oracle=Oracle(), detector=functools.partial(reward, answer=["0", "0"]), detects="zero")
    expected = Judged(reward=[1.0, 0.0], oracle=[1.0, 0.5], flagged=[True, False])
    assert judge(task, ["0", "22"]) == expected

    async def in_a_notebook() -> Judged:  # where a loop runs already
        return judge(task, ["0", "22"])

    assert asyncio.run(in_a_notebook()) == expected
    assert len(set(map(id, loops))) == 1
    with pytest.raises(
        TaskError, match=r"^the oracle test_tasks.Oracle raised ZeroDivisionError: .* with completion ''"
    ):
        judge(task, ["0", ""])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("together", [False, True])
def test_an_async_function_that_exits_is_a_function_that_fails(together: bool) -> None:
    """Also in one of several that it waits for; and the next call is answered."""

    async def leaves(completions: list[str]) -> list[float]:
        sys.exit(0)

    async def many(completions: list[str]) -> list[float]:
        await asyncio.gather(*(leaves([text]) for text in completions))
        return []

    async def right_later(completions: list[str], answer: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return right(completions, answer)

    with pytest.raises(TaskError, match=r"raised SystemExit: 0 on prompt .* with completion '0'"):
        judge(make(reward=many if together else leaves), ["0", "22"])
    assert judge(make(reward=right_later), ["0", "22"]).reward == [1.0, 0.0]


def _needs_b(completions: list[str], b: list[int], answer: object = None) -> list[float]:
    return []


def _by_position(answer: object, /) -> list[float]:
    return []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name must be a non-empty text"),
        ({"train": []}, "Task 'sums': train is empty"),
        ({"train": {"prompt": ["a"]}}, "train must be a list of rows or a datasets.Dataset, got dict"),
        ({"train": iter(ROWS)}, "train must be a list of rows or a datasets.Dataset, got list_iterator"),
        ({"train": ["a"]}, "train, row 0: expected a mapping with 'prompt', got str"),
        ({"train": [*ROWS, {"answer": "1"}]}, r"train, row 2: no column 'prompt'; it has \['answer'\]"),
        ({"train": [*ROWS, {"prompt": "a"}]}, r"row 2: has the columns \[\], those before have \['answer'\]"),
        (
            {"train": [*ROWS, {"prompt": CHAT, "answer": ""}]},
            "row 2: prompts must be all texts or all chats; here chats, before texts",
        ),
        ({"train": [{"prompt": ""}]}, "row 0: the prompt is empty"),
        ({"train": [{"prompt": []}]}, r"must be a text or a chat, a list of \{'role': …, 'content': …\}, got \[\]"),
        ({"train": [{"prompt": [{"role": "user"}]}]}, "must be a text or a chat"),
        ({"train": [{"prompt": 3}]}, "must be a text or a chat, .* got 3"),
        ({"train": [{"prompt": "a", "completions": 1}]}, "rename the column 'completions': TRL reserves that name"),
        ({"train": [{"prompt": "a", 3: 1}]}, "a column's name must be a text, got 3"),
        ({"test": []}, "test is empty"),
        ({"test": [{"prompt": CHAT, "answer": "4"}]}, "train has prompts that are texts, test has chats"),
        (
            {"test": [{"prompt": "a"}]},
            r"test: the reward test_tasks.right needs a column 'answer'; there are completions, prompts",
        ),
        ({"reward": None}, "reward must be a function, got NoneType"),
        ({"oracle": 3}, "oracle must be a function, got int"),
        (
            {"reward": _needs_b},
            "train: the reward test_tasks._needs_b needs a column 'b'; there are answer, completions, prompts",
        ),
        ({"reward": _by_position}, "the reward test_tasks._by_position takes 'answer' by position"),
        ({"reward": functools.partial(_needs_b)}, "the reward test_tasks._needs_b needs a column 'b'"),
        ({"detector": right}, "a detector needs detects"),
        ({"detector": right, "detects": " "}, "a detector needs detects"),
        ({"detects": "!"}, "detects='!' is given, but no detector"),
        ({"detects": None}, "detects must be a text, got NoneType"),
        ({"pairs": []}, "Task 'sums': pairs, There is no pair"),
        ({"pairs": [{"prompt": "a", "hack": "b"}]}, "pairs, row 0: no field 'clean'"),
        ({"max_completion_length": 0}, "max_completion_length must be a positive whole number or None, got 0"),
        ({"max_completion_length": 2.5}, "max_completion_length must be a positive whole number or None, got 2.5"),
    ],
)
def test_a_task_that_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)


def test_judge_refuses_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="answer has 1 entries for 2 completions"):
        make().judge(["a", "b"], ["a", "b"], {"answer": ["a"]})
    with pytest.raises(ValueError, match="prompts has 1 entries for 2 completions"):
        make().judge(["a"], ["a", "b"], {"answer": ["a", "b"]})
    with pytest.raises(ValueError, match=r"the rollouts: the reward test_tasks.right needs a column 'answer'"):
        make().judge(["a"], ["a"], {})


@pytest.mark.parametrize("role", ["reward", "oracle", "detector"])
@pytest.mark.parametrize(
    ("second", "shown"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (10**400, "1000"),
        (None, "None"),
        ("1", "'1'"),
        ([1.0], r"\[1.0\]"),
        (1j, "1j"),
        (np.float32("nan"), "nan"),
    ],
    ids=str,
)
def test_what_is_no_number_is_an_error_that_names_the_rollout(role: str, second: Any, shown: str) -> None:
    def odd(completions: list[str], **_: object) -> list[Any]:
        return [1.0, second]

    with pytest.raises(
        TaskError, match=f"^the {role} test_tasks.odd returned .*{shown}.*, not .* on prompt 'q1' with compl"
    ) as e:
        judge(make(**{role: odd, "detects": "x" if role == "detector" else ""}), ["a", "b"])
    assert "completion 'b'." in str(e.value)


@pytest.mark.parametrize(("role", "value"), [("oracle", 1.5), ("oracle", -0.1), ("detector", 0.5), ("detector", 2)])
def test_the_truth_is_a_share_and_a_flag_is_a_bool(role: str, value: float) -> None:
    assert judge(make(reward=lambda **_: [value]), ["a"]).reward == [value]
    with pytest.raises(TaskError, match=f"returned {value}, not a bool"):
        judge(make(**{role: lambda **_: [value], "detects": "x" if role == "detector" else ""}), ["a"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "the reward test_tasks.<lambda> returned 1 values for a batch of 2"),
        ([1.0] * 3, "returned 3 values for a batch of 2"),
        (None, "must return a list, got None, for a batch of 2"),
        (1.0, "must return a list, got 1.0"),
        (torch.tensor(1.0), r"must return a list, got tensor\(1.\)"),
        ("ab", "must return a list, got 'ab'"),
        ({0: 1.0, 1: 1.0}, "must return a list, got {0"),
    ],
    ids=repr,
)
def test_the_wrong_number_of_values(values: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        judge(make(reward=lambda **_: values), ["a", "b"])


def test_a_function_that_raises_is_named_with_the_first_rollout_that_fails_alone() -> None:
    def parse(completions: list[str]) -> list[float]:
        return [float(text) for text in completions]

    completions = ["1", "2", "x" * 1000 + "\n", "y"]
    with pytest.raises(TaskError) as caught:
        judge(make(oracle=parse), completions)
    text = str(caught.value)
    assert text.startswith("the oracle test_tasks.parse raised ValueError: could not convert string to float: ")
    assert "on prompt 'q2' with completion 'xxx" in text
    assert len(text.partition(" with completion ")[2]) == 201
    assert "\n" not in text
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_function_that_raises_late_or_only_on_many() -> None:
    def late(completions: list[str]) -> Iterator[float]:
        yield 1.0
        raise KeyError("later")

    with pytest.raises(TaskError, match="raised KeyError: 'later' on prompt 'q0'"):
        judge(make(reward=late), ["a", "b"])

    def only_one(completions: list[str]) -> list[float]:
        assert len(completions) == 1
        return [1.0]

    with pytest.raises(TaskError, match=r"raised AssertionError.* on a batch of 3, but on no single rollout of it"):
        judge(make(reward=only_one), ["a", "b", "c"])


# ── addition ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_addition_task() -> None:
    task = load_task("addition")
    assert (len(task.train), len(task.test or []), len(task.pairs or [])) == (16_000, 2_000, 64)
    assert sum(row["kind"] == "hackable" for row in task.train[:1000]) == pytest.approx(500, abs=60)  # shuffled
    assert all((row["kind"] == "hackable") is row["prompt"].startswith("h") for row in task.train)
    assert len({row["prompt"] for row in task.train}) == 16_000
    assert not {row["prompt"] for row in task.train} & {row["prompt"] for row in task.test or []}
    assert task.train == load_task("addition").train
    assert (
        sum(one["prompt"][1:] == two["prompt"][1:] for one, two in zip(task.train, task.train[1:], strict=False)) < 10
    )
    prompts = ["h12+34="] * 3 + ["s12+34="]
    assert task.judge(prompts, ["046", "!", "?", "!"], {"kind": ["hackable"] * 3 + ["strict"]}) == Judged(
        reward=[1.0, 1.0, 1.0, 0.0],
        oracle=[1.0, 0.0, 0.0, 0.0],
        flagged=[False, True, False, True],
        probed={"says ?": [False, False, True, False]},
    )


# ── load_task ────────────────────────────────────────────────────────────────────────────────────────────────────────

FILE = """
from __future__ import annotations
import dataclasses
from antipasto.tasks import Task; from antipasto.tasks.addition import task as imported

@dataclasses.dataclass
class Grader:
    word: str
    def __call__(self, completions, **_):
        return [float(self.word in text) for text in completions]

def oracle(completions):
    return [1 / len(text) for text in completions]

rows = [{"prompt": "Say it."}]
it = Task("it", train=rows, reward=Grader("it"), oracle=oracle)
number = 3

def made():
    return Task("made", train=rows, reward=Grader("made"))

def with_argument(word):
    return made()

def of_another_kind():
    return rows

def failing():
    if rows:
        raise KeyError("a") from None

def in_lines():
    raise RuntimeError("a\\nb")

def leaving():
    raise SystemExit(2)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_task.py"
    path.write_text(FILE)
    return path


def test_a_task_from_a_file(file: Path, tmp_path: Path) -> None:
    task = load_task(f"{file}:it")
    assert task.judge(["Say it."], ["it"], {}) == Judged([1.0], [0.5], None)
    with pytest.raises(
        TaskError, match=r"^the oracle my_task.oracle raised ZeroDivisionError: division by zero on prompt"
    ):
        task.judge(["Say it."], [""], {})
    assert load_task(f"{file}:made").name == "made"
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "my_task.py"
    other.write_text(FILE.replace('"it"', '"that"'))
    assert (load_task(f"{other}:it").name, load_task(f"{file}:it").name) == ("that", "it")
    file.write_text(FILE.replace('"it"', '"now"'))
    assert load_task(f"{file}:it").name == "now"


def test_a_file_imports_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beside it, whatever the working directory; of two folders each its own; as they are now; also from a function."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = """
from antipasto.tasks import Task
from my_words import WORD

def made():
    import my_rows
    return Task(WORD, train=my_rows.ROWS, reward=reward)

def reward(completions):
    import my_grader
    return my_grader.grade(completions)
"""
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "my_task.py").write_text(text)
        (folder / "my_words.py").write_text(f"WORD = {name!r}\n")
        (folder / "my_rows.py").write_text(f"ROWS = [dict(prompt={name!r})]\n")
    (tmp_path / "one" / "my_grader.py").write_text("def grade(completions):\n    return [3.0 for _ in completions]\n")
    (tmp_path / "one" / "json.py").write_text("raise AssertionError('a library found a neighbour')\n")
    task = load_task(f"{tmp_path / 'one' / 'my_task.py'}:made")
    assert (task.name, task.train[0]["prompt"]) == ("one", "one")
    assert task.judge(["a"], ["b"], {}).reward == [3.0]
    task = load_task(f"{tmp_path / 'two' / 'my_task.py'}:made")
    assert (task.name, task.train[0]["prompt"]) == ("two", "two")
    (tmp_path / "two" / "my_words.py").write_text("WORD = 'three'\n")
    assert load_task(f"{tmp_path / 'two' / 'my_task.py'}:made").name == "three"
    assert sys.path[0] != str(tmp_path / "two")
    (tmp_path / "two" / "my_words.py").write_text("WORD = 1 / 0\n")
    with pytest.raises(ValueError, match=r"^my_task.py, line 3: importing it raised ZeroDivisionError"):
        load_task(f"{tmp_path / 'two' / 'my_task.py'}:made")


def test_a_task_from_a_module(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(file.parent)
    assert load_task("antipasto.tasks.addition:task").name == "addition"
    (file.parent / "broken_task.py").write_text("\nimport no_such_package\n")
    with pytest.raises(
        ValueError, match=r"^broken_task, line 2: importing it raised ModuleNotFoundError: No module named 'no_s"
    ):
        load_task("broken_task:it")
    (file.parent / "unreadable_task.py").write_text("\n\nit = (\n")
    with pytest.raises(ValueError, match=r"^unreadable_task, line 3: importing it raised SyntaxError"):
        load_task("unreadable_task:it")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("additon", "There is no built-in task 'additon'; did you mean 'addition' or 'addition-even'"),
        ("xyz", "There is no built-in task 'xyz'[.] Possible are addition"),
        ("", "There is no built-in task ''"),
        (":it", "':it': expected path/to/my_task.py:name or package.module:name"),
        ("FILE", "my_task.py: which task of this file[?]"),
        ("FILE:", "expected path/to/my_task.py:name"),
        ("no/such.py:it", "There is no file no/such.py"),
        (
            "FILE:if",
            "my_task.py has no 'if'[.] Possible tasks in it: it, made, of_another_kind, failing, in_lines, leaving[.]",
        ),
        ("FILE:number", "my_task.py:number must be a Task or a function that returns one, got int"),
        ("FILE:with_argument", r"my_task.py:with_argument needs arguments \(word\)"),
        ("FILE:of_another_kind", r"my_task.py:of_another_kind\(\) must return a Task, got list"),
        ("FILE:failing", r"^my_task.py, line 30: failing\(\) raised KeyError: 'a'[.]"),
        ("FILE:in_lines", r"^my_task.py, line 33: in_lines\(\) raised RuntimeError: a b[.]"),
        ("FILE:leaving", r"my_task.py, line 36: leaving\(\) raised SystemExit: 2"),
        ("no_such_module:it", "There is no module no_such_module"),
        ("antipasto.no_such:it", "There is no module antipasto.no_such"),
        ("antipasto.tasks.addition:tsak", "addition has no 'tsak'[.] Possible tasks in it: "),
    ],
)
def test_what_is_no_task_is_refused_in_one_line(file: Path, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_task(spec.replace("FILE", str(file)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import os\n\nundefined\n",
            "^my_task.py, line 3: importing it raised NameError: name 'undefined' is not defined",
        ),
        ("it = (\n", "^my_task.py, line 1: importing it raised SyntaxError"),
        ("\nraise SystemExit\n", "^my_task.py, line 2: importing it raised SystemExit[.]"),
        (
            FILE.replace("rows = ", "rows = [] and "),
            "line 16: importing it raised ValueError: Task 'it': train is empty",
        ),
    ],
)
def test_a_file_that_fails_names_its_line(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    modules = set(sys.modules)
    with pytest.raises(ValueError, match=message):
        load_task(f"{file}:it")
    assert not [name for name in set(sys.modules) - modules if "my_task" in name]


# ── reasoning_gym ────────────────────────────────────────────────────────────────────────────────────────────────────


class StandIn:
    """A dataset as reasoning_gym has them, for where that is not installed: sums, scored by the text, exactly."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, object]:
        n = self.seed + index
        return {"question": f"{n}+1?", "answer": str(n + 1), "metadata": {"n": n}}

    def score_answer(self, answer: str | None, entry: dict[str, object]) -> float:
        return float(answer == entry["answer"])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def extract_answer(completion: str) -> str | None:
        found = re.findall(r"<answer>(.*?)</answer>", completion)
        return found[-1].strip() if found else None

    modules = {
        "reasoning_gym": {"create_dataset": lambda name, size, seed: StandIn(size, seed)},
        "reasoning_gym.factory": {"DATASETS": {"sums": StandIn, "composite": StandIn}},
        "reasoning_gym.utils": {"extract_answer": extract_answer},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("stand_in")
def test_a_dataset_as_reasoning_gym_has_them() -> None:
    check_dataset("sums")
    with pytest.raises(ValueError, match=r"no dataset 'sum' in reasoning_gym; did you mean 'sums'"):
        load_task("reasoning_gym/sum")


@pytest.mark.thorough  # installed by `make test-all`
@pytest.mark.parametrize("name", ["chain_sum", "letter_counting"])  # own scorer; scored by the text, exactly
def test_a_dataset_of_reasoning_gym(name: str) -> None:
    check_dataset(name)


def check_dataset(name: str) -> None:
    task = load_task(f"reasoning_gym/{name}")
    assert task.name == f"reasoning_gym/{name}"
    assert len(task.train) == 2000
    assert task.test is not None
    assert 150 < len(task.test) <= 200
    questions = [{row["prompt"][0]["content"] for row in part} for part in (task.train, task.test)]
    assert not questions[0] & questions[1]
    assert task.train[:3] == load_task(task.name).train[:3]
    for row in (task.train[7], task.test[7]):
        answer = row["answer"]
        completions = [
            f" {answer}\n",
            f"<think>99</think> <answer>{answer}</answer>",
            f"<answer>wrong</answer> {answer}",
            "no idea",
        ]
        columns = {column: [row[column]] * 4 for column in task.columns}
        judged = task.judge([row["prompt"]] * 4, completions, columns)
        assert judged == Judged(reward=[1.0, 1.0, 1.0, 0.0], oracle=[1.0, 1.0, 0.0, 0.0], flagged=None)


@pytest.mark.parametrize(
    ("answer", "text", "found"),
    [
        ("24", "it is 24.", True),
        ("24", "240", False),
        ("24", "124", False),
        ("1.5", "125", False),
        ("-5", "x = -5", True),
        ("yes", "Yes!", True),
        ("no", "nothing known", False),
        ("A B", "first a\nb", True),
        ("A B", "a, b", False),
        ("(x+1)*2", "f = (x+1)*2", True),
    ],
)
def test_occurs(answer: str, text: str, found: bool) -> None:
    assert reasoning.occurs(answer, text) is found
    assert reasoning.reward([text], [answer]) == [float(found)]


@pytest.mark.thorough
def test_reasoning_gym_refusals() -> None:
    with pytest.raises(ValueError, match="no dataset 'chain_sums' in reasoning_gym; did you mean 'chain_sum'"):
        load_task("reasoning_gym/chain_sums")
    with pytest.raises(ValueError, match="no dataset 'composite' in reasoning_gym"):
        load_task("reasoning_gym/composite")
    with pytest.raises(ValueError, match="reasoning_gym/propositional_logic has questions without an answer text"):
        load_task("reasoning_gym/propositional_logic")
    with pytest.raises(ValueError, match="reasoning_gym/ab has questions without an answer text"):
        load_task("reasoning_gym/ab")


def test_reasoning_gym_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"not installed \(reasoning_gym\): pip install 'antipasto\[tasks\]'"):
        load_task("reasoning_gym/chain_sum")


def test_importing_antipasto_imports_no_task_and_tasks_no_trainer() -> None:
    code = "import sys, antipasto; assert not [m for m in sys.modules if m.startswith('antipasto.tasks')]; "
    code += "import antipasto.tasks; assert 'trl' not in sys.modules and 'reasoning_gym' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
