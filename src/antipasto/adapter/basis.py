"""The singular basis of one weight, and its cache on disk.

    W = U diag(S) Vh        W (o, i), U (o, r), S (r,) descending, Vh (r, i), r = min(o, i)

A stack of weights (E, o, i), as of experts, has one basis per weight: U (E, o, r), S (E, r), Vh (E, r, i), in one file.

Method. For o ≥ i, ``eigh`` of the fp64 Gram matrix WᵀW gives V and S², and U = W V / S. For o < i, the transpose is
decomposed. This is about as fast as LAPACK's fp32 SVD and several times more accurate, but it squares the condition number:
a weight with S_min < 1e-4 S_max goes through LAPACK's SVD in fp64 instead. The sign of a singular vector is arbitrary; it is
fixed by making the entry of largest magnitude in each row of Vh positive, so that the same weight gives the same basis.

Cache. Each weight has one file, ``<sha256>.safetensors``, named after the hash of its dtype, shape and bytes. The file
carries a digest of its tensors, which is checked at every read. If the file is truncated, corrupted, of the wrong shape or
of another weight, the basis is **recomputed, with a warning that names the file**, and the file is replaced. Files are
renamed into place atomically. When several processes need the same weight, one computes and the others wait for its file. A
cache that cannot be written causes a warning; the run continues. On a CPU the tensors stay memory-mapped, so that processes
share them; an existing file is replaced, never modified.

Location. ``$ANTIPASTO_CACHE``, else the user's cache folder (``~/.cache/antipasto`` on Linux). ``cache_dir=None`` turns the
cache off.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from platformdirs import user_cache_dir
from safetensors import SafetensorError
from torch import Tensor

from antipasto.adapter.fingerprints import Fingerprint, dtype_name, sketch, weight_digest
from antipasto.files import digest, read_tensors, write_tensors
from antipasto.names import AntiPastoWarning

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Weight dtypes for which a basis can be computed."""

DEFAULT_CACHE = "auto"
"""Value of ``cache_dir`` that stands for `cache_home()`."""

SVD_VERSION = "gram-eigh-1"
"""Name and version of the algorithm in `decompose`. It changes whenever the same weight would get another basis."""

_FORMAT = "antipasto-basis-2"  # changes with the file's layout or the meaning of its tensors
_MIN_CONDITION = 1e-4  # S_min / S_max; below this the Gram matrix loses U's orthonormality: error ~ eps64 / condition²


