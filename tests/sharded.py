"""Routed steps on a model that FSDP2 shards over two processes, or on one process: what `test_sharded` compares."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import torch
from processes import process_group
from scripted import load, tokenizer
from torch import Tensor, nn
from torch import multiprocessing as mp
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import antipasto as ap
from antipasto.adapter import choice
from antipasto.adapter.functional import merged_weight
from antipasto.adapter.layer import AntiPastoLinear
from antipasto.adapter.sharded import flat as whole_flat
from antipasto.adapter.sharded import local
from antipasto.routing.monitor import Completion
from antipasto.routing.probing import RoutingWarning
from antipasto.tasks import addition

PAIRS = ap.load_pairs(addition.hack_pairs(8, seed=0))
WAYS: dict[str, dict[str, Any]] = {
    "route": {},
    "erase, one_sided": {"mode": "erase", "gate": "one_sided"},
    "gradient": {"level": "gradient"},
    "gradient, erase, one_sided": {"level": "gradient", "mode": "erase", "gate": "one_sided"},
    "route, basis carried": {"save_basis": True},
}
# unlike on the two processes, and duplicates on the first alone
COMPLETIONS = [
    [Completion(p.prompt, text) for p in PAIRS[:2] for text in (p.hack, p.hack, p.hack, p.clean)],
    [Completion(p.prompt, text) for p in PAIRS[2:6] for text in (p.hack, p.clean)],
]


class Decays(torch.optim.Optimizer):
    """Its steps depend on the values of the parameters, and it does not say so."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.5)
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad)


def shard(model: nn.Module, *, blocks: bool = True) -> None:
    """By block, or all of the model at once."""
    for block in model.model.layers if blocks else ():
        fully_shard(block)
    fully_shard(model)


def ids(step: int) -> Tensor:
    """Four sequences, of which each process has two."""
    return torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(step))


def backward(model: nn.Module, batch: Tensor, rank: int | None) -> list[Tensor]:
    """The gradient of the mean over the processes of their losses; each sequence's own, layer by layer."""
    rows = []
    for part in range(2) if rank is None else [rank]:
        with ap.rollout_grads(model) as grads:
            loss = model(input_ids=batch[2 * part : 2 * part + 2]).logits.logsumexp(-1).mean()
            (loss / 2 if rank is None else loss).backward()
        rows.append(torch.cat(list(grads.values()), 1) * (2 if rank is None else 1))
    return rows


def one_and_two(
    everything: Callable[[int | None, Path], dict[str, Any]], child: Callable[[int, str], None], folder: Path
) -> tuple[Any, Any, Any]:
    """What is found by one process, and by each of two, with one direction."""
    model = load()
    ap.wrap(model)
    ap.extract_direction(model, tokenizer(), PAIRS).save(folder / "direction")
    mp.spawn(child, args=(str(folder),), nprocs=2)
    return everything(None, folder), torch.load(folder / "0.pt"), torch.load(folder / "1.pt")


def knobs_of(model: nn.Module) -> dict[str, Tensor]:
    layers = ap.knobs(model).values()
    return {
        "delta_s": whole_flat([layer.delta_s for layer in layers]),
        "delta_s_hack": whole_flat([layer.delta_s_hack for layer in layers if layer.delta_s_hack is not None]),
    }


def held_by(layer: AntiPastoLinear) -> int:
    """How many W_θ a layer keeps."""
    return sum(entry.strong is not None for entry in layer.choice.held._entries) + len(layer.fixed or ())


def train(way: dict[str, Any], v: ap.Direction, rank: int | None, folder: Path, *, shard_last: bool) -> dict[str, Any]:
    """Four routed steps; the books go through a file between the second and the third."""
    model, way, built = load(), dict(way), Mock(side_effect=merged_weight)
    ap.wrap(model, ap.AntiPastoConfig(save_basis=way.pop("save_basis", False)))
    if rank is not None and not shard_last:
        shard(model)
    options = {"threshold": 0.3 if way.get("gate") is None else None, **way}
    router = ap.Router(model, v, controls={"random": v.random(0)}, **options)
    if rank is not None and shard_last:
        shard(model, blocks=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    patch.object(choice, "merged_weight", built).start()
    with torch.no_grad():  # after this, FSDP leaves the root's parameters whole
        model(input_ids=ids(0))
    norms, rows, metrics = [], [], []
    file = folder / f"books{'' if rank is None else rank}"
    for steps in (range(2), range(2, 4)):
        with router.attach(optimizer):
            for step in steps:
                optimizer.zero_grad()
                rows += backward(model, ids(step), rank)
                norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
                optimizer.step()
        if rank != 1:  # one process may do so alone
            router.save(file)
            metrics.append(router.metrics())
        if rank is not None:
            torch.distributed.barrier()
        router = ap.Router(model, v, controls={"random": v.random(0)}, **options)
        router.load(file if rank is None else folder / "books0")
    with torch.no_grad(), router.deployed("random"), ap.fixed(model):
        deployed = model(input_ids=ids(0)).logits
        held = sum(held_by(layer) for layer in model.modules() if isinstance(layer, AntiPastoLinear))
    patch.stopall()
    if isinstance(model, FSDPModule):
        model.reshard()
    return {
        **knobs_of(model),
        "basis": sum(local(p).numel() for name, p in model.named_parameters() if "basis_" in name),
        "held": held,
        "built": built.call_count,
        "steps": router.steps,
        "books": {name: router.book(name) for name in router.books},
        "metrics": metrics,
        "deployed": deployed,
        "norms": norms,
        "rows": rows,
    }


def look(rank: int | None) -> dict[str, Any]:
    """What is only looked at: a direction, scores, a warning and an error."""
    model = load()
    ap.wrap(model)
    if rank is not None:
        shard(model)
    v = ap.extract_direction(model, tokenizer(), PAIRS)
    monitor = ap.Monitor(model, tokenizer(), v, threshold=0.0)
    scores = [monitor.scores(c, batch_size=2) for c in (COMPLETIONS if rank is None else [COMPLETIONS[rank]])]
    parameters = [p for p in model.parameters() if p.requires_grad]
    with ap.Router(model, v).attach(Decays(parameters, lr=0.1)) as router:
        backward(model, ids(0), rank)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RoutingWarning)
            for parameter in parameters:
                parameter.detach().fill_(1.0)
            router._optimizer.step()  # type: ignore[union-attr]
        before = knobs_of(model)
        backward(model, ids(0), rank)
        if rank in (None, 1):  # in the rows of one process alone
            grad = parameters[0].grad
            (grad.to_local() if isinstance(grad, DTensor) else grad)[-1] = torch.nan  # type: ignore[index]
        try:
            router._optimizer.step()  # type: ignore[union-attr]
            error = ""
        except ValueError as raised:
            error = str(raised)
    after = knobs_of(model)
    return {
        "effect": torch.cat(list((v.effect or {}).values())),
        "scores": scores,
        "warned": [str(w.message) for w in caught if w.category is RoutingWarning],
        "error": error,
        "kept": all(torch.equal(before[name], after[name]) for name in before),
    }


def everything(rank: int | None, folder: Path) -> dict[str, Any]:
    warnings.simplefilter("error", RoutingWarning)
    v = ap.Direction.load(folder / "direction")
    found: dict[str, Any] = {
        name: train(way, v, rank, folder, shard_last=n % 2 == 1) for n, (name, way) in enumerate(WAYS.items())
    }
    return found | {"look": look(rank)}


def child(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        torch.save(everything(rank, Path(folder)), f"{folder}/{rank}.pt")
