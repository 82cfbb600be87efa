"""Where the command line can be misused, or the machine lets it down: one line that says what to do, and nothing half done."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.metadata
import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from command_line import MODEL, SMALL, TRAIN, fails, refused, run, succeeds
from lines import write_lines
from packaging.requirements import Requirement
from rich.console import Console
from torch.distributed.fsdp import StateDictType
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import GRPOTrainer

import antipasto as ap
from antipasto.adapter.fingerprints import BaseWarning
from antipasto.app import errors, inspection
from antipasto.app import evaluate as evaluate_job
from antipasto.app.models import quiet
from antipasto.app.train.config import TrainConfig
from antipasto.app.train.run import check_saves_adapter
from antipasto.evaluation.ask import conclude
from antipasto.evaluation.records import Answer, read_evaluation, write_evaluation
from antipasto.names import AntiPastoWarning
from antipasto.options import check_types
from antipasto.tasks import addition
from antipasto.trl import FirstLook, Interrupts, RoutedGRPOTrainer

ROOT = Path(__file__).parents[1]
SOURCE = Path(ap.__file__).parents[1]


def script(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Python code in a process that takes itself for the command."""
    begin = "import sys; sys.argv = ['antipasto', *sys.argv[1:]]\n"
    return subprocess.run(
        [sys.executable, "-c", begin + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "100", "NO_COLOR": "1"},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, whose name rich would take for markup and for an emoji."""
    out = tmp_path_factory.mktemp("runs") / "[bold]y" / "a[/b]c :smile:"
    text = succeeds(*TRAIN, "--method", "route", "--out", out, *SMALL)
    out.with_name("said.txt").write_text(text)
    return out


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """The same, as if its process had been killed after the last checkpoint."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    return tmp_path / "run"


# ── torch is loaded where it is needed ───────────────────────────────────────────────────────────────────────────────

WITHOUT_TORCH = """
from antipasto.app.cli import app
try:
    app()
except SystemExit as end:
    heavy = {"torch", "transformers", "peft", "trl", "numpy"} & set(sys.modules)
    print(f"ended with {end.code}, loaded {heavy or 'nothing'}")
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", MODEL, "--task", "adition"], 2),
        (["eval", "nowhere", "--promts", "3"], 2),
        (["map", MODEL, "--forms", "nowhere.jsonl", "--pairs", "p"], 2),
        (["watch", "no/such/model", "--rollouts", __file__, "--pairs", __file__], 2),
        (["watch", MODEL, "--rollouts", "nowhere-*.jsonl", "--pairs", __file__], 2),
        (["inspect", MODEL], 2),
        (["extract", MODEL, "--pairs", __file__, "--out", __file__], 2),
    ],
)
def test_help_and_wrong_words_load_no_torch(arguments: list[str], code: int) -> None:
    assert f"ended with {code}, loaded nothing" in script(WITHOUT_TORCH, *arguments).stdout


def test_the_public_names_are_there_in_the_command_too() -> None:
    """In a process that loads late; ``knobs`` is a function and a module."""
    code = """
import antipasto as ap
assert "torch" not in sys.modules
import antipasto.adapter.knobs
import antipasto.app.cli, antipasto.app.errors
with antipasto.app.errors.readable_errors():
    pass
assert callable(ap.knobs) and ap.AntiPastoConfig().peft_type in __import__("peft").PEFT_TYPE_TO_CONFIG_MAPPING
try:
    ap.nothing
except AttributeError as error:
    print(sorted(ap.__all__), error)
"""
    done = script(code)
    assert done.stdout.strip() == f"{sorted(ap.__all__)} module 'antipasto' has no attribute 'nothing'", done.stderr


def test_a_misspelt_flag_is_recognised(tmp_path: Path) -> None:
    assert "no option --stepz; did you mean '--steps'?" in refused(*TRAIN, "--stepz", "5")
    assert "no option --stepz; did you mean '--steps'?" in refused("train", "--stepz", "5")


def test_options_for_trl_need_no_model_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is in the file; the first unknown option is not the model."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": MODEL, "task": "addition"}))
    made = captured(monkeypatch, "--config", tmp_path / "run.yaml", "--trainer.warmup_steps", "3")
    assert (made.model, made.trainer) == (MODEL, {"warmup_steps": 3})


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("all-linear", "all-linear"),
        (r".*\.layers\.(0|1)\..*_proj", r".*\.layers\.(0|1)\..*_proj"),
    ],
)
def test_layers_by_name_or_by_pattern(typed: str, meant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed, in a file, and in the config that a run leaves, which repeats it."""
    words = (MODEL, "--task", "addition")
    made = captured(monkeypatch, *words, "--target-modules", typed)
    assert made.target_modules == meant
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"target_modules": typed}))
    assert captured(monkeypatch, *words, "--config", tmp_path / "config.yaml") == made
    (tmp_path / "config.yaml").write_text(made.to_yaml())
    assert captured(monkeypatch, "--config", tmp_path / "config.yaml") == made


