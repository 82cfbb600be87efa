"""Tiny random models, one per family, and how each is adapted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

import antipasto as ap

VOCABULARY = 32
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}


@dataclass(frozen=True)
class Family:
    """A model class, its tiny config, the target_modules to adapt it with, and the leaf names that should result."""

    model: str
    config: str
    options: dict[str, Any]
    leaves: frozenset[str]
    target_modules: list[str] | None = None

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(seed)
        model = getattr(transformers, self.model)(getattr(transformers, self.config)(**self.options))
        return model.to(dtype).eval()


_ATTENTION_MLP = frozenset(["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"])

FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", {**SIZES, **HEADS}, _ATTENTION_MLP),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", {**SIZES, **HEADS}, _ATTENTION_MLP),
    "qwen3_5": Family(
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        {**SIZES, **HEADS, **LINEAR_ATTENTION},
        _ATTENTION_MLP | {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"},
    ),
    "gemma": Family(
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**SIZES, **HEADS, "query_pre_attn_scalar": 4}, _ATTENTION_MLP
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
        frozenset({"c_attn", "c_proj", "c_fc"}),
        target_modules=["c_attn", "c_proj", "c_fc"],
    ),
}


def tokens(batch: int = 3, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Random ids (batch, length)."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module, std: float = 0.1, seed: int = 0, adapter_name: str | None = None) -> None:
    """Numbers in both knobs of every layer."""
    generator = torch.Generator().manual_seed(seed)
    for layer in ap.knobs(model, adapter_name=adapter_name).values():
        for knob in (layer.delta_s, layer.delta_s_hack):
            if knob is not None:
                knob.data.copy_(torch.randn(knob.shape, generator=generator) * std)


def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids).logits


def losses(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Minus the log-probability of every sequence, (b,)."""
    logprobs = ap.token_logprobs(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, ids)
    return -(logprobs if mask is None else logprobs * mask[:, 1:]).sum(-1)
