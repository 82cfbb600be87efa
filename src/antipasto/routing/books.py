"""The file in which a router saves its books.

The *book* of a direction is the running sum of what its gate moved, or would have moved, into the quarantine.

    book/NAME/LAYER     (r,)   the book of a control, or of the direction itself (`OWN_BOOK`, with mode="measure")
    chance/LAYER        (r,)   the book of the router's own random direction
    direction           as in `Direction.to_tensors`

Metadata: the number of steps, the names of the books, and the fingerprints of the weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from antipasto.adapter.fingerprints import Fingerprint, fingerprints_from_json, fingerprints_to_json
from antipasto.files import read_tensors, readable_as, write_tensors

OWN_BOOK = "direction"
"""Name of the direction's own book in ``measure`` mode. In ``route`` mode, ``delta_s_hack`` is that book."""
CHANCE = "built-in chance"
"""Name of the book of the router's own random direction."""

FORMAT = "antipasto-books-2"


@dataclass(frozen=True)
class Books:
    """Contents of the file that `Router.save` writes.

    Attributes:
        steps: number of routed steps.
        books: name → layer → (r,), including `CHANCE`.
        direction: as in `Direction.to_tensors`; empty if there is none.
        fingerprints: layer → fingerprint of its weight.
    """

    steps: int
    books: dict[str, dict[str, Tensor]]
    direction: dict[str, Tensor]
    fingerprints: dict[str, Fingerprint]

    @property
    def controls(self) -> dict[str, dict[str, Tensor]]:
        """All books except `CHANCE`."""
        return {name: book for name, book in self.books.items() if name != CHANCE}

    def write(self, path: str | Path) -> None:
        """Write the file, which `read_books` reads."""
        tensors = {
            f"{'chance' if name == CHANCE else f'book/{name}'}/{layer}": part
            for name, book in self.books.items()
            for layer, part in book.items()
        }
        tensors |= self.direction
        metadata = {
            "format": FORMAT,
            "fingerprints": fingerprints_to_json(self.fingerprints),
            "steps": json.dumps(self.steps),
            "books": json.dumps(sorted(self.controls)),
        }
        write_tensors(path, {key: tensor.clone() for key, tensor in tensors.items()}, metadata)


def read_books(path: str | Path) -> Books:
    """Read a file that `Router.save` wrote, without a router.

    Raises:
        ValueError: the file is not a book file, or is damaged. The message names it.
        OSError: the file cannot be read.
    """
    with readable_as("book file", path):
        tensors, metadata = read_tensors(path, FORMAT)
        steps, names = (json.loads(metadata[key]) for key in ("steps", "books"))
        fingerprints = fingerprints_from_json(metadata["fingerprints"])
        chance = {key.removeprefix("chance/"): t for key, t in tensors.items() if key.startswith("chance/")}
        if not chance or not isinstance(steps, int) or not isinstance(names, list):
            raise ValueError("its steps, book names or chance book are missing or have the wrong type")
        for key, tensor in tensors.items():
            if _is_ours(key) and not (tensor.ndim == 1 and tensor.isfinite().all()):
                raise ValueError(f"{key} is not a vector of finite numbers")
        books = {name: {layer: tensors[f"book/{name}/{layer}"] for layer in chance} for name in names}
        for name, book in books.items():
            for layer, part in book.items():
                if len(part) != len(chance[layer]):
                    raise ValueError(
                        f"book {name!r} has {len(part)} numbers for {layer}, and others have {len(chance[layer])}"
                    )
        return Books(
            steps=steps,
            books={**books, CHANCE: chance},
            direction={key: tensor for key, tensor in tensors.items() if not _is_ours(key)},
            fingerprints=fingerprints,
        )


def _is_ours(key: str) -> bool:
    """Whether a tensor is part of a book (or a momentum, which earlier versions wrote) and not of the direction."""
    return key.startswith(("book/", "chance/", "momentum/"))
