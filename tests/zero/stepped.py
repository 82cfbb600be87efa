"""Routed steps under DeepSpeed's ZeRO on two processes, or by torch on one: what `test_zero` compares."""

from __future__ import annotations

import faulthandler
import json
import linecache
import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from scripted import load, tokenizer
from sharded import COMPLETIONS, PAIRS, ids, knobs_of
from torch import Tensor, nn

import antipasto as ap
from antipasto.app.train.config import TrainConfig
from antipasto.app.train.trl_args import trainer_args
from antipasto.routing.probing import RoutingWarning
from antipasto.tasks import load_task

WAYS: dict[str, dict[str, Any]] = {
    "route": {"stage": 2},
    "route, stage 1, monitored": {"stage": 1, "monitored": True},
    "erase, monitored": {"mode": "erase", "stage": 2, "monitored": True},
    "erase, one_sided, SGD": {"mode": "erase", "gate": "one_sided", "stage": 1, "optimizer": "SGD"},
    "route, offloaded": {"stage": 2, "offload": True},
    "route, base in bf16": {"stage": 2, "dtype": torch.bfloat16},
    "measure, stage 0": {"mode": "measure", "stage": 0},
    "monitored alone": {"stage": 2, "monitored": True, "routed": False},
}
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=2.0, momentum=0.9),
}


