"""The singular basis of one weight, and its cache on disk.

    W = U diag(S) Vh        W (o, i), U (o, r), S (r,) descending, Vh (r, i), r = min(o, i)

A stack of weights (E, o, i), as of experts, has one basis per weight: U (E, o, r), S (E, r), Vh (E, r, i), in one file.

Method. For o ≥ i, ``eigh`` of the fp64 Gram matrix WᵀW gives V and S², and U = W V / S. For o < i, the transpose is
decomposed. This is about as fast as LAPACK's fp32 SVD and several times more accurate, but it squares the condition number:
a weight with S_min < 1e-4 S_max goes through LAPACK's SVD in fp64 instead. The sign of a singular vector is arbitrary; it is
fixed by making the entry of largest magnitude in each row of Vh positive, so that the same weight gives the same basis.

Cache. A file holds the top k directions of one weight, with U and Vh as they are used: rounded to the dtype of the layer's
products. S keeps the basis's own dtype. Its name says what it holds:

    <sha256>.safetensors                   all r directions in the basis's own dtype, fp32, or fp64 for an fp64 weight
    <sha256>-r64-bfloat16.safetensors      the top 64, with U and Vh in bf16; either part may be absent

with the hash of the weight's dtype, shape and bytes. A request is served from the smallest file that holds at least its
directions, in its dtype or unrounded, and only what it takes is copied. Without such a file the basis is computed, and what
was asked for is written. Every file carries the digests of the whole basis, all directions and unrounded, so that the
`Fingerprint` of a layer does not depend on what its basis was read from.

Each file also carries a digest of its own tensors, which is checked at every read. If a file is truncated, corrupted, of the
wrong shape or of another weight, there is **a warning that names it**, it is removed, and the basis is read from another
file or **recomputed**. Files are renamed into place atomically. When several processes need the same file, one computes and
the others wait for it. A cache that cannot be written causes a warning; the run continues. On a CPU the tensors stay
memory-mapped, so that processes share them; an existing file is replaced, never modified.

Location. ``$ANTIPASTO_CACHE``, else the user's cache folder (``~/.cache/antipasto`` on Linux). ``cache_dir=None`` turns the
cache off.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from platformdirs import user_cache_dir
from safetensors import SafetensorError
from torch import Tensor

from antipasto.adapter.fingerprints import Fingerprint, dtype_name, in_fp64, sketch, weight_digest
from antipasto.files import digest, read_tensors, write_tensors
from antipasto.names import AntiPastoWarning

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Weight dtypes for which a basis can be computed."""

DEFAULT_CACHE = "auto"
"""Value of ``cache_dir`` that stands for `cache_home()`."""

SVD_VERSION = "gram-eigh-1"
"""Name and version of the algorithm in `decompose`. It changes whenever the same weight would get another basis."""

_FORMAT = "antipasto-basis-2"  # changes with the file's layout or the meaning of its tensors
_NAME = re.compile(r"[0-9a-f]{64}(-r(?P<rank>\d{1,9}))?(-(?P<dtype>bfloat16|float16|float32))?\.safetensors")
_MIN_CONDITION = 1e-4  # S_min / S_max; below this the Gram matrix loses U's orthonormality: error ~ eps64 / condition²


