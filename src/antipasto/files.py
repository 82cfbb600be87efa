"""Files and folders that are there whole or not at all: written beside their place, flushed to disk, renamed into it."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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
    """`write_bytes` of an object as JSON.

    Raises:
        ValueError: there is a NaN or an infinity in it; names the file.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} is not written: a number in it is NaN or infinite, and JSON has neither.") from error
    write_text(path, text + "\n", flush=flush)


def with_nulls(record: Mapping[str, Any]) -> dict[str, Any]:
    """A flat record with null where it has a NaN or an infinity: JSON has neither."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in record.items()}


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`write_bytes` of a safetensors file, with the digest of all that is in it; tensors from any device.

    Args:
        path: the file.
        tensors: by name.
        metadata: texts by name; ``"digest"`` is added.
    """
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    write_bytes(path, save(tensors, metadata=dict(metadata) | {"digest": digest(tensors, metadata)}))


def read_tensors(path: str | Path, form: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `write_tensors` wrote, if it still is that: tensors, and metadata without the digest.

    Args:
        path: the file.
        form: what the metadata must say under ``"format"``.

    Raises:
        ValueError: no safetensors file, of another format, or not the bytes that were written.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") != form:
                raise ValueError(f"its format is {metadata.get('format')!r}, expected {form!r}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
    except SafetensorError as error:
        raise ValueError(f"it is not a safetensors file, or is damaged: {error}") from error
    if metadata.pop("digest", None) != digest(tensors, metadata):
        raise ValueError("its contents do not match their digest: it is damaged, or was changed")
    return tensors, metadata


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """sha256, in hex, of the names, dtypes, shapes and bytes of some tensors, on whatever device, and of some texts.

    bf16 has no numpy dtype, so it is bytes that are hashed and not arrays.
    """
    result = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        result.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if metadata:
        result.update(json.dumps(metadata, sort_keys=True).encode())
    return result.hexdigest()


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes the other's place at the end, whole; after an exception it is removed instead.

    On Linux the two are exchanged in one step. Elsewhere there is a moment between two renames in which neither is there
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
            try:
                temporary.rename(folder)
            except BaseException:
                old.rename(folder)
                raise
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
