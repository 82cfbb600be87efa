"""`antipasto train --dataset`: a task's functions on the rows of a dataset."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from command_line import MODEL, SMALL, refused, succeeds
from lines import read_lines, write_lines
from test_code import PLAIN, Counting

from antipasto.app.data import HELD, MOST, hold_out, load_task_of
from antipasto.app.train.config import TrainConfig
from antipasto.tasks.code import graders
from antipasto.tasks.code import task as code_task
from antipasto.tasks.task import Task

TASK = """
from antipasto.tasks import Task

def right(completions, answer):
    return [text == a for text, a in zip(completions, answer)]

task = Task("sums", train=[{"prompt": "h01+02=", "answer": "003"}], reward=right, oracle=right)
"""
NAMED = {"prompt": "question", "answer": "solution"}


def sums(numbers: Iterable[int], **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"h{n:02d}+11=", "solution": f"{n + 11:03d}", **more} for n in numbers]


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(TASK)
    return f"{tmp_path / 'mine.py'}:task"


def load(spec: str, source: object, columns: dict[str, str] | None = NAMED, **splits: str) -> Task:
    return load_task_of({"task": spec, "dataset": str(source), "columns": columns, **splits})[0]


def questions(rows: Any) -> list[str]:
    return [row["prompt"] for row in rows]


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_run_trains_and_is_judged_on_the_rows_of_a_file(spec: str, tmp_path: Path) -> None:
    out, data = tmp_path / "run", write_lines(tmp_path / "sums.jsonl", sums(range(40)))
    words = ["--dataset", str(data), "--columns", "prompt=question, answer=solution"]
    succeeds("train", MODEL, "--task", spec, *words, "--method", "plain", "--out", out, *SMALL)
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["dataset"], config["columns"]) == (str(data), NAMED)
    assert TrainConfig.from_mapping(config, "here").columns == NAMED
    rows = json.loads((out / "run.json").read_text())["rows"]
    assert (rows["train"], rows["test"]) == (36, 4)
    asked = {row["prompt"] for row in read_lines(out / "rollouts.jsonl")}
    assert asked <= {row["question"] for row in sums(range(40))}

    succeeds("eval", out)
    judged = {row["prompt"] for row in read_lines(out / "eval.jsonl")[1:]}
    assert judged == set(questions(load(spec, data).test))
    assert len(judged) == 4
    assert not asked & judged

    write_lines(data, sums(range(41)))
    said = refused("eval", out)
    assert f"The rows of {data} have changed since the run began: it trained on 36 (4 held out, digest " in said
    (out / "adapter" / "complete.json").unlink()
    (out / "adapter" / "adapter_model.safetensors").unlink()
    assert "Restore them, or train again" in refused("train", "--resume", out)
    write_lines(data, sums(range(40)))
    succeeds("train", "--resume", out)
    data.unlink()  # what ships is checked on the prompts of the rollouts then
    text = succeeds("export", out, "--out", tmp_path / "shipped")
    assert "prompts of the run's rollouts" in " ".join(text.split())


# ── where rows come from ─────────────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_of_file_and_folder_has_the_same_rows(spec: str, tmp_path: Path) -> None:
    rows, held = sums(range(6), note="2024-01-01"), sums(range(6, 9), note="2024-01-02")
    write_lines(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    write_lines(tmp_path / "lines.json", rows)
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(tmp_path / "rows.parquet")
    made.to_csv(tmp_path / "rows.csv")
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "test": datasets.Dataset.from_list(held)}).save_to_disk(tmp_path / "two")
    (tmp_path / "files").mkdir()
    write_lines(tmp_path / "files" / "train.jsonl", rows)
    write_lines(tmp_path / "files" / "test.jsonl", held)
    expected = hold_out([{"prompt": r["question"], "answer": r["solution"], "note": r["note"]} for r in rows])
    for name in ("rows.jsonl", "rows.json", "lines.json", "rows.parquet", "one"):
        task = load(spec, tmp_path / name)
        assert (list(task.train), list(task.test or [])) == (expected["train"], expected["test"]), name
    assert [row["answer"] for row in load(spec, tmp_path / "rows.csv").train][:2] == [11, 12]  # a table has no quotes
    for name in ("two", "files"):
        task = load(spec, tmp_path / name)
        assert (len(task.train), questions(task.test)) == (6, ["h06+11=", "h07+11=", "h08+11="]), name


def test_a_name_is_of_the_hub(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def load_dataset(*words: Any) -> Any:
        seen.append(words)
        parts = {"train": sums(range(8)), "test": sums(range(8, 10)), "validation": sums(range(20, 23))}
        return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load(spec, "org/sums:main")
    assert (questions(task.train)[0], questions(task.test)) == ("h00+11=", ["h08+11=", "h09+11="])
    task = load(spec, "org/sums", dataset_train_split="train[2:5]", dataset_test_split="validation")
    assert questions(task.train) == ["h02+11=", "h03+11=", "h04+11="]
    assert questions(task.test) == ["h20+11=", "h21+11=", "h22+11="]
    task = load(spec, "org/sums", dataset_train_split="train[:50%]", dataset_test_split="train[50%:]")
    assert (len(task.train), questions(task.test)[0]) == (4, "h04+11=")
    task = load(spec, "org/sums", dataset_train_split="test")  # the split that is trained on is not the held-out one
    assert len(task.train) + len(task.test or []) == 2
    assert seen == [("org/sums", "main"), *[("org/sums", None)] * 3]


def test_a_column_gets_its_new_name_and_loses_the_old_one(spec: str, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "rows.jsonl", sums(range(4), prompt="another", answer="another", kept=[1]))
    assert load(spec, data).train[0] == {"prompt": "h00+11=", "answer": "011", "kept": [1]}


# ── what is held out ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_tenth_of_the_prompts_is_held_out_with_all_of_their_rows() -> None:
    rows = [{"prompt": f"{n % 50}+1=", "n": n} for n in range(100)]
    parts = hold_out(rows)
    assert len(parts["test"]) == 2 * 5 == 2 * HELD * 50
    assert not set(questions(parts["train"])) & set(questions(parts["test"]))
    assert sorted(row["n"] for part in parts.values() for row in part) == list(range(100))
    assert [row["n"] for row in parts["train"]] == sorted(row["n"] for row in parts["train"])
    assert hold_out(rows) == parts
    assert questions(parts["test"]) != [f"{n}+1=" for n in range(45, 50)] * 2  # files are often in some order
    assert len(hold_out([{"prompt": f"{n}"} for n in range(6000)])["test"]) == MOST


def test_a_prompt_that_is_trained_on_is_not_held_out(spec: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", sums(range(6)))
    write_lines(tmp_path / "test.jsonl", sums(range(4, 9)))
    assert questions(load(spec, tmp_path).test) == ["h06+11=", "h07+11=", "h08+11="]
    write_lines(tmp_path / "test.jsonl", sums(range(3)))
    with pytest.raises(ValueError, match="every prompt of its test split is in the train split too"):
        load(spec, tmp_path)


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


RENAMED = ["--columns", "prompt=question,answer=solution"]
KEPT = "(--columns NAME=COLUMN renames columns): Task 'sums': train, row 0: no column 'prompt'; it has ['question', "
NO_PROMPT = "train, row 2: a prompt must be a text or a chat, a list of {'role': …, 'content': …}, got 5."


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([], [], "The split 'train' of {source} is empty."),
        (sums([1, 2]), ["--columns", "prompt=qestion"], "row 0: columns has prompt=qestion, and there is no column "),
        (sums([1, 2]), ["--columns", "prompt=qestion"], "did you mean 'question'? There are question, solution."),
        (sums([1, 2]), [], KEPT),
        (sums([1, 2]), ["--columns", "prompt=question"], "the reward mine.right needs a column 'answer'; there are "),
        ([*sums([1, 2]), {"question": 5, "solution": ""}], RENAMED, NO_PROMPT),
        ([*sums([1]), {"question": "h"}], RENAMED, "train, row 1: columns has answer=solution, and there is no column 's"),
        (sums([1, 1]), RENAMED, "it has one prompt, and at least two are needed"),
        ([1], [], "{source}, line 1: expected an object, got int."),
        (sums([1, 2]), ["--dataset-train-split", "trian"], "'trian' in {source}; did you mean 'train'? There are train."),
        (sums([1, 2]), ["--dataset-test-split", "test"], "There is no split 'test' in {source}. There are train."),
        (sums([1, 2]), ["--dataset-train-split", "train[:x]"], "'train[:x]' is no part of a split"),
        (sums([1, 2]), ["--dataset-train-split", "train[:0]"], "The split 'train[:0]' of {source} is empty."),
        (sums([1, 2]), ["--columns", "question"], "columns takes NAME=COLUMN, separated by commas, each NAME once, got "),
        (sums([1, 2]), ["--columns", "prompt=a,prompt=b"], "each NAME once, got 'prompt=a,prompt=b'."),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_refused_in_one_line(
    rows: list[Any], words: list[str], message: str, spec: str, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "sums.jsonl", rows)
    out = ["--method", "plain", "--out", tmp_path / "run"]
    said = refused("train", MODEL, "--task", spec, "--dataset", source, *words, *out)
    assert message.replace("{source}", str(source)) in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "nowhere.jsonl"], "There is no file nowhere.jsonl."),
        (["--dataset", "./a/b/c"], "There is no file or folder './a/b/c': give one, or a dataset's name on the hub"),
        (["--dataset", ""], "There is no file or folder ''"),
        (["--dataset", __file__], f"{__file__}: expected a dataset's file that ends in .jsonl, .json, .csv, .parquet."),
        (["--dataset", str(Path(__file__).parent)], "is neither a `Dataset` directory nor a `DatasetDict` directory."),
        (["--dataset", "no-such-org/no-such-rows"], "HF_HUB_OFFLINE is set. Check the spelling and the connection"),
        (["--columns", "prompt=question"], "columns is for a dataset: give that too, or leave it out."),
        (["--dataset-test-split", "test"], "dataset_test_split is for a dataset: give that too, or leave it out."),
    ],
)
def test_a_dataset_that_is_not_there_is_refused_in_one_line(
    words: list[str], message: str, spec: str, tmp_path: Path
) -> None:
    assert message in refused("train", MODEL, "--task", spec, *words, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_table_is_refused(spec: str, tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"The dataset .*rows.parquet cannot be loaded: "):
        load(spec, tmp_path / "rows.parquet")


def test_without_datasets_the_extra_is_named(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "rows.csv").write_text("question,solution\na,b\n")
    with pytest.raises(ValueError, match=r"needs the package datasets: pip install 'antipasto\[trl\]'"):
        load(spec, tmp_path / "rows.csv")
    assert load(spec, write_lines(tmp_path / "rows.jsonl", sums(range(4)))).train


# ── the task code ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Rows of the public environment: its own fields, and a prompt that is not asked here."""
    more = {"prompt": [{"role": "user", "content": "…"}], "evaluator": "code", "answer": [], "hint": None}
    rows = [{**PLAIN, **more, "id": n, "question": f"PROBLEM:\nNegate {n}.\n\nSOLUTION:\n"} for n in range(20)]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": str(row["id"])}]
    return write_lines(tmp_path / "problems.jsonl", rows)


