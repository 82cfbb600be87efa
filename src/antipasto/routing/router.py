"""What of every optimizer step goes into the quarantine.

    update level (default)   after optimizer.step():  Δ = δS_after − δS_before
                             moved = gate(Δ);   δS = δS_before + (Δ − moved);   δS_hack += moved
    gradient level           before the step:  the same gate on Δ = −g;  δS.grad = g + moved;  δS_hack.grad = −moved

A direction claims a part by its gate (`gates`).

θ = δS + δS_hack is the same after an update-level move, so **routing does not change the training run** that samples from θ,
and each further direction can keep a book of what it would have moved in that same run (`controls`). That takes an optimizer
whose step depends on the gradients and on what it remembers of them alone, as those of SGD, Adam, AdamW without decay, RMSprop
and Lion do: the optimizer sees δS where the plain run's saw θ. Where a step depends on the parameter's value (weight decay,
LAMB, Adafactor, schedule-free averaging), or an optimizer writes to the parameters outside of ``step()`` (Lookahead,
schedule-free's ``eval``), θ leaves the plain run. Both are warned about: the first is tried out on copies
(`probing`) after each of the first steps, until three were conclusive, but not with a closure; the second is seen at
the next step, or when the router lets go of the optimizer. With deployed sampling (`antipasto.trl.trainer`) part of the run is
of δS, which the direction shapes; the books are then of that run. mode="erase" drops the moved part instead of keeping it;
mode="measure" moves nothing, and keeps the direction's own book beside the controls'.

Two guarantees at update level, for what ``step()`` moves, with any optimizer and whatever its momentum does. Coordinate gate:
the coordinates it guards never move hack-ward, exactly. One-sided gate: no step moves δS hack-ward along V, up to rounding. At
gradient level neither holds: Adam rescales the small routed part to a full-size step in both knobs.

Weight decay. A decoupled decay (AdamW's) pulls δS towards zero and is part of Δ, so the gate sees it; the quarantine, which
the optimizer does not know, does not decay. 0 is the default of every trainer this is meant for.

A step that is refused moves nothing, and neither does one that a GradScaler skips. A step that ends in an exception is routed
as far as it went, before the next one or when the router lets go of the optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from antipasto.adapter.fingerprints import check_same_base
from antipasto.adapter.knobs import current_fingerprints, knobs, require_finite_gradients
from antipasto.adapter.layer import View
from antipasto.adapter.views import seen_as
from antipasto.names import GateName, Level, Mode
from antipasto.routing.books import CHANCE, OWN_BOOK, Books, read_books
from antipasto.routing.directions import Direction
from antipasto.routing.gates import Control, Gate
from antipasto.routing.probing import RoutingWarning, Watch

_CHANCE_SEED = 2410_04332  # no seed that a control would be given


@dataclass
class _Step:
    """The step under way: what was there before it."""

    delta_s: Tensor
    hack: Tensor  # at gradient level, where the optimizer moves both knobs
    skipped: bool = False  # by a GradScaler
    unfilled: list[Tensor] = field(default_factory=list)  # parameters without a momentum buffer


class Router:
    """Routes what each optimizer step learns, by a direction, into the quarantine; keeps the books of controls.

    Args:
        model: an adapted model. Its active adapter is the one that is routed.
        direction: which way is hack-ward.
        mode: ``"route"`` moves into the quarantine, ``"erase"`` drops, ``"measure"`` only watches.
        level: ``"update"`` or ``"gradient"``. At gradient level ``delta_s_hack`` is made to require a gradient: create the
            optimizer afterwards, with both knobs in it.
        gate: ``"coordinate"`` or ``"one_sided"``.
        threshold: of the coordinate gate: the effect size above which one is guarded; 0.65 if None.
        controls: name → `Direction`, under the same gate and threshold, or `Control`; each keeps a book of what it would have
            moved of the same displacements, at update level.

    Raises:
        ValueError: options that make no sense together, or a direction that does not fit the model; names the layer.
    """

    def __init__(
        self,
        model: nn.Module,
        direction: Direction,
        *,
        mode: Mode = "route",
        level: Level = "update",
        gate: GateName = "coordinate",
        threshold: float | None = None,
        controls: Mapping[str, Direction | Control] | None = None,
    ) -> None:
        if mode not in ("route", "erase", "measure"):
            raise ValueError(f"mode must be route, erase or measure, got {mode!r}.")
        if level not in ("update", "gradient"):
            raise ValueError(f"level must be update or gradient, got {level!r}.")
        self.model, self.mode, self.level = model, mode, level
        self.steps = 0
        layers = knobs(model)
        self.adapter_name = next(iter(layers.values())).adapter
        self._sizes = {name: layer.r for name, layer in layers.items()}
        self._fingerprints = current_fingerprints(layers)
        self._delta_s = [layer.delta_s for layer in layers.values()]
        hack = [layer.delta_s_hack for layer in layers.values()] if mode == "route" else []
        self._hack = [knob for knob in hack if knob is not None]
        if len(self._hack) < len(hack):
            raise ValueError("mode='route' needs a quarantine, and this model's was dropped. Use 'erase' or 'measure'.")
        if level == "gradient":
            for knob in self._hack:
                knob.requires_grad_(True)
        self.direction = direction
        self._gates = self._made_gates(direction, dict(controls or {}), gate, threshold)
        kept = [name for name in self._gates if name not in (OWN_BOOK, CHANCE)]
        kept += [CHANCE, *([OWN_BOOK] if mode == "measure" else [])]
        none = torch.zeros(sum(self._sizes.values()), device=self._device, dtype=torch.float32)
        self._books = {name: none.clone() for name in kept}
        self._seen: dict[str, Tensor] = {}
        # while attached
        self._optimizer: torch.optim.Optimizer | None = None
        self._watch: Watch | None = None
        self._step: _Step | None = None
        self._descent = torch.empty(0)

    @property
    def _device(self) -> torch.device:
        return self._delta_s[0].device

    def _made_gates(
        self,
        direction: Direction,
        controls: dict[str, Direction | Control],
        gate: GateName,
        threshold: float | None,
    ) -> dict[str, Gate]:
        """The direction's own, that of a random one of the same shape, and the controls'."""
        if taken := {OWN_BOOK, CHANCE} & {*controls}:
            raise ValueError(f"{taken.pop()!r} is the name of a book that the router keeps: give the control another.")
        own = Control(direction, gate, threshold)
        given = {
            name: entry if isinstance(entry, Control) else Control(entry, gate, threshold)
            for name, entry in controls.items()
        }
        for control in (own, *given.values()):
            control.direction.check_base(self.model, self._fingerprints)
        by_chance = Control(direction.random(_CHANCE_SEED), gate, threshold)
        named = {OWN_BOOK: own, CHANCE: by_chance, **given}
        return {name: Gate(control, self._sizes, self._device) for name, control in named.items()}

    # ── in the loop ──────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def attach(self, optimizer: torch.optim.Optimizer) -> Iterator[Router]:
        """Context: every ``optimizer.step()`` is routed. Leaves no hook behind, also after an exception.

        Args:
            optimizer: a torch optimizer (or accelerate's wrapper of one) that has the ``delta_s`` of all routed layers; the
                module's text says what its step may depend on.

        Raises:
            ValueError: a knob is not in the optimizer, the router is attached already, or ``maximize=True`` at gradient level.
                From the step: a gradient or a displacement that is not finite.

        Warns:
            RoutingWarning: the optimizer decays the knobs; from the step, its step depends on their values; from there or the
                end, they were written to outside of a step (see the module's text).
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self._check_optimizer(optimizer)
        handles = [
            optimizer.register_step_pre_hook(lambda _, args, kwargs: self._on_step(args, kwargs)),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]
        if self.level == "gradient":
            # until the step splits it, the gradient counts once: clipping would else see it in both knobs
            handles += [knob.register_hook(torch.zeros_like) for knob in self._hack]
        self._optimizer = optimizer
        by_name = dict(zip(self._sizes, self._delta_s, strict=True))
        writes = self.level == "update" and self.mode != "measure"
        self._watch = Watch(optimizer, by_name, tries=self._keeps_the_run(optimizer), writes=writes)
        self._follow(self._device)
        try:
            yield self
            self._end_interrupted()
            self._watch.see_writes(stacklevel=4)
        finally:
            for handle in handles:
                handle.remove()
            try:
                self._end_interrupted()
            finally:
                self._optimizer = self._watch = None

    def _keeps_the_run(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether θ is to be the plain run's, and nothing has been said yet of why it would not."""
        groups = [
            group for group in optimizer.param_groups if any(p is k for p in group["params"] for k in self._delta_s)
        ]
        routes = self.mode == "route" and self.level == "update"
        return routes and not any(group.get("weight_decay") for group in groups)

    def _follow(self, device: torch.device) -> None:
        """Move along with a model that has been moved since."""
        for gate in self._gates.values():
            gate.to(device)
        self._books = {name: book.to(device) for name, book in self._books.items()}

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if self._optimizer is not None:
            raise ValueError("This router is attached already: each step would be routed twice.")
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        wanted = [("delta_s", self._delta_s)]
        if self.level == "gradient":
            wanted.append(("delta_s_hack", self._hack))
        for what, parameters in wanted:
            for name, knob in zip(self._sizes, parameters, strict=False):
                if id(knob) not in groups:
                    raise ValueError(
                        f"{name}: its {what} is not in the optimizer. Create the optimizer after the router, with all "
                        "parameters that require a gradient."
                    )
        if self.level != "gradient" or self.mode != "route":
            for name, layer in knobs(self.model, adapter_name=self.adapter_name).items():
                hack = layer.delta_s_hack
                if hack is not None and hack.requires_grad and id(hack) in groups:
                    raise ValueError(
                        f"{name}: its delta_s_hack is in the optimizer and would train by itself. Call "
                        "delta_s_hack.requires_grad_(False) on every layer, and create the optimizer without it."
                    )
        ascends = [bool(groups[id(knob)].get("maximize")) for knob in self._delta_s]
        if self.level == "gradient" and self.mode != "measure" and any(ascends):
            raise ValueError(
                "At level='gradient' the part of a gradient that a step would follow downwards is routed, and this optimizer "
                "has maximize=True: minimise the negative, or use level='update'."
            )
        signs = [
            torch.full((r,), -1.0 if up else 1.0, dtype=torch.float32)
            for r, up in zip(self._sizes.values(), ascends, strict=True)
        ]
        self._descent = torch.cat(signs).to(self._device)
        if any(groups[id(knob)].get("weight_decay") for knob in self._delta_s):
            warnings.warn(
                "The optimizer decays the knobs. The decay is routed as part of each step and the quarantine does not decay, "
                "so that training is no longer what it would be without the router; weight_decay=0 keeps it so.",
                RoutingWarning,
                stacklevel=4,
            )

    def _on_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._end_interrupted()
        closure = kwargs.get("closure") if len(args) < 2 else args[1]  # args[0] is the optimizer
        assert self._watch is not None
        self._watch.see_writes(stacklevel=5)
        if closure is None:
            self._step = self._begun_step()
            return None
        self._watch.stop_trying()
        if self.level == "gradient" and self.mode != "measure":
            raise ValueError(
                "level='gradient' cannot route a step with a closure, which computes gradients of its own."
            )
        step = self._step = _Step(_flat(self._delta_s), torch.empty(0))

        def looked_at() -> Any:
            loss = closure()
            try:
                self._see_gradient()
            except ValueError:
                with torch.no_grad():  # an optimizer that calls it several times has moved them by now
                    _write(self._delta_s, self._split(step.delta_s))
                raise
            return loss

        return (args[0], looked_at, *args[2:]), {name: value for name, value in kwargs.items() if name != "closure"}

    def flatten(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Gradients by layer, (b, r) each, as one (b, R); zeros where a layer has none."""
        b = len(next(iter(grads.values())))
        blocks = [
            grads[name][:, :r] if name in grads else torch.zeros(b, r, device=self._device)
            for name, r in self._sizes.items()
        ]
        return torch.cat(blocks, 1)

    def alignment(self, gradients: Tensor) -> Tensor:
        """How hack-ward the steps are that gradients (b, R) ask for: cosines (b,) with the direction (`Gate.alignment`)."""
        return self._gates[OWN_BOOK].alignment(gradients)

    @torch.no_grad()
    def _see_gradient(self) -> None:
        """Look at the gradient that the optimizer is about to use; refuse what is not finite, having changed nothing."""
        grads = [torch.zeros_like(knob) if knob.grad is None else knob.grad for knob in self._delta_s]
        require_finite_gradients(dict(zip(self._sizes, grads, strict=True)), self.steps)
        self._see("hackward_in", self._descent * _flat(grads))

    @torch.no_grad()
    def _begun_step(self) -> _Step:
        # of a GradScaler, where the optimizer skips in its step
        found_inf = getattr(self._optimizer, "found_inf", None)
        step = _Step(_flat(self._delta_s), _flat(self._hack) if self._hack else torch.empty(0))
        step.skipped = found_inf is not None and bool(found_inf)
        if step.skipped:
            assert self._optimizer is not None
            parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
            step.unfilled = [p for p in parameters if "momentum_buffer" not in self._optimizer.state.get(p, {})]
            return step
        self._see_gradient()
        if self.level == "gradient" and self.mode != "measure":
            self._split_gradient()
        return step

    def _split_gradient(self) -> None:
        g = _flat([torch.zeros_like(knob) if knob.grad is None else knob.grad for knob in self._delta_s])
        moved, self._seen["fired"] = self._gates[OWN_BOOK].moved(-g)
        self._seen["fired_random"] = self._gates[CHANCE].moved(-g)[1]
        for knob, part in zip(self._delta_s, self._split(g + moved), strict=True):
            knob.grad = part.clone()
        for knob, part in zip(self._hack, self._split(-moved), strict=False):  # none where the moved part is erased
            knob.grad = part.clone()

    def _end_interrupted(self) -> None:
        """Route what a step that ended in an exception had moved by then."""
        if self._step is None:
            return
        if self._step.skipped or torch.equal(self._step.delta_s, _flat(self._delta_s)):
            self._step = None
        else:
            self._after_step(whole=False)

    @torch.no_grad()
    def _after_step(self, whole: bool = True) -> None:
        step, self._step = self._step, None
        if step is None:  # of a step that called its base class's, which was routed
            return
        if step.skipped:
            assert self._optimizer is not None
            for parameter in step.unfilled:  # torch's fused SGD makes it, and skips without having filled it
                self._optimizer.state.get(parameter, {}).pop("momentum_buffer", None)
            return
        before, after = step.delta_s, _flat(self._delta_s)
        delta = after - before
        if self.level == "gradient" and self._hack:
            delta = delta + (_flat(self._hack) - step.hack)  # of θ: here the optimizer moves both knobs
        self._require_finite(delta, step)
        moved = self._gated(delta)
        if self.level == "update" and self.mode != "measure":
            own = moved[OWN_BOOK]
            # exact on both sides: what is moved entirely ends where it began, what is not moved stays where the step put it
            _write(self._delta_s, self._split(torch.where(own == 0, after, before + (delta - own))))
            if self.mode == "route":
                _write(self._hack, self._split(_flat(self._hack) + own))
        self._see("hackward_update", -delta)
        self._see("hackward_out", before - _flat(self._delta_s))
        for name, book in self._books.items():
            book += moved[name]
        self.steps += 1
        assert self._watch is not None
        self._watch.after_step(try_out=whole)

    def _gated(self, delta: Tensor) -> dict[str, Tensor]:
        """What each gate moves."""
        moved, fired = {}, {}
        for name, gate in self._gates.items():
            moved[name], fired[name] = gate.moved(delta)
        if self.level == "update" or self.mode == "measure":
            self._seen["fired"], self._seen["fired_random"] = fired[OWN_BOOK], fired[CHANCE]
        return moved

    def _require_finite(self, delta: Tensor, step: _Step) -> None:
        """Put the knobs back and say so where the optimizer's own step made a NaN or Inf of them."""
        if delta.isfinite().all():
            return
        _write(self._delta_s, self._split(step.delta_s))
        if self.level == "gradient" and self._hack:
            _write(self._hack, self._split(step.hack))
        bad = next(
            name for name, part in zip(self._sizes, self._split(delta), strict=True) if not part.isfinite().all()
        )
        raise ValueError(
            f"After {self.steps} steps, {type(self._optimizer).__name__}'s step made a NaN or Inf of the knobs of {bad}, from "
            "gradients that are finite. The knobs are as they were before this step; what the optimizer remembers may not be. "
            "Look at its learning rate and its eps."
        )

    def _see(self, name: str, u: Tensor) -> None:
        self._seen[name] = self._gates[OWN_BOOK].hackward(u)
        self._seen[f"{name}_random"] = self._gates[CHANCE].hackward(u)

    # ── what it says ─────────────────────────────────────────────────────────────────────────────────────────────────

    def metrics(self) -> dict[str, float]:
        """Numbers of the last step, each beside what a random direction of the same k and r gets (``…_random``).

        ``hackward_in``: ‖relu(V g)‖ / ‖g‖ of the gradient; ``hackward_update``: the same of the step that the optimizer made;
        ``hackward_out``: of what ``delta_s`` moved in the end; ``fired``: share of coordinates, or of rows, where the gate
        fired; ``quarantine_norm``: length of all that was moved so far.
        """
        own = self._hack if self.mode == "route" else None
        book = _flat(own) if own else self._books.get(OWN_BOOK)
        numbers = {name: float(value) for name, value in self._seen.items()}
        numbers["quarantine_norm"] = 0.0 if book is None else float(book.norm())
        numbers["quarantine_norm_random"] = float(self._books[CHANCE].norm())
        return numbers

    @property
    def books(self) -> tuple[str, ...]:
        """The names of the books, but for the router's own of chance."""
        return tuple(name for name in self._books if name != CHANCE)

    def book(self, name: str) -> dict[str, Tensor]:
        """What a control would have moved so far: layer name → (r,).

        Raises:
            ValueError: there is no such book.
        """
        if name not in self.books:
            raise ValueError(f"There is no book {name!r}; there are {sorted(self.books)}.")
        return self._by_layer(self._books[name])

    def _by_layer(self, flat: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._sizes, self._split(flat), strict=True))

    def deployed(self, name: str | None = None) -> AbstractContextManager[None]:
        """Context: the quarantine out; or, by name, a control's book out instead.

        Raises:
            ValueError: there is no such book, or another adapter is active than the one that is routed.
        """
        active = next(iter(knobs(self.model).values())).adapter
        if active != self.adapter_name:
            raise ValueError(
                f"The router is of the adapter {self.adapter_name!r}, but {active!r} is active: set_adapter first."
            )
        if name is None and self.mode == "measure":
            name = OWN_BOOK
        if name is None:
            return seen_as(self.model, View.DEPLOYED)
        return seen_as(self.model, View.TRAINED, {layer: -part for layer, part in self.book(name).items()})

    # ── continuing ───────────────────────────────────────────────────────────────────────────────────────────────────

    def save(self, path: str | Path) -> None:
        """Write the books, the direction as it is, and the number of steps; the adapter holds the knobs."""
        Books(
            steps=self.steps,
            books={name: self._by_layer(book) for name, book in self._books.items()},
            direction=self.direction.to_tensors(),
            fingerprints=self._fingerprints,
        ).write(path)

    def load(self, path: str | Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            ValueError: the file is not a book file, is damaged, or has other books or layers than this router; names it.
            OSError: the file cannot be read.
        """
        saved = read_books(path)
        try:
            if sorted(saved.controls) != sorted(self.books):
                raise ValueError(f"it has the books {sorted(saved.controls)}, this router {sorted(self.books)}")
            books = {
                name: torch.cat([saved.books[name][layer] for layer in self._sizes]).to(self._device)
                for name in self._books
            }
            if any(len(books[name]) != len(book) for name, book in self._books.items()):
                raise ValueError("its layers have another r")
            layers = knobs(self.model, adapter_name=self.adapter_name)
            check_same_base(
                saved.fingerprints,
                self._fingerprints,
                {name: layer.S for name, layer in layers.items()},
                what="It",
                remedy="Continue on the base that the run began with.",
            )
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} does not continue this run: {error}.") from error
        if self._watch is not None:
            self._watch.forget()  # whoever loads the books has loaded the knobs as well
        self._books, self.steps = books, saved.steps

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        return flat.split(list(self._sizes.values()))


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach() for tensor in tensors])


def _write(parameters: list[nn.Parameter], values: tuple[Tensor, ...]) -> None:
    torch._foreach_copy_([parameter.detach() for parameter in parameters], list(values))
