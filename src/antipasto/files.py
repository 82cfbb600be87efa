"""Atomic writes of files and folders: write to a temporary name, flush to disk, rename."""

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
    """Write a file atomically.

    Args:
        flush: fsync, so that the file survives a loss of power.

    Raises:
        OSError: it cannot be written. An earlier file at this path is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    try:
        # not by tempfile or safetensors: only the owner may read the files that they create
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
    """Write a text file atomically, as `write_bytes`."""
    write_bytes(path, text.encode(), flush=flush)


def write_json(path: str | Path, value: Mapping[str, Any], *, flush: bool = True) -> None:
    """Write a JSON file atomically, as `write_bytes`.

    Raises:
        ValueError: a number is NaN or infinite; names the file.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} was not written: it has a NaN or an infinity, and JSON allows neither.") from error
    write_text(path, text + "\n", flush=flush)


def with_nulls(record: Mapping[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinities in a flat record by None, because JSON allows neither."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in record.items()}


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, with a digest of its contents. Tensors may be on any device.

    Args:
        metadata: texts by name; ``"digest"`` is added.
    """
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    write_bytes(path, save(tensors, metadata=dict(metadata) | {"digest": digest(tensors, metadata)}))


def read_tensors(path: str | Path, form: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `write_tensors` wrote and check its digest.

    Args:
        form: the expected value of ``"format"`` in the metadata.

    Returns:
        The tensors, and the metadata without the digest.

    Raises:
        ValueError: it is not a safetensors file, has another format, or does not match its digest.
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


@contextmanager
def readable_as(what: str, path: str | Path) -> Iterator[None]:
    """Context that reads a file: wrong contents become a ValueError that names it; an OSError passes."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a valid {what}: {error}.") from error


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """sha256 in hex over names, dtypes, shapes and bytes of tensors, and over texts. Tensors may be on any device."""
    result = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        result.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)  # numpy has no bf16
    if metadata:
        result.update(json.dumps(metadata, sort_keys=True).encode())
    return result.hexdigest()


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``folder`` at the end, atomically. After an exception it is removed instead.

    On Linux the two folders are exchanged in one system call. Elsewhere it takes two renames. In between, no folder has that
    name, and the old one is next to it as ``.NAME-….old``.

    Raises:
        OSError: it cannot be written. An earlier folder is unchanged.
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
    """Swap two paths atomically. Returns False where the system or the file system cannot (Linux only: renameat2(2))."""
    if sys.platform != "linux":
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
