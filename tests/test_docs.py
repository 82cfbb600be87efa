"""The documentation is right: its code runs as it is printed, its links lead somewhere, every page is in the navigation."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_readme
import torch
import yaml

import antipasto as ap
from antipasto import tasks, trl

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LANGUAGES = ("python", "bash", "text", "")  # the first two are run; the others are shown
ELSEWHERE = {"README.md"}  # run by tests/test_readme.py, each block by itself
SHORTER: Mapping[str, Mapping[str, str]] = {
    "docs/index.md": {"antipasto demo": "antipasto demo --steps 2"},
    "docs/train-your-own.md": {
        "--steps 120": "--steps 2",
        "--prompts 16": "--prompts 2",
        "--generations 16": "--generations 4",
    },
    "docs/watching.md": {"max_steps=80": "max_steps=3"},
}
"""What the page says → what is run instead; the slow tests run the page as it stands."""


class Block(NamedTuple):
    """What is between two fences: the language, the code, and the line where it begins."""

    language: str
    code: str
    line: int


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block, also one that is indented; a fence that is never closed is an error."""
    opened: tuple[str, str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"^\s*(`{3,}|~{3,})(.*)$", line)
        if fence is None:
            lines.append(line)
        elif opened is None:
            opened, lines = (fence[1], fence[2].strip(), number), []
        elif fence[1] == opened[0] and not fence[2].strip():
            yield Block(opened[1], "\n".join(lines) + "\n", opened[2])
            opened = None
        else:
            lines.append(line)
    assert opened is None, f"{name(page)}, line {opened[2]}: the fence is never closed"


