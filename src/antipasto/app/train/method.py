"""Make the monitor or the router of a run, from its config and its task.

method    what happens to flagged rollouts, or to the part of an update that the direction claims   by
plain     nothing                                                                                   (score: logged only)
penalty   flagged rollouts get reward 0                                                             score or detector
discount  rewards shrink as scores rise from clean to hack                                          score
route     that part goes into the quarantine, which is deleted before deployment                    direction
erase     that part is dropped                                                                      direction
measure   nothing is moved; what would have been moved is logged                                    direction
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from torch import nn

import antipasto as ap
from antipasto.app.run_folder import RunFolder
from antipasto.app.train.config import TrainConfig
from antipasto.evaluation.ask import Sampling, own_answers
from antipasto.names import HELDOUT, MODES, By, Flagged, Method
from antipasto.routing.pairs import pairs_in, split_pairs
from antipasto.tasks import Task
from antipasto.terminal import doing
from antipasto.trl.advantages import deployed_positions
from antipasto.trl.trainer import DEPLOY_FRACTION

T = TypeVar("T")
_PAID: dict[Method, Flagged] = {"penalty": "penalty", "discount": "discount"}
OWN_ANSWERS = 64  # answers of the base model that a monitor is calibrated on


class RunMethod:
    """Makes the monitor or the router of a run.

    Raises:
        ValueError: config and task do not fit together, or a file of pairs or a direction is invalid.
    """

    def __init__(self, config: TrainConfig, task: Task, *, has_direction: bool) -> None:
        self.config, self.task = config, task
        has_pairs = bool(config.pairs or task.pairs)
        by = config.by if config.by is not None else _goes_by(config.method, has_pairs)
        self.uses_direction, self.uses_monitor = by == "direction", by == "score"
        self.uses_pairs = self.uses_direction or self.uses_monitor
        self._check_there_is(by, has_pairs)
        self._refuse_unused()
        fraction = config.deploy_fraction
        if fraction is None:
            fraction = DEPLOY_FRACTION if config.method == "route" else 0.0
        deployed_positions(config.generations, fraction)
        if self.uses_pairs and not has_direction:  # find a bad file before the model is loaded
            if config.direction is not None:
                ap.Direction.load(config.direction)
            else:
                self._fitted_and_heldout()
        flags = self.uses_monitor or task.detector is not None
        # flags are logged even where the method does not use them
        self.flagged: Flagged | None = (_PAID.get(config.method) or "watch") if flags else None

    def _check_there_is(self, by: By | None, has_pairs: bool) -> None:
        """Check that there are the pairs, direction or detector that the method needs."""
        method, task = self.config.method, self.task
        if self.uses_pairs and not has_pairs and not (self.uses_direction and self.config.direction):
            what, give = ("pairs", "--pairs")
            if self.uses_direction:
                what, give = "pairs or a direction", "--pairs or --direction"
            raise ValueError(f"method {method} needs {what}, and task {task.name!r} has none: give {give}.")
        if by == "detector" and task.detector is None:
            raise ValueError(
                f"method {method} needs pairs or a detector, and task {task.name!r} has neither: give --pairs, or "
                "train with --method plain."
                if self.config.by is None
                else f"method {method} with by=detector needs a detector, and task {task.name!r} has none."
            )

    def _refuse_unused(self) -> None:
        """Refuse options that have no effect on this run."""
        defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
        unused = [] if self.uses_direction else ["direction", "threshold", "controls"]
        unused += [] if self.uses_pairs else ["pairs"]
        if self.config.false_alarms is not None and not self.uses_monitor:
            raise ValueError(f"false_alarms={self.config.false_alarms} does nothing here: this run has no monitor.")
        for name in unused:
            if (value := getattr(self.config, name)) != defaults[name]:
                why = "this run uses no direction; --method route does"
                raise ValueError(f"{name}={value} does nothing here: {why}.")

    def _pairs(self) -> list[ap.ContrastPair]:
        return ap.load_pairs(self.config.pairs if self.config.pairs is not None else list(self.task.pairs or []))

    def _fitted_and_heldout(self) -> tuple[list[ap.ContrastPair], list[ap.ContrastPair]]:
        return split_pairs(self._pairs(), HELDOUT, self.config.seed)

    def router(
        self, folder: RunFolder, tokenizer: Any, state: PartialState, console: Console
    ) -> Callable[[nn.Module], ap.Router] | None:
        """A function from an adapted model to its router; None if the method has no router."""
        config = self.config
        mode = config.method
        if mode not in MODES:
            return None

        def make(model: nn.Module) -> ap.Router:
            path = folder.direction
            _once(path, "making the direction", lambda: self._make_direction(model, tokenizer, path), state, console)
            v = ap.Direction.load(folder.direction)
            controls = {name: getattr(v, name)(config.seed) for name in config.controls}
            return ap.Router(model, v, mode=mode, threshold=config.threshold, controls=controls)

        return make

    def monitor(
        self, folder: RunFolder, tokenizer: Any, state: PartialState, how: Sampling, console: Console
    ) -> Callable[[nn.Module], ap.Monitor] | None:
        """A function from an adapted model to its monitor; None if the method uses no score.

        Args:
            folder: gets the monitor's file.
            state: one process makes the monitor; all read the file.
            how: how the base model's own answers are sampled.
            console: where to print the calibration.
        """
        if not self.uses_monitor:
            return None

        def make(model: nn.Module) -> ap.Monitor:
            path, said = folder.monitor, "making the monitor, from the pairs and from answers of the base model"
            _once(path, said, lambda: self._make_monitor(model, tokenizer, path, how), state, console)
            monitor = ap.Monitor.load(folder.monitor, model, tokenizer)
            console.print(str(monitor.calibration), markup=False, highlight=False)
            return monitor

        return make

    def _make_monitor(self, model: nn.Module, tokenizer: Any, path: Path, how: Sampling) -> None:
        rate = self.config.false_alarms
        number = OWN_ANSWERS if rate is None else max(OWN_ANSWERS, math.ceil(4 / rate))
        order = random.Random(self.config.seed).choices(range(len(self.task.train)), k=number)
        own = own_answers(model, tokenizer, [self.task.train[row]["prompt"] for row in order], how)
        # a low threshold: a wrong answer has no reward to lose, so flagging it costs nothing
        options: dict[str, Any] = {"heldout": HELDOUT, "seed": self.config.seed, "rule": "quarter"}
        options["batch_size"] = self._pairs_at_once
        ap.Monitor.from_pairs(model, tokenizer, self._pairs(), own=own, false_alarms=rate, **options).save(path)

    @property
    def _pairs_at_once(self) -> int:
        """Pairs per backward: two texts each, or somewhat more, are a micro-batch."""
        return pairs_in(self.config.micro_batch or 32)

    def _make_direction(self, model: nn.Module, tokenizer: Any, path: Path) -> None:
        if self.config.direction is not None:
            v = ap.Direction.load(self.config.direction)
        else:
            fit, heldout = self._fitted_and_heldout()
            model.eval()
            v = ap.extract_direction(model, tokenizer, fit, heldout=heldout, batch_size=self._pairs_at_once)
            model.train()
        v.save(path)


def _goes_by(method: Method, has_pairs: bool) -> By | None:
    """The default of ``by``."""
    if method in MODES:
        return "direction"
    if method == "penalty":
        return "score" if has_pairs else "detector"
    return "score" if method == "discount" else None


def _once(path: Path, said: str, make: Callable[[], None], state: PartialState, console: Console) -> None:
    """Make a file if it is not there: one process does it, and all wait for it."""
    with nullcontext() if path.exists() else doing(console, said):
        on_main(state, lambda: None if path.exists() else make())


def on_main(state: PartialState, function: Callable[[], T]) -> T:
    """Call a function on the main process and broadcast its result. An error is raised on every process."""
    result: list[Any] = [None, None]
    raised: ValueError | OSError | None = None
    if state.is_main_process:
        try:
            result = [function(), None]
        except (ValueError, OSError) as error:
            raised, result = error, [None, f"{error}"]
    value, message = broadcast_object_list(result)
    if raised is not None:
        raise raised
    if message is not None:
        raise ValueError(message)
    return value
