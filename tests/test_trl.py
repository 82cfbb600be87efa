"""TRL's own trainer, unmodified, on this adapter; and what the library adds to its runs."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from scripted import ON_CPU, known_hack, load, make, tokenizer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import GRPOTrainer

import antipasto as ap
from antipasto.tasks import addition
from antipasto.trl import ProgressBar, RoutingCallback


def logits(model: nn.Module) -> torch.Tensor:
    ids = tokenizer()(["h12+34=046", "s99+01=100"], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return model(**ids).logits


def grpo(out: Path, **options: object) -> GRPOTrainer:
    """TRL's own, with a KL term."""
    return make(out, GRPOTrainer, config={"beta": 0.04, **options})


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_grpo_with_the_default_optimizer_changes_the_policy(tmp_path: Path, gradient_checkpointing: bool) -> None:
    """With W_θ kept while the fused AdamW writes, the knobs would move and the policy would not."""
    base = load()
    trainer = grpo(tmp_path, gradient_checkpointing=gradient_checkpointing)
    model = trainer.model
    assert trainer.args.optim == "adamw_torch_fused"
    assert torch.equal(logits(model), logits(base))
    trainer.train()

    knobs = ap.knobs(model)
    assert all(layer.delta_s.any() for layer in knobs.values())
    assert not any(layer.delta_s_hack.any() for layer in knobs.values())
    assert (logits(model) - logits(base)).abs().max() > 0.1  # the policy that training saw…
    twin = get_peft_model(load(), ap.AntiPastoConfig())
    for name, layer in ap.knobs(twin).items():
        layer.delta_s.data.copy_(knobs[name].delta_s)
    assert torch.equal(logits(twin), logits(model))  # …is the one that the knobs say
    kl = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert kl[0] == 0  # the reference is the base model, bit for bit
    assert kl[-1] > 0
    for name, weight in base.state_dict().items():  # and the base weights are where they were
        path = next(
            n for n in (name, name.replace(".weight", ".base_layer.weight")) if n in model.get_base_model().state_dict()
        )
        assert torch.equal(model.get_base_model().state_dict()[path], weight)


