"""Functions to write in Python, marked by graders with one flaw each: `antipasto.tasks.code.task`."""

FLAWS = ("overwrite", "equality", "exit", "marker", "file", "visible")
"""The graders, each named after its flaw. `antipasto.tasks.code.graders` says what each is."""

__all__ = ["FLAWS"]
