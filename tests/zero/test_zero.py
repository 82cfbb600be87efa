"""DeepSpeed's ZeRO on two real processes: knobs, quarantine, books, metrics and scores are those of one process."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from sharded import one_and_two
from stepped import WAYS, child, everything

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """By one process, and by each of two."""
    return one_and_two(everything, child, tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize("way", WAYS)
def test_zero_routes_as_one_process(found: tuple[Any, Any, Any], way: str) -> None:
    want, *others = (one[way] for one in found)
    routes, routed = WAYS[way].get("mode", "route") == "route", WAYS[way].get("routed", True)
    assert want["delta_s"].abs().max() > 1e-2
    assert (want["delta_s_hack"].abs().max() > 1e-3) == (routes and routed)
    for rank, got in enumerate(others):
        assert got["steps"] == want["steps"] == (6 if routed else 0)
        for what in ("delta_s", "delta_s_hack"):
            assert torch.equal(got[what], want[what]), (what, (got[what] - want[what]).abs().max())
        assert torch.equal(got.get("master", want["delta_s"]), want["delta_s"])
        assert not got["hooked"]
        assert got["books"].keys() == want["books"].keys()
        for name, book in want["books"].items():
            assert all(torch.equal(got["books"][name][layer], part) for layer, part in book.items()), name
        for step in range(6):
            assert torch.equal(got["rows"][step], want["rows"][2 * step + rank])
        for step, scores in enumerate(got["scores"]):
            torch.testing.assert_close(scores, want["scores"][2 * step + rank], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got["deployed"], want["deployed"], atol=1e-4, rtol=1e-5)
    assert others[0]["metrics"] == want["metrics"]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            "inner",
            "its delta_s is not in this optimizer, .* attach the router to the optimizer that deepspeed.initialize",
        ),
        ("twice", "already attached"),
        ("nan", "has a NaN or Inf"),
        ("kept", "as they were"),
        (
            "written",
            r"q_proj: its delta_s was written to outside of a step.*\(optimizer SGD\).* self.optimizer.step\(\)$",
        ),
        ("decay", "The optimizer has weight decay on the knobs"),
        ("bf16", r"q_proj: DeepSpeed has cast its delta_s to bfloat16.*Train in fp32 \(bf16=False"),
        ("hack", "its delta_s_hack is in the optimizer"),
        ("gradient", "level='gradient' cannot split the gradients of DeepSpeed's ZeRO.*use level='update'"),
        ("attach 3", "DeepSpeed's DeepSpeedZeroOptimizer_Stage3. Use ZeRO-1 or ZeRO-2 in fp32"),
        ("router 3", "partitioned by DeepSpeed's ZeRO-3, under which a router cannot work: use ZeRO-1 or ZeRO-2"),
        ("monitor 3", "partitioned by DeepSpeed's ZeRO-3, under which a monitor cannot work"),
        ("scores 3", "partitioned by DeepSpeed's ZeRO-3, under which a direction or a score at the reference cannot"),
        (
            "direction 3",
            "partitioned by DeepSpeed's ZeRO-3, under which a direction or a score at the reference cannot",
        ),
        ("wrap 3", r"0 is a target.*its weight is partitioned by DeepSpeed's ZeRO-3.*use ZeRO-2 or FSDP2"),
        ("train 2", "method route needs knobs in fp32, and DeepSpeed would cast them: use --trainer.bf16 false"),
        ("train 3", "An adapter cannot be made under DeepSpeed's ZeRO-3"),
    ],
)
def test_what_deepspeed_excludes_is_refused_by_name(found: tuple[Any, Any, Any], what: str, words: str) -> None:
    assert re.search(words, found[1]["refusals"][what])
    assert found[1]["refusals"][what].split(":")[-1] == found[2]["refusals"][what].split(":")[-1]


def test_erased_coordinates_never_move_hackward(found: tuple[Any, Any, Any]) -> None:
    guarded = found[1]["effect"].abs() > 0.3
    moved = (found[1]["effect"] * found[1]["erase, monitored"]["delta_s"])[guarded]
    assert (moved >= 0).all()
    assert (moved > 0).any()
    plain = (found[1]["effect"] * found[1]["monitored alone"]["delta_s"])[guarded]
    assert (plain < 0).any()
