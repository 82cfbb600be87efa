"""Files that are there whole or not at all: written beside their place, flushed to disk, renamed into it."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    try:
        # opened here and not by tempfile or safetensors, whose files only their owner may read
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of a text."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """`write_bytes` of an object as JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`write_bytes` of a safetensors file; tensors from any device."""
    write_bytes(path, save({name: t.cpu().contiguous() for name, t in tensors.items()}, metadata=dict(metadata)))
