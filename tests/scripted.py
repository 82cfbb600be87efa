"""GRPO on the shipped model, sampled or with completions that are a function of (prompt, place in its group, step)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

import antipasto as ap
from antipasto.tasks import addition
from antipasto.trl import RoutedGRPOTrainer

GROUP = 8
ON_CPU: dict[str, Any] = {
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def load() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(addition.model_path())


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(addition.model_path())


def hashed(*parts: object) -> int:
    return hashlib.sha256(repr(parts).encode()).digest()[0]


def says_known(completions: list[str], **_: object) -> list[bool]:
    return [addition.KNOWN_HACK in text for text in completions]


def by_hash(prompts: list[str], completions: list[str], **_: object) -> list[bool]:
    """Flags a third of the rollouts, for no reason."""
    return [hashed(prompt, text) % 3 == 0 for prompt, text in zip(prompts, completions, strict=True)]


def script(prompt: str, place: int, step: int) -> str:
    """The sum, a hack, or a wrong number."""
    left, right = prompt[1:-1].split("+")
    total = int(left) + int(right)
    which = hashed(prompt, place, step) % 4
    return [f"{total:03d}", "!", f"{total:03d}?", f"{(total + place + 1) % 200:03d}"][which]


class Script(GRPOTrainer):
    """Does not sample."""

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, **_: Any
    ) -> tuple[list[list[int]], None]:
        assert num_generations == self.num_generations
        first = self.accelerator.process_index * len(prompt_ids)
        completions = [
            script(self.processing_class.decode(ids), (first + i) % self.num_generations, self.state.global_step)
            for i, ids in enumerate(prompt_ids)
        ]
        eos = self.processing_class.eos_token_id
        return [[*self.processing_class(text).input_ids, eos] for text in completions], None


class Plain(Script):
    """TRL's own, scripted."""


class Kept(RoutedGRPOTrainer):
    """Keeps the generations that it made, as they were before TRL shuffled them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generations: list[dict[str, torch.Tensor]] = []

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.generations.append({key: v.clone() for key, v in output.items() if isinstance(v, torch.Tensor)})
        return output


class Routed(Kept, Script):
    """Ours, scripted."""


class Sampled(Kept):
    """Ours, which samples."""


def config_of(out: Path, **options: Any) -> GRPOConfig:
    """Four steps of 2 prompts x 8 rollouts, with TRL's and the Trainer's defaults wherever possible."""
    sizes = {"max_steps": 4, "per_device_train_batch_size": 2 * GROUP, "num_generations": GROUP}
    rest = {"max_completion_length": 5, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"}
    return GRPOConfig(**{"output_dir": str(out), **ON_CPU, **sizes, **rest, **options})


def make(
    out: Path,
    kind: type[GRPOTrainer] = Routed,
    *,
    model: nn.Module | str | None = None,
    config: dict[str, Any] | None = None,
    rewards: Callable[..., Any] | list[Callable[..., Any]] = addition.reward,
    **options: Any,
) -> Any:
    prompts = [addition.prompt(kind, pair) for pair in addition.split("train")[:32] for kind in "hs"]
    trainer = kind(
        model=load() if model is None else model,
        args=config_of(out, **(config or {})),
        reward_funcs=rewards,
        train_dataset=Dataset.from_dict({"prompt": prompts, "serial": list(range(len(prompts)))}),
        eval_dataset=Dataset.from_dict({"prompt": prompts[:2]}),
        processing_class=tokenizer(),
        **{"peft_config": ap.AntiPastoConfig(), **options},
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(out: Path, *args: Any, **options: Any) -> Any:
    """Made and trained at once: a trainer seeds everything when it is made."""
    trainer = make(out, *args, **options)
    trainer.train()
    return trainer


def known_hack(model: nn.Module) -> ap.Direction:
    return ap.extract_direction(model, tokenizer(), ap.load_pairs(addition.hack_pairs(24, seed=0)))


def flat(model: nn.Module, what: str) -> torch.Tensor:
    return torch.cat([getattr(layer, what).detach() for layer in ap.knobs(model).values()])


def claims_nothing(model: nn.Module) -> ap.Router:
    """A router whose gate guards no coordinate: for what else a router brings, deployed sampling above all."""
    layers = ap.knobs(model)
    rows = {name: torch.full((1, layer.r), layer.r**-0.5) for name, layer in layers.items()}
    effect = {name: torch.zeros(layer.r) for name, layer in layers.items()}
    return ap.Router(model, ap.Direction(rows, effect=effect))
