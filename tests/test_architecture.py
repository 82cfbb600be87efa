"""docs/architecture.md: the picture is of the imports, no library room needs the application, the walks exist."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
WALKS = re.findall(r"`(antipasto(?:\.\w+)+)`", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("draw_architecture")


def test_the_library_does_without_the_application(draw: ModuleType) -> None:
    assert [pair for pair in draw.arrows() if pair[1].startswith("app") and not pair[0].startswith("app")] == []


def test_no_room_stands_in_a_circle_and_the_picture_is_of_today(
    draw: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["draw_architecture.py", "--check"])
    draw.main()
    assert capsys.readouterr().out.splitlines()[-1] == "shared"


def test_a_circle_is_found(draw: ModuleType) -> None:
    with pytest.raises(ValueError, match="cycle"):
        draw.floors({*draw.arrows(), ("adapter", "tasks")})


def test_every_file_has_a_line_in_its_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms: dict[str, set[str]] = {}
    for part, place in zip(text.split("**Application**"), ("", "app/"), strict=True):
        room = ""
        for first, files in re.findall(r"^\| (?:`([\w/]+/)`)? ?\| (`[^|]*) \|", part, re.MULTILINE):
            room = first or room
            rooms.setdefault(place + room, set()).update(re.findall(r"`(\w+\.py)`", files))
    code = ROOT / "src" / "antipasto"
    there: dict[str, set[str]] = {}
    for path in code.rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            room = f"{path.parent.relative_to(code).as_posix()}/".removeprefix("./").removeprefix("app/")
            there.setdefault(("app/" if "app" in path.parts else "") + room, set()).add(path.name)
    assert rooms["app/"] - {"__main__.py"} == there["app/"]
    assert {**rooms, "app/": there["app/"]} == there


def test_there_are_walks() -> None:
    assert len(WALKS) > 12


@pytest.mark.parametrize("name", WALKS)
def test_a_step_of_a_walk_is_there(name: str) -> None:
    module, inner = name, []
    while True:
        try:
            found: object = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            inner.insert(0, last)
    for attribute in inner:
        found = getattr(found, attribute)
