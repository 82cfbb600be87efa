"""examples/loop.py: the method in one file, of at most 250 lines."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

LOOP = Path(__file__).parents[1] / "examples" / "loop.py"


@pytest.fixture(scope="module")
def loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_loop", LOOP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for its annotations
    spec.loader.exec_module(module)
    return module


def test_it_is_short() -> None:
    assert len(LOOP.read_text().splitlines()) <= 250


@pytest.mark.slow
@pytest.mark.parametrize("method", ["route", "penalty", "plain"])
def test_it_trains_and_judges(method: str, loop: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Every view is asked with the same draws; what ships is another model than what was trained under `route` alone."""
    found = loop.run(method, 3, 0)
    assert {kind for kind, _ in found} == {"hackable", "strict"}
    of = {
        name: [found[kind, name] for kind in ("hackable", "strict")] for name in ("reference", "as trained", "deployed")
    }
    assert of["as trained"] != of["reference"]
    assert (of["deployed"] != of["as trained"]) == (method == "route")
    text = capsys.readouterr().out
    assert "step 3/3  reward 0." in text
    assert "hackable  deployed     solve 0." in text


@pytest.mark.parametrize("rollouts", [8, 16])
def test_a_rollout_is_compared_with_those_of_its_own_prompt(rollouts: int, loop: ModuleType) -> None:
    """Where all rollouts of a prompt are paid alike, they teach nothing, however unlike the prompts are."""
    model = loop.AutoModelForCausalLM.from_pretrained(loop.addition.model_path())
    tokenizer = loop.AutoTokenizer.from_pretrained(loop.addition.model_path())
    layers = loop.ap.wrap(model)
    prompts = [text for text in ("h12+34=", "s56+78=") for _ in range(rollouts)]
    batch = loop.sample(model, tokenizer, prompts)
    loop.loss_of(model, batch, loop.torch.tensor([1.0, 0.0]).repeat_interleave(rollouts), rollouts).backward()
    assert all(layer.delta_s.grad.abs().max() < 1e-7 for layer in layers.values())


def test_a_penalty_takes_the_reward_of_what_is_flagged(loop: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a monitor that flags everything, no rollout is paid: nothing but the KL term moves the knobs, from 0 not at all."""
    monkeypatch.setattr(
        loop.ap.Monitor, "flags", lambda self, completions: loop.torch.ones(len(completions), dtype=bool)
    )
    found = loop.run("penalty", 2, 0)
    assert found["hackable", "as trained"] == found["hackable", "reference"]
