"""The trainers and wrappers that people put around a model, for real: each trains, and what it leaves loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from datasets import Dataset
from families import FAMILIES, tokens
from peft import PeftModel, get_peft_model
from processes import process_group
from scripted import ON_CPU
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import antipasto as ap
from antipasto.tasks import addition

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "learning_rate": 0.05,
    "save_strategy": "steps",
    "save_steps": 3,
    **ON_CPU,
}


def addition_model() -> tuple[Any, Any]:
    path = addition.model_path()
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def rows() -> list[str]:
    return [f"{addition.prompt('h', pair)}{sum(pair):03d}" for pair in addition.split("train")[:8]]


def check(trainer: Any, folder: Path) -> None:
    """It learned in the knobs alone, and its checkpoint is the model."""
    model = trainer.model
    assert all(layer.delta_s.abs().max() > 0 for layer in ap.knobs(model).values())
    base, tokenizer = addition_model()
    untouched = dict(base.named_parameters())
    for name, layer in ap.knobs(model).items():
        assert torch.equal(layer.layer.base_layer.weight, untouched[f"{name}.weight"])
    ids = tokenizer(rows()[:2], return_tensors="pt").input_ids
    loaded = PeftModel.from_pretrained(base, folder / "checkpoint-3")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
        with ap.reference(model):
            want = addition_model()[0](ids).logits
            assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer(tmp_path: Path, checkpointing: bool) -> None:
    base, tokenizer = addition_model()
    model = get_peft_model(base, ap.AntiPastoConfig())
    data = [{"input_ids": ids, "labels": ids} for ids in tokenizer(rows()).input_ids]
    args = TrainingArguments(str(tmp_path), gradient_checkpointing=checkpointing, **COMMON)
    trainer = Trainer(model=model, args=args, train_dataset=Dataset.from_list(data))
    trainer.train()
    check(trainer, tmp_path)


def test_sft(tmp_path: Path) -> None:
    model, tokenizer = addition_model()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(str(tmp_path), gradient_checkpointing=False, max_length=16, **COMMON),
        train_dataset=Dataset.from_list([{"text": text} for text in rows()]),
        processing_class=tokenizer,
        peft_config=ap.AntiPastoConfig(),
    )
    trainer.train()
    check(trainer, tmp_path)


def test_dpo_takes_the_base_model_for_its_reference(tmp_path: Path) -> None:
    model, tokenizer = addition_model()
    pairs = addition.split("train")[:8]
    data = [
        {"prompt": addition.prompt("h", p), "chosen": f"{sum(p):03d}", "rejected": f"{sum(p) + 1:03d}"} for p in pairs
    ]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(str(tmp_path), gradient_checkpointing=False, max_length=16, logging_steps=1, **COMMON),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=ap.AntiPastoConfig(),
    )
    trainer.train()
    first = next(row for row in trainer.state.log_history if "rewards/margins" in row)
    assert first["rewards/margins"] == 0.0  # policy and reference are one model, bit for bit
    check(trainer, tmp_path)


def test_device_map_puts_the_knobs_where_their_layer_is(tmp_path: Path) -> None:
    FAMILIES["llama"].build().save_pretrained(tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    layers = ap.wrap(whole)
    assert {layer.delta_s.device for layer in layers.values()} == {torch.device("cpu")}
    assert torch.equal(whole(tokens()).logits, FAMILIES["llama"].build()(tokens()).logits)
    here = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        device_map=dict.fromkeys(here, "cpu") | {"model.layers.1": "disk"},
        offload_folder=tmp_path / "disk",
    )
    with pytest.raises(ValueError, match=r"model\.layers\.1\..* is a target, but cannot be adapted: .*offloaded"):
        ap.wrap(offloaded)


# ── FSDP2 ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def build_sharded(shard: bool) -> nn.Module:
    model = FAMILIES["llama"].build()
    ap.wrap(model)
    if shard:
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    return model


def steps(model: nn.Module, batch: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(batch).logits.logsumexp(-1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _shard(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        model = build_sharded(shard=True)
        losses = steps(model, tokens()[rank : rank + 1])
        layers = ap.knobs(model)
        knobs = {name: whole(layer.delta_s) for name, layer in layers.items()}
        with torch.no_grad(), ap.reference(model):
            reference = model(tokens()).logits
        base = sum(p.to_local().numel() for n, p in model.named_parameters() if "base_layer.weight" in n)  # type: ignore[attr-defined]
        basis = sum(layer.U.numel() + layer.Vh.numel() for layer in layers.values())
        torch.save(
            {"knobs": knobs, "losses": losses, "reference": reference, "base": base, "basis": basis},
            f"{folder}/{rank}.pt",
        )
        del model, layers


@pytest.mark.slow
def test_fsdp2_on_two_processes(tmp_path: Path) -> None:
    """The knobs are those of one process on the whole batch; W is sharded, the basis is whole on each."""
    mp.spawn(_shard, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = build_sharded(shard=False)
    losses = steps(model, tokens()[:2])
    assert [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)] == pytest.approx(
        losses, rel=1e-4
    )
    for name, layer in ap.knobs(model).items():
        assert torch.equal(first["knobs"][name], second["knobs"][name])
        torch.testing.assert_close(first["knobs"][name], layer.delta_s.detach(), atol=2e-3, rtol=1e-2)
    want = FAMILIES["llama"].build()(tokens()).logits
    for one in (first, second):
        torch.testing.assert_close(one["reference"], want)
    weights = sum(layer.layer.base_layer.weight.numel() for layer in ap.knobs(model).values())
    assert first["base"] + second["base"] == weights
    assert first["basis"] == second["basis"] > weights


# ── FSDP1 ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "rendezvous"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("save_basis", [False, True])
def test_fsdp1_computes_the_same(save_basis: bool) -> None:
    """It has plain tensors in the place of parameters during a forward, the carried basis's among them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    config = ap.AntiPastoConfig(target_modules=["0", "1"], save_basis=save_basis, cache_dir=None)
    layers = ap.wrap(model, config)
    for layer in layers.values():
        layer.delta_s.data.normal_(std=0.1)
    x = torch.randn(8, 6)
    want = model(x)
    want.square().sum().backward()
    grads = [layer.delta_s.grad.clone() for layer in layers.values()]  # type: ignore[union-attr]
    model.zero_grad()
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    y = sharded(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, want)
    got = [p.grad for name, p in sharded.named_parameters() if ".delta_s." in name]
    for one, other in zip(got, grads, strict=True):
        torch.testing.assert_close(one, other)
