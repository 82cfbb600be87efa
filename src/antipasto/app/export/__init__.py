"""`antipasto export`: write what ships as files that do not need this library, and check them in a process without it."""

from antipasto.app.export.job import export_run

__all__ = ["export_run"]
