"""docs/compatibility.md names tests that are there, and versions that are tested."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "compatibility.md").read_text()


def test_every_test_that_is_named_is_there() -> None:
    there = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT))
    assert len(named) > 40
    assert named <= there


def test_the_versions_are_those_of_the_constraints() -> None:
    constraints = {
        which: dict(line.split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line)
        for which, name in (("oldest", "constraints-oldest.txt"), ("newest", "constraints.txt"))
    }
    rows = re.findall(
        r"^\| (torch|transformers|peft|trl|accelerate|datasets) \| ([\d.]+) \| ([\d.]+) \|", DOCUMENT, re.MULTILINE
    )
    assert len(rows) == 6
    wanted = (ROOT / "pyproject.toml").read_text()
    for name, oldest, newest in rows:
        assert constraints["oldest"][name] == oldest
        assert constraints["newest"][name] == newest
        lowest = re.search(rf"\"{name}>=([\d.]+)[\",]", wanted)
        assert lowest is not None
        assert f"{oldest}.".startswith(f"{lowest[1]}.")
