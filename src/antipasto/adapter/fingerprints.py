"""Identify the weights that a singular basis belongs to, and estimate how far two weights are apart from their fingerprints.

Coordinates in a singular basis are meaningless on another weight. Even for the same weight, a basis is only defined up to
sign, order and rotations among near-equal singular values. So adapters, directions and books carry, for each layer,

    sha256 of the weight W (o, i) · its shape and dtype · the SVD's version · digests of S and of (U, S, Vh) · a sketch of W

W may be a stack of weights (E, o, i), which share one fingerprint.

The sketch is n numbers z_j = a_jᵀ W b_j, with fixed random signs a_j (o,) and b_j (i,). They are linear in W and
E[(a_jᵀ D b_j)²] = ‖D‖_F². Two sketches therefore give the distance of two weights, without the weights:

    ‖W − W'‖_F² ≈ 1/n Σ_j (z_j − z'_j)²                                    (random projections: Johnson & Lindenstrauss 1984)

This distinguishes a rounded copy from a fine-tuned one. It also tells how much the difference D = W' − W rotates the basis.
To first order, directions j and k rotate into each other by u_jᵀ D v_k / (σ_j − σ_k) (Wedin 1972). For a random D, such as
rounding, this is about ε / gap_j, with ε = ‖D‖_F / √(o i) and gap_j the distance of σ_j from its neighbours. Directions that
rotate by more than 1/3 rad are *unsettled*: coordinates along them may not mean the same.
"""

from __future__ import annotations

import base64
import enum
import functools
import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from antipasto.files import digest
from antipasto.names import AntiPastoWarning

SKETCH_NUMBERS = 8
_LINE = re.compile(
    r"(?P<shape>\d+(?:x\d+){1,2}) (?P<dtype>\w+) sha256:(?P<weight>[0-9a-f]{64}) svd:(?P<svd>[\w.-]+) "
    r"S:(?P<S>[0-9a-f]{16}) basis:(?P<basis>[0-9a-f]{16}) sketch:(?P<sketch>[A-Za-z0-9+/]+=*)"
)
_SVD_ERROR = 1e-6  # how far S differs between libraries in fp32, relative to the largest singular value
_TURN = 1 / 3  # in radians
_SHOWN = 3  # layers named in a message


class BaseWarning(AntiPastoWarning):
    """A file's base weights match the model's up to rounding, but some of its coordinates may not mean the same here."""


class Likeness(enum.Enum):
    """How a weight relates to the one that a fingerprint was taken of."""

    SAME = "the same basis, of the same weight"
    OTHER_BASIS = "the same weight, decomposed by another library, version or device"
    ROUNDED = "the same weight, rounded to another dtype"
    OTHER = "another weight"


class Fingerprint(NamedTuple):
    """Identity of one weight and its singular basis.

    Attributes:
        shape: (o, i), or (E, o, i).
        dtype: the weight's dtype, such as ``"bfloat16"``, or its packing, such as ``"bnb_nf4"``.
        weight: sha256 of dtype, shape and bytes, in hex; of a quantised weight, of its codes and constants (`quantized`).
        svd: name and version of the algorithm.
        S: digest of the singular values.
        basis: digest of U, S and Vh.
        sketch: `SKETCH_NUMBERS` random projections of the weight, in fp64.
    """

    shape: tuple[int, ...]
    dtype: str
    weight: str
    svd: str
    S: str
    basis: str
    sketch: tuple[float, ...]

    def __str__(self) -> str:
        """Format as one line, which `parse` reads."""
        sketch = base64.b64encode(np.array(self.sketch, "<f8").tobytes()).decode()
        return f"{_shape(self)} {self.dtype} sha256:{self.weight} svd:{self.svd} S:{self.S} basis:{self.basis} sketch:{sketch}"

    @classmethod
    def parse(cls, line: str) -> Fingerprint:
        """Parse the output of ``str``.

        Raises:
            ValueError: the line is not a fingerprint.
        """
        match = _LINE.fullmatch(line) if isinstance(line, str) else None
        try:
            if match is None:
                raise ValueError("it is not of the form")
            sketch = tuple(np.frombuffer(base64.b64decode(match["sketch"], validate=True), "<f8").tolist())
            if len(sketch) != SKETCH_NUMBERS or not all(map(math.isfinite, sketch)):
                raise ValueError("its sketch is damaged")
        except ValueError as error:
            raise ValueError(f"Not a fingerprint of a layer: {line!r:.80} ({error}).") from error
        shape = tuple(map(int, match["shape"].split("x")))
        return cls(shape, match["dtype"], match["weight"], match["svd"], match["S"], match["basis"], sketch)

    def distance(self, other: Fingerprint) -> float:
        """Estimate ‖W − W'‖_F / ‖W‖_F, to within about a third; infinite if the shapes differ."""
        if self.shape != other.shape:
            return math.inf
        difference, size = math.dist(self.sketch, other.sketch), math.hypot(*self.sketch)
        return difference / size if size else (math.inf if difference else 0.0)

    def likeness(self, other: Fingerprint) -> Likeness:
        """How another weight relates to this one."""
        same = (self.weight, self.shape, self.dtype) == (other.weight, other.shape, other.dtype)
        if not same and (self.dtype == other.dtype or self.distance(other) > _rounding(self.dtype, other.dtype)):
            return Likeness.OTHER
        if self.basis == other.basis:
            return Likeness.SAME
        return Likeness.OTHER_BASIS if same else Likeness.ROUNDED

    def unsettled(self, other: Fingerprint, S: Tensor) -> int:
        """Count the singular directions that rotate by more than `_TURN` between the two weights' bases.

        If both are the same weight, decomposed by different means, ε is taken to be `_SVD_ERROR` σ₁.

        Args:
            other: fingerprint of the other weight.
            S: (r,) singular values, descending; or (E, r).
        """
        S = S.double()
        if self.weight == other.weight:
            coupling = _SVD_ERROR * S[..., :1]
        else:
            difference = math.dist(self.sketch, other.sketch) / math.sqrt(SKETCH_NUMBERS)  # about ‖D‖_F
            coupling = S.new_tensor(difference / math.sqrt(math.prod(self.shape)))
        gaps = F.pad(S[..., :-1] - S[..., 1:], (1, 1), value=math.inf)
        return int((torch.minimum(gaps[..., :-1], gaps[..., 1:]) < coupling / _TURN).sum())


