"""The files that a program left, read as what they are: bytes that somebody else arranged.

Nothing is followed: no symlink, in no part of a path. Nothing is opened but regular files, so that no FIFO can block and no
device can act. A file of two names is refused, as one of them may be elsewhere. All of it is dead by now, so what is looked at
is what is read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import PurePosixPath

_NO_FOLLOW = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


def read_left(folder: int, names: Iterable[str], most: int) -> tuple[Mapping[str, bytes], Mapping[str, str]]:
    """Files by name, and why others of the names are refused.

    Args:
        folder: the open folder that they are in.
        names: relative paths.
        most: bytes that a file may have.
    """
    files, refused = dict[str, bytes](), dict[str, str]()
    for name in names:
        try:
            files[name] = _read(folder, PurePosixPath(name).parts, most)
        except _RefusedError as error:
            refused[name] = str(error)
        except OSError as error:
            refused[name] = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
    return files, refused


class _RefusedError(Exception):
    """Why a file is not read."""


def _read(folder: int, parts: tuple[str, ...], most: int) -> bytes:
    with ExitStack() as held:
        for part in parts[:-1]:
            found = os.stat(part, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                raise _RefusedError(f"{part} is {_kind(found.st_mode)} and no folder")
            folder = os.open(part, _NO_FOLLOW | os.O_DIRECTORY, dir_fd=folder)
            held.callback(os.close, folder)
        found = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise _RefusedError(f"{_kind(found.st_mode)} and no regular file")
        if found.st_nlink > 1:
            raise _RefusedError("a file of more than one name")
        if found.st_size > most:
            raise _RefusedError(f"larger than {most} bytes")
        file = os.open(parts[-1], _NO_FOLLOW | os.O_NONBLOCK, dir_fd=folder)
        with os.fdopen(file, "rb") as opened:
            return opened.read(most)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "a symlink", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return kinds.get(stat.S_IFMT(mode), "a device" if stat.S_IFMT(mode) in (stat.S_IFBLK, stat.S_IFCHR) else "a file")
