"""Load a task by name, from a Python file or from a module."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from antipasto.options import near
from antipasto.tasks import addition, reasoning
from antipasto.tasks.code import FLAWS
from antipasto.tasks.task import Task, described


def _code(*flaws: str, leave_out: str | None = None) -> Task:
    from antipasto.tasks.code.task import task  # reads all problems

    return task(flaws, leave_out=leave_out)


BUILT_IN: Mapping[str, Callable[[], Task]] = {
    "addition": addition.task,
    "addition-even": functools.partial(addition.task, "even"),
    "addition-apart": functools.partial(addition.task, "apart"),
    "code": functools.partial(_code, *FLAWS),
    **{f"code/{flaw}": functools.partial(_code, flaw) for flaw in FLAWS},
    **{f"code/unseen-{flaw}": functools.partial(_code, *FLAWS, leave_out=flaw) for flaw in FLAWS},
}


def load_task(spec: str) -> Task:
    """Load a task.

        addition                      built in: addition, addition-even, addition-apart
        code                          built in: functions to write, under graders with a flaw each
        code/<flaw>                   built in: under one of them; code/unseen-<flaw>: under all, of which no pair shows one
        reasoning_gym/<dataset>       one of reasoning_gym's datasets
        path/to/my_task.py:name       a `Task` in a file, or a function without arguments that returns one
        package.module:name           the same in a module

    Every call runs the file again. As a script, it may import the modules in its folder, which are reloaded too. These come
    before installed packages while the file runs, and after them when one of its functions is called later.

    Raises:
        ValueError: there is no such built-in, file, module or name, it is not a task, or the user's code raises.

    Example:
        >>> len(load_task("addition").test)
        2000
    """
    if spec.startswith(reasoning.PREFIX):
        return reasoning.task(spec.removeprefix(reasoning.PREFIX))
    if spec in BUILT_IN:
        return BUILT_IN[spec]()
    source, name = _place(spec)
    if not source.endswith(".py"):
        return _named(_import_module(source), name, source)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    with _neighbours(path.resolve().parent):
        return _named(_import_file(path.resolve()), name, source)


def check_task_name(spec: str) -> None:
    """Check a task's name without running the user's code.

    Raises:
        ValueError: the name is malformed, or there is no such built-in or file.
    """
    if not spec.startswith(reasoning.PREFIX) and spec not in BUILT_IN:
        source, _ = _place(spec)
        if source.endswith(".py") and not Path(source).is_file():
            raise ValueError(f"There is no file {source}.")


def _place(spec: str) -> tuple[str, str]:
    """Split a task's name into its file or module and the name in it."""
    source, colon, name = spec.rpartition(":")
    if not colon:
        if spec.endswith(".py"):
            raise ValueError(f"{spec}: which task of this file? Write {spec}:name.")
        raise ValueError(
            f"There is no built-in task {spec!r}{near(spec, BUILT_IN, most=3)} Possible are {', '.join(BUILT_IN)}, "
            f"{reasoning.PREFIX}<dataset>, path/to/my_task.py:name and package.module:name."
        )
    if not source or not name:
        raise ValueError(f"{spec!r}: expected path/to/my_task.py:name or package.module:name.")
    return source, name


_BROUGHT: set[str] = set()
"""Modules that task files imported from their own folders."""


@contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """Make a folder's modules importable, and forget those of earlier calls, which may have changed."""
    for name in _BROUGHT:
        sys.modules.pop(name, None)
    _BROUGHT.clear()
    importlib.invalidate_caches()
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        # for functions that import when called; last, so that installed packages are found first
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        _BROUGHT.update(name for name in set(sys.modules) - before if _lies_in(sys.modules[name], folder))


def _lies_in(module: ModuleType, folder: Path) -> bool:
    """Whether a module's file is in the folder, but not in an environment inside it."""
    file = getattr(module, "__file__", None)
    return file is not None and folder in Path(file).parents and "site-packages" not in file


def _import_file(path: Path) -> ModuleType:
    # the digest tells files of the same name apart; the stem comes last because messages show it
    unique = f"antipasto_task_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}.{path.stem}"
    module_spec = importlib.util.spec_from_file_location(unique, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[unique] = module  # dataclasses and pickle look their module up
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[unique]
        raise ValueError(f"{path.name}{_line(error, str(path))}: importing it raised {described(error)}.") from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"There is no module {error.name}; a file is given as path/to/my_task.py:name.") from error
        found = _origin(name)
        raise ValueError(f"{name}{_line(error, found)}: importing it raised {described(error)}.") from error


def _origin(name: str) -> str | None:
    try:
        found = importlib.util.find_spec(name)
    except Exception:  # a parent package that fails
        return None
    return found.origin if found else None


def _named(module: ModuleType, name: str, source: str) -> Task:
    if not hasattr(module, name):
        there = [key for key, value in vars(module).items() if _task_like(key, value, module)]
        raise ValueError(f"{source} has no {name!r}. Possible tasks in it: {', '.join(there) or 'none'}.")
    value = getattr(module, name)
    if isinstance(value, Task):
        return value
    if not callable(value):
        raise ValueError(f"{source}:{name} must be a Task or a function that returns one, got {type(value).__name__}.")
    if needed := _required(value):
        raise ValueError(f"{source}:{name} needs arguments ({', '.join(needed)}); a task's function must take none.")
    try:
        made = value()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{Path(source).name}{_line(error, getattr(module, '__file__', None))}: {name}() raised {described(error)}."
        ) from error
    if not isinstance(made, Task):
        raise ValueError(f"{source}:{name}() must return a Task, got {type(made).__name__}.")
    return made


def _task_like(key: str, value: object, module: ModuleType) -> bool:
    if isinstance(value, Task):
        return True
    own = inspect.isfunction(value) and value.__module__ == module.__name__
    return own and not key.startswith("_") and not _required(value)  # type: ignore[arg-type]


def _required(function: Callable[..., object]) -> list[str]:
    """The arguments without a default."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions in C have no signature
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _line(error: BaseException, file: str | None) -> str:
    """``, line 3``: the line in the user's file, or nothing if the traceback does not pass through it."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f", line {lines[-1]}" if lines else ""
