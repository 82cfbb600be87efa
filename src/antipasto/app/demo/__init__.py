"""`antipasto demo`: the job, and the story its numbers tell."""

from antipasto.app.demo.job import DemoConfig, run

__all__ = ["DemoConfig", "run"]