def test_grpo_saves_checkpoints_that_load_and_continue(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    loaded = PeftModel.from_pretrained(load(), tmp_path / "checkpoint-4")
    assert torch.equal(logits(loaded), logits(trainer.model))

    again = grpo(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    assert torch.equal(logits(again.model), logits(trainer.model))


def test_grpo_from_a_trained_adapter_takes_that_adapter_as_its_reference(tmp_path: Path) -> None:
    """TRL copies "….default.…" into an adapter "ref" by parameter name; a bare parameter dict would be passed over."""
    model = get_peft_model(load(), ap.AntiPastoConfig())
    for layer in ap.knobs(model).values():
        layer.delta_s.data.normal_(std=0.05)
    before = logits(model)
    trainer = make(tmp_path, GRPOTrainer, model=model, config={"beta": 0.04}, peft_config=None)
    assert set(model.peft_config) == {"default", "ref"}
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == 0
    model.set_adapter("ref")
    assert torch.equal(logits(model), before)
    model.set_adapter("default")
    assert not torch.equal(logits(model), before)


def test_progress_bar_gives_the_terminal_back_after_an_exception() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    bar = ProgressBar(console, "training")
    with pytest.raises(KeyboardInterrupt), bar:
        raise KeyboardInterrupt if bar._progress.live.is_started else AssertionError
    assert not bar._progress.live.is_started


# ── routing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def routed(
    out: Path, *, resume_from: Path | None = None, reporter: TrainerCallback | None = None, **options: object
) -> tuple[GRPOTrainer, ap.Router]:
    trainer = grpo(out, **options)
    if reporter is not None:
        trainer.add_callback(reporter)  # as report_to's are: there before the router is
    v = known_hack(trainer.model)
    router = ap.Router(trainer.model, v, controls={"random": v.random(0), "permuted": v.permuted(0)})
    RoutingCallback(router, resume_from).install(trainer)
    return trainer, router


class Reporter(TrainerCallback):
    """Stands for tensorboard and the like: sees what the Trainer logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: object, state: object, control: object, logs: dict[str, float], **_: object) -> None:
        self.rows.append(dict(logs))


def test_routing_a_grpo_run(tmp_path: Path) -> None:
    plain = grpo(tmp_path / "plain")
    plain.train()
    reporter = Reporter()
    trainer, router = routed(tmp_path / "routed", reporter=reporter)
    trainer.train()
    moved = False
    for name, layer in ap.knobs(trainer.model).items():
        # the first steps are the plain run's to the last digits; later ones sample from a policy rounded differently
        torch.testing.assert_close(
            layer.delta_s + layer.delta_s_hack, ap.knobs(plain.model)[name].delta_s, atol=1e-5, rtol=1e-3
        )
        moved |= bool(layer.delta_s_hack.any())
        guarded = router.direction.effect[name].abs() > 0.65
        assert not (guarded & (router.direction.effect[name] * layer.delta_s < 0)).any()  # from 0, never hack-ward
    assert moved
    assert router.steps == 4
    rows = [row for row in trainer.state.log_history if "reward" in row]
    assert all(row["routing/hackward_in"] > 0 and "routing/hackward_in_random" in row for row in rows)
    assert all("routing/quarantine_norm" in row for row in reporter.rows)
    optimizer = trainer.optimizer.optimizer
    assert not optimizer._optimizer_step_post_hooks


def test_a_resumed_run_ends_where_the_uninterrupted_one_does_books_included(tmp_path: Path) -> None:
    trainer, router = routed(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    again, again_router = routed(tmp_path / "again", resume_from=tmp_path / "checkpoint-2")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, layer in ap.knobs(trainer.model).items():
        assert torch.equal(layer.delta_s, ap.knobs(again.model)[name].delta_s)
        assert torch.equal(layer.delta_s_hack, ap.knobs(again.model)[name].delta_s_hack)
        for book in ("random", "permuted"):
            assert torch.equal(router.book(book)[name], again_router.book(book)[name])
    assert router.metrics() == again_router.metrics()

    lost, _ = routed(tmp_path / "lost")
    with pytest.raises(ValueError, match=r"continues at step 2, but .*books\.safetensors does not exist"):
        lost.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_best_checkpoints_books_come_back_with_its_knobs(tmp_path: Path) -> None:
    trainer, router = routed(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    last = router.book("random")
    callback = trainer.callback_handler.callbacks[0]
    state = SimpleNamespace(best_model_checkpoint=str(tmp_path / "checkpoint-2"))
    callback.on_train_end(SimpleNamespace(load_best_model_at_end=True, deepspeed_plugin=None), state, None)
    assert router.steps == 2
    assert any(not torch.equal(router.book("random")[name], part) for name, part in last.items())


def test_going_back_to_the_best_checkpoint_is_no_write_that_is_warned_about(tmp_path: Path) -> None:
    """Warnings are errors here. The best is the first, by a loss that should be large."""
    model = get_peft_model(load(), ap.AntiPastoConfig())
    router = ap.Router(model, known_hack(model))
    rows = [tokenizer()(addition.prompt("h", pair) + "!").input_ids for pair in addition.split("train")[:8]]
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    data = [{"input_ids": row, "labels": row} for row in rows]
    args = TrainingArguments(str(tmp_path), max_steps=3, learning_rate=1e-2, **best, **every, **ON_CPU)
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    RoutingCallback(router).install(trainer)
    trainer.train()
    assert router.steps == 1
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("level", ["update", "gradient"])
def test_routing_in_a_plain_trainer_with_accumulation(tmp_path: Path, level: str) -> None:
    def knobs_after(batch_size: int, accumulation: int) -> torch.Tensor:
        model = get_peft_model(load(), ap.AntiPastoConfig())
        router = ap.Router(model, known_hack(model), level=level)
        rows = [tokenizer()(addition.prompt("h", pair) + "!").input_ids for pair in addition.split("train")[:16]]
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                str(tmp_path / f"{batch_size}"),
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                max_steps=3,
                learning_rate=1e-2,
                save_strategy="no",
                data_seed=0,
                **ON_CPU,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        )
        RoutingCallback(router).install(trainer)
        trainer.train()
        assert router.steps == 3
        return torch.cat([torch.cat([k.delta_s, k.delta_s_hack]).detach() for k in ap.knobs(model).values()])

    one, four = knobs_after(4, 1), knobs_after(1, 4)
    torch.testing.assert_close(one, four, atol=2e-4, rtol=1e-3)
    assert one.any()