class Basis(NamedTuple):
    """Reduced SVD of one weight: ``U`` (o, r), ``S`` (r,) descending, ``Vh`` (r, i), on one device.

    U and Vh have one dtype; S may have a wider one. For a stack of weights, all three have a leading dimension (E, …).
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def rank(self) -> int:
        """Number of singular directions, r."""
        return self.S.shape[-1]

    def truncate(self, rank: int) -> Basis:
        """Copy of the top ``rank`` directions; the basis itself if it has no more than that."""
        if rank >= self.rank:
            return self
        return Basis(self.U[..., :rank].clone(), self.S[..., :rank].clone(), self.Vh[..., :rank, :].clone())


class Digests(NamedTuple):
    """Digests, in hex, of a weight and of its whole basis: all directions, before U and Vh are rounded."""

    weight: str
    S: str
    basis: str


class Part(NamedTuple):
    """Part of a basis: the top ``rank`` directions, with U and Vh in ``dtype``."""

    rank: int
    dtype: torch.dtype

    def of(self, basis: Basis) -> Basis:
        """Take this part of a basis."""
        U, S, Vh = basis.truncate(self.rank)
        return Basis(U.to(self.dtype), S, Vh.to(self.dtype))


class _Request(NamedTuple):
    """A weight's digest and shape, all that `decompose` gives of it, and the part that is asked for."""

    key: str
    shape: tuple[int, ...]
    whole: Part
    asked: Part

    @classmethod
    def of(cls, weight: Tensor, rank: int | None, dtype: torch.dtype | None) -> _Request:
        check_rank(rank)
        if dtype is not None and dtype not in WEIGHT_DTYPES:
            raise ValueError(f"Expected a dtype of {', '.join(map(str, WEIGHT_DTYPES))} for U and Vh, got {dtype}.")
        whole = Part(min(weight.shape[-2:]), torch.promote_types(weight.dtype, torch.float32))
        asked = Part(min(rank or whole.rank, whole.rank), dtype or whole.dtype)
        return cls(weight_digest(weight), tuple(weight.shape), whole, asked)

    @property
    def kept(self) -> Part:
        """What a file has that is written for this: U and Vh as they are asked for, if that is not wider than they are."""
        return Part(self.asked.rank, min(self.asked.dtype, self.whole.dtype, key=lambda dtype: dtype.itemsize))

    def path(self, cache_dir: str | os.PathLike[str]) -> Path:
        """The file that is written for this."""
        folder = cache_home() if cache_dir == DEFAULT_CACHE else Path(cache_dir).expanduser()
        rank = "" if self.kept.rank == self.whole.rank else f"-r{self.kept.rank}"
        dtype = "" if self.kept.dtype == self.whole.dtype else f"-{self.kept.dtype}".replace("torch.", "")
        return folder / f"{self.key}{rank}{dtype}.safetensors"


class BasisCacheWarning(AntiPastoWarning):
    """A file of the basis cache was invalid and is ignored, or could not be written."""


def cache_home() -> Path:
    """Cache folder: ``$ANTIPASTO_CACHE`` if set and not empty, else the user's cache folder for this library."""
    return Path(os.environ.get("ANTIPASTO_CACHE") or user_cache_dir("antipasto", appauthor=False)).expanduser()


def decompose(weight: Tensor) -> Basis:
    """Compute the reduced SVD of a weight, on its device if that supports fp64, else on the CPU.

    Args:
        weight: (o, i) or a stack (E, o, i), any of `WEIGHT_DTYPES`.

    Returns:
        `Basis` in fp32 (in fp64 for an fp64 weight), on the weight's device.

    Raises:
        ValueError: the weight is not 2-D or 3-D, has an unsupported dtype, is on the meta device, contains a NaN or Inf, or
            has a singular value that overflows the basis's dtype.

    Example:
        >>> basis = decompose(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
        >>> basis.S
        tensor([3., 2.])
    """
    _check(weight)
    if weight.ndim == 3:  # one by one, since each needs several copies in fp64
        return Basis(*map(torch.stack, zip(*map(decompose, weight), strict=True)))
    out_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    W = in_fp64(weight)
    if not torch.isfinite(W).all():
        raise ValueError(f"The weight of shape {tuple(weight.shape)} has a NaN or Inf in it: it has no SVD.")
    basis = _gram_svd(W)
    if basis.S[-1] < _MIN_CONDITION * basis.S[0] or basis.S[0] == 0:
        basis = Basis(*torch.linalg.svd(W, full_matrices=False))
    if basis.S[0] > torch.finfo(out_dtype).max:
        raise ValueError(
            f"The weight of shape {tuple(weight.shape)} has a singular value of {basis.S[0]:.3g}, more than {out_dtype} "
            "can hold."
        )
    U, S, Vh = _fix_signs(basis)
    return Basis(*(t.to(weight.device, out_dtype).contiguous() for t in (U, S, Vh)))


def load_basis(
    weight: Tensor,
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    cache_dir: str | os.PathLike[str] | None = DEFAULT_CACHE,
) -> Basis:
    """Load the basis of a weight from the cache, or compute it and write what was asked for there.

    Args:
        weight: (o, i) or a stack (E, o, i), any of `WEIGHT_DTYPES`, on any device.
        rank: number of top directions; None, or more than min(o, i): all.
        dtype: what to round U and Vh to; None: as `decompose` computes them. S is never rounded.
        cache_dir: a folder; ``"auto"`` for `cache_home()`; ``None`` for no cache.

    Returns:
        As `decompose`, or the part of it that was asked for, to the same bits wherever it comes from.

    Raises:
        ValueError: as `decompose`; or the rank is below 1, or the dtype is not one of `WEIGHT_DTYPES`.

    Warns:
        BasisCacheWarning: an invalid file was found and ignored (the warning names it), or the cache cannot be written.

    Example:
        >>> load_basis(torch.eye(3), rank=2, dtype=torch.bfloat16, cache_dir=None).U.shape
        torch.Size([3, 2])
    """
    return _load(weight, rank, dtype, cache_dir)[0]


