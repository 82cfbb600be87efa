"""An extension of mkdocstrings' parser: two words of our docstrings, in the dialect that it reads.

``Example:`` is the section that it knows as ``Examples:``; it would make a box of running text out of it. A ``::`` before an
indented block is reStructuredText; in Markdown the indentation is enough.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
