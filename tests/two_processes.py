"""One rank of a run that `test_two_processes` starts: ``python two_processes.py OUT ROLLOUTS_PER_RANK ACCUMULATION``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from scripted import flat, make, says_known, tokenizer
from torch import nn

import antipasto as ap
from antipasto.tasks import addition


def router(model: nn.Module) -> ap.Router:
    v = ap.extract_direction(model, tokenizer(), ap.load_pairs(addition.hack_pairs(8, seed=0)))
    return ap.Router(model, v, threshold=0.3, controls={"random": v.random(0)})


def run(out: Path, per_rank: int, accumulation: int) -> Any:
    """Direction, detector and deployed sampling, with a KL term."""
    trainer = make(
        out,
        config={
            "per_device_train_batch_size": per_rank,
            "gradient_accumulation_steps": accumulation,
            "beta": 0.04,
            "max_grad_norm": 0.05,
            **({"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}),
        },
        router=router,
        detector=says_known,
        oracle=addition.oracle,
        deploy_fraction=0.375,  # unevenly over the two halves of a group
        rollout_log=out / "log",
    )
    trainer.train()
    rank = trainer.accelerator.process_index
    state = {"delta_s": flat(trainer.model, "delta_s"), "delta_s_hack": flat(trainer.model, "delta_s_hack")}
    torch.save({**state, "metrics": trainer.router.metrics(), "history": trainer.state.log_history}, out / f"{rank}.pt")
    trainer.router.save(out / f"{rank}.safetensors")
    return trainer


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    torch.distributed.destroy_process_group()
