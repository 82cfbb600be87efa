"""Files and folders that are there whole or not at all: written beside their place, flushed to disk, renamed into it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor


def write_bytes(path: str | Path, data: bytes, *, flush: bool = True) -> None:
    """Write a file, whole or not at all.

    Args:
        path: the file.
        data: what it is to hold.
        flush: wait until it is on the disk, so that not even a loss of power leaves another.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    try:
        # opened here and not by tempfile or safetensors, whose files only their owner may read
        with temporary.open("xb") as file:
            file.write(data)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str, *, flush: bool = True) -> None:
    """`write_bytes` of a text."""
    write_bytes(path, text.encode(), flush=flush)


def write_json(path: str | Path, value: Mapping[str, Any], *, flush: bool = True) -> None:
    """`write_bytes` of an object as JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n", flush=flush)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`write_bytes` of a safetensors file; tensors from any device."""
    write_bytes(path, save({name: t.cpu().contiguous() for name, t in tensors.items()}, metadata=dict(metadata)))


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes the other's place at the end, whole; after an exception it is removed instead.

    On Linux the two are exchanged at one stroke. Elsewhere there is a moment between two renames in which neither is there
    under that name, and the old one is beside it as ``.NAME-….old``.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{folder.name}-{uuid.uuid4().hex}"
    temporary, old = folder.with_name(f"{mark}.tmp"), folder.with_name(f"{mark}.old")
    temporary.mkdir()
    try:
        yield temporary
        for path in [*(p for p in temporary.rglob("*") if p.is_file()), temporary]:
            _flush(path)
        if not folder.exists():
            temporary.rename(folder)
        elif _exchange(temporary, folder):
            shutil.rmtree(temporary)
        else:
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places, where the system and the file system can do that (Linux: renameat2(2))."""
    if sys.platform != "linux":
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
