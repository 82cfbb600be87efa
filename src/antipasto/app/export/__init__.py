"""`antipasto export`: what ships of a run, as files that need nothing of this library, checked by a process without it."""

from antipasto.app.export.job import export_run

__all__ = ["export_run"]
