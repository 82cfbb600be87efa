"""What a router keeps of a run, on disk: the books, and what belongs to them.

    book/NAME/LAYER     (r,)   what a control would have moved; `OWN_BOOK` is the direction's own, of mode="measure"
    chance/LAYER        (r,)   the same of the router's own random direction
    direction           as `Direction.to_tensors` has it

Metadata: how many steps, the names of the books, the fingerprints of the weights that they are of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from antipasto.adapter.fingerprints import Fingerprint, fingerprints_from_json, fingerprints_to_json
from antipasto.files import read_tensors, write_tensors

OWN_BOOK = "direction"
"""The direction's own book, in ``measure`` mode; in ``route`` mode ``delta_s_hack`` is that book."""
CHANCE = "built-in chance"
"""The book of the router's own random direction."""

FORMAT = "antipasto-books-2"


@dataclass(frozen=True)
class Books:
    """What `Router.save` writes.

    Attributes:
        steps: how many were routed.
        books: what each control would have moved, name → layer → (r,); `CHANCE` among them.
        direction: as `Direction.to_tensors` has it; empty where there is none.
        fingerprints: layer → that of its weight.
    """

    steps: int
    books: dict[str, dict[str, Tensor]]
    direction: dict[str, Tensor]
    fingerprints: dict[str, Fingerprint]

    @property
    def controls(self) -> dict[str, dict[str, Tensor]]:
        """The books without `CHANCE`."""
        return {name: book for name, book in self.books.items() if name != CHANCE}

    def write(self, path: str | Path) -> None:
        """Write the file."""
        tensors = {
            f"{'chance' if name == CHANCE else f'book/{name}'}/{layer}": part
            for name, book in self.books.items()
            for layer, part in book.items()
        }
        tensors |= self.direction
        facts: Mapping[str, Any] = {"steps": self.steps, "books": sorted(self.controls)}
        metadata = {"format": FORMAT, "fingerprints": fingerprints_to_json(self.fingerprints)}
        metadata |= {key: json.dumps(value) for key, value in facts.items()}
        write_tensors(path, {key: tensor.clone() for key, tensor in tensors.items()}, metadata)


def read_books(path: str | Path) -> Books:
    """Read what `Router.save` wrote, without a router.

    Raises:
        ValueError: the file is not a book file, or is damaged; names it.
        OSError: the file cannot be read.
    """
    try:
        return _read(path)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a book file that can be used: {error}.") from error


def _read(path: str | Path) -> Books:
    tensors, metadata = read_tensors(path, FORMAT)
    steps, names = (json.loads(metadata[key]) for key in ("steps", "books"))
    fingerprints = fingerprints_from_json(metadata["fingerprints"])
    chance = {key.removeprefix("chance/"): t for key, t in tensors.items() if key.startswith("chance/")}
    if not chance or not isinstance(steps, int) or not isinstance(names, list):
        raise ValueError("it does not hold what books hold")
    for key, tensor in tensors.items():
        if _is_ours(key) and not (tensor.ndim == 1 and tensor.isfinite().all()):
            raise ValueError(f"{key} is not a vector of finite numbers")
    return Books(
        steps=steps,
        books={
            **{name: {layer: tensors[f"book/{name}/{layer}"] for layer in chance} for name in names},
            CHANCE: chance,
        },
        direction={key: tensor for key, tensor in tensors.items() if not _is_ours(key)},
        fingerprints=fingerprints,
    )


def _is_ours(key: str) -> bool:
    """Whether a tensor is not the direction's: a book's, or a momentum, which earlier versions wrote."""
    return key.startswith(("book/", "chance/", "momentum/"))