def test_an_option_has_its_bounds_wherever_it_comes_from(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("generations: 1")
    assert "greater than or equal to 2" in fails(*TRAIN, "--generations", "1")
    assert "generations must be at least 2, got 1" in refused(*TRAIN, "--config", tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"deploy_fraction must be at most 1, got 1\.5"):
        TrainConfig(MODEL, "addition", deploy_fraction=1.5)


def captured(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> TrainConfig:
    """The config that `antipasto train` would start."""
    made: list[TrainConfig] = []
    monkeypatch.setattr("antipasto.app.train.run.start", lambda config, *_, **__: made.append(config) or Path("out"))
    succeeds("train", *arguments)
    return made[0]


# ── one process a folder ─────────────────────────────────────────────────────────────────────────────────────────────

HOLD = """
from pathlib import Path
from antipasto.app.locks import held
with held(Path(sys.argv[1]), Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a folder, until it is killed."""
    begin = "import sys; sys.argv = ['antipasto', *sys.argv[1:]]\n"
    other = subprocess.Popen(
        [sys.executable, "-c", begin + HOLD, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    try:
        yield other
    finally:
        other.kill()
        other.communicate()


def test_a_folder_that_is_written_into_is_refused_until_the_writer_is_dead(stopped: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    words = "Another antipasto process is writing into"
    with holder(new / ".lock") as other:
        assert f"{words} {new}" in refused(*TRAIN, "--out", new, *SMALL)
        assert f"{words} {new}" in refused("demo", "--steps", "1", "--out", new)
        other.kill()
        other.wait()
        assert (new / ".lock").exists()  # as a killed process leaves it
        succeeds(*TRAIN, "--out", new, *SMALL)
        assert not (new / ".lock").exists()
    with holder(stopped / ".lock"):
        assert f"{words} {stopped}" in refused("train", "--resume", stopped)
    with holder(new / ".lock"):
        assert f"{words} {new}" in refused("eval", new)
        succeeds("inspect", new)  # only looks
    with holder(tmp_path / ".shipped.lock"):
        assert f"{words} {tmp_path / 'shipped'}" in refused("export", new, "--out", tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


def test_only_one_process_watches_into_a_folder(tmp_path: Path) -> None:
    pairs = write_lines(tmp_path / "pairs.jsonl", addition.hack_pairs(8, seed=0))
    log = write_lines(tmp_path / "log.jsonl", [{"prompt": "h12+34=", "completion": "046"}] * 2)
    words = ["watch", MODEL, "--rollouts", log, "--pairs", pairs]
    out = tmp_path / "watch"  # the default
    out.mkdir()
    with holder(out / ".lock") as other:
        assert f"Another antipasto process is writing into {out}: wait" in refused(*words)
        assert [path.name for path in out.iterdir()] == [".lock"]
        other.kill()
        other.wait()
        succeeds(*words)
        assert not (out / ".lock").exists()
    # where nothing came of it
    words[1] = str(tmp_path / "no" / "model")
    refused(*words, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_resumed_run_removes_what_a_killed_one_had_begun_to_write(stopped: Path) -> None:
    mark = uuid.uuid4().hex
    (stopped / f".adapter-{mark}.tmp").mkdir()
    (stopped / f".adapter-{mark}.tmp" / "half").touch()
    (stopped / f".books.safetensors-{mark}.tmp").touch()
    mine = [f".mine-{mark}.tmp", ".adapter-mine.tmp"]
    for name in mine:
        (stopped / name).touch()
    succeeds("train", "--resume", stopped)
    assert sorted(path.name for path in stopped.glob(".*")) == sorted(mine)


# ── runs that end early ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("role", ["reward", "oracle", "detector"])
def test_a_function_that_exits_is_a_function_that_fails(role: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        f"""
import sys
from antipasto.tasks import Task

def fine(completions, **_):
    return [True] * len(completions)

def ends(completions, **_):
    sys.exit(0)

functions = {{name: fine for name in ("reward", "oracle", "detector")}} | {{{role!r}: ends}}
mine = Task("mine", train=[{{"prompt": "h12+34="}}] * 4, detects="all", max_completion_length=4, **functions)
"""
    )
    out = tmp_path / "run"
    text = refused("train", MODEL, "--task", f"{tmp_path / 'mine.py'}:mine", "--method", "plain", "--out", out, *SMALL)
    assert f"the {role} mine.ends raised SystemExit: 0" in text
    assert not (out / "adapter").exists()


def test_sys_exit_anywhere_else_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("antipasto.app.commands.cache_bases", lambda *_, **__: sys.exit(0))
    assert "something called sys.exit(0)" in refused("basis", MODEL)


def test_a_closed_terminal_saves_as_sigterm_does() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with Interrupts(Console(file=io.StringIO())) as interrupts:
            assert signal.getsignal(signal.SIGHUP) == signal.getsignal(signal.SIGTERM) == interrupts._on_signal
            signal.raise_signal(signal.SIGHUP)
            assert interrupts._asked
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        with Interrupts(Console(file=io.StringIO())) as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupts._asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_is_killed_before_its_first_step_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C stands for the kill: nothing is tidied up after it."""

    def killed(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("antipasto.app.train.run"), "RoutedGRPOTrainer", killed)
    out = tmp_path / "run"
    code, _ = run(*TRAIN, "--out", out, *SMALL)
    assert code == 130
    words = f"The run in {out} has not reached its first step. If it was stopped, there is nothing to continue: start it again"
    for command in (["train", "--resume", out], ["eval", out], ["export", out, "--out", tmp_path / "shipped"]):
        assert words in refused(*command)
    again = refused(*TRAIN, "--out", out, *SMALL)
    assert f"or start that run again: antipasto train --config {out / 'config.yaml'} --out ANOTHER" in again
    assert words in succeeds("inspect", out, columns=1000)
    succeeds("report", out)
    assert words in (out / "report.html").read_text()
    # and what cannot begin leaves the folder as it was
    monkeypatch.setattr(
        importlib.import_module("antipasto.app.train.run"), "RoutedGRPOTrainer", lambda **_: json.loads("{")
    )
    run(*TRAIN, "--out", tmp_path / "other", *SMALL)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "command", [["train", "--resume"], ["eval"], ["inspect"], ["report"], ["export", "--out", "shipped"]]
)
def test_a_run_folder_that_is_not_there_is_one_message(command: list[str], tmp_path: Path) -> None:
    assert refused(*command, tmp_path / "gone") == f"antipasto: There is no run folder {tmp_path / 'gone'}."


def test_a_report_of_an_interrupted_run_claims_nothing_about_its_routing(stopped: Path) -> None:
    (stopped / "books.safetensors").unlink()
    succeeds("report", stopped)
    page = (stopped / "report.html").read_text()
    assert "nothing was routed" not in page
    assert "There are no books of controls yet" in page


# ── extras ───────────────────────────────────────────────────────────────────────────────────────────────────────────

BASE_INSTALL = """
for name in ("scipy", "trl", "datasets", "matplotlib", "pandas", "pyarrow"):
    sys.modules[name] = None  # importing it is an ImportError, and looking for it finds nothing
from typer.testing import CliRunner
from antipasto.app.cli import app
model, pairs, out, run = sys.argv[1:]
for words in (
    ["--help"], ["basis", model], ["extract", model, "--pairs", pairs, "--out", out], ["inspect", out], ["inspect", run],
    ["eval", run], ["report", run], ["train", model, "--task", "addition"], ["train", "--resume", run], ["demo"],
    ["export", run, "--out", out + ".shipped", "--prompts", "2"],
):
    result = CliRunner().invoke(app, words)
    ours = result.exception is None or isinstance(result.exception, SystemExit)
    print(words[0], result.exit_code, ours or repr(result.exception), "" if result.exit_code == 0 else result.output)
"""


@pytest.mark.slow
def test_a_base_install_does_what_it_can_and_names_the_extra_for_the_rest(stopped: Path, tmp_path: Path) -> None:
    pairs = write_lines(tmp_path / "pairs.jsonl", addition.hack_pairs(8, seed=0))
    run_folder = tmp_path / "finished"
    shutil.copytree(stopped, run_folder)
    succeeds("train", "--resume", run_folder)
    some = [*answers("as trained", 3), *answers("reference", 2)]
    write_evaluation(conclude("addition", {"prompts": 40}, some), run_folder)
    done = script(BASE_INSTALL, MODEL, pairs, tmp_path / "v.safetensors", run_folder)
    lines = [line for line in done.stdout.splitlines() if line]
    assert [line.split()[:3] for line in lines] == [
        *(["--help", "0", "True"], ["basis", "0", "True"], ["extract", "0", "True"], ["inspect", "0", "True"]),
        *(["inspect", "0", "True"], ["eval", "2", "True"], ["report", "2", "True"], ["train", "2", "True"]),
        *(["train", "2", "True"], ["demo", "2", "True"], ["export", "0", "True"]),
    ], done.stdout + done.stderr
    assert "needs scipy, matplotlib, which are not installed: pip install 'antipasto[report]'" in lines[5]
    assert "needs trl, datasets, scipy, matplotlib, which are not installed: pip install 'antipasto[trl]'" in lines[7]


def requirements() -> dict[str, Requirement]:
    text = (ROOT / "pyproject.toml").read_text()
    found = [Requirement(line) for line in re.findall(r"\"([a-z0-9-]+>=[\d.,<>=]+)\"", text)]
    return {requirement.name: requirement for requirement in found}


def test_the_bound_of_trl_is_of_the_version_whose_private_methods_are_overridden() -> None:
    found = requirements()["trl"].specifier
    installed = importlib.metadata.version("trl")
    assert found.contains(installed)
    assert not found.contains("99.0")
    major, minor, *_ = installed.split(".")
    assert not found.contains(f"{major}.{int(minor) + 1}.0")  # a version that nobody has tried
    source = inspect.getsource(RoutedGRPOTrainer)
    called = set(re.findall(r"super\((?:RoutedGRPOTrainer, self)?\)\.(_\w+)\(", source)) - {"__init__"}
    assert called >= {"_generate_and_score_completions", "_calculate_rewards", "_compute_loss", "_generate"}
    assert all(callable(getattr(GRPOTrainer, name, None)) for name in called)


def test_everything_that_is_imported_is_declared() -> None:
    """Also what a dependency would bring anyway: it may cease to."""
    imported = set()
    for source in Path(ap.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add((node.module or "").partition(".")[0])
    optional = {"reasoning_gym", "bitsandbytes", "deepspeed"}  # there if something of theirs is asked for
    others = imported - set(sys.stdlib_module_names) - {"antipasto", "typing_extensions"} - optional
    names = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    assert {names.get(name, name) for name in others} <= set(requirements())


@pytest.mark.parametrize(
    ("option", "said"),
    [("use_liger_kernel", "liger"), ("use_vllm", "vllm"), ("deepspeed", "antipasto: the 'deepspeed>=")],
)
def test_a_missing_package_is_called_by_its_own_name(option: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{}")
    value = tmp_path / "ds.json" if option == "deepspeed" else "true"
    text = refused(*TRAIN, "--out", tmp_path / "run", f"--trainer.{option}", value, *SMALL)
    unset_hf_deepspeed_config()  # the half-made config that the error keeps alive would break every later model
    assert said in text.lower()
    assert "antipasto[trl]" not in text
    assert "metadata" not in text


def test_a_run_whose_adapter_fsdp_would_not_write_is_refused() -> None:
    plugin = SimpleNamespace(state_dict_type=StateDictType.SHARDED_STATE_DICT)
    trainer: Any = SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    with pytest.raises(ValueError, match="SHARDED_STATE_DICT, with which no adapter would be written: set"):
        check_saves_adapter(trainer)
    plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    check_saves_adapter(trainer)


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_librarys_error_names_a_file_with_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(inspection, "show", lambda *_: json.loads("{"))
    (tmp_path / "config.yaml").touch()
    text = refused("inspect", tmp_path)
    (file,) = tmp_path.glob("antipasto-*.txt")
    assert "Expecting property name" in text
    assert f"Traceback in {file}" in text
    assert "json/decoder.py" in file.read_text()
    monkeypatch.setenv("ANTIPASTO_TRACEBACK", "1")
    with pytest.raises(json.JSONDecodeError):
        run("inspect", tmp_path)


def test_whose_error_it_is() -> None:
    """Ours is what a ``raise`` in this package made; a function in C that fails in one of its lines is not."""
    cases = {"raise ValueError('x')": True, "int('x')": False, "import json; json.loads('{')": False}
    for code, ours in cases.items():
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (whatever it says)
            exec(compile(code, errors.__file__, "exec"), {})
        assert errors._is_ours(caught.value) is ours, code
    with pytest.raises(ValueError, match="somebody else") as caught:
        raise ValueError("of somebody else")
    assert not errors._is_ours(caught.value)


def test_every_warning_of_ours_is_heard_and_no_other() -> None:
    """Each is of the one class that the command line lets through; PEFT's own words, which a layer repeats, are PEFT's."""
    with warnings.catch_warnings(record=True) as said, quiet():
        warnings.warn("ours", AntiPastoWarning, stacklevel=1)
        warnings.warn("theirs", UserWarning, stacklevel=1)
    assert [str(one.message) for one in said] == ["ours"]
    package, calls = Path(ap.__file__).parent, 0
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"):
                continue
            if isinstance(node.args[0], ast.Constant) and node.args[0].value == "Already unmerged. Nothing to do.":
                continue
            calls += 1
            module = importlib.import_module(".".join(path.relative_to(package.parent).with_suffix("").parts))
            assert issubclass(getattr(module, ast.unparse(node.args[1])), AntiPastoWarning), path
    assert calls > 7


def test_a_warning_of_ours_is_one_line_without_code() -> None:
    code = (
        "import warnings; from antipasto.app import errors; from antipasto.names import AntiPastoWarning\n"
        "with errors.readable_errors(load=False):\n"
        "    warnings.warn('of 3\\n problems', AntiPastoWarning)\n"
        "    warnings.warn('theirs', UserWarning)\n"
        "warnings.warn('later', AntiPastoWarning)\n"
    )
    ours, theirs, later = script(code).stderr.splitlines()
    assert ours == "warning: of 3 problems"
    assert theirs.endswith("UserWarning: theirs")
    assert later.endswith("AntiPastoWarning: later")


def test_a_warning_about_the_base_is_heard() -> None:
    with pytest.warns(BaseWarning, match="another dtype"), quiet():
        warnings.warn("another dtype", BaseWarning, stacklevel=1)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", ["steps: !!bool foo", 'steps: !!int ""', "steps: !!timestamp foo", "steps: !!float x"])
def test_a_tag_that_does_not_fit_is_no_yaml(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    words = f"{tmp_path / 'config.yaml'} is not YAML"
    assert words in refused(*TRAIN, "--config", tmp_path / "config.yaml")
    assert words in refused("inspect", tmp_path)
    value = text.removeprefix("steps: ")
    assert "cannot be read as a value" in refused(*TRAIN, "--trainer.run_name", value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("1e-4", 1e-4),
        ("{min_lr: 1e-4, n: 010}", {"min_lr": 1e-4, "n": 10}),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("[a, 1]", ["a", 1]),
        ("'1e-4'", "1e-4"),
        ("~", None),
    ],
)
def test_a_value_means_what_it_looks_like(
    text: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line, in a file, and in the config that a run leaves, which repeats it."""
    words = (MODEL, "--task", "addition")
    made = captured(monkeypatch, *words, "--trainer.save_strategy", text)
    assert made.trainer == {"save_strategy": value}
    assert type(made.trainer["save_strategy"]) is type(value)
    (tmp_path / "config.yaml").write_text(f"trainer: {{save_strategy: {text}}}")
    assert captured(monkeypatch, *words, "--config", tmp_path / "config.yaml") == made
    (tmp_path / "config.yaml").write_text(made.to_yaml())
    assert captured(monkeypatch, "--config", tmp_path / "config.yaml") == made


def answers(arm: str, solved: int) -> list[Answer]:
    return [Answer(arm, i, None, "p", "c", 1, 0.0, float(i % 4 < solved), float(i % 4 < solved), {}) for i in range(40)]


@pytest.mark.parametrize("damage", ["x", 10**400, None, [1.0], True])
def test_an_estimate_that_is_no_number_is_refused(damage: Any, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 3")
    some = [*answers("as trained", 3), *answers("reference", 2)]
    write_evaluation(conclude("sums", {"prompts": 40}, some), tmp_path)
    assert len(read_evaluation(tmp_path).answers) == 80
    body = json.loads((tmp_path / "eval.json").read_text())
    body["arms"][0]["measures"]["solve"]["low"] = damage
    (tmp_path / "eval.json").write_text(json.dumps(body))
    for command in ("inspect", "report"):
        assert f"{tmp_path / 'eval.json'} cannot be read: low must be float" in refused(command, tmp_path)


def test_a_number_of_hundreds_of_digits_is_refused_in_every_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("steps: 3")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 10**400}) + "\n")
    assert "'reward' must be a number" in refused("report", tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "config.yaml").write_text(f"steps: 3\nthreshold: {10**400}")
    assert "'threshold' must be a number" in refused("report", tmp_path)
    with pytest.raises(ValueError, match="learning_rate must be float"):
        TrainConfig(MODEL, "addition", learning_rate=10**400)
    config = TrainConfig(MODEL, "addition")
    config.learning_rate = 10**5000  # type: ignore[assignment]  # more than Python writes
    with pytest.raises(ValueError, match="learning_rate must be float, got a value of type int"):
        check_types(config)


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
@pytest.mark.parametrize(
    "command",
    [
        *(
            ["train", "m", f"--{name}"]
            for name in ("learning-rate", "beta", "temperature", "threshold", "deploy-fraction")
        ),
        *(["eval", "r", f"--{name}"] for name in ("temperature", "margin")),
        ["extract", "m", "--pairs", "p", "--out", "o", "--heldout"],
        ["map", "m", "--forms", "f", "--heldout"],
        *(["watch", "m", "--rollouts", "f", f"--{name}"] for name in ("fail-above", "threshold")),
    ],
    ids=lambda command: " ".join(command),
)
def test_a_number_must_be_finite(command: list[str], value: str) -> None:
    assert f"'{command[-1]}'" in fails(*command, value)
    name = command[-1].removeprefix("--").replace("-", "_")
    if command[0] == "train" and name != "deploy_fraction":  # in a file too
        with pytest.raises(ValueError, match=f"{name} must be"):
            TrainConfig(MODEL, "addition", **{name: float(value)})


def test_a_tolerance_may_be_infinite_but_not_no_number(tmp_path: Path) -> None:
    assert "'--tolerance'" in fails("export", tmp_path, "--out", tmp_path / "x", "--tolerance", "nan")
    assert "is not a run folder" in refused("export", tmp_path, "--out", tmp_path / "x", "--tolerance", "inf")


@pytest.mark.timeout(60)
def test_a_reader_that_goes_away_ends_the_command_without_a_word() -> None:
    """As in ``antipasto … | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "antipasto", "basis", MODEL, "--dry-run"]
    ended = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    os.close(writer)
    assert (ended.stderr, ended.returncode) == ("", 1)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    words, file = f"{pipe} is a pipe or a device", tmp_path / "file"
    file.touch()
    for command in (
        *([*TRAIN, "--config", pipe], [*TRAIN, "--pairs", pipe], [*TRAIN, "--direction", pipe]),
        *(["extract", MODEL, "--pairs", pipe, "--out", "o"], ["inspect", pipe]),
        *(["map", MODEL, "--forms", pipe], ["map", MODEL, "--forms", file, "--pairs", pipe]),
        *(["map", MODEL, "--forms", file, "--monitor", pipe], ["watch", MODEL, "--rollouts", pipe, "--pairs", file]),
        ["watch", MODEL, "--rollouts", tmp_path / "*ipe", "--pairs", file],
        *(["watch", MODEL, "--rollouts", file, option, pipe] for option in ("--pairs", "--monitor")),
    ):
        assert words in refused(*command)


# ── what is printed ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_paths_are_printed_as_they_are(finished: Path, tmp_path: Path) -> None:
    """Also in what eval, inspect, report and export say of the run, and in what a resumed one says."""
    said = finished.with_name("said.txt").read_text()
    assert f"run folder: {finished}\n" in said
    assert f"next: antipasto eval '{finished}'\n" in said
    out = tmp_path / "[red]x[/] :smile:"
    shutil.copytree(finished, out)
    assert f"written: {out / 'eval.jsonl'}\n" in succeeds("eval", out, "--prompts", "8")
    assert f"report: {out / 'report.html'}\n" in succeeds("report", out)
    text = succeeds("inspect", out, columns=1000)
    assert "".join(str(out).split()) in "".join(text.split())  # a title is as wide as its table
    shipped = tmp_path / "[b]ships[/i]"
    text = succeeds("export", out, "--out", shipped, "--prompts", "2", columns=1000)
    assert f'AutoModelForCausalLM.from_pretrained("{shipped}")' in text
    assert out.name in text
    shutil.rmtree(out / "adapter")
    assert f"continuing from {out / 'checkpoint-1'}\n" in succeeds("train", "--resume", out)


def test_nothing_with_a_text_in_it_is_printed_as_markup() -> None:
    """An f-string that goes to rich is a `Text`, or goes through `say`."""
    to_rich = r"(?:console\.(?:print|status)\(|(?:title|caption)=|\.(?:title|caption) \+?=)\s*f[\"'].*"
    for source in Path(ap.__file__).parent.rglob("*.py"):
        for match in re.finditer(to_rich, source.read_text()):
            assert not re.search(r"\{(?!len\()", match[0]), f"{source}: {match[0]}"


def test_what_an_evaluation_says_is_printed_as_it_is(tmp_path: Path) -> None:
    """Names of arms, of kinds and of what is flagged; the book of one is empty, which the caption says."""
    arms = {"reference": 2, "as trained": 3, "deployed": 1, "random": 1, "[/x]": 3, "[bold]y :smile:": 1}
    some = [
        dataclasses.replace(answer, kind="[/k]", flags={"[/f]": answer.row % 2 == 0})
        for arm, solved in arms.items()
        for answer in answers(arm, solved)
    ]
    write_evaluation(conclude("[/t]", {"prompts": 40}, some), tmp_path)
    (tmp_path / "config.yaml").write_text("steps: 3")
    text = succeeds("inspect", tmp_path, columns=300)
    shown = io.StringIO()
    evaluate_job.show(read_evaluation(tmp_path), Console(file=shown, width=300))
    for said in (text, shown.getvalue()):
        assert "[/x]: its book is empty" in said
        assert all(word in said for word in ("[bold]y :smile:", "[/k] prompts", "[/f]"))
    live = Console(file=(drawn := io.StringIO()), force_terminal=True, width=300)
    with evaluate_job.asking(live, 40) as tell:
        tell(answers("[/x]", 3)[:2])
    assert "[/x]" in drawn.getvalue()


# ── what is said in the library's own words ──────────────────────────────────────────────────────────────────────────


def test_pairs_are_asked_for_where_pairs_are_meant(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from antipasto.tasks import Task\n"
        "mine = Task('mine', train=[{'prompt': 'h12+34='}] * 4, reward=lambda completions, **_: [1.0] * len(completions))\n"
    )
    text = refused("train", MODEL, "--task", f"{tmp_path / 'mine.py'}:mine", "--out", tmp_path / "r", *SMALL)
    assert "method penalty needs pairs or a detector" in text
    assert "--direction" not in text  # which a penalty does not go by
    assert "--method plain" in text
    where = ("--task", f"{tmp_path / 'mine.py'}:mine", "--out", tmp_path / "r", *SMALL)
    assert "needs pairs or a direction" in refused("train", MODEL, "--method", "route", *where)
    assert "method measure needs pairs or a direction" in refused("train", MODEL, "--method", "measure", *where)
    text = refused(
        "train", MODEL, "--task", f"{tmp_path / 'mine.py'}:mine", "--by", "detector", "--out", tmp_path / "r", *SMALL
    )
    assert "needs a detector" in text


def test_chats_need_a_chat_template(tmp_path: Path) -> None:
    (tmp_path / "chats.py").write_text(
        "from antipasto.tasks import Task\n"
        "rows = [{'prompt': [{'role': 'user', 'content': 'Say it.'}]}] * 4\n"
        "task = Task('chats', train=rows, reward=lambda completions, **_: [0.0] * len(completions))\n"
    )
    words = ["--task", f"{tmp_path / 'chats.py'}:task", "--method", "plain"]
    text = refused("train", MODEL, *words, "--out", tmp_path / "run", *SMALL)
    assert "'chats' are chats" in text
    assert f"the tokenizer of {MODEL} has no chat template" in text


@pytest.mark.parametrize("command", ["extract", "map", "watch", "train"])
@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template: use a chat model"),
        ("{{ raise_exception('no such role') }}", "rejects a prompt (no such role): use the roles"),
    ],
)
def test_pairs_that_are_chats_need_a_template_that_takes_them(
    command: str, template: str | None, words: str, tmp_path: Path
) -> None:
    model, pairs = tmp_path / "model", tmp_path / "pairs.jsonl"
    shutil.copytree(MODEL, model)
    if template is not None:
        (model / "chat_template.jinja").write_text(template)
    rows = [
        row | {"prompt": [{"role": "user", "content": row["prompt"]}], "form": "clean", "text": row["clean"]}
        for row in addition.hack_pairs(8, seed=0)
    ]
    write_lines(pairs, rows)
    log = write_lines(tmp_path / "log.jsonl", [{"prompt": "h12+34=", "completion": "046"}])
    text = refused(
        *(command, model, "--pairs", pairs),
        *{
            "extract": ["--out", tmp_path / "v"],
            "map": ["--forms", pairs],
            "watch": ["--rollouts", log],
            "train": ["--task", "addition", "--by", "score", "--out", tmp_path / "run", *SMALL],
        }[command],
    )
    assert words in text
    assert str(model) in text


@pytest.mark.parametrize(
    ("oracle", "exploit", "words"),
    [
        (0.5, 0.1, []),
        (0.5, 0.31, ["0.31 of the first"]),
        (0.01, 0.0, ["oracle's mean"]),
        (0.0, 0.9, ["0.90", "oracle's"]),
    ],
)
def test_a_start_that_exploits_or_an_oracle_that_says_no_is_told(
    oracle: float, exploit: float, words: list[str]
) -> None:
    console = Console(file=io.StringIO(), width=80)
    look = FirstLook(console)
    for logs in (
        {"loss": 1.0},
        {"reward": 1.0, "oracle": oracle, "exploit": exploit},
        {"reward": 1.0, "oracle": 0, "exploit": 1},
    ):
        look.on_log(None, None, None, logs=logs)
    said = console.file.getvalue()
    assert said.count("warning: ") == len(words)
    assert all(word in said for word in words)