def load_identified_basis(
    weight: Tensor,
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    cache_dir: str | os.PathLike[str] | None = DEFAULT_CACHE,
) -> tuple[Basis, Fingerprint]:
    """Call `load_basis`; return the basis and the `Fingerprint` of weight and whole basis, the same for every part of it."""
    basis, digests = _load(weight, rank, dtype, cache_dir)
    return basis, Fingerprint(
        shape=tuple(weight.shape),
        dtype=dtype_name(weight),
        weight=digests.weight,
        svd=SVD_VERSION,
        S=digests.S[:16],
        basis=digests.basis[:16],
        sketch=sketch(weight),
    )


def cache_file(
    weight: Tensor,
    cache_dir: str | os.PathLike[str] = DEFAULT_CACHE,
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Path of the file that `load_basis` writes for these arguments, whether or not it exists."""
    return _Request.of(weight, rank, dtype).path(cache_dir)


def cached_file(
    weight: Tensor,
    cache_dir: str | os.PathLike[str] = DEFAULT_CACHE,
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> Path | None:
    """Path of the valid file that `load_basis` reads for these arguments; None if there is none and it would compute."""
    request = _Request.of(weight, rank, dtype)
    found = _find(request.path(cache_dir).parent, request, quiet=True)
    return None if found is None else found.path


def _load(
    weight: Tensor, rank: int | None, dtype: torch.dtype | None, cache_dir: str | os.PathLike[str] | None
) -> tuple[Basis, Digests]:
    """Return what was asked for of the basis, and the digests of the whole."""
    _check(weight)
    request = _Request.of(weight, rank, dtype)
    if cache_dir is None:
        basis, digests = _compute(weight, request.key)
    else:
        basis, digests = _load_cached(weight, request, request.path(cache_dir))
    basis = request.asked.of(basis)
    return Basis(*(tensor.to(weight.device) for tensor in basis)), digests


def _load_cached(weight: Tensor, request: _Request, path: Path) -> tuple[Basis, Digests]:
    """Return a basis that holds what was asked for, and its digests; it is written to ``path`` if it had to be computed."""
    folder, lock_path = path.parent, path.with_suffix(".lock")
    if (found := _find(folder, request)) is not None:
        _remove_stale(lock_path)
        return found.basis, found.digests
    computed: tuple[Basis, Digests] | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock_path):
            try:
                # another process may have been faster
                if (found := _find(folder, request, quiet=True)) is not None:
                    return found.basis, found.digests
                for left in folder.glob(f".{path.name}-*.tmp"):  # left by a process killed while writing
                    left.unlink(missing_ok=True)
                computed = _compute(weight, request.key)
                _write(path, request.kept.of(computed[0]), computed[1])
            finally:
                # the lock is still held, so waiting processes will find the file; at worst one computes it again
                lock_path.unlink(missing_ok=True)
    except (OSError, NotImplementedError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or f"{error}"
        _warn_unwritable(folder, said)  # NotImplementedError: the file system has no locks
    return computed or _compute(weight, request.key)


def _remove_stale(lock_path: Path) -> None:
    """Remove a lock whose cache file exists: its process was killed, or is about to remove it."""
    try:
        if lock_path.exists():
            with FileLock(lock_path, timeout=0):
                lock_path.unlink(missing_ok=True)
    except (OSError, NotImplementedError):
        pass  # the lock is still held (Timeout is an OSError), or the folder is not writable


def _compute(weight: Tensor, key: str) -> tuple[Basis, Digests]:
    basis = decompose(weight)
    return basis, Digests(weight=key, S=digest({"S": basis.S}), basis=digest(basis._asdict()))


def check_rank(rank: Any, name: str = "rank") -> None:
    """Raise an error unless a rank is a whole number of at least 1, or None."""
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"{name} must be a whole number of at least 1, or None for full rank; got {rank!r}.")


def _check(weight: Tensor) -> None:
    if weight.ndim not in (2, 3) or weight.numel() == 0:
        raise ValueError(
            f"Expected a 2-D weight (o, i) with numbers in it, or a stack of them, got one of shape {tuple(weight.shape)}."
        )
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"Expected a weight of dtype {', '.join(map(str, WEIGHT_DTYPES))}, got {weight.dtype}.")
    if weight.device.type == "meta":
        raise ValueError(
            "The weight is on the meta device: it has no values to decompose. Load the model onto a real device first."
        )


def _gram_svd(W: Tensor) -> Basis:
    """SVD of an fp64 matrix, from the eigenvectors of its smaller Gram matrix."""
    if W.shape[0] < W.shape[1]:
        V, S, Uh = _gram_svd(W.T)
        return Basis(Uh.T, S, V.T)
    eigenvalues, V = torch.linalg.eigh(W.T @ W)  # ascending
    S, V = eigenvalues.clamp_min(0).sqrt().flip(0), V.flip(1)
    return Basis(W @ V / S, S, V.T)


def _fix_signs(basis: Basis) -> Basis:
    U, S, Vh = basis
    largest = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).squeeze(1)  # (r,)
    sign = torch.where(largest < 0, -1.0, 1.0).to(S)
    return Basis(U * sign, S, Vh * sign[:, None])


class _Found(NamedTuple):
    path: Path
    basis: Basis
    digests: Digests


def _find(folder: Path, request: _Request, *, quiet: bool = False) -> _Found | None:
    """Read the smallest valid file of a weight that holds what was asked for; None if there is none."""
    whole, usable = request.whole, {}
    for path in folder.glob(f"{request.key}*.safetensors"):
        if (match := _NAME.fullmatch(path.name)) is None:
            continue
        dtype = whole.dtype if match["dtype"] is None else getattr(torch, match["dtype"])
        held = Part(int(match["rank"] or whole.rank), dtype)
        if held.rank >= request.asked.rank and held.dtype in (request.kept.dtype, whole.dtype):
            usable[path] = held
    for path in sorted(usable, key=lambda path: usable[path].rank * usable[path].dtype.itemsize):
        if (found := _read(path, request, usable[path], quiet=quiet)) is not None:
            return found
    return None


def _read(path: Path, request: _Request, held: Part, *, quiet: bool) -> _Found | None:
    """Read a cache file that should hold this part; None if it is gone, or if it is invalid, which is told unless quiet."""
    try:
        tensors, metadata = read_tensors(path, _FORMAT)
        _verify(metadata, tensors, request, held)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        if not quiet:
            warnings.warn(
                f"The basis cache file {path} is not usable ({error}). It is ignored, and removed if it is damaged.",
                BasisCacheWarning,
                stacklevel=3,
            )
            if isinstance(error, ValueError):  # else it could not be read, and may be good
                with suppress(OSError):  # the folder may not be writable
                    path.unlink(missing_ok=True)
        return None
    S = metadata.get("S") or digest({"S": tensors["S"]})  # early files, which all have the whole of S, do not say it
    return _Found(path, Basis(**tensors), Digests(weight=request.key, S=S, basis=metadata["basis"]))


def _verify(metadata: dict[str, str], tensors: dict[str, Tensor], request: _Request, held: Part) -> None:
    if metadata.get("weight") != request.key:
        raise ValueError("it belongs to another weight")
    *stack, o, i = request.shape
    r = held.rank
    expected = {"U": (*stack, o, r), "S": (*stack, r), "Vh": (*stack, r, i)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        raise ValueError(f"shapes {shapes}, expected {expected}")
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    if dtypes != {"U": held.dtype, "S": request.whole.dtype, "Vh": held.dtype}:
        raise ValueError(f"dtypes {', '.join(map(str, dtypes.values()))}")


def _write(path: Path, basis: Basis, digests: Digests) -> None:
    metadata = {"format": _FORMAT, "weight": digests.weight, "basis": digests.basis, "S": digests.S}
    write_tensors(path, basis._asdict(), metadata)


@functools.cache  # one warning per folder, even where `warnings.catch_warnings` resets Python's own registry
def _warn_unwritable(folder: Path, error: str) -> None:
    warnings.warn(
        f"The basis cache {folder} cannot be written ({error}). Continuing without it: the next run will compute the bases "
        "again. Set ANTIPASTO_CACHE to a writable folder, or cache_dir=None to turn the cache off.",
        BasisCacheWarning,
        stacklevel=3,
    )
