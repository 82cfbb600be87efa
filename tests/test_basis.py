"""The SVD is one, and the cache never gives back anything but the weight's own basis."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import warnings
from pathlib import Path

import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from antipasto.adapter import basis as module
from antipasto.adapter.basis import Basis, BasisCacheWarning, cache_home, decompose, load_basis
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
    assert_same_up_to_rounding = torch.testing.assert_close
    assert_same_up_to_rounding(Vh.double(), module._fix_signs(Basis(U, S, W_Vh)).Vh, atol=1e-6, rtol=0)


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


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(b"not a safetensors file at all")


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
    metadata = {"format": form, "weight": path.stem, "basis": digest(tensors)}
    return metadata | {"digest": digest(tensors, metadata)}


def _right_header_wrong_shape(path: Path) -> None:
    tensors = {name: tensor[:1].clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata=signed(tensors, module._FORMAT, path))


def _tensor_missing(path: Path) -> None:
    save_file({"U": torch.zeros(1)}, path, metadata={"format": module._FORMAT, "weight": path.stem})


def _without_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def _of_another_format(path: Path) -> None:
    tensors = {name: load_file(path)[name] for name in Basis._fields}
    save_file(tensors, path, metadata=signed(tensors, "other", path))


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BAD = [
    _truncate,
    _cut_in_half,
    _empty,
    _garbage,
    _flip_the_last_bit,
    _another_weights_file,
    _right_header_wrong_shape,
    _tensor_missing,
    _without_metadata,
    _of_another_format,
]


@pytest.mark.parametrize("damage", BAD)
def test_a_bad_file_is_replaced_with_a_warning_that_names_it(tmp_path: Path, damage: object) -> None:
    weight = random_weight()
    good = load_basis(weight, cache_dir=tmp_path)
    path = tmp_path / f"{weight_digest(weight)}.safetensors"
    damage(path)  # type: ignore[operator]
    with pytest.warns(BasisCacheWarning, match=str(path)):
        assert_same(load_basis(weight, cache_dir=tmp_path), good)
    assert_same(load_basis(weight, cache_dir=tmp_path), good)  # replaced: no warning the second time


def test_a_file_that_cannot_be_replaced_costs_warnings_only(tmp_path: Path) -> None:
    weight = random_weight()
    good = load_basis(weight, cache_dir=tmp_path)
    _a_folder(tmp_path / f"{weight_digest(weight)}.safetensors")
    with pytest.warns(BasisCacheWarning) as caught:
        assert_same(load_basis(weight, cache_dir=tmp_path), good)
    assert {"not usable", "cannot be written"} <= {
        k for w in caught for k in ("not usable", "cannot be written") if k in str(w.message)
    }


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_bit_changes_what_is_returned(tmp_path: Path, position: int, bit: int) -> None:
    weight = random_weight()
    good = load_basis(weight, cache_dir=tmp_path)
    path = tmp_path / f"{weight_digest(weight)}.safetensors"
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.unlink()  # what was loaded is mapped from the old file
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BasisCacheWarning)
        assert_same(load_basis(weight, cache_dir=tmp_path), good)


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


def _load_when_told(folder: str, start: object, results: object) -> None:
    original = module.decompose
    calls = []
    module.decompose = lambda weight: (calls.append(1), original(weight))[1]
    start.wait()  # type: ignore[attr-defined]
    basis = load_basis(random_weight(300, 200), cache_dir=folder)
    results.put((len(calls), basis.S.sum().item()))  # type: ignore[attr-defined]


def test_processes_that_want_the_same_weight_end_with_one_good_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_load_when_told, args=(str(tmp_path), start, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(calls for calls, _ in answers) == [0, 0, 0, 1]  # one computed, the others waited for its file
    assert len({total for _, total in answers}) == 1
    assert [p.name for p in tmp_path.iterdir()] == [f"{weight_digest(random_weight(300, 200))}.safetensors"]
