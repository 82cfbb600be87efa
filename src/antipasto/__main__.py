"""``python -m antipasto``, the same as ``antipasto``."""

from antipasto.cli import app

app(prog_name="antipasto")
