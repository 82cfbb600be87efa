"""Lock a folder for one process at a time, and remove what a killed process left half written.

The lock is the kernel's (flock, through filelock). It ends with its process, however that ends: a lock file alone is no lock.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from antipasto.names import AntiPastoWarning

LOCK = ".lock"
_TEMPORARY = re.compile(r"\.(?P<name>.+)-[0-9a-f]{32}\.(?P<kind>tmp|old)")  # as `antipasto.files` names them


@contextmanager
def held(lock: Path, what: Path) -> Iterator[None]:
    """Context manager that holds a lock file and removes it at the end.

    Args:
        lock: the lock file; its folder must exist.
        what: the locked folder, for messages.

    Raises:
        ValueError: another process holds the lock.
        OSError: the lock file cannot be written.
    """
    holder = FileLock(lock)
    try:
        holder.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"Another antipasto process is writing into {what}: wait until it has ended, or choose another folder."
        ) from None
    except NotImplementedError:
        said = f"The file system of {what} has no locks: do not start two processes in it."
        warnings.warn(said, AntiPastoWarning, stacklevel=3)
        yield
        return
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows does not remove open files
            lock.unlink(missing_ok=True)  # while still held, so that a waiting process notices
        holder.release()


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """As `held`, with the lock file in the folder. It is created if need be, and removed at the end if it is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with held(folder / LOCK, folder):
            yield
    finally:
        with suppress(OSError):  # not empty
            folder.rmdir()


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove temporary files of a killed process. Call it while the folder is locked.

    Args:
        folder: the locked folder.
        names: the files and folders whose temporary versions are removed. Everything else is left alone.
    """
    for path in list(folder.iterdir()):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or found["name"] not in names:
            continue
        if found["kind"] == "old" and not (folder / found["name"]).exists():
            continue  # the only copy
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
