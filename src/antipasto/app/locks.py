"""One process at a time: a folder that is written into is held, and what a killed process left half written is removed.

The lock is the kernel's (flock, through filelock): it ends with the process that holds it, however that ends. A lock file that
is found is not a lock.
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

_TEMPORARY = re.compile(r"\.(?P<name>.+)-[0-9a-f]{32}\.(?P<kind>tmp|old)")  # as `antipasto.files` names them


@contextmanager
def held(lock: Path, what: Path) -> Iterator[None]:
    """Hold a lock file for a while.

    Args:
        lock: the file; its folder must be there. It is gone at the end.
        what: what it stands for, in messages.

    Raises:
        ValueError: another process holds it.
        OSError: it cannot be written.
    """
    holder = FileLock(lock)
    try:
        holder.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"Another antipasto process is writing into {what}: wait until it has ended, or choose another folder."
        ) from None
    except NotImplementedError:
        said = f"No locks on the file system of {what}: nothing may be started twice there."
        warnings.warn(said, AntiPastoWarning, stacklevel=3)
        yield
        return
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows removes no file that is open
            lock.unlink(missing_ok=True)  # still held: whoever waits for it sees that it is gone
        holder.release()


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove what a process that was killed had begun to write; call it while the folder is held.

    Args:
        folder: where.
        names: of the files and folders that were to be written there. What else is in the folder is left alone.
    """
    for path in list(folder.iterdir()):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or found["name"] not in names:
            continue
        if found["kind"] == "old" and not (folder / found["name"]).exists():
            continue  # the only one there is
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
