"""FSDP2 on two real processes: routing, books, metrics and scores are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sharded import WAYS, child, everything, one_and_two


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """By one process, and by each of two."""
    return one_and_two(everything, child, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("way", WAYS)
def test_routing_is_that_of_one_process(found: tuple[Any, Any, Any], way: str) -> None:
    """Bit for bit: a sum of two losses' gradients is the same wherever it is taken."""
    want, *others = (one[way] for one in found)
    assert all(metrics["fired"] > 0 for metrics in want["metrics"])
    assert want["delta_s"].abs().max() > 1e-2
    assert (want["delta_s_hack"].abs().max() > 1e-3) == ("erase" not in way)
    assert (want["basis"] > 0) == ("carried" in way)
    for rank, got in enumerate(others):
        assert got["steps"] == want["steps"] == 4
        assert got["basis"] == want["basis"] / 2  # a carried basis is divided, with the layer's other parameters
        for what in ("delta_s", "delta_s_hack"):
            assert torch.equal(got[what], want[what]), what
        torch.testing.assert_close(got["deployed"], want["deployed"], atol=1e-4, rtol=1e-5)  # by another execution
        assert got["held"] == got["built"] == 0 < want["held"]
        assert got["books"].keys() == want["books"].keys()
        for name, book in want["books"].items():
            for layer, part in book.items():
                assert torch.equal(got["books"][name][layer], part), (name, layer)
        assert got["norms"] == pytest.approx(want["norms"], rel=1e-5)
        for step in range(4):
            assert torch.equal(got["rows"][step], want["rows"][2 * step + rank])
    assert others[0]["metrics"] == want["metrics"]


def test_a_direction_scores_warnings_and_errors_are_those_of_one_process(found: tuple[Any, Any, Any]) -> None:
    want, *others = (one["look"] for one in found)
    assert "depends on the values of the knobs" in want["warned"][0]
    assert "has a NaN or Inf" in want["error"]
    assert want["kept"]
    for rank, got in enumerate(others):
        torch.testing.assert_close(got["effect"], want["effect"])
        torch.testing.assert_close(got["scores"][0], want["scores"][rank], atol=1e-5, rtol=1e-4)
        assert (got["warned"], got["error"], got["kept"]) == (want["warned"], want["error"], True)