def begin(rank: int, folder: str) -> None:
    """Join the other process. DeepSpeed would compile an operator; accelerate asks for an address, without using it."""
    os.environ.update(DS_ACCELERATOR="cpu", WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    store = torch.distributed.FileStore(f"{folder}/rendezvous", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


def engine_of(model: nn.Module, optimizer: Any, stage: int, offload: bool = False, **more: Any) -> Any:
    import deepspeed

    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # its default is 1
        **more,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def backward(model: nn.Module, engine: Any, batch: Tensor, rank: int | None) -> list[Tensor]:
    """The gradient of the mean over the processes of their losses; each sequence's own, layer by layer."""
    rows = []
    for part in range(2) if rank is None else [rank]:
        with ap.rollout_grads(model) as grads:
            loss = (engine or model)(input_ids=batch[2 * part : 2 * part + 2]).logits.float().logsumexp(-1).mean()
            if engine is None:
                (loss / 2).backward()
            else:
                engine.backward(loss)
        rows.append(torch.cat(list(grads.values()), 1) * (2 if rank is None else 1))
    return rows


def train(way: dict[str, Any], v: ap.Direction, rank: int | None, folder: Path) -> dict[str, Any]:
    """Six routed steps; the books go through a file between the third and the fourth."""
    way = {"optimizer": "AdamW", "stage": 2, "monitored": False, "routed": True, "offload": False, **way}
    stage, offload, routed = (way.pop(name) for name in ("stage", "offload", "routed"))
    model, monitored = load().to(way.pop("dtype", torch.float32)), way.pop("monitored")
    ap.wrap(model)
    optimizer = OPTIMIZERS[way.pop("optimizer")]([p for p in model.parameters() if p.requires_grad])
    engine = None if rank is None else engine_of(model, optimizer, stage, offload)
    stepping = optimizer if engine is None else engine.optimizer
    options = {"threshold": 0.3 if way.get("gate") is None else None, **way}

    def router() -> ap.Router:
        return ap.Router(model, v, controls={"random": v.random(0)}, **options)

    monitor = ap.Monitor(model, tokenizer(), v, threshold=0.0) if monitored else None
    one, rows, scores, metrics = router(), [], [], []
    file = folder / f"books{'' if rank is None else rank}"
    for steps in (range(3), range(3, 6)):
        with ExitStack() as attached:
            if routed:
                attached.enter_context(one.attach(stepping))
            for step in steps:
                rows += backward(model, engine, ids(step), rank)
                if monitor is not None:  # between a backward and its step; with the same gradients one process need not
                    scores += [
                        monitor.scores(c, batch_size=4) for c in (COMPLETIONS if rank is None else [COMPLETIONS[rank]])
                    ]
                if engine is None:
                    optimizer.step()
                    optimizer.zero_grad()
                else:
                    engine.step()
        if rank != 1:  # one process may do so alone
            one.save(file)
            metrics.append(one.metrics())
        if rank is not None:
            torch.distributed.barrier()
        one = router()
        one.load(file if rank is None else folder / "books0")
    with torch.no_grad(), one.deployed("random"):
        deployed = model(input_ids=ids(0)).logits.float()
    found = {
        **knobs_of(model),
        "steps": one.steps,
        "books": {name: one.book(name) for name in one.books},
        "metrics": metrics,
        "deployed": deployed,
        "rows": rows,
        "scores": scores,
    }
    if engine is not None:
        found["hooked"] = "step" in vars(engine.optimizer)
        if stage:
            from deepspeed.utils import safe_get_full_fp32_param

            masters = [safe_get_full_fp32_param(layer.delta_s).flatten() for layer in ap.knobs(model).values()]
            found["master"] = torch.cat(masters)
        engine.destroy()
    return found


def said(act: Callable[[], Any]) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""


def warned(act: Callable[[], Any]) -> str:
    """The warning, and the line it points at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RoutingWarning)
        act()
    (one,) = (warning for warning in caught if warning.category is RoutingWarning)
    return f"{one.message} {linecache.getline(one.filename, one.lineno).strip()}"


def attach(router: ap.Router, optimizer: Any) -> None:
    with router.attach(optimizer):
        pass


def wrapped(hack: bool = False) -> tuple[nn.Module, Any]:
    model = load()
    for layer in ap.wrap(model).values():
        if hack and layer.delta_s_hack is not None:
            layer.delta_s_hack.requires_grad_(True)
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def refusals(v: ap.Direction, folder: Path) -> dict[str, str]:
    """What is said where it cannot work, or is not the plain run."""
    found = {}
    model, optimizer = wrapped()
    router = ap.Router(model, v)
    engine = engine_of(model, optimizer, 2)
    found["inner"] = said(lambda: attach(router, optimizer))
    with router.attach(engine.optimizer):
        found["twice"] = said(lambda: attach(router, engine.optimizer))
        backward(model, engine, ids(0), torch.distributed.get_rank())
        engine.step()
        next(iter(ap.knobs(model).values())).delta_s.detach().fill_(1.0)
        backward(model, engine, ids(0), torch.distributed.get_rank())
        found["written"] = warned(engine.step)
        before = knobs_of(model)["delta_s"]
        for layer in ap.knobs(model).values():
            layer.delta_s.register_hook(lambda g: g * torch.nan)
        backward(model, engine, ids(0), torch.distributed.get_rank())
        found["nan"] = said(engine.step)
    found["kept"] = "as they were" if before.any() and torch.equal(before, knobs_of(model)["delta_s"]) else ""
    model, _ = wrapped()
    decays = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.1)
    engine = engine_of(model, decays, 2)
    found["decay"] = warned(lambda: attach(ap.Router(model, v), engine.optimizer))
    model, optimizer = wrapped()
    router = ap.Router(model, v)
    found["bf16"] = said(lambda: attach(router, engine_of(model, optimizer, 2, bf16={"enabled": True}).optimizer))
    model, optimizer = wrapped(hack=True)
    engine = engine_of(model, optimizer, 2)
    found["hack"] = said(lambda: attach(ap.Router(model, v), engine.optimizer))
    found["gradient"] = said(lambda: attach(ap.Router(model, v, level="gradient"), engine.optimizer))
    return found | refusals_of_stage_3(v, folder)


def refusals_of_stage_3(v: ap.Direction, folder: Path) -> dict[str, str]:
    import deepspeed

    model, optimizer = wrapped()
    router, monitor = ap.Router(model, v), ap.Monitor(model, tokenizer(), v, threshold=0.0)
    engine = engine_of(model, optimizer, 3)
    found = {
        "attach 3": said(lambda: attach(router, engine.optimizer)),
        "router 3": said(lambda: ap.Router(model, v)),
        "monitor 3": said(lambda: ap.Monitor(model, tokenizer(), v, threshold=0.0)),
        "scores 3": said(lambda: monitor.scores(COMPLETIONS[0])),
        "direction 3": said(lambda: ap.extract_direction(model, tokenizer(), PAIRS)),
    }
    rank = torch.distributed.get_rank()
    stage_3 = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=stage_3):
        linear = nn.Sequential(nn.Linear(8, 8))
    found["wrap 3"] = said(lambda: ap.wrap(linear, ap.AntiPastoConfig(target_modules=["0"])))
    for stage, method, more in ((2, "route", {"bf16": True}), (3, "penalty", {})):
        file = folder / f"stage{stage}-{rank}.json"
        file.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": stage}}))
        config = TrainConfig("model", "addition", method=method, trainer={"deepspeed": str(file), **more})
        found[f"train {stage}"] = said(lambda c=config: trainer_args(c, load_task("addition"), folder, 2))  # type: ignore[misc]
    return found


def everything(rank: int | None, folder: Path) -> dict[str, Any]:
    warnings.simplefilter("error", RoutingWarning)
    v = ap.Direction.load(folder / "direction")
    found: dict[str, Any] = {name: train(way, v, rank, folder) for name, way in WAYS.items()}
    assert v.effect is not None
    return found | {"effect": torch.cat([v.effect[name] for name in ap.knobs(wrapped()[0])])}


def child(rank: int, folder: str) -> None:
    faulthandler.dump_traceback_later(500, exit=True)
    torch.set_num_threads(1)
    begin(rank, folder)
    found = everything(rank, Path(folder))
    found["refusals"] = refusals(ap.Direction.load(f"{folder}/direction"), Path(folder))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
