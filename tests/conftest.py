"""No network, no cache but the test's own."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# one thread here and in every child: tests run in parallel processes, and OpenMP's threads spin while they wait for each other
os.environ["OMP_NUM_THREADS"] = "1"

import pytest


@pytest.fixture(autouse=True)
def _own_basis_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTIPASTO_CACHE", str(tmp_path_factory.mktemp("basis-cache")))