def fingerprints_to_json(fingerprints: Mapping[str, Fingerprint]) -> str:
    """Serialise fingerprints for a file's metadata."""
    return json.dumps({name: str(one) for name, one in fingerprints.items()})


def fingerprints_from_json(text: str) -> dict[str, Fingerprint]:
    """Parse the output of `fingerprints_to_json`.

    Raises:
        ValueError: the text has another form.
    """
    lines = json.loads(text)
    if not isinstance(lines, dict):
        raise ValueError(f"fingerprints must be an object, layer by layer, got {type(lines).__name__}")
    return {name: Fingerprint.parse(line) for name, line in lines.items()}


def dtype_name(tensor: Tensor) -> str:
    """Name of a tensor's dtype, as in a fingerprint.

    Example:
        >>> dtype_name(torch.zeros(1))
        'float32'
    """
    return str(tensor.dtype).removeprefix("torch.")


def weight_digest(weight: Tensor) -> str:
    """sha256, in hex, of a weight's dtype, shape and bytes; the same on every device.

    Example:
        >>> weight_digest(torch.zeros(2, 2)) == weight_digest(torch.zeros(2, 2, dtype=torch.float16))
        False
    """
    known = _known.get()
    if known is None:
        return digest({"weight": weight.detach()})
    key = (weight.data_ptr(), weight.device, weight.dtype, tuple(weight.shape), weight.stride())
    if key not in known:  # keep the tensor alive, so that no other tensor can get its address
        known[key] = digest({"weight": weight.detach()}), weight.detach()
    return known[key][0]


_known: ContextVar[dict[Any, tuple[str, Tensor]] | None] = ContextVar("_known", default=None)


@contextmanager
def hashed_once() -> Iterator[None]:
    """Context that caches `weight_digest`, for code that does not write to weights: each weight is hashed at most once.

    Example:
        >>> with hashed_once():
        ...     weight_digest(torch.zeros(2, 2)) == weight_digest(torch.zeros(2, 2))
        True
    """
    token = _known.set({} if _known.get() is None else _known.get())
    try:
        yield
    finally:
        _known.reset(token)


def in_fp64(weight: Tensor) -> Tensor:
    """A weight in fp64, without gradient: on its device if that supports fp64, else on the CPU."""
    weight = weight.detach()
    return (weight if weight.device.type in ("cpu", "cuda") else weight.cpu()).double()


def sketch(weight: Tensor) -> tuple[float, ...]:
    """Compute `SKETCH_NUMBERS` random projections a_jᵀ W b_j of a weight (o, i), or of a stack as (E·o, i), in fp64."""
    W = in_fp64(weight).flatten(0, -2)
    a, b = (_signs(side, size).to(W.device) for side, size in zip(("out", "in"), W.shape, strict=True))
    return tuple(((W @ b) * a).sum(0).tolist())  # (o, i) (i, n) ⊙ (o, n), summed over o


