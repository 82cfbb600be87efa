"""What a config and a task together say: by what the run is routed, and by which direction.

method    what becomes of what the gate claims                         gates by
plain     nothing is claimed                                           (score: it watches)
route     it fills the quarantine, which is deleted at deployment      direction, detector, both or score
erase     it is dropped                                                direction, detector, both or score
measure   nothing is moved, books are kept                             direction
penalty   flagged rollouts get reward 0                                detector or score
discount  rewards shrink as scores rise from clean to hack             score
drop      nobody learns from flagged rollouts                          detector or score
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
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
from antipasto.names import HELDOUT, Flagged, Rule
from antipasto.routing.pairs import split_pairs
from antipasto.tasks import Task
from antipasto.trl.advantages import deployed_positions
from antipasto.trl.trainer import DEPLOY_FRACTION

T = TypeVar("T")
OWN_ANSWERS = 64  # of the start, which say what a monitor's threshold means


class Gating:
    """What a config and a task together say about direction, detector and router.

    Raises:
        ValueError: they do not fit together, or a file of pairs or a direction is bad.
    """

    def __init__(self, config: TrainConfig, task: Task, *, has_direction: bool) -> None:
        self.config, self.task = config, task
        method, by = config.method, config.by
        has_pairs, routes = bool(config.pairs or task.pairs), method in ("route", "erase")
        if by is None and method in ("penalty", "drop", "route", "erase", "discount"):
            by = "score" if has_pairs or method == "discount" else "detector"
            if routes and config.direction:
                by = "direction"
        self.uses_direction = method == "measure" or (routes and by in ("direction", "both"))
        self.uses_monitor = by == "score"
        self.uses_detector = (method in ("penalty", "drop") and by != "score") or by in ("detector", "both")
        self.uses_pairs = self.uses_direction or self.uses_monitor
        if self.uses_pairs and not has_pairs and not (self.uses_direction and config.direction):
            what, give = (
                ("pairs or a direction", "--pairs or --direction") if self.uses_direction else ("pairs", "--pairs")
            )
            raise ValueError(f"method {method} needs {what}: task {task.name!r} brings none, so give {give}.")
        if self.uses_detector and task.detector is None and by == "detector" and config.by is None:
            what, give = ("pairs, a direction", "--pairs or --direction") if routes else ("pairs", "--pairs")
            raise ValueError(
                f"method {method} needs {what} or a detector to go by, and task {task.name!r} brings none: give {give}, or "
                "train without, --method plain."
            )
        if self.uses_detector and task.detector is None:
            raise ValueError(f"method {method} needs a detector, and task {task.name!r} has none.")
        self._refuse_unused()
        fraction = config.deploy_fraction
        if fraction is None:
            fraction = DEPLOY_FRACTION if method == "route" else 0.0
        deployed_positions(config.generations, fraction)
        if self.uses_pairs and not has_direction:  # a bad file is better known of before the model is loaded
            if config.direction is not None:
                ap.Direction.load(config.direction)
            else:
                self._pairs()
        actions: dict[str, Flagged] = {"penalty": "penalty", "discount": "discount", "drop": "drop"}
        self.flagged: Flagged = actions.get(method, "route")
        watches = task.detector is not None and not self.uses_detector and not self.uses_monitor
        if watches or (self.uses_monitor and method == "plain"):
            self.flagged = "watch"  # what nothing goes by is still worth a column in the logs

    def _refuse_unused(self) -> None:
        """Options of a direction where there is none, or of its extraction where it comes from a file."""
        defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
        names: tuple[str, ...] = ("estimator", "k") if self.config.direction is not None else ()
        if not self.uses_direction:
            names = ("direction", "threshold", "gate", "estimator", "k", "controls")
            names += () if self.uses_pairs else ("pairs",)
        if self.config.false_alarms is not None and not self.uses_monitor:
            raise ValueError(f"false_alarms={self.config.false_alarms} does nothing here: no monitor flags anything.")
        for name in names:
            if getattr(self.config, name) != defaults[name]:
                why = "this run goes by no direction; --method route --by direction does"
                why = "a direction's file is given" if self.uses_direction else why
                raise ValueError(f"{name}={getattr(self.config, name)} does nothing here: {why}.")

    def _pairs(self) -> tuple[list[ap.ContrastPair], list[ap.ContrastPair]]:
        """To fit, and to hold out."""
        pairs = ap.load_pairs(self.config.pairs if self.config.pairs is not None else list(self.task.pairs or []))
        return split_pairs(pairs, HELDOUT, self.config.seed)

    def router(self, folder: RunFolder, tokenizer: Any, state: PartialState) -> Callable[[nn.Module], ap.Router] | None:
        """A function that makes the router of an adapted model; None where the method has none."""
        config = self.config
        if config.method not in ("route", "erase", "measure"):
            return None
        mode = config.method

        def make(model: nn.Module) -> ap.Router:
            if not self.uses_direction:
                return ap.Router(model, None, mode=mode)
            # one process extracts, and all read the same file
            on_main(state, lambda: self._make_direction(model, tokenizer, folder.direction))
            v = ap.Direction.load(folder.direction)
            controls = {name: getattr(v, name)(config.seed) for name in config.controls}
            options: dict[str, Any] = {"gate": config.gate, "threshold": config.threshold, "controls": controls}
            return ap.Router(model, v, mode=mode, **options)

        return make

    def monitor(
        self, folder: RunFolder, tokenizer: Any, state: PartialState, how: Sampling, console: Console
    ) -> Callable[[nn.Module], ap.Monitor] | None:
        """A function that makes the monitor of an adapted model, and says what it is; None where nothing goes by a score.

        Args:
            folder: its file is there.
            tokenizer: of the model.
            state: one process makes it, and all read the same file.
            how: training's, by which the start's own answers are drawn.
            console: where to say it.
        """
        if not self.uses_monitor:
            return None

        def make(model: nn.Module) -> ap.Monitor:
            on_main(state, lambda: self._make_monitor(model, tokenizer, folder.monitor, how))
            monitor = ap.Monitor.load(folder.monitor, model, tokenizer)
            console.print(str(monitor.calibration), markup=False, highlight=False)
            return monitor

        return make

    def _make_monitor(self, model: nn.Module, tokenizer: Any, path: Path, how: Sampling) -> None:
        if path.exists():
            return
        rate = self.config.false_alarms
        number = OWN_ANSWERS if rate is None else max(OWN_ANSWERS, math.ceil(4 / rate))
        order = random.Random(self.config.seed).choices(range(len(self.task.train)), k=number)
        own = own_answers(model, tokenizer, [self.task.train[row]["prompt"] for row in order], how)
        pairs = ap.load_pairs(self.config.pairs if self.config.pairs is not None else list(self.task.pairs or []))
        # a penalty on a wrong answer takes nothing from it, so that what only comes near the exploit may be flagged
        rule: Rule = "quarter" if self.config.method in ("penalty", "plain") else "midway"
        options: dict[str, Any] = {"heldout": HELDOUT, "seed": self.config.seed, "rule": rule}
        ap.Monitor.from_pairs(model, tokenizer, pairs, own=own, false_alarms=rate, **options).save(path)

    def _make_direction(self, model: nn.Module, tokenizer: Any, path: Path) -> None:
        if path.exists():
            return
        if self.config.direction is not None:
            v = ap.Direction.load(self.config.direction)
        else:
            fit, heldout = self._pairs()
            model.eval()
            v = ap.extract_direction(
                model, tokenizer, fit, heldout=heldout, estimator=self.config.estimator, k=self.config.k
            )
            model.train()
        v.save(path)


def on_main(state: PartialState, function: Callable[[], T]) -> T:
    """Call on the main process; what it returns comes to all. So does an error that it raises, to the others as its words."""
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
