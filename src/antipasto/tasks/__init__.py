"""Tasks: prompts with a reward that can be fooled, and the truth beside it."""

from antipasto.tasks.loading import load_task
from antipasto.tasks.task import REWARDED, SOLVED, Task, TaskError, completion_text, is_exploit, is_solved

__all__ = ["REWARDED", "SOLVED", "Task", "TaskError", "completion_text", "is_exploit", "is_solved", "load_task"]