@functools.lru_cache(maxsize=64)
def _signs(side: str, size: int) -> Tensor:
    """(size, n) of ±1 in fp64; the same on every machine and in every version, since files contain sketches."""
    count = size * SKETCH_NUMBERS
    stream = hashlib.shake_256(f"antipasto sketch 1 {side} {size}".encode()).digest((count + 7) // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8))[:count]
    return torch.from_numpy(bits.astype(np.float64)).mul(2).sub(1).reshape(size, SKETCH_NUMBERS)


def _rounding(*dtypes: str) -> float:
    """Upper bound of the error of rounding to the coarser of two dtypes, relative to ‖W‖_F.

    If one of them is a packing, that of fp32: a packed weight is the same as its own dequantised copy, and as nothing else.
    """
    known = [dtype for name in dtypes if isinstance(dtype := getattr(torch, name, None), torch.dtype)]
    return max(torch.finfo(dtype).eps for dtype in (known if len(known) == len(dtypes) else [torch.float32]))


# ── compare a file's base with the model's ───────────────────────────────────────────────────────────────────────────


def check_same_base(
    expected: Mapping[str, Fingerprint],
    found: Mapping[str, Fingerprint],
    S: Mapping[str, Tensor],
    *,
    what: str,
    remedy: str,
    carries_basis: bool = False,
) -> None:
    """Refuse a model with another base; warn if the base matches but some coordinates may not mean the same.

    Args:
        expected: layer name → the fingerprint that a file carries.
        found: layer name → the fingerprint of the model.
        S: layer name → (r,) singular values, or (E, r).
        what: what the file is, for messages: ``"The adapter in runs/a"``.
        remedy: what to do if the base is refused, for messages.
        carries_basis: whether the file has its own basis, so that nothing is unsettled.

    Raises:
        ValueError: the base is another one. The message names layers and says how they differ.

    Warns:
        BaseWarning: the base is the same up to rounding, or was decomposed elsewhere, and directions are unsettled by that.
    """
    wrong = {
        name: f"of shape {_shape(one)}, which is not among the adapted layers here"
        for name, one in expected.items()
        if name not in found
    }
    likeness = {name: one.likeness(found[name]) for name, one in expected.items() if name in found}
    wrong |= {name: _difference(expected[name], found[name]) for name, how in likeness.items() if how is Likeness.OTHER}
    if wrong:
        some = "; ".join(f"{name}: {how}" for name, how in list(wrong.items())[:_SHOWN])
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(
            f"{what} was made on another base: {len(wrong)} of its {len(expected)} layers differ. {some}{more}. "
            f"Coordinates in a singular basis are meaningless on other weights. {remedy}"
        )
    if not carries_basis:
        for how in (Likeness.ROUNDED, Likeness.OTHER_BASIS):
            _warn_of_unsettled(expected, found, S, [name for name, this in likeness.items() if this is how], how, what)


def _warn_of_unsettled(
    expected: Mapping[str, Fingerprint],
    found: Mapping[str, Fingerprint],
    S: Mapping[str, Tensor],
    names: list[str],
    how: Likeness,
    what: str,
) -> None:
    unsettled = sum(expected[name].unsettled(found[name], S[name]) for name in names)
    if not unsettled:
        return
    numbers = sum(S[name].numel() for name in names)
    dtypes = _dtypes(expected[names[0]], found[names[0]])
    warnings.warn(
        f"{what} was made on {how.value}{dtypes}, in {len(names)} of its {len(expected)} layers. {unsettled:,} of their "
        f"{numbers:,} singular values are so close to a neighbour that their directions may be rotated: coordinates there may "
        "not mean the same. An adapter saved with save_basis=True carries its own basis and does not have this problem.",
        BaseWarning,
        stacklevel=4,
    )


def _shape(fingerprint: Fingerprint) -> str:
    return "x".join(map(str, fingerprint.shape))


def _dtypes(expected: Fingerprint, found: Fingerprint) -> str:
    """Both dtypes, in brackets, if they differ."""
    return "" if expected.dtype == found.dtype else f" ({expected.dtype} there, {found.dtype} here)"


def _difference(expected: Fingerprint, found: Fingerprint) -> str:
    if expected.shape != found.shape:
        return f"shape {_shape(expected)} there, {_shape(found)} here"
    return f"other weights{_dtypes(expected, found)}, about {expected.distance(found):.2g} of their norm apart"
