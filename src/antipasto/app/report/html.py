"""What every page has: one HTML file with its style, script and figures, and nothing from elsewhere.

The page asks nothing of any server: its content security policy allows the two inline blocks by their hashes and nothing else.
jinja2 escapes every expression of the template; before that, `readable` spells out what would act on a browser or a writer
without being seen. ``frame.html`` is what a page stands in, ``blocks.html`` the parts that pages share.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from antipasto.app.report import tables
from antipasto.app.report.answers import outcome
from antipasto.app.report.plots import LEVELS, class_rules
from antipasto.app.report.rollouts import LONGEST
from antipasto.terminal import plain

ON_PAPER = 8
"""How many rollouts of a list, and rows of answers, are printed."""


def page_of(template: str, **values: Any) -> str:
    """A page.

    Args:
        template: extends ``frame.html``.
        **values: what it shows; ``title`` and ``kind``, what sort of page it is, belong to every one.
    """
    css, script = (
        files("antipasto.app.report").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    css += class_rules()
    return (
        _environment()
        .get_template(template)
        .render(
            css=Markup(css),  # ours, and inside an element whose text HTML does not unescape
            script=Markup(script),
            policy=f"default-src 'none'; style-src {_hash(css)}; script-src {_hash(script)}; {_NOTHING_ELSE}",
            version=version("antipasto"),
            levels=LEVELS,
            on_paper=ON_PAPER,
            longest=LONGEST,
            **values,
        )
    )


_NOTHING_ELSE = "base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        finalize=lambda value: readable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        loader=PackageLoader("antipasto.app.report", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"marked": marked, "turns": turns, "outcome": outcome, "number": tables.number}
    environment.globals["colour_of"] = tables.colour_of
    return environment


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def readable(text: str) -> str:
    r"""Text as it is, but for what is not seen: control characters, bidirectional marks and lone surrogates, spelled out.

    Line breaks and tabs stay.

    Example:
        >>> print(readable("a\n\u202eb"))
        a
        \u202eb
    """
    return "".join(part if part in ("\n", "\t") else plain(part) for part in _KEPT.split(text))


_KEPT = re.compile(r"([\n\t])")


def marked(text: str) -> Markup:
    """`readable` as HTML, with what was spelled out set apart from text that says the same."""
    parts: list[Markup] = []
    run: list[str] = []
    for ch in text:
        seen = readable(ch)
        if seen == ch:
            run.append(ch)
        else:
            parts += [escape("".join(run)), Markup('<span class="esc">{}</span>').format(seen)]
            run = []
    return Markup("").join([*parts, escape("".join(run))])


class Turn(NamedTuple):
    """What one says in a chat; of a plain text, all of it, by nobody.

    Attributes:
        left_out: how many characters stand between ``head`` and ``tail``, where it was too long.
    """

    role: str | None
    head: str
    left_out: int
    tail: str


def turns(said: Any) -> list[Turn]:
    """A text or a chat, turn by turn, none longer than `LONGEST`."""
    if isinstance(said, list) and said and all(isinstance(turn, Mapping) for turn in said):
        return [
            _turn(str(turn.get("role", "?")), turn["content"] if set(turn) == {"role", "content"} else dict(turn))
            for turn in said
        ]
    return [_turn(None, said)]


def _turn(role: str | None, content: Any) -> Turn:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    if len(text) <= LONGEST:
        return Turn(role, text, 0, "")
    half = LONGEST // 2
    return Turn(role, text[:half], len(text) - 2 * half, text[-half:])
