"""A model made without a random generator, and files about it that a version of this library once wrote.

python tests/frozen.py      # writes those of the present format; only when the format is raised
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, nn

import antipasto as ap
from antipasto.adapter.config import FORMAT

HERE = Path(__file__).parent / "frozen_files"


def _numbers(*shape: int) -> Tensor:
    """In [-1/2, 1/2], the same on every machine."""
    count = torch.Size(shape).numel()
    return (((torch.arange(count) * 7919 + 13) % 1009).double() / 1009 - 0.5).float().reshape(shape)


def build() -> nn.Module:
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 4))
    for parameter in model.parameters():
        parameter.data = _numbers(*parameter.shape)
    return model


def inputs() -> Tensor:
    return _numbers(5, 7)


def main() -> None:
    torch.manual_seed(0)
    folder = HERE / f"format-{FORMAT}"
    for kind in ("plain", "carried"):
        model = get_peft_model(
            build(), ap.AntiPastoConfig(target_modules=["0", "2"], rank_pattern={"0": 5}, save_basis=kind == "carried")
        )
        for number, layer in enumerate(ap.knobs(model).values()):
            layer.delta_s.data = 0.2 * _numbers(layer.r + number)[number:]
            assert layer.delta_s_hack is not None
            layer.delta_s_hack.data = 0.1 * _numbers(layer.r + 5)[5:]
        model.save_pretrained(folder / kind)
    expected = {"trained": model(inputs()).tolist()}
    with ap.deployed(model):
        expected["deployed"] = model(inputs()).tolist()
    effect = {name: 3 * _numbers(layer.r) for name, layer in ap.knobs(model).items()}
    prints = {name: layer.layer.current_fingerprint() for name, layer in ap.knobs(model).items()}
    v = ap.Direction({name: t / t.norm() for name, t in effect.items()}, effect=effect, fingerprints=prints)
    v.save(folder / "direction.safetensors")
    router = ap.Router(model, v, controls={"random": v.random(0)})
    optimizer = torch.optim.SGD([layer.delta_s for layer in ap.knobs(model).values()], lr=0.1)
    with router.attach(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs()).square().mean().backward()
            optimizer.step()
    router.save(folder / "books.safetensors")
    expected["book"] = float(router.book("random")["0"].norm())
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    for readme in folder.glob("*/README.md"):
        readme.unlink()


if __name__ == "__main__":
    sys.exit(main())
