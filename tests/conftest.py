"""No network, no cache but the tests' own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# one thread here and in every child: tests run in parallel processes, and OpenMP's threads spin while they wait for each other
os.environ["OMP_NUM_THREADS"] = "1"
# read where trackio is imported, which trl does
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")

import pytest


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["TRACKIO_DIR"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _basis_cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For the fixtures of modules, which come before those of tests: another process's basis may differ in its last bits."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("basis-cache")
        patch.setenv("ANTIPASTO_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _own_basis_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTIPASTO_CACHE", str(tmp_path_factory.mktemp("basis-cache")))


@pytest.fixture
def shared_basis_cache(
    _basis_cache_of_the_session: Path, _own_basis_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For tests whose runs are of one model: they need not decompose it again."""
    monkeypatch.setenv("ANTIPASTO_CACHE", str(_basis_cache_of_the_session))


@pytest.fixture(scope="module")
def model() -> Any:
    """The demo's, adapted."""
    import scripted

    import antipasto as ap

    loaded = scripted.load()
    ap.wrap(loaded, ap.AntiPastoConfig(cache_dir=None))
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    import scripted

    return scripted.tokenizer()


@pytest.fixture
def batches_of_pairs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs go through the model at once, as they do."""
    from antipasto.routing import directions, monitor

    sizes: list[int] = []
    for module in (monitor, directions):
        real = module.nll_gradients
        monkeypatch.setattr(
            module, "nll_gradients", lambda m, s, real=real, **o: sizes.append(len(s)) or real(m, s, **o)
        )
    return sizes