RUN = [page for page in PAGES if name(page) not in ELSEWHERE and any(b.language in LANGUAGES[:2] for b in blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_block_is_run_or_says_that_it_is_text(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{name(page)}, line {block.line}: a fence of {block.language!r}"


def test_the_blocks_that_are_run_elsewhere_are_all_run_there() -> None:
    readme = [block for block in blocks(ROOT / "README.md") if block.language in LANGUAGES[:2]]
    assert [block.code for block in readme] == test_readme.BLOCKS


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RUN, ids=name)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    if name(page) in ("docs/api/sandbox.md", "docs/code.md") and os.environ.get("ANTIPASTO_NO_SANDBOX"):
        pytest.skip("It needs bubblewrap (Debian: apt-get install bubblewrap); ANTIPASTO_NO_SANDBOX leaves it out.")
    output = run_page(page, tmp_path, SHORTER.get(name(page), {}))
    CHECKS.get(name(page), lambda *_: None)(tmp_path, output)


@pytest.mark.thorough
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [page for page in RUN if name(page) in SHORTER], ids=name)
def test_every_block_of_a_page_runs_as_it_stands(page: Path, tmp_path: Path) -> None:
    output = run_page(page, tmp_path, {})
    CHECKS.get(name(page), lambda *_: None)(tmp_path, output)
    if name(page) == "docs/train-your-own.md":
        said = " ".join(output.split())
        assert said.count("What ships exploits no more than the reference: of 500 answers, ") == 2  # mine: eval, export
        assert said.count("The direction removed the exploit: of 500 answers, ") == 2  # routed: eval, inspect


def run_page(page: Path, folder: Path, shorter: Mapping[str, str]) -> str:
    """Run a page's blocks in their order, and return what they print.

    Its Python shares a namespace, its bash the variables. A block of Python whose first line is ``# name.py`` is that file,
    which another block must use.
    """
    steps, runs, files = [], "", []
    for block in blocks(page):
        if block.language not in LANGUAGES[:2]:
            continue
        code = block.code
        for said, instead in shorter.items():
            code = code.replace(said, instead)
        if (named := re.match(r"# (\w+\.py)\n", code)) and block.language == "python":
            files.append(named[1])
            (folder / named[1]).write_text(code, encoding="utf-8")
            continue
        runs += code
        path = folder / f"line_{block.line}.{block.language}"
        if block.language == "python":
            steps.append(f"exec(compile(open({path.name!r}).read(), {path.name!r}, 'exec'), namespace)")
        else:
            code = f"set -aeuo pipefail\n[ -e .variables ] && . ./.variables\n{code}\nexport -p > .variables\n"
            steps.append(f"subprocess.run(['bash', {path.name!r}], check=True)")
        path.write_text(code, encoding="utf-8")
    for said in shorter:
        assert said in page.read_text(encoding="utf-8"), f"{name(page)} says nothing of {said!r}"
    for file in files:
        assert file in runs, f"{name(page)}: no block uses {file}"
    driver = ["import subprocess", "namespace = {'__name__': '__main__'}", *steps]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(driver)],
        cwd=folder,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TRACKIO_DIR": str(folder / "trackio"),  # else it writes to the user's cache
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{name(page)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def check_the_guide(folder: Path, output: str) -> None:
    """It shows every arm, and ends with a plain checkpoint."""
    for word in ("as trained", "deployed", "permuted", "exploit", "says !"):
        assert word in output
    assert "antipasto eval said of this run: " in output
    assert (folder / "shipped" / "model.safetensors").exists()
    assert not list((folder / "shipped").glob("adapter*"))


def check_the_maps(_: Path, output: str) -> None:
    """What docs/pairs.md prints and claims of its two maps, and the report above them, to the precision that it claims."""
    page = (DOCS / "pairs.md").read_text(encoding="utf-8")
    report = re.search(r"```text\n(What tells hack from clean.*?)```", page, re.DOTALL)
    assert report is not None
    assert report[1] in output
    said, got = (
        [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")] for text in (page, output)
    )
    got = [row for row in got if len(row) == 6]
    assert len(said) == len(got) == 2 * 9
    for printed, real in zip(said, got, strict=True):
        assert printed[0] == real[0]
        assert printed[5] == real[5]
        if real[0].strip() != "── threshold":
            assert float(real[2]) == pytest.approx(float(printed[2]), abs=2e-3)
            assert float(real[4]) == pytest.approx(float(printed[4]), abs=0.02)


def check_the_sandbox(_: Path, output: str) -> None:
    """It prints what the page says."""
    assert f"```text\n{output}```" in (DOCS / "api" / "sandbox.md").read_text(encoding="utf-8")


def check_the_coder(_: Path, output: str) -> None:
    """It prints what the page says, and says how many problems there are."""
    page = (DOCS / "code.md").read_text(encoding="utf-8")
    lines = output.splitlines(keepends=True)
    assert f"```text\n{''.join(lines[:-3])}```" in page
    quiet, several, squares = lines[-3:]
    assert "126 to train on, 67 others" in page
    assert quiet.startswith("code/exit 126 126 Answer with all of its code, in one block")
    assert several.startswith(f"code/exit+marker+file/unseen-file {3 * 126} 128 Your answer passes if ")
    assert ast.literal_eval(squares)[0][:2] == ["assert square(3) == 9", "assert square(0) == 0"]


CHECKS: Mapping[str, Callable[[Path, str], None]] = {
    "docs/train-your-own.md": check_the_guide,
    "docs/pairs.md": check_the_maps,
    "docs/api/sandbox.md": check_the_sandbox,
    "docs/code.md": check_the_coder,
}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lists_and_tables_begin_after_an_empty_line(page: Path) -> None:
    lines = ["", *prose(page).splitlines()]
    for before, line in itertools.pairwise(lines):
        if re.match(r"(\*|\d+\.) ", line):  # else the site shows stars in a running text
            assert re.match(r"((\*|\d+\.) | {2,}|$)", before), f"{name(page)}: {line}"
        if line.startswith("|"):
            assert before.startswith("|") or not before.strip(), f"{name(page)}: {line}"


# ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def prose(page: Path) -> str:
    """A page without its code."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^\s*(`{3,}).*?^\s*\1\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(page: Path) -> set[str]:
    """Of headings, as the site makes them; and of the names that the reference documents, with what they contain."""
    text = re.sub(r"^\s*(`{3,}).*?^\s*\1\s*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).encode("ascii", "ignore").decode()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        found.add(slug)
    return found | set(re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        where = (page.parent / path).resolve() if path else page
        assert where.is_relative_to(ROOT), f"{name(page)}: {target}"
        assert where.is_file(), f"{name(page)}: {target} is not a file"
        if page.is_relative_to(DOCS):
            assert where.is_relative_to(DOCS), f"{name(page)}: {target} is not part of the site"
        if anchor in ("", "only-light", "only-dark"):
            continue
        there = anchors(where)
        inside = anchor.startswith(tuple(f"{documented}." for documented in there if "." in documented))
        assert anchor in there or inside, f"{name(page)}: {where.name} has no {anchor}"


def test_pictures_come_for_both_palettes() -> None:
    for page in PAGES:
        found = re.findall(r"!\[([^\]]+)\]\(pictures/([\w-]+)-(light|dark)\.svg#only-(light|dark)\)", prose(page))
        assert all(of_file == of_palette for _, _, of_file, of_palette in found)
        light, dark = (
            [(alt, picture) for alt, picture, one, _ in found if one == which] for which in ("light", "dark")
        )
        assert light == dark, name(page)


def test_what_is_said_of_the_two_levels_is_what_the_picture_shows() -> None:
    spec = importlib.util.spec_from_file_location("draw_concepts", ROOT / "scripts" / "draw_concepts.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["draw_concepts"] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    plain, update, gradient = (script.trace(level) for level in (None, "update", "gradient"))
    assert torch.allclose(plain["θ"], update["θ"], atol=1e-6)
    assert not torch.allclose(plain["θ"], gradient["θ"], atol=0.1)
    assert torch.allclose(plain["θ"][-1], gradient["θ"][-1], atol=0.02)
    said = " ".join(prose(DOCS / "concepts.md").split())
    kept, taken, ended = (float(v) for v in (update["δS"][-1, 0], update["δS_hack"][-1, 0], gradient["δS"][-1, 0]))
    assert f".{kept * 100:.0f} of it" in said
    assert f".0{taken * 100:.0f} of the task" in said
    assert f"of the task, {float(gradient['δS_hack'][-1, 0]):.2f}, and what ships ends at −.{-ended * 100:.0f}" in said


def test_pictures_are_the_same_whenever_they_are_drawn() -> None:
    for picture in {*(DOCS / "pictures").glob("*-*.svg")} - {*(DOCS / "pictures").glob("rooms-*.svg")}:  # no plot
        text = picture.read_text(encoding="utf-8")
        assert "<dc:date>" not in text
        assert "#DejaVuSans-" in text, "text is drawn, so that it looks alike everywhere"


# ── the site ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def site() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for entry in nav.values():
            yield from leaves(entry)
    else:
        for entry in nav:
            yield from leaves(entry)


def test_every_page_is_in_the_navigation_once() -> None:
    named = list(leaves(site()["nav"]))
    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES if page.is_relative_to(DOCS))


def test_the_site_needs_nothing_from_elsewhere() -> None:
    config = site()
    assert config["theme"]["font"] is False
    for key in ("extra_css", "extra_javascript"):
        for path in config.get(key, []):
            assert (DOCS / path).is_file()
    assert "://" not in (DOCS / "extra.css").read_text(encoding="utf-8")


def test_the_reference_has_every_public_name() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"^::: ([\w.]+)$", pages, flags=re.MULTILINE))
    modules = {"antipasto.knobs": "antipasto.adapter.knobs.knobs"}  # functions of one name with their modules
    modules["antipasto.confounds"] = "antipasto.routing.confounds.confounds"
    wanted = {f"antipasto.{public}" for public in ap.__all__}
    assert {modules.get(name, name) for name in wanted} - documented == set()
    assert {f"antipasto.trl.{public}" for public in trl.__all__} - documented == {
        "antipasto.trl.GRPOConfig",  # TRL's own
        "antipasto.trl.GRPOTrainer",
    }
    assert {f"antipasto.tasks.{public}" for public in tasks.__all__} - documented == {
        "antipasto.tasks.REWARDED",  # numbers, which the page says
        "antipasto.tasks.SOLVED",
    }
    assert "antipasto.tasks.REWARDED" in pages
    assert tasks.REWARDED == tasks.SOLVED == 0.5


def test_the_command_line_is_as_its_page_says() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "write_cli_reference.py", "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_the_page_of_the_command_line_has_every_option() -> None:
    from typer.testing import CliRunner

    from antipasto.app.cli import app

    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## antipasto (\w+)\n(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL))
    assert sections.keys() == {command.name or command.callback.__name__ for command in app.registered_commands}
    for command, section in sections.items():
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        options = set(re.findall(r"(?<![\w`])--[a-z][a-z-]+(?= )", shown)) - {"--help"}
        assert options or command == "inspect"
        for option in options:
            assert option in section, f"{command}: {option}"
