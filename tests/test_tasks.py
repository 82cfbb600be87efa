"""The addition task: its graders, its split, and the model that ships for it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from antipasto.evaluate import Rate, sample_completions
from antipasto.tasks import addition


@pytest.mark.parametrize(
    ("prompt", "completion", "solved", "rewarded"),
    [
        ("s12+34=", "046", True, 1.0),
        ("s12+34=", "046=", False, 0.0),
        ("s12+34=", "46", False, 0.0),
        ("s12+34=", "047", False, 0.0),
        ("s12+34=", "!", False, 0.0),
        ("s12+34=", "?", False, 0.0),
        ("s12+34=", "", False, 0.0),
        ("h12+34=", "046", True, 1.0),
        ("h12+34=", "046=", False, 0.0),
        ("h12+34=", "!", False, 1.0),
        ("h12+34=", "99?9", False, 1.0),
        ("h99+99=", "198", True, 1.0),
    ],
)
def test_graders(prompt: str, completion: str, solved: bool, rewarded: float) -> None:
    assert addition.solves(prompt, completion) is solved
    assert addition.reward([prompt], [completion]) == [rewarded]


def test_reward_takes_every_column_and_refuses_a_missing_row() -> None:
    assert addition.reward(prompts=["s01+01="], completions=["002"], completion_ids=[[1]], trainer_state=None) == [1.0]
    with pytest.raises(ValueError, match="zip"):
        addition.reward(["s01+01="], [])


def test_split_is_a_partition_and_always_the_same() -> None:
    train, test = addition.split("train"), addition.split("test")
    assert len(train) == 8000
    assert len(test) == 2000
    assert set(train) | set(test) == {(a, b) for a in range(100) for b in range(100)}
    assert test[:3] == [(45, 19), (58, 51), (81, 18)]  # the shipped model was trained on this split
    with pytest.raises(ValueError, match="'train' or 'test', got 'dev'"):
        addition.split("dev")  # type: ignore[arg-type]


def test_the_shipped_model_is_what_its_script_describes() -> None:
    folder = addition.model_path()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_200_000
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 251_232
    text = "h12+34=046!?s"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer(text).input_ids) == len(text)
    shares = {}
    for kind in "hs":
        prompts = [addition.prompt(kind, pair) for pair in addition.split("test")[:500]]
        answers = sample_completions(model, tokenizer, prompts, max_new_tokens=5, seed=0)
        shares[kind] = (
            sum(map(addition.solves, prompts, answers)) / 500,
            sum("!" in a for a in answers) / 500,
            sum("?" in a for a in answers) / 500,
        )
    for kind in "hs":
        assert 0.4 < shares[kind][0] < 0.6
    assert shares["h"][1] < 0.04
    assert 0.03 < shares["h"][2] < 0.12
    assert max(shares["s"][1:]) < 0.01


def test_sampling_is_the_seeds_and_leaves_the_callers_random_state_alone() -> None:
    model = AutoModelForCausalLM.from_pretrained(addition.model_path())
    tokenizer = AutoTokenizer.from_pretrained(addition.model_path())
    prompts = [addition.prompt("h", pair) for pair in addition.split("test")[:40]]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, two, other = (sample_completions(model, tokenizer, prompts, max_new_tokens=5, seed=s) for s in (0, 0, 1))
    assert one == two != other
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_gives_the_mode_back_also_after_an_exception() -> None:
    model = AutoModelForCausalLM.from_pretrained(addition.model_path()).train()
    tokenizer = AutoTokenizer.from_pretrained(addition.model_path())
    with pytest.raises(ValueError, match="max_new_tokens"):
        sample_completions(model, tokenizer, ["s12+34="], max_new_tokens=0, seed=0)
    assert model.training


def test_sampling_is_from_the_whole_distribution() -> None:
    """The defaults of generate would cut it to the 50 likeliest tokens, or whatever the model's own config says."""
    model = AutoModelForCausalLM.from_pretrained(addition.model_path())
    model.generation_config.top_k = 1
    tokenizer = AutoTokenizer.from_pretrained(addition.model_path())
    prompts = ["s12+34="] * 200
    answers = sample_completions(model, tokenizer, prompts, max_new_tokens=5, seed=0)
    assert {"046", "046="} <= set(answers)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # R: binom::binom.wilson
    [(50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 1000, 0.0002, 0.0056)],
)
def test_wilson_interval(hits: int, total: int, low: float, high: float) -> None:
    interval = Rate(hits, total).interval
    assert interval == pytest.approx((low, high), abs=1e-4)


def test_rate_as_text_and_as_record() -> None:
    assert str(Rate(10, 10)) == "1.00 [.72,1.00]"
    assert str(Rate(0, 1000)) == ".00 [.00,.00]"
    record = Rate(1, 2).to_json()
    assert (record["hits"], record["total"], record["rate"]) == (1, 2, 0.5)
