"""The SVD is one, and the cache never gives back anything but the weight's own basis."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import at_once
from safetensors.torch import load_file, save_file

from antipasto.adapter import basis as module
from antipasto.adapter.basis import (
    Basis,
    BasisCacheWarning,
    cache_file,
    cache_home,
    cached_file,
    decompose,
    load_basis,
    load_identified_basis,
)
from antipasto.adapter.fingerprints import weight_digest
from antipasto.files import digest

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def random_weight(o: int = 6, i: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(o, i, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_is_svd(basis: Basis, weight: torch.Tensor, tolerance: float) -> None:
    U, S, Vh = (t.double() for t in basis)
    W = weight.double()
    (o, i), r = weight.shape, min(weight.shape)
    assert (U.shape, S.shape, Vh.shape) == ((o, r), (r,), (r, i))
    scale = max(S[0].item(), 1e-300)
    torch.testing.assert_close((U * S) @ Vh / scale, W / scale, atol=tolerance, rtol=0)
    torch.testing.assert_close(U.T @ U, torch.eye(r).double(), atol=tolerance, rtol=0)
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(r).double(), atol=tolerance, rtol=0)
    assert (S >= 0).all()
    assert (S.diff() <= 0).all()


def assert_same(a: Basis, b: Basis) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ── the decomposition ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 7), (7, 1), (1, 1), (64, 48)])
def test_svd_of_every_shape_and_dtype(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_weight(*shape, dtype=dtype)
    basis = decompose(weight)
    assert basis.U.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_is_svd(basis, weight, 1e-12 if dtype == torch.float64 else 1e-6)


@given(
    hnp.arrays(
        "float32",
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(-4, 4, width=32, allow_subnormal=False),
    )
)
@settings(max_examples=150, deadline=None)
def test_svd_of_any_weight(array: object) -> None:
    weight = torch.tensor(array)  # hypothesis likes zeros, repeated rows and tiny entries: rank-deficient weights
    assert_is_svd(decompose(weight), weight, 2e-6)


@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-6, 1e-9, 0.0])
def test_ill_conditioned_weights_keep_orthonormal_vectors(smallest: float) -> None:
    U, _ = torch.linalg.qr(random_weight(40, 24, torch.float64))
    V, _ = torch.linalg.qr(random_weight(24, 24, torch.float64, seed=1))
    S = torch.linspace(1, 0, 24).double() ** 2 * (1 - smallest) + smallest
    weight = (U * S) @ V.T
    assert_is_svd(decompose(weight), weight, 1e-8)
    assert_is_svd(decompose(weight.float()), weight.float(), 1e-6)


def test_signs_are_fixed() -> None:
    weight = random_weight(9, 5)
    Vh = decompose(weight).Vh
    assert (Vh.gather(1, Vh.abs().argmax(1, keepdim=True)) > 0).all()
    # LAPACK's vectors of the same weight, sign-fixed alike, are ours
    U, S, W_Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(Vh.double(), module._fix_signs(Basis(U, S, W_Vh)).Vh, atol=1e-6, rtol=0)


def test_decompose_is_deterministic() -> None:
    assert_same(decompose(random_weight(30, 20)), decompose(random_weight(30, 20)))


def test_truncate_keeps_the_top_in_memory_of_its_own() -> None:
    basis = decompose(random_weight(8, 6))
    top = basis.truncate(2)
    assert top.rank == 2
    assert torch.equal(top.S, basis.S[:2])
    assert top.U.untyped_storage().nbytes() == 8 * 2 * 4
    assert basis.truncate(99) is basis


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3), "2-D"),
        (torch.zeros(1, 2, 3, 4), r"\(1, 2, 3, 4\)"),
        (torch.zeros(2, 3, dtype=torch.int8), "torch.int8"),
        (torch.full((2, 3), float("nan")), "NaN or Inf"),
        (torch.full((2, 3), float("inf")), "NaN or Inf"),
        (torch.zeros(2, 3, device="meta"), "meta device"),
    ],
)
def test_what_has_no_basis_is_an_error(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decompose(weight)
    with pytest.raises(ValueError, match=message):
        load_basis(weight)


# ── the key ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fingerprint_sees_bytes_shape_and_dtype() -> None:
    weight = torch.zeros(4, 6)
    others = [
        torch.zeros(6, 4),
        torch.zeros(4, 6, dtype=torch.bfloat16),
        torch.zeros(4, 6, dtype=torch.float16),
        weight + 1,
    ]
    others.append(-weight)  # equal to weight, of other bytes
    assert len({weight_digest(w) for w in [weight, *others]}) == 6


def test_fingerprint_ignores_the_layout_in_memory() -> None:
    weight = random_weight(4, 6)
    assert weight_digest(weight) == weight_digest(weight.T.contiguous().T)


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def count_decompositions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls = []
    original = module.decompose
    monkeypatch.setattr(module, "decompose", lambda weight: (calls.append(1), original(weight))[1])
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_time_comes_from_the_file(tmp_path: Path, count_decompositions: list[int], dtype: torch.dtype) -> None:
    weight = random_weight(dtype=dtype)
    first, second = load_basis(weight, cache_dir=tmp_path), load_basis(weight, cache_dir=tmp_path)
    assert_same(first, second)
    assert len(count_decompositions) == 1
    assert [p.name for p in tmp_path.iterdir()] == [
        f"{weight_digest(weight)}.safetensors"
    ]  # no lock, no temporary file


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTIPASTO_CACHE", str(tmp_path / "here"))
    load_basis(random_weight())
    assert len(list((tmp_path / "here").iterdir())) == 1
    monkeypatch.delenv("ANTIPASTO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == tmp_path / "xdg" / "antipasto"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ANTIPASTO_CACHE", "~/mine")
    assert cache_home() == tmp_path / "mine"
    load_basis(random_weight(), cache_dir="~/other")
    assert (tmp_path / "other").is_dir()
    monkeypatch.setenv("ANTIPASTO_CACHE", "")
    assert cache_home() == tmp_path / "xdg" / "antipasto"


def test_none_turns_the_cache_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTIPASTO_CACHE", str(tmp_path / "never"))
    assert_is_svd(load_basis(random_weight(), cache_dir=None), random_weight(), 1e-6)
    assert not (tmp_path / "never").exists()


def test_files_are_readable_by_others_as_the_umask_allows(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        load_basis(random_weight(), cache_dir=tmp_path)
    finally:
        os.umask(previous)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o644


def _flip_the_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _another_weights_file(path: Path) -> None:
    weight = random_weight(seed=7)
    load_basis(weight, cache_dir=path.parent / "other")
    shutil.copy(path.parent / "other" / f"{weight_digest(weight)}.safetensors", path)


def signed(tensors: dict[str, torch.Tensor], form: str, path: Path) -> dict[str, str]:
    """Metadata as it ought to be for these tensors."""
    metadata = {"format": form, "weight": path.name[:64], "basis": digest(tensors)}
    return metadata | {"digest": digest(tensors, metadata)}


def _right_header_wrong_shape(path: Path) -> None:
    tensors = {name: tensor[:1].clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata=signed(tensors, module._FORMAT, path))


def _of_another_format(path: Path) -> None:
    tensors = {name: load_file(path)[name] for name in Basis._fields}
    save_file(tensors, path, metadata=signed(tensors, "other", path))


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _of_another_dtype(path: Path) -> None:
    tensors = load_file(path)
    tensors["Vh"] = tensors["Vh"].half()
    save_file(tensors, path, metadata=signed(tensors, module._FORMAT, path))


BAD: dict[str, Callable[[Path], object]] = {
    "its end is gone": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "half of it is gone": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"not a safetensors file at all"),
    "the last bit is another": _flip_the_last_bit,
    "another weight's": _another_weights_file,
    "another shape": _right_header_wrong_shape,
    "a tensor is gone": lambda path: save_file(
        {"U": torch.zeros(1)}, path, metadata={"format": module._FORMAT, "weight": path.name[:64]}
    ),
    "no metadata": lambda path: save_file(load_file(path), path),
    "another format": _of_another_format,
    "another dtype": _of_another_dtype,
}
WHOLE: dict[str, Any] = {"rank": None, "dtype": None}
PART: dict[str, Any] = {"rank": 2, "dtype": torch.bfloat16}


@pytest.mark.parametrize("asked", [WHOLE, PART], ids=["whole", "part"])
@pytest.mark.parametrize("damage", BAD)
def test_a_bad_file_is_replaced_with_a_warning_that_names_it(
    tmp_path: Path, count_decompositions: list[int], damage: str, asked: dict[str, Any]
) -> None:
    weight = random_weight()
    good = load_basis(weight, **asked, cache_dir=tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    BAD[damage](path)
    count_decompositions.clear()
    with pytest.warns(BasisCacheWarning, match=str(path)):
        assert_same(load_basis(weight, **asked, cache_dir=tmp_path), good)
    assert_same(load_basis(weight, **asked, cache_dir=tmp_path), good)  # replaced: no warning the second time
    assert len(count_decompositions) == 1


@pytest.mark.parametrize("damage", BAD)
def test_a_bad_file_is_removed_if_a_larger_one_serves(
    tmp_path: Path, count_decompositions: list[int], damage: str
) -> None:
    weight = random_weight()
    good = load_basis(weight, **PART, cache_dir=tmp_path)
    load_basis(weight, cache_dir=tmp_path)
    path = cache_file(weight, tmp_path, **PART)
    BAD[damage](path)
    count_decompositions.clear()
    with pytest.warns(BasisCacheWarning, match=str(path)):
        assert_same(load_basis(weight, **PART, cache_dir=tmp_path), good)
    assert not path.exists()
    assert_same(load_basis(weight, **PART, cache_dir=tmp_path), good)
    assert count_decompositions == []


def test_a_file_that_cannot_be_read_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: Path, form: str) -> None:
        raise OSError(24, "Too many open files")

    good = load_basis(random_weight(), cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_tensors", unreadable)
        with pytest.warns(BasisCacheWarning, match="Too many open files"):
            load_basis(random_weight(), **PART, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert_same(load_basis(random_weight(), cache_dir=tmp_path), good)


def test_a_file_that_cannot_be_replaced_costs_warnings_only(tmp_path: Path) -> None:
    weight = random_weight()
    good = load_basis(weight, cache_dir=tmp_path)
    _a_folder(tmp_path / f"{weight_digest(weight)}.safetensors")
    with pytest.warns(BasisCacheWarning) as caught:
        assert_same(load_basis(weight, cache_dir=tmp_path), good)
    assert {"not usable", "cannot be written"} <= {
        k for w in caught for k in ("not usable", "cannot be written") if k in str(w.message)
    }


@pytest.mark.parametrize("asked", [WHOLE, PART], ids=["whole", "part"])
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_bit_changes_what_is_returned(
    tmp_path: Path, position: int, bit: int, asked: dict[str, Any]
) -> None:
    weight = random_weight()
    good, fingerprint = load_identified_basis(weight, **asked, cache_dir=tmp_path)
    path = cache_file(weight, tmp_path, **asked)
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.unlink()  # what was loaded is mapped from the old file
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BasisCacheWarning)
        basis, again = load_identified_basis(weight, **asked, cache_dir=tmp_path)
    assert_same(basis, good)
    assert again == fingerprint


@pytest.mark.parametrize("folder", ["a-file", "a-file/below"])
def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path, folder: str) -> None:
    (tmp_path / "a-file").touch()
    with pytest.warns(BasisCacheWarning, match="a-file"):
        basis = load_basis(random_weight(), cache_dir=tmp_path / folder)
    assert_is_svd(basis, random_weight(), 1e-6)


def test_a_full_disk_costs_a_warning_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(BasisCacheWarning, match="No space left on device"):
        basis = load_basis(random_weight(), cache_dir=tmp_path)
    assert_is_svd(basis, random_weight(), 1e-6)
    assert list(tmp_path.iterdir()) == []


def test_a_file_appears_under_its_name_only_when_it_is_whole_and_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"{weight_digest(random_weight())}.safetensors"
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append((path.exists(), os.fstat(descriptor).st_size)))
    load_basis(random_weight(), cache_dir=tmp_path)
    assert seen == [(False, path.stat().st_size)]


# ── what a file holds ────────────────────────────────────────────────────────────────────────────────────────────────


def part_of(weight: torch.Tensor, rank: int | None, dtype: torch.dtype | None) -> Basis:
    """By the plain formula: the top of the SVD, with U and Vh rounded once."""
    U, S, Vh = decompose(weight)
    k = S.shape[-1] if rank is None else rank
    U, S, Vh = U[..., :k], S[..., :k], Vh[..., :k, :]
    return Basis(U, S, Vh) if dtype is None else Basis(U.to(dtype), S, Vh.to(dtype))


def early_file(weight: torch.Tensor, folder: Path) -> Path:
    """As it was written when every file held the whole basis."""
    path, tensors = cache_file(weight, folder), decompose(weight)._asdict()
    save_file(tensors, path, metadata=signed(tensors, "antipasto-basis-2", path))
    return path


PARTS = [(None, None), (2, None), (9, None), (2, torch.float32), (None, torch.bfloat16), (3, torch.float16)]
PARTS += [(1, torch.bfloat16), (3, torch.float64)]


@pytest.mark.parametrize("before", ["nothing", "an early file"])
@pytest.mark.parametrize(("rank", "dtype"), PARTS)
@pytest.mark.parametrize("of", DTYPES)
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 6, 5)])
def test_a_part_has_the_bits_and_the_fingerprint_of_the_whole(
    tmp_path: Path,
    count_decompositions: list[int],
    shape: tuple[int, ...],
    of: torch.dtype,
    rank: int | None,
    dtype: torch.dtype | None,
    before: str,
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(of)
    want = part_of(weight, rank, dtype)
    _, fingerprint = load_identified_basis(weight, cache_dir=None)
    if before == "an early file":
        early_file(weight, tmp_path)
    count_decompositions.clear()
    for folder in (None, tmp_path, tmp_path):  # computed; computed and written, or read; read
        basis, found = load_identified_basis(weight, rank=rank, dtype=dtype, cache_dir=folder)
        assert found == fingerprint
        assert_same(basis, want)
        assert [t.dtype for t in basis] == [t.dtype for t in want]
        assert all(t.is_contiguous() for t in basis)
    stack = weight.shape[0] if weight.ndim == 3 else 0
    assert len(count_decompositions) == (1 + (before == "nothing")) * (1 + stack)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_says_in_its_name_what_it_holds_and_holds_no_more(tmp_path: Path) -> None:
    weight = random_weight(96, 64, torch.bfloat16)
    key, sizes = weight_digest(weight), {}
    for rank, dtype in ((None, None), (None, torch.bfloat16), (16, None), (16, torch.bfloat16), (64, torch.float16)):
        path = cache_file(weight, tmp_path / "other", rank=rank, dtype=dtype)
        load_basis(weight, rank=rank, dtype=dtype, cache_dir=path.parent)
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        sizes[path.name] = path.stat().st_size
        path.unlink()
    numbers, r = 96 + 64, 64
    assert sizes.keys() == {
        f"{key}.safetensors",
        f"{key}-bfloat16.safetensors",
        f"{key}-r16.safetensors",
        f"{key}-r16-bfloat16.safetensors",
        f"{key}-float16.safetensors",
    }
    for name, size in sizes.items():
        k, bytes_each = 16 if "-r16" in name else r, 2 if "float16" in name else 4
        assert 0 < size - k * (bytes_each * numbers + 4) < 1024  # its head


SERVED = [
    ((1, torch.bfloat16), "-r2-bfloat16"),
    ((2, torch.bfloat16), "-r2-bfloat16"),
    ((1, None), "-r3"),
    ((1, torch.float16), "-r3"),
    ((3, torch.bfloat16), "-r3"),
    ((3, torch.float32), "-r3"),
    ((4, torch.bfloat16), ""),
    ((4, None), ""),
    ((99, None), ""),
    ((None, None), ""),
    ((None, torch.bfloat16), ""),
]


@pytest.mark.parametrize(("asked", "name"), SERVED)
def test_the_smallest_file_that_holds_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: tuple[int | None, torch.dtype | None], name: str
) -> None:
    weight, (rank, dtype) = random_weight(6, 5), asked
    for had in ((2, torch.bfloat16), (3, None), (None, None)):  # upwards, so that each is computed
        load_basis(weight, rank=had[0], dtype=had[1], cache_dir=tmp_path)
    (tmp_path / f"{weight_digest(weight)}-r1-and-more.safetensors").write_text("not ours")
    read, original = [], module.read_tensors
    monkeypatch.setattr(module, "read_tensors", lambda path, form: (read.append(path), original(path, form))[1])
    monkeypatch.setattr(module, "decompose", lambda _: pytest.fail("computed"))
    basis = load_basis(weight, rank=rank, dtype=dtype, cache_dir=tmp_path)
    assert read == [tmp_path / f"{weight_digest(weight)}{name}.safetensors"]
    assert cached_file(weight, tmp_path, rank=rank, dtype=dtype) == read[0]
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.undo()
    assert_same(basis, part_of(weight, min(rank or 5, 5), dtype))


@pytest.mark.parametrize(
    ("had", "asked"),
    [
        ((3, None), (None, None)),
        ((3, None), (4, None)),
        ((3, torch.bfloat16), (3, None)),
        ((None, torch.bfloat16), (None, None)),
        ((None, torch.bfloat16), (2, torch.float16)),
        ((None, torch.float16), (2, torch.bfloat16)),
    ],
)
def test_what_a_file_does_not_hold_is_not_read_from_it(
    tmp_path: Path,
    count_decompositions: list[int],
    had: tuple[int | None, torch.dtype | None],
    asked: tuple[int | None, torch.dtype | None],
) -> None:
    weight = random_weight(6, 5)
    load_basis(weight, rank=had[0], dtype=had[1], cache_dir=tmp_path)
    assert cached_file(weight, tmp_path, rank=asked[0], dtype=asked[1]) is None
    basis = load_basis(weight, rank=asked[0], dtype=asked[1], cache_dir=tmp_path)
    assert len(count_decompositions) == 2
    assert_same(basis, part_of(weight, *asked))
    assert len(list(tmp_path.iterdir())) == 2


def test_bf16_of_an_fp64_weight_is_rounded_once(tmp_path: Path, count_decompositions: list[int]) -> None:
    weight = random_weight(40, 30, torch.float64)
    load_basis(weight, dtype=torch.float32, cache_dir=tmp_path)
    U = load_basis(weight, dtype=torch.bfloat16, cache_dir=tmp_path).U
    assert len(count_decompositions) == 2  # not rounded from the file in fp32
    assert torch.equal(U, decompose(weight).U.bfloat16())


def test_only_what_is_asked_for_is_copied_from_a_larger_file(tmp_path: Path) -> None:
    weight = random_weight(8, 6)
    load_basis(weight, cache_dir=tmp_path)
    U, S, Vh = load_basis(weight, rank=2, cache_dir=tmp_path)
    assert [t.untyped_storage().nbytes() for t in (U, S, Vh)] == [8 * 2 * 4, 2 * 4, 2 * 6 * 4]


@pytest.mark.parametrize("asked", [WHOLE, PART], ids=["whole", "part"])
def test_a_load_hashes_the_weight_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> None:
    hashed = []
    monkeypatch.setattr("antipasto.adapter.fingerprints.digest", lambda tensors: (hashed.append(1), digest(tensors))[1])
    for times in (1, 2):  # written, read
        load_identified_basis(random_weight(), **asked, cache_dir=tmp_path)
        assert len(hashed) == times


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1.*got 0"),
        ({"rank": 2.0}, "got 2.0"),
        ({"rank": True}, "got True"),
        ({"dtype": torch.int8}, "U and Vh, got torch.int8"),
    ],
)
def test_a_part_that_makes_no_sense_is_an_error(tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(ValueError, match=message):
            load_basis(random_weight(), **asked, cache_dir=folder)
    assert list(tmp_path.iterdir()) == []


def _load_part_when_told(folder: str, rank: int | None, start: Any, results: Any) -> None:
    weight = random_weight(300, 200)
    start.wait()
    basis, fingerprint = load_identified_basis(weight, rank=rank, dtype=torch.bfloat16, cache_dir=folder)
    results.put((rank, str(fingerprint), digest(basis._asdict())))


@pytest.mark.slow
def test_processes_that_want_different_parts_of_one_weight_at_once(tmp_path: Path) -> None:
    weight = random_weight(300, 200)
    answers = at_once(_load_part_when_told, [(str(tmp_path), rank) for rank in (64, None, 64, None)])
    _, fingerprint = load_identified_basis(weight, cache_dir=None)
    for rank, found, basis in answers:
        assert found == str(fingerprint)
        assert basis == digest(part_of(weight, rank, torch.bfloat16)._asdict())
    names = {path.name for path in tmp_path.iterdir()}  # no lock
    whole, part = (f"{weight_digest(weight)}{which}-bfloat16.safetensors" for which in ("", "-r64"))
    assert names in ({whole, part}, {whole})  # the latter if it was there before the part was asked for
