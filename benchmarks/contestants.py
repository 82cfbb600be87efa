"""What is measured side by side: one model's shapes, adapted in every way that somebody might.

bare            no adapter; gradients flow to the embeddings' output, so that backward does what an adapter below would need
lora-16, lora-1 PEFT's LoRA
tinylora        PEFT's TinyLoRA (arXiv:2602.04118), u = 64 numbers a layer
hook            y = W x + U (θ ⊙ (Vh x)) as a forward hook, written as the formula reads, and left to autograd
rebuild         W = U diag(S + θ) Vh at every forward, as Transformer²'s SVF code does (arXiv:2501.06252)
full, 256, 64   this library, at that rank
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import antipasto as ap

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# hidden, intermediate, layers, heads, kv heads
SHAPES = {
    "135m": (576, 1536, 30, 9, 3),  # SmolLM2-135M
    "4b": (2560, 9728, 1, 32, 8),  # one layer of Qwen3-4B
    "8b": (4096, 12288, 1, 32, 8),  # one layer of Qwen3-8B
}


def make_model(shape: str = "135m", *, layers: int | None = None, vocabulary: int = 49152) -> LlamaForCausalLM:
    """A Llama of these shapes with random weights; a vocabulary of 18 leaves the trunk, with next to no head."""
    torch.manual_seed(0)
    hidden, intermediate, depth, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


class Hooked(nn.Module):
    """The seed's hook on one Linear."""

    def __init__(self, linear: nn.Linear, basis: ap.Basis) -> None:
        super().__init__()
        self.U, self.Vh = basis.U, basis.Vh
        self.theta = nn.Parameter(torch.zeros_like(basis.S))
        linear.register_forward_hook(lambda _, args, y: y + ((args[0] @ self.Vh.T) * self.theta) @ self.U.T)


class Rebuilt(nn.Module):
    """A Linear whose weight is made from its parts each time."""

    def __init__(self, linear: nn.Linear, basis: ap.Basis) -> None:
        super().__init__()
        self.U, self.S, self.Vh = basis
        self.theta = nn.Parameter(torch.zeros_like(basis.S))
        linear.forward = lambda x: F.linear(x, self.U @ torch.diag(self.S + self.theta) @ self.Vh, linear.bias)  # type: ignore[method-assign,assignment]


def _by_hand(how: Callable[[nn.Linear, ap.Basis], Any]) -> Callable[[nn.Module], nn.Module]:
    def adapt(model: nn.Module) -> nn.Module:
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if name.rpartition(".")[2] in TARGETS:
                assert isinstance(module, nn.Linear)
                module.adapter = how(module, ap.load_basis(module.weight))
        return model

    return adapt


def _by_peft(config: peft.PeftConfig) -> Callable[[nn.Module], nn.Module]:
    return lambda model: peft.get_peft_model(model, config)


def _bare(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _, __, y: y.requires_grad_())  # type: ignore[operator]
    return model


CONTESTANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": _bare,
    "lora-16": _by_peft(peft.LoraConfig(r=16, target_modules=TARGETS)),
    "lora-1": _by_peft(peft.LoraConfig(r=1, target_modules=TARGETS)),
    "tinylora": _by_peft(peft.TinyLoraConfig(target_modules=TARGETS)),
    "hook": _by_hand(Hooked),
    "rebuild": _by_hand(Rebuilt),
    "full": _by_peft(ap.AntiPastoConfig()),
    "256": _by_peft(ap.AntiPastoConfig(rank=256)),
    "64": _by_peft(ap.AntiPastoConfig(rank=64)),
}


def make(contestant: str, shape: str = "135m", **options: Any) -> nn.Module:
    """The model, adapted, with small random knobs: none of them is at its start, where a shortcut might be taken."""
    model = CONTESTANTS[contestant](make_model(shape, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean NLL of the next token."""
    return -ap.token_logprobs(model(input_ids=ids, use_cache=False).logits, ids).mean()
