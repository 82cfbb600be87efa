"""The picture of docs/architecture.md: the rooms of src/antipasto, and which takes something from which, out of the imports.

    python scripts/draw_architecture.py          # writes docs/pictures/rooms-light.svg and rooms-dark.svg
    python scripts/draw_architecture.py --check  # says whether that was forgotten; writes nothing

A room is a package, or the modules at the top, *shared*; each job of the application is a room of its own. A room stands
above all that it imports. Imports for type checkers alone do not count; those inside of functions do.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE, PICTURES = ROOT / "src", ROOT / "docs" / "pictures"
SHARED, ENTRANCE = "shared", ("antipasto", "antipasto.public", "antipasto.__main__")
INKS = {"light": ("#303030", "#9e9e9e", "#e0f2f1", "#fbe9e7"), "dark": ("#dddddd", "#8a8d93", "#1d3a38", "#43281f")}
WIDTH, HEIGHT, GAP, ROW = 118, 44, 22, 84


def modules() -> dict[str, Path]:
    """Dotted name → file, of all that is in the package."""
    found = {}
    for path in sorted((SOURCE / "antipasto").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    """The room of a module: ``adapter``, ``app/report``, ``app`` for what is in no job, ``shared`` for what is at the top.

    Example:
        >>> [room(f"antipasto.{name}") for name in ("adapter.layer", "app.report.page", "app.runs", "files")]
        ['adapter', 'app/report', 'app', 'shared']
    """
    parts = module.split(".")[1:]
    if parts[:1] == ["app"]:
        if parts[1:2] in (["cli"], ["demo"]):  # made of other jobs
            return "/".join(parts[:2])
        inner = SOURCE.joinpath("antipasto", *parts[:2])
        return "/".join(parts[:2]) if len(parts) > 1 and inner.is_dir() else "app"
    return parts[0] if parts and SOURCE.joinpath("antipasto", parts[0]).is_dir() else SHARED


def imports(module: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that one imports, wherever in its text."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")
            base = ".".join([*above[: len(above) - node.level + 1], *([node.module] if node.module else [])])
            base = base if node.level else node.module or ""
            yield from (
                full if (full := f"{base}.{name.name}") in known else base for name in node.names if base in known
            )


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, but for what stands under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _statements(node)


def arrows() -> set[tuple[str, str]]:
    """(room, room that it imports)."""
    known = modules()
    found: set[tuple[str, str]] = set()
    for module, path in known.items():
        if module in ENTRANCE:
            continue
        for other in imports(module, path, known):
            if other not in ENTRANCE and room(other) != room(module):
                found.add((room(module), room(other)))
    return found


def floors(found: set[tuple[str, str]]) -> list[list[str]]:
    """Rooms by floor, the lowest first: each one above all that it imports.

    Raises:
        ValueError: rooms import each other in a circle; `graphlib.CycleError` names them.
    """
    below: dict[str, set[str]] = {}
    for one, other in sorted(found):
        below.setdefault(one, set()).add(other)
        below.setdefault(other, set())
    level: dict[str, int] = {}
    for name in TopologicalSorter(below).static_order():
        level[name] = 1 + max((level[other] for other in below[name]), default=-1)
    return [sorted(name for name, at in level.items() if at == floor) for floor in range(max(level.values()) + 1)]


def direct(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those arrows that no longer way replaces: what a room imports through another is not drawn."""
    below: dict[str, set[str]] = {}
    for floor in floors(found):
        for name in floor:
            under = {other for one, other in found if one == name}
            below[name] = under | {far for other in under for far in below[other]}
    return {(one, other) for one, other in found if not any(other in below[mid] for a, mid in found if a == one)}


def svg(found: set[tuple[str, str]], ink: str) -> str:
    """The picture: rooms as boxes on floors, an arrow from each to what it imports."""
    text, line, library, application = INKS[ink]
    by_floor = floors(found)
    widest = max(map(len, by_floor)) * (WIDTH + GAP) + GAP
    at: dict[str, tuple[float, float]] = {}
    for floor, names in enumerate(by_floor):
        left = (widest - len(names) * (WIDTH + GAP) + GAP) / 2
        top = (len(by_floor) - 1 - floor) * ROW + GAP
        at |= {name: (left + i * (WIDTH + GAP), float(top)) for i, name in enumerate(names)}
    height = len(by_floor) * ROW + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {widest:g} {height:g}" font-family="sans-serif">',
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{line}"/></marker></defs>',
    ]
    for one, other in sorted(direct(found)):
        (x1, y1), (x2, y2) = at[one], at[other]
        parts.append(
            f'<path d="M{x1 + WIDTH / 2:g} {y1 + HEIGHT:g} L{x2 + WIDTH / 2:g} {y2:g}" stroke="{line}" opacity="0.6" '
            'fill="none" marker-end="url(#tip)"/>'
        )
    for name, (x, y) in at.items():
        fill = application if name.startswith("app") else library
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{fill}" stroke="{line}"/>'
            f'<text x="{x + WIDTH / 2:g}" y="{y + 27:g}" text-anchor="middle" font-size="14" fill="{text}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="say whether the pictures are as they should be")
    check = parser.parse_args().check
    found = arrows()
    for ink in INKS:
        path, drawn = PICTURES / f"rooms-{ink}.svg", svg(found, ink)
        if not check:
            path.write_text(drawn, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != drawn:
            sys.exit(f"{path} does not show what the imports are: run python scripts/draw_architecture.py")
    for floor in reversed(floors(found)):
        print("  ".join(floor))


if __name__ == "__main__":
    main()
