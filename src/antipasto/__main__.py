"""``python -m antipasto``, the same as ``antipasto``."""

from antipasto.app.cli import app

app(prog_name="antipasto")
