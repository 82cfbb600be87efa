"""Rollouts of several turns: what tools and environments answer is in the context, and never in a score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lines import read_lines, write_lines
from peft import get_peft_model
from scripted import Kept, config_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl.chat_template_utils import qwen3_chat_template

import antipasto as ap
from antipasto.adapter.rollouts import TokenIds
from antipasto.app.watch.config import WatchConfig
from antipasto.app.watch.sources import read_sources

pytestmark = pytest.mark.filterwarnings("ignore:.*experimental feature.*")

GROUP = 4
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": %d}}\n</tool_call><|im_end|>'


def tokenizer() -> Any:
    """Bytes, and the template of Qwen3, which has tools."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = qwen3_chat_template
    return made


def model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=2048, **sizes))


def adapted() -> nn.Module:
    return get_peft_model(model(), ap.AntiPastoConfig(cache_dir=None))


def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: one.
        b: the other.

    Returns:
        their sum.
    """
    return f"it is {a + b}"


class Calculator:
    """An environment whose method is the tool."""

    def reset(self, **_: Any) -> None:
        return None

    def add(self, a: int, b: int) -> str:
        """Add two numbers.

        Args:
            a: one.
            b: the other.

        Returns:
            their sum.
        """
        return add(a, b)


class Scripted(Kept):
    """Does not sample: half of the rollouts call a tool first."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        texts = []
        for place, ids in enumerate(prompt_ids):
            answered = "<tool_response>" in self.processing_class.decode(ids)
            texts.append("!<|im_end|>" if answered else CALL % place if place % 2 else "3<|im_end|>")
        return [self.processing_class(text).input_ids for text in texts], None


def monitor(of: nn.Module) -> ap.Monitor:
    rows = [{"prompt": question(b), "hack": "!", "clean": str(1 + b)} for b in range(8)]
    return ap.Monitor.from_pairs(of, tokenizer(), ap.load_pairs(rows), heldout=0.25)


def question(b: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"1+{b}?"}]


def trained(out: Path, beta: float, **options: Any) -> Any:
    sizes = {"per_device_train_batch_size": GROUP, "num_generations": GROUP, "max_completion_length": 200}
    trainer = Scripted(
        model=model(),
        peft_config=ap.AntiPastoConfig(cache_dir=None),
        args=config_of(out, max_steps=2, beta=beta, **sizes),
        reward_funcs=lambda completions, **_: [float(len(said) % 2) for said in completions],
        train_dataset=Dataset.from_list([{"prompt": question(b)} for b in range(8)]),
        processing_class=tokenizer(),
        monitor=monitor,
        flagged="watch",
        rollout_log=out / "log.jsonl",
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def by_hand(trainer: Any, batch: dict[str, Tensor]) -> Tensor:
    """The scores as the formula reads: NLL per token of what the model wrote, its gradient at θ = 0, the cosine with t."""
    base = adapted().eval()  # not trained
    layers, scores = ap.knobs(base), []
    t = torch.cat([trainer.monitor.direction.effect[name] for name in layers])
    for row in range(GROUP):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        own = batch["tool_mask"][row][: len(completion)].bool()
        ids = torch.cat([prompt, completion])[None]
        logprobs = ap.token_logprobs(base(ids).logits, ids)[0, len(prompt) - 1 :]
        grads = torch.autograd.grad(-logprobs[own].mean(), [layer.delta_s for layer in layers.values()])
        scores.append(torch.cosine_similarity(torch.cat(grads), t, dim=0))
    return torch.stack(scores)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"tools": [add]}, {"environment_factory": Calculator}], ids=["tools", "environment"]
)
@pytest.mark.parametrize("beta", [0.0, 0.04], ids=["its own forward", "the forward of the KL term"])
def test_the_score_is_of_what_the_model_wrote(beta: float, options: dict[str, Any], tmp_path: Path) -> None:
    trainer = trained(tmp_path, beta, **options)
    rows = read_lines(tmp_path / "log.jsonl")
    assert len(rows) == 2 * GROUP
    for step, batch in enumerate(trainer.generations):
        assert 0 < batch["tool_mask"].float().mean() < 1
        logged = rows[step * GROUP : (step + 1) * GROUP]
        torch.testing.assert_close(
            torch.tensor([row["score"] for row in logged]), by_hand(trainer, batch), atol=2e-5, rtol=1e-4
        )
    called = rows[1]
    assert [message["role"] for message in called["completion"]] == ["assistant", "tool", "assistant"]
    told = [i for i, own in zip(called["completion_ids"], called["tool_mask"], strict=True) if not own]
    assert "it is 2" in tokenizer().decode(told)
    assert rows[0]["tool_mask"] == [1] * len(rows[0]["completion_ids"])


def test_watch_scores_what_the_model_wrote(tmp_path: Path) -> None:
    """By the tool mask of the file, the same text has the score of its own part."""
    watching = monitor(adapted().eval())
    ids = tokenizer()("!<|im_end|>it is 2<|im_end|>!<|im_end|>").input_ids
    mask = [1, 1] + [0] * (len(ids) - 4) + [1, 1]
    row = {"prompt": question(1), "completion": "!", "completion_ids": ids, "tool_mask": mask}
    write_lines(tmp_path / "log.jsonl", [row])
    (one,) = read_sources([tmp_path / "log.jsonl"], WatchConfig(), [])
    found = watching.scores([ap.Completion(one.prompt, one.text, False, one.ids, one.tool_mask)])
    prompt = watching.tokens(ap.Completion(question(1), "!")).prompt
    want = watching.score_tokens([TokenIds(prompt, ids, mask), TokenIds(prompt, ids)])
    torch.testing.assert_close(found[0], want[0])
    assert abs(float(want[0] - want[1])) > 1e-3


@pytest.mark.parametrize("mask", [[1], "all", [0, 0], [1, 2]])
def test_a_mask_that_does_not_fit_is_refused_by_line(mask: Any, tmp_path: Path) -> None:
    row = {"prompt": "1+1=", "completion": "!!", "completion_ids": [1, 1], "tool_mask": mask}
    write_lines(tmp_path / "log.jsonl", [row])
    with pytest.raises(
        ValueError, match=r"log.jsonl, line 1: 'tool_mask' must have a 1 or 0 for each of 'completion_ids'"
    ):
        list(read_sources([tmp_path / "log.jsonl"], WatchConfig(), []))
