"""TRL's own way to an inference engine: what it merges, sends and unmerges, into plain transformers in the engine's place.

Only the engine is replaced: its client in server mode, its ``LLM`` in colocate mode. `VLLMGeneration` is TRL's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import randomise
from peft import get_peft_model
from scripted import GROUP, Sampled, claims_nothing, load, make, tokenizer
from torch import Tensor
from trl.generation import vllm_generation

import antipasto as ap
from antipasto.adapter.knobs import token_logprobs


class Engine:
    """Plain transformers that gets weights by name and samples from them; it knows nothing of adapters."""

    def __init__(self) -> None:
        self.model = load().eval()
        self.wanted = dict(self.model.named_parameters())
        for parameter in self.wanted.values():
            parameter.data.fill_(torch.nan)  # nothing of the checkpoint is left
        self.got: list[dict[str, Tensor]] = [{}]
        self.resets = 0

    # what TRL calls in server mode

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], params: Iterator[tuple[str, Tensor]]
    ) -> None:
        for (name, dtype, shape), (sent, param) in zip(metadata, params, strict=True):
            assert (sent, str(param.dtype), list(param.shape)) == (name, f"torch.{dtype}", shape)
            self.load_weights([(sent, param)])

    def reset_prefix_cache(self) -> None:
        assert self.got[-1].keys() == self.wanted.keys()
        self.resets += 1
        self.got.append({})

    def generate(self, prompts: list[Any], **options: Any) -> Any:
        if "sampling_params" in options:  # colocate mode
            return self.outputs([row["prompt_token_ids"] for row in prompts], options["sampling_params"])
        assert options["n"] > 1
        ids = [row for row in prompts for _ in range(options["n"])]
        answers, logprobs = self.sample(ids)
        return {"prompt_ids": prompts, "completion_ids": answers, "logprobs": [[[p] for p in row] for row in logprobs]}

    # what TRL calls in colocate mode

    @property
    def llm_engine(self) -> Any:
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        return SimpleNamespace(model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner)))

    def outputs(self, ids: list[list[int]], params: Any) -> list[Any]:
        assert params.n == 1
        rows = zip(ids, *self.sample(ids), strict=True)
        said = [
            (prompt, answer, [{t: SimpleNamespace(rank=1, logprob=p)} for t, p in zip(answer, ps, strict=True)])
            for prompt, answer, ps in rows
        ]
        return [
            SimpleNamespace(prompt_token_ids=p, outputs=[SimpleNamespace(token_ids=a, logprobs=lp)])
            for p, a, lp in said
        ]

    # what it does

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, value in weights:
            self.wanted[name].data.copy_(value)
            self.got[-1][name] = value.detach().clone()

    @torch.no_grad()
    def sample(self, ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        prompts = torch.tensor(ids)  # of one length, on this task
        texts = self.model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=5)
        logprobs = token_logprobs(self.model(texts).logits, texts)[:, prompts.shape[1] - 1 :]
        answers: list[list[int]] = []
        for row in texts[:, prompts.shape[1] :].tolist():
            end = row.index(tokenizer().eos_token_id) + 1 if tokenizer().eos_token_id in row else len(row)
            answers.append(row[:end])
        return answers, [row[: len(a)] for row, a in zip(logprobs.tolist(), answers, strict=True)]


def connected(trainer: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Put the engine where TRL would have started vLLM, or found its server."""
    engine = Engine()
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "_init_vllm", lambda self: None)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    theirs = vllm_generation.VLLMGeneration(
        trainer.model, trainer.accelerator, tokenizer(), mode=mode, max_completion_length=5
    )
    theirs.llm = theirs.vllm_client = engine
    trainer.use_vllm, trainer._last_loaded_step, trainer.vllm_generation = True, -1, theirs
    return engine


@pytest.mark.parametrize("mode", ["server", "colocate"])
@pytest.mark.parametrize("fraction", [0.0, 0.25], ids=["one policy", "two policies"])
def test_what_the_engine_samples_is_what_is_trained(
    mode: str, fraction: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities of the engine's plain weights are those of the adapted model, of each policy by itself."""
    steps = 2
    config = {"max_steps": steps, "beta": 0.04}  # with a KL term, TRL computes the policy's own log-probabilities
    trainer = make(tmp_path, Sampled, config=config, router=claims_nothing, deploy_fraction=fraction)
    randomise(trainer.model)
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if "delta" not in n}
    engine = connected(trainer, mode, monkeypatch)
    trainer.train()

    assert engine.resets == steps * (2 if fraction else 1)
    for sampled in trainer.generations:
        mask = sampled["completion_mask"].bool()
        ours, theirs = sampled["old_per_token_logps"][mask], sampled["sampling_per_token_logps"][mask]
        assert len(ours) > 2 * GROUP
        torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-5)
    first, second, *_ = engine.got
    moved = [name for name in first if not torch.equal(first[name], second[name])]
    assert len(moved) == len(ap.knobs(trainer.model))  # the other policy, or the next step
    assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if n in base)  # unmerged


@pytest.mark.parametrize("view", ["trained", "deployed"])
def test_the_engine_gets_every_weight_once_by_its_own_name(
    view: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In bf16 too, where a sum and a difference would drift: 50 times merged, sent and unmerged."""
    model = get_peft_model(load().to(torch.bfloat16), ap.AntiPastoConfig()).eval()
    randomise(model)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "_init_vllm", lambda self: None)
    trainer = make(tmp_path, Sampled, router=claims_nothing)
    theirs = vllm_generation.VLLMGeneration(model, trainer.accelerator, tokenizer(), mode="server")
    engine = theirs.vllm_client = Engine()
    engine.model.to(torch.bfloat16)
    x = torch.tensor([tokenizer()("h12+34=046").input_ids])
    with torch.no_grad(), ap.deployed(model) if view == "deployed" else nullcontext():
        for _ in range(50):
            theirs.sync_weights()
        unmerged = model(x).logits
        model.merge_adapter()
        assert torch.equal(engine.model(x).logits, model(x).logits)
        model.unmerge_adapter()
        assert torch.equal(model(x).logits, unmerged)
    assert engine.resets == 50
    assert all(torch.equal(engine.got[0][name], engine.got[49][name]) for name in engine.wanted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
