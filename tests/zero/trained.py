"""`RoutedGRPOTrainer` under accelerate's DeepSpeed on two processes, or by torch on one: what `test_zero_trainer` compares."""

from __future__ import annotations

import faulthandler
import warnings
from pathlib import Path
from typing import Any

import torch
from scripted import GROUP, Routed, make
from sharded import knobs_of
from stepped import begin
from two_processes import monitor, router

from antipasto.tasks import addition

KINDS: dict[str, dict[str, Any]] = {"route": {"router": router, "deploy_fraction": 0.375}, "penalty": {}}
DEEPSPEED = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def run(out: Path, kind: str, processes: int, resume_from: Path | None = None) -> dict[str, Any]:
    """Three steps of two micro-batches, flagged by score; with a checkpoint after the second."""
    config: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": GROUP // processes,
        "gradient_accumulation_steps": 2,
        "beta": 0.04,
        "max_grad_norm": 0.05,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    if processes == 2:
        config["deepspeed"] = DEEPSPEED
    trainer = make(
        out, Routed, config=config, monitor=monitor, oracle=addition.oracle, rollout_log=out / "log", **KINDS[kind]
    )
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    trainer.save_model(str(out / "adapter"))
    state = {
        **knobs_of(trainer.model),
        "history": trainer.state.log_history,
        "engine": type(trainer.model_wrapped).__name__,
    }
    if trainer.router is not None:
        state |= {
            "metrics": trainer.router.metrics(),
            "book": trainer.router.book("random"),
            "steps": trainer.router.steps,
        }
    return state


def child(rank: int, folder: str) -> None:
    faulthandler.dump_traceback_later(500, exit=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    begin(rank, folder)
    found = {}
    for kind in KINDS:
        out = Path(folder) / "two" / kind
        out.mkdir(parents=True, exist_ok=True)
        found[kind] = run(out, kind, 2)
    found["resumed"] = run(
        Path(folder) / "two" / "resumed", "route", 2, Path(folder) / "two" / "route" / "checkpoint-2"
    )
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
