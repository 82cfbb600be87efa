"""Render a page: one HTML file with its style, script and figures inside.

The page loads nothing from a server: its content security policy allows only the two inline blocks, by their hashes. jinja2
escapes every expression of the template; before that, `readable` spells out invisible characters. ``frame.html`` is the base
template, ``blocks.html`` has shared macros.
"""

from __future__ import annotations

import base64
import hashlib
import json
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
"""Number of rollouts per list, and of rows of answers, that are printed on paper."""


def page_of(template: str, **values: Any) -> str:
    """Render a template as a complete page.

    Args:
        template: extends ``frame.html``.
        **values: for the template; every page needs ``title`` and ``kind``, ``"report"`` or ``"watch"``.
    """
    css, script = (
        files("antipasto.app.report").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    css += class_rules()
    return (
        _environment()
        .get_template(template)
        .render(
            css=Markup(css),  # ours; HTML does not unescape the text of <style>
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
    r"""Spell out invisible characters: control characters, bidirectional marks and lone surrogates.

    Line breaks and tabs stay.

    Example:
        >>> print(readable("a\n\u202eb"))
        a
        \u202eb
    """
    return "".join(ch if ch in "\n\t" else plain(ch) for ch in text)


def marked(text: str) -> Markup:
    """`readable` as HTML, with the spelled-out characters marked."""
    escaped = Markup('<span class="esc">{}</span>').format
    return Markup("").join(escape(ch) if ch == readable(ch) else escaped(readable(ch)) for ch in text)


class Turn(NamedTuple):
    """One message of a chat, or a plain text with role None.

    Attributes:
        left_out: number of characters cut out between ``head`` and ``tail``.
    """

    role: str | None
    head: str
    left_out: int
    tail: str


def turns(said: Any) -> list[Turn]:
    """Split a text or a chat into turns, each cut to `LONGEST`."""
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