class Basis(NamedTuple):
    """Reduced SVD of one weight: ``U`` (o, r), ``S`` (r,) descending, ``Vh`` (r, i), of one dtype on one device.

    For a stack of weights, all three have a leading dimension (E, …).
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


class BasisCacheWarning(AntiPastoWarning):
    """A file of the basis cache was invalid and is replaced, or could not be written."""


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
    W = weight.detach()
    W = W.double() if W.device.type in ("cpu", "cuda") else W.cpu().double()
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


def load_basis(weight: Tensor, *, cache_dir: str | os.PathLike[str] | None = DEFAULT_CACHE) -> Basis:
    """Load the basis of a weight from the cache, or compute it and write it there.

    Args:
        weight: (o, i) or a stack (E, o, i), any of `WEIGHT_DTYPES`, on any device.
        cache_dir: a folder; ``"auto"`` for `cache_home()`; ``None`` for no cache.

    Returns:
        As `decompose`.

    Raises:
        ValueError: as `decompose`.

    Warns:
        BasisCacheWarning: an invalid file was found and replaced (the warning names it), or the cache cannot be written.
    """
    return _load(weight, cache_dir)[0]


def load_identified_basis(
    weight: Tensor, *, cache_dir: str | os.PathLike[str] | None = DEFAULT_CACHE
) -> tuple[Basis, Fingerprint]:
    """Call `load_basis`; return the basis and the `Fingerprint` that identifies weight and basis."""
    basis, key, basis_digest = _load(weight, cache_dir)
    return basis, Fingerprint(
        shape=tuple(weight.shape),
        dtype=dtype_name(weight),
        weight=key,
        svd=SVD_VERSION,
        S=digest({"S": basis.S})[:16],
        basis=basis_digest[:16],
        sketch=sketch(weight),
    )


def _load(weight: Tensor, cache_dir: str | os.PathLike[str] | None) -> tuple[Basis, str, str]:
    """Return the basis, the weight's digest and the basis's digest."""
    _check(weight)
    if cache_dir is None:
        basis, basis_digest = _compute(weight)
        return basis, weight_digest(weight), basis_digest
    path = cache_file(weight, cache_dir)
    folder, key = path.parent, path.stem
    lock_path = path.with_suffix(".lock")
    found = _read(path, key, weight)
    if found is not None:
        _remove_stale(lock_path)
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(lock_path):
                try:
                    found = _read(path, key, weight, quiet=True)  # another process may have been faster
                    if found is None:
                        for left in folder.glob(f".{path.name}-*.tmp"):  # left by a process killed while writing
                            left.unlink(missing_ok=True)
                        found = _compute(weight)
                        _write(path, key, *found)
                finally:
                    # the lock is still held, so waiting processes will find the file; at worst one computes it again
                    lock_path.unlink(missing_ok=True)
        except (OSError, NotImplementedError, SafetensorError) as error:
            said = getattr(error, "strerror", None) or f"{error}"
            _warn_unwritable(folder, said)  # NotImplementedError: the file system has no locks
    basis, basis_digest = found or _compute(weight)
    return basis, key, basis_digest


def _remove_stale(lock_path: Path) -> None:
    """Remove a lock whose cache file exists: its process was killed, or is about to remove it."""
    try:
        if lock_path.exists():
            with FileLock(lock_path, timeout=0):
                lock_path.unlink(missing_ok=True)
    except (OSError, NotImplementedError):
        pass  # the lock is still held (Timeout is an OSError), or the folder is not writable


def _compute(weight: Tensor) -> tuple[Basis, str]:
    basis = decompose(weight)
    return basis, digest(basis._asdict())


def cache_file(weight: Tensor, cache_dir: str | os.PathLike[str] = DEFAULT_CACHE) -> Path:
    """Path of the cache file for a weight's basis, whether or not the file exists."""
    folder = cache_home() if cache_dir == DEFAULT_CACHE else Path(cache_dir).expanduser()
    return folder / f"{weight_digest(weight)}.safetensors"


def is_cached(weight: Tensor, cache_dir: str | os.PathLike[str] = DEFAULT_CACHE) -> bool:
    """Whether the cache has a valid basis for a weight, so that `load_basis` would only read it."""
    path = cache_file(weight, cache_dir)
    return _read(path, path.stem, weight, quiet=True) is not None


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


def _read(path: Path, key: str, weight: Tensor, *, quiet: bool = False) -> tuple[Basis, str] | None:
    """Read a basis and its digest from a cache file; None if there is no file, or (with a warning) if it is invalid."""
    try:
        tensors, metadata = read_tensors(path, _FORMAT)
        _verify(metadata, tensors, key, weight)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        if not quiet:
            warnings.warn(
                f"The basis cache file {path} is not usable ({error}). It is ignored and will be replaced.",
                BasisCacheWarning,
                stacklevel=3,
            )
        return None
    return Basis(**{name: tensor.to(weight.device) for name, tensor in tensors.items()}), metadata["basis"]


def _verify(metadata: dict[str, str], tensors: dict[str, Tensor], key: str, weight: Tensor) -> None:
    if metadata.get("weight") != key:
        raise ValueError("it belongs to another weight")
    *stack, o, i = weight.shape
    r = min(o, i)
    expected = {"U": (*stack, o, r), "S": (*stack, r), "Vh": (*stack, r, i)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        raise ValueError(f"shapes {shapes}, expected {expected}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if dtypes != {torch.promote_types(weight.dtype, torch.float32)}:
        raise ValueError(f"dtypes {', '.join(map(str, dtypes))}")


def _write(path: Path, key: str, basis: Basis, basis_digest: str) -> None:
    write_tensors(path, basis._asdict(), {"format": _FORMAT, "weight": key, "basis": basis_digest})


@functools.cache  # one warning per folder, even where `warnings.catch_warnings` resets Python's own registry
def _warn_unwritable(folder: Path, error: str) -> None:
    warnings.warn(
        f"The basis cache {folder} cannot be written ({error}). Continuing without it: the next run will compute the bases "
        "again. Set ANTIPASTO_CACHE to a writable folder, or cache_dir=None to turn the cache off.",
        BasisCacheWarning,
        stacklevel=3,
    )