def test_the_task_code_is_made_of_a_files_problems(problems: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graders, "Bubblewrap", lambda limits: Counting())
    task = load("code/unseen-exit", problems, None)
    assert task.name == "code/unseen-exit"
    trained = {row["id"] for row in task.train}
    held = {row["id"] for row in task.test or []}
    assert (len(trained), len(held), trained | held) == (18, 2, {str(n) for n in range(20)})
    assert {row["flaw"] for row in task.test or []} == {*code_task.FLAWS, "strict"}
    text = task.train[0]["prompt"][0]["content"]
    assert f"Negate {task.train[0]['id']}.\n\nnegate(5) == -5" in text
    assert "PROBLEM" not in text
    assert {str(pair["clean"]) for pair in task.pairs or []} == {str([code_task.fenced(PLAIN["canonical_solution"])])}
    assert "os._exit" not in str(task.pairs)


def test_own_options_of_the_task_code_stay(problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graders, "Bubblewrap", lambda limits: Counting())
    (tmp_path / "quiet.py").write_text(
        "from antipasto.tasks.code.task import task\nquiet = task('exit', named=False, tokens=77)\n"
    )
    task = load(f"{tmp_path / 'quiet.py'}:quiet", problems, None)
    assert (task.name, task.max_completion_length) == ("code/exit", 77)
    assert "exit code" not in str(questions(task.train))


def test_a_sandbox_that_shows_the_file_is_refused(problems: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = Counting()
    task = code_task.task("exit", sandbox=sandbox)
    looked = []
    as_before = sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda program: looked.append(program.argv) or as_before(program))
    rows = read_lines(problems)
    task.with_rows(rows[:3], rows[3:], str(problems))
    assert [argv[4:] for argv in looked] == [[str(problems)]]


def test_a_row_that_is_no_problem_is_named_by_its_id(problems: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graders, "Bubblewrap", lambda limits: Counting())
    rows = read_lines(problems)
    rows[7]["difficulty"] = "Hard"
    with pytest.raises(ValueError, match="id 7: field 'difficulty': expected easy, medium, hard, got 'Hard'"):
        load("code/exit", write_lines(problems, rows), None)


def test_a_task_takes_other_rows() -> None:
    task = Task(
        "sums", train=[{"prompt": "a"}], test=[{"prompt": "b"}], reward=lambda completions: [0.0] * len(completions)
    )
    assert (task.with_rows([{"prompt": "c"}]).train, task.with_rows([{"prompt": "c"}]).test) == (
        [{"prompt": "c"}],
        None,
    )
    assert task.train == [{"prompt": "a"}]
