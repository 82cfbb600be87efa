"""A NaN or Inf stops what it would spoil, and names the layer. (Rewards: test_tasks.py; weights: test_targets.py.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tokens
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from scripted import make

import antipasto as ap
from antipasto.trl import RoutedGRPOTrainer

BAD = "model.layers.1.mlp.up_proj"


def model_with_gradients() -> tuple[PeftModel, torch.optim.Optimizer]:
    model = get_peft_model(FAMILIES["llama"].build(), ap.AntiPastoConfig())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0)
    model(tokens()).logits.logsumexp(-1).mean().backward()
    return model, optimizer


def direction(model: PeftModel) -> ap.Direction:
    effect = {name: torch.randn(layer.r) for name, layer in ap.knobs(model).items()}
    return ap.Direction({name: t / t.norm() for name, t in effect.items()}, effect=effect)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mode", ["route", "erase", "measure"])
def test_the_router_stops_before_the_step(mode: Any, value: float) -> None:
    model, optimizer = model_with_gradients()
    router = ap.Router(model, direction(model), mode=mode)
    gradient = ap.knobs(model)[BAD].delta_s.grad
    assert gradient is not None
    gradient[3] = value
    with router.attach(optimizer):
        with pytest.raises(
            ValueError, match=f"After 0 steps, the gradient of {BAD} has a NaN or Inf in it. The knobs are as"
        ):
            optimizer.step()
        for layer in ap.knobs(model).values():
            assert not layer.delta_s.any()
        gradient[3] = 0.0
        optimizer.step()
    assert router.steps == 1
    assert all(layer.delta_s.isfinite().all() for layer in ap.knobs(model).values())


def test_all_layers_that_are_not_finite_are_counted() -> None:
    model, optimizer = model_with_gradients()
    for layer in ap.knobs(model).values():
        layer.delta_s.grad.fill_(torch.nan)  # type: ignore[union-attr]
    with (
        ap.Router(model, direction(model)).attach(optimizer),
        pytest.raises(ValueError, match="13 of the other 13 layers"),
    ):
        optimizer.step()


def test_a_scaler_that_skips_the_step_is_let_do_so() -> None:
    """torch.amp.GradScaler tells a fused optimizer of the overflow, which then leaves the knobs as they are."""
    model, _ = model_with_gradients()
    knobs = [layer.delta_s for layer in ap.knobs(model).values()]
    optimizer = torch.optim.AdamW(knobs, lr=0.1, weight_decay=0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with ap.Router(model, direction(model)).attach(optimizer):
        scaler.scale(model(tokens()).logits.logsumexp(-1).mean()).backward()
        knobs[0].grad.fill_(torch.inf)  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
    assert not any(knob.any() for knob in knobs)
    assert scaler.get_scale() == 1.0


@pytest.mark.parametrize("routed", [True, False])
def test_the_trainer_stops_before_the_step(tmp_path: Path, routed: bool) -> None:
    """Also where there is no router."""
    trainer = make(
        tmp_path,
        RoutedGRPOTrainer,
        rewards=lambda completions, **_: [float(number % 2) for number in range(len(completions))],
        router=(lambda model: ap.Router(model, direction(model))) if routed else None,
    )
    ap.knobs(trainer.model)[BAD].delta_s.register_hook(lambda g: g * torch.nan)
    with pytest.raises(ValueError, match=f"After 0 steps, the gradient of {BAD} has a NaN or Inf"):
        trainer.train()
    assert not any(layer.delta_s.any() for layer in ap.knobs(trainer.model).values())


def test_an_adapter_that_is_not_finite_is_not_loaded(tmp_path: Path) -> None:
    model = get_peft_model(FAMILIES["llama"].build(), ap.AntiPastoConfig())
    ap.knobs(model)[BAD].delta_s.data[0] = torch.nan
    with pytest.raises(ValueError, match=rf"{BAD}\.delta_s\.default\.weight of the state dict contains a NaN or Inf"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(model))
    ap.knobs(model)[BAD].delta_s.data[0] = 1.0
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = torch.inf
    file.unlink()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="is damaged, or was not saved together with"):
        PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path)
