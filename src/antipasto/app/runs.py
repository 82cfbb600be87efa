"""Load a finished run: its base model with its adapter."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer

from antipasto.adapter import AntiPastoConfig
from antipasto.adapter.fingerprints import hashed_once
from antipasto.adapter.knobs import deployed, reference, scaled
from antipasto.adapter.layer import View
from antipasto.adapter.views import seen_as
from antipasto.app.data import load_task_of
from antipasto.app.models import base_fingerprint, best_device, load_model, quiet, with_template_options
from antipasto.app.run_folder import RunFolder
from antipasto.evaluation.records import REFERENCE, SHRUNK, TRAINED, dial_arm
from antipasto.files import replacing_folder, write_json
from antipasto.names import COMPLETE
from antipasto.routing.books import read_books
from antipasto.routing.router import Router
from antipasto.tasks import Task

ROUTED = "route"
"""The method that leaves a quarantine, which does not ship."""


@dataclass(frozen=True)
class LoadedRun:
    """A finished run.

    Attributes:
        folder: its folder.
        config: ``config.yaml``.
        facts: ``run.json``.
        model: the base model with the adapter, in eval mode, as trained.
        tokenizer: with left padding.
        dial: share of the quarantine that ships; 1 if there is no quarantine.
    """

    folder: RunFolder
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    model: PeftModel
    tokenizer: Any
    dial: float

    @property
    def method(self) -> str:
        """The ``--method`` of `antipasto train`."""
        return str(self.facts.get("method", self.config["method"]))

    @property
    def has_quarantine(self) -> bool:
        """Whether there is a quarantine; if not, the model ships as trained."""
        return self.method == ROUTED

    @property
    def task(self) -> str | None:
        """The task's name for `antipasto.tasks.load_task`; None if the run has none."""
        task = self.facts.get("task", self.config.get("task"))
        return None if task is None else str(task)

    def load_task(self) -> Task:
        """Load the task, on the rows of the run's dataset if it has one.

        Raises:
            ValueError: it cannot be loaded, or the rows of the dataset have changed.
        """
        return load_task_of({**self.config, "task": self.task}, self.facts)[0]

    @property
    def base(self) -> str:
        """The base model's folder, or its name on the hub."""
        return str(self.facts["base"]["model"])

    def views(
        self, *, shrink: float | None = None, dials: Sequence[float] = ()
    ) -> dict[str, AbstractContextManager[None]]:
        """Name of each arm → context manager in which the model is that arm; see `run_views`."""
        books = read_books(self.folder.books).controls if self.folder.books.exists() else {}
        return run_views(self.model, books, self.method, shrink=shrink, dials=dials)

    def shipped(self) -> AbstractContextManager[None]:
        """Context manager in which the model is the one that ships."""
        return deployed(self.model, self.dial) if self.has_quarantine else nullcontext()


def load_run(root: Path, *, dial: float = 0.0) -> LoadedRun:
    """Load a finished run.

    Args:
        dial: share of the quarantine that ships.

    Raises:
        ValueError: the run is not finished, it has no quarantine and ``dial`` is not 0, its base model cannot be loaded or has
            changed, or its adapter is damaged.
    """
    folder = RunFolder(root)
    config, facts = folder.read_config(), folder.read_run()
    if folder.unfinished is not None:
        raise ValueError(folder.unfinished)
    model, tokenizer = load_model(facts["base"]["model"], dtype=config.get("dtype", "auto"))
    with_template_options(tokenizer, (config.get("trainer") or {}).get("chat_template_kwargs"))
    with quiet(), hashed_once():
        adapter = AntiPastoConfig.from_pretrained(str(folder.adapter))
        adapter.cache_dir = config.get("cache_dir", "auto")
        adapted = PeftModel.from_pretrained(model.to(best_device()), folder.adapter, config=adapter).eval()
        now = base_fingerprint(adapted)
    if now != facts["base"]["fingerprint"]:
        raise ValueError(
            f"{facts['base']['model']} has changed since {root} was trained: restore those weights, or train again."
        )
    method = str(facts.get("method", config["method"]))
    if dial and method != ROUTED:
        raise ValueError(f"{root}: --dial needs a quarantine, and a run by method {method} has none.")
    return LoadedRun(folder, config, facts, adapted, tokenizer, dial if method == ROUTED else 1.0)


def run_facts(trainer: Trainer, base: str, fingerprint: str, *, task: str, method: str) -> dict[str, Any]:
    """The contents of ``run.json``: how the run was started, on what, with which versions.

    Args:
        trainer: of the run, with the adapted model.
        base: the base model's folder or hub name.
        fingerprint: its `antipasto.app.models.base_fingerprint`.
        task: as `antipasto.tasks.load_task` takes it.
        method: the ``--method``.
    """
    names = ("antipasto", "torch", "transformers", "peft", "trl")
    return {
        "command": _command(),
        "versions": {name: version(name) for name in names},
        "task": task,
        "method": method,
        "base": {"model": base, "fingerprint": fingerprint},
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "processes": trainer.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": str(trainer.accelerator.device),
    }


def finish_run(trainer: Trainer, router: Router | None, folder: RunFolder) -> None:
    """Save the books and then the adapter, atomically: a complete adapter marks a finished run. Call it on all processes."""
    main = trainer.accelerator.is_main_process
    if main and router is not None:
        router.save(folder.books)
    with replacing_folder(folder.adapter) if main else nullcontext(folder.adapter) as adapter:
        trainer.save_model(str(adapter))
        if main:
            write_json(adapter / COMPLETE, {"step": trainer.state.global_step})


def _command() -> str:
    """The command line of this process, as one would type it."""
    name = Path(sys.argv[0]).name
    return shlex.join(["antipasto" if name in ("antipasto", "__main__.py") else name, *sys.argv[1:]])


def run_views(
    model: nn.Module,
    books: Mapping[str, Mapping[str, torch.Tensor]],
    method: str,
    *,
    shrink: float | None = None,
    dials: Sequence[float] = (),
) -> dict[str, AbstractContextManager[None]]:
    """The arms of a trained model: name → context manager in which the model is that arm.

    ============  =============================================================
    reference     θ = 0: the base model
    as trained    θ = δS + δS_hack
    deployed      θ = δS, if the run has a quarantine
    random, …     θ minus what that control would have moved into the quarantine (its book)
    dial -0.50, … θ = δS + c δS_hack
    shrunk        c θ, with the same KL to the reference as the deployed model: what plain shrinking would do
    ============  =============================================================

    Args:
        model: adapted, with the run's knobs.
        books: control's name → layer → (r,).
        method: of the run.
        shrink: c, from `antipasto.evaluation.ask.matched_scale`; None: no such arm.
        dials: shares of the quarantine to leave in, for a run that has one.
    """
    views: dict[str, AbstractContextManager[None]] = {REFERENCE: reference(model), TRAINED: nullcontext()}
    if method == ROUTED:
        views |= {dial_arm(dial): deployed(model, dial) for dial in (0.0, *dials)}
    if method in ("route", "measure"):  # erase has already removed from θ what the direction claimed
        for name, book in books.items():
            views[name] = seen_as(model, View.TRAINED, {layer: -part for layer, part in book.items()})
    if method == ROUTED and shrink is not None:
        views[SHRUNK] = scaled(model, shrink)
    return views
