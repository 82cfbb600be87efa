"""One rank of a run that `test_two_processes` starts: ``python two_processes.py OUT ROLLOUTS_PER_RANK ACCUMULATION KIND``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from scripted import Routed, make, says_known, tokenizer
from torch import nn

import antipasto as ap
from antipasto.adapter.sharded import flat
from antipasto.tasks import addition


class Sharded(Routed):
    """Under accelerate's FSDP2, which accelerate by itself uses only on GPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="FULL_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
        self.is_fsdp_enabled = True


def router(model: nn.Module) -> ap.Router:
    v = ap.extract_direction(model, tokenizer(), ap.load_pairs(addition.hack_pairs(8, seed=0)))
    return ap.Router(model, v, threshold=0.3, controls={"random": v.random(0)})


def monitor(model: nn.Module) -> ap.Monitor:
    pairs = ap.load_pairs(addition.hack_pairs(16, seed=1))
    return ap.Monitor.from_pairs(model, tokenizer(), pairs)


def run(out: Path, per_rank: int, accumulation: int, kind: str = "") -> Any:
    """Direction, detector or monitor, and deployed sampling, with a KL term."""
    trainer = make(
        out,
        Sharded if kind == "sharded" else Routed,
        config={
            "per_device_train_batch_size": per_rank,
            "gradient_accumulation_steps": accumulation,
            "beta": 0.04,
            "max_grad_norm": 0.05,
            **({"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}),
        },
        router=router,
        **({"monitor": monitor} if kind else {"detector": says_known}),
        oracle=addition.oracle,
        deploy_fraction=0.375,  # unevenly over the two halves of a group
        rollout_log=out / "log",
    )
    trainer.train()
    rank = trainer.accelerator.process_index
    layers = ap.knobs(trainer.model).values()
    state = {what: flat([getattr(layer, what) for layer in layers]) for what in ("delta_s", "delta_s_hack")}
    torch.save({**state, "metrics": trainer.router.metrics(), "history": trainer.state.log_history}, out / f"{rank}.pt")
    trainer.router.save(out / f"{rank}.safetensors")
    trainer.save_model(str(out / "adapter"))
    return trainer


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
    torch.distributed.destroy_process_group()
