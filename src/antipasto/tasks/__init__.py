"""Tasks: prompts, a reward that can be fooled, and an oracle that cannot."""

from antipasto.tasks.loading import load_task
from antipasto.tasks.task import REWARDED, SOLVED, Task, TaskError, completion_text, is_exploit, is_solved

__all__ = ["REWARDED", "SOLVED", "Task", "TaskError", "completion_text", "is_exploit", "is_solved", "load_task"]
