"""Split every optimizer step: move the part that a direction's gate selects (`gates`) into the quarantine.

    update level (default)   after optimizer.step():  Δ = δS_after − δS_before
                             moved = gate(Δ);   δS = δS_before + (Δ − moved);   δS_hack += moved
    gradient level           before the step:  the same gate on Δ = −g;  δS.grad = g + moved;  δS_hack.grad = −moved

Modes. ``"route"`` moves the part into the quarantine, ``"erase"`` drops it, and ``"measure"`` moves nothing.

Books. A *book* is the running sum of what a gate moved. In ``"route"`` mode the quarantine is the direction's book. Other
directions can keep a book of what they would have moved in the same run: these are the *controls*. The router always keeps
one for a random direction, and in ``"measure"`` mode one for the direction itself.

The training run. An update-level move does not change θ = δS + δS_hack, so **routing does not change the training run** that
samples from θ. This needs an optimizer whose step depends only on gradients and on state computed from gradients, because
the optimizer sees δS where without routing it would see θ. SGD, Adam, AdamW without decay, RMSprop and Lion qualify.
Otherwise θ deviates from the run without a router:

* A step may depend on the parameters' values (weight decay, LAMB, Adafactor, schedule-free averaging). The router tests this
  on copies after each of the first steps, until three were conclusive, and warns (`probing`). Steps with a closure cannot be
  tested.
* An optimizer may write to the parameters outside of ``step()`` (Lookahead, schedule-free's ``eval``). The router warns at
  the next step, or when it is detached.

With deployed sampling (`antipasto.trl.trainer`), part of the rollouts come from δS, which the direction does affect. The books
then belong to that run.

Guarantees at update level, for what ``step()`` moves, with any optimizer and any momentum. Coordinate gate: the guarded
coordinates never move hack-ward, exactly. One-sided gate: no step moves δS hack-ward along V, up to rounding. At gradient
level neither holds: Adam rescales the small routed part to a full-size step in both knobs.

Weight decay. A decoupled decay (as in AdamW) pulls δS towards zero. It is part of Δ, so it is routed; the quarantine, which
the optimizer does not have, does not decay.

Skipped steps. A step that raises an error for a NaN or Inf moves nothing, and neither does a step that a GradScaler skips. If
an exception interrupts a step, what it has moved is routed before the next step, or when the router is detached.

Several processes. Under DDP every process routes the same step. Under FSDP2 the knobs are sharded (`adapter.sharded`): every
process gathers them, routes the same whole step, and writes back the rows that it holds. Gates and books are whole everywhere,
so that any one process can save them or read the metrics. Under DeepSpeed's ZeRO-1 and 2 the optimizer has slices of the knobs
(`adapter.zero`): every process gathers the gradient, routes the same whole step, and writes the result into its slice as well.
Whether such steps depend on the parameters' values is not tested; writes outside of a step are seen.
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
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from antipasto.adapter.fingerprints import check_same_base, dtype_name
from antipasto.adapter.knobs import current_fingerprints, knobs, require_finite_gradients
from antipasto.adapter.layer import View
from antipasto.adapter.rollouts import flat_rows
from antipasto.adapter.sharded import flat, reshard, sharded_as, write
from antipasto.adapter.views import seen_as
from antipasto.adapter.zero import around_steps, gradient, groups, has_master, refuse_partitioned, zero_optimizer
from antipasto.names import MODES, GateName, Level, Mode
from antipasto.routing.books import CHANCE, OWN_BOOK, Books, read_books
from antipasto.routing.directions import Direction
from antipasto.routing.gates import Control, Gate
from antipasto.routing.probing import RoutingWarning, Watch

_CHANCE_SEED = 2410_04332  # unlikely to be the seed of a control


@dataclass
class _Step:
    """State from before the current step."""

    delta_s: Tensor
    hack: Tensor  # at gradient level, where the optimizer moves both knobs
    skipped: bool = False  # by a GradScaler
    unfilled: list[Tensor] = field(default_factory=list)  # parameters that have no momentum buffer yet


class Router:
    """Moves the hack-ward part of each optimizer step into the quarantine, and keeps the books of controls.

    Args:
        model: an adapted model. Its active adapter is routed.
        direction: the hack direction.
        mode: ``"route"`` moves the hack-ward part into the quarantine, ``"erase"`` drops it, ``"measure"`` moves nothing.
        level: ``"update"`` or ``"gradient"``. At gradient level, the router makes ``delta_s_hack`` require a gradient: create
            the optimizer afterwards, with both knobs in it.
        gate: ``"coordinate"`` or ``"one_sided"``.
        threshold: for the coordinate gate: the effect size above which a coordinate is guarded; 0.65 if None.
        controls: name → `Control`, or `Direction` with the same gate and threshold. Each keeps a book of what it would have
            moved of the same displacements, at update level.

    Raises:
        ValueError: options exclude each other, or a direction does not fit the model. The message names the layer.
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
        if mode not in MODES:
            raise ValueError(f"mode must be route, erase or measure, got {mode!r}.")
        if level not in ("update", "gradient"):
            raise ValueError(f"level must be update or gradient, got {level!r}.")
        self.model, self.mode, self.level = model, mode, level
        self.steps = 0
        refuse_partitioned(model, "a router")
        layers = knobs(model)
        self.adapter_name = next(iter(layers.values())).adapter
        self._sizes = {name: layer.numbers for name, layer in layers.items()}
        self._fingerprints = current_fingerprints(layers)
        self._take_knobs()
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

    def _take_knobs(self) -> None:
        """Look up the knobs and the norm of the quarantine. Sharding a model replaces its parameters by others."""
        reshard(self.model)
        layers = knobs(self.model, adapter_name=self.adapter_name).values()
        self._delta_s = [layer.delta_s for layer in layers]
        hack = [layer.delta_s_hack for layer in layers] if self.mode == "route" else []
        self._hack = [knob for knob in hack if knob is not None]
        if len(self._hack) < len(hack):
            raise ValueError(
                "mode='route' needs a quarantine, but this model's quarantine was dropped. Use 'erase' or 'measure'."
            )
        for name, knob in zip(self._sizes, self._delta_s, strict=True):
            if knob.numel() != self._sizes[name]:
                raise ValueError(
                    f"{name}: its delta_s has {knob.numel()} of {self._sizes[name]} numbers here, as under FSDP1. "
                    "A router needs whole knobs, or FSDP2 (torch.distributed.fsdp.fully_shard)."
                )
        self._quarantine_norm = flat(self._hack).norm() if self._hack else torch.zeros(())

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
        """Gates of the direction, of a random direction of the same shape, and of the controls."""
        if taken := {OWN_BOOK, CHANCE} & {*controls}:
            raise ValueError(f"{taken.pop()!r} is the name of one of the router's own books: rename the control.")
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
        """Context in which every ``optimizer.step()`` is routed. All hooks are removed at the end, also after an exception.

        Args:
            optimizer: a torch optimizer (or accelerate's wrapper of one) that has the ``delta_s`` of all routed layers, or the
                one of ZeRO-1 or 2 that ``deepspeed.initialize`` returned. The module's docstring says what its step may
                depend on.

        Raises:
            ValueError: a knob is not in the optimizer, the router is already attached, ``maximize=True`` at gradient level, or
                DeepSpeed's options exclude a router.
                During a step: a gradient or a displacement is not finite.

        Warns:
            RoutingWarning: the optimizer has weight decay on the knobs. During a step: the step depends on the knobs' values.
                During a step or at the end: the knobs were written to outside of a step.
        """
        zero = zero_optimizer(optimizer)
        optimizer = getattr(optimizer if zero is None else zero, "optimizer", optimizer)
        if self._optimizer is not None:
            raise ValueError("This router is already attached: each step would be routed twice.")
        self._take_knobs()
        if zero is not None:
            self._check_zero(zero)
        decays = self._check_optimizer(optimizer.param_groups if zero is None else groups(zero))
        handles = self._hooks(optimizer) if zero is None else [around_steps(zero, self._on_zero_step, self._after_step)]
        if self.level == "gradient":
            # keep this gradient zero until the step splits it, or clipping would count the gradient in both knobs
            handles += [_keep_gradient_zero(knob) for knob in self._hack]
        self._optimizer = optimizer
        by_name = dict(zip(self._sizes, self._delta_s, strict=True))
        # An update-level route keeps θ that of the run without a router, unless there is weight decay, which was warned about.
        # The optimizer inside ZeRO's has slices of the knobs, so that a step cannot be tried on copies of the knobs.
        tries = self.mode == "route" and self.level == "update" and not decays and zero is None
        self._watch = Watch(optimizer, by_name, tries=tries, writes=self._splits("update"))
        for gate in self._gates.values():
            gate.to(self._device)
        self._books = {name: book.to(self._device) for name, book in self._books.items()}
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

    def _hooks(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        return [
            optimizer.register_step_pre_hook(lambda _, args, kwargs: self._on_step(args, kwargs)),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]

    def _splits(self, level: Level) -> bool:
        """Whether steps are changed, at this level."""
        return self.level == level and self.mode != "measure"

    def _check_zero(self, zero: Any) -> None:
        if self.level == "gradient":
            raise ValueError(
                "level='gradient' cannot split the gradients of DeepSpeed's ZeRO, which keeps slices of them: use "
                "level='update', or DDP or FSDP2."
            )
        for name, knob in zip(self._sizes, self._delta_s, strict=True):
            if knob.dtype != torch.float32:
                raise ValueError(
                    f"{name}: DeepSpeed has cast its delta_s to {dtype_name(knob)}, and with it the "
                    "quarantine, where small moves would round to nothing. Train in fp32 (bf16=False, fp16=False); "
                    "DeepSpeed's torch_autocast can compute in bfloat16."
                )
        if zero.torch_autocast_gradscaler is not None:
            raise ValueError(
                "A router cannot tell the steps that DeepSpeed's gradient scaler skips: use torch_autocast with bfloat16."
            )

    def _check_optimizer(self, param_groups: list[dict[str, Any]]) -> bool:
        """Raise an error for an optimizer that cannot be routed; return whether it has weight decay on the knobs."""
        groups = {id(p): group for group in param_groups for p in group["params"]}
        wanted = [("delta_s", self._delta_s)]
        if self.level == "gradient":
            wanted.append(("delta_s_hack", self._hack))
        for what, parameters in wanted:
            for name, knob in zip(self._sizes, parameters, strict=False):
                if id(knob) not in groups and has_master(knob):
                    raise ValueError(
                        f"{name}: its {what} is not in this optimizer, since DeepSpeed has put slices in its place: attach "
                        "the router to the optimizer that deepspeed.initialize returned."
                    )
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
                        f"{name}: its delta_s_hack is in the optimizer and would be trained directly. Call "
                        "delta_s_hack.requires_grad_(False) on every layer, and create the optimizer without it."
                    )
        ascends = [bool(groups[id(knob)].get("maximize")) for knob in self._delta_s]
        if self._splits("gradient") and any(ascends):
            raise ValueError(
                "level='gradient' routes gradients that the optimizer descends, but this optimizer has maximize=True: "
                "minimise the negative, or use level='update'."
            )
        signs = [
            torch.full((r,), -1.0 if up else 1.0, dtype=torch.float32)
            for r, up in zip(self._sizes.values(), ascends, strict=True)
        ]
        self._descent = torch.cat(signs).to(self._device)
        decays = any(groups[id(knob)].get("weight_decay") for knob in self._delta_s)
        if decays:
            warnings.warn(
                "The optimizer has weight decay on the knobs. The decay is routed as part of each step, and the quarantine "
                "does not decay, so that training is no longer what it would be without the router. Use weight_decay=0.",
                RoutingWarning,
                stacklevel=4,
            )
        return decays

    def _on_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._end_interrupted()
        closure = kwargs.get("closure") if len(args) < 2 else args[1]  # args[0] is the optimizer
        assert self._watch is not None
        self._watch.see_writes(stacklevel=5)
        if closure is None:
            self._step = self._begun_step()
            return None
        self._watch.stop_trying()
        if self._splits("gradient"):
            raise ValueError(
                "level='gradient' cannot route a step with a closure, which recomputes the gradients: use level='update'."
            )
        step = self._step = _Step(flat(self._delta_s), torch.empty(0))

        def looked_at() -> Any:
            loss = closure()
            try:
                self._see_gradient()
            except ValueError:
                with torch.no_grad():  # an optimizer that calls the closure several times has already moved the knobs
                    write(self._delta_s, self._split(step.delta_s))
                raise
            return loss

        return (args[0], looked_at, *args[2:]), {name: value for name, value in kwargs.items() if name != "closure"}

    def _on_zero_step(self) -> None:
        self._end_interrupted()
        assert self._watch is not None
        self._watch.see_writes(stacklevel=4)
        self._step = self._begun_step()

    def flatten(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Concatenate gradients by layer, (b, r) each, to (b, R); zeros for missing layers."""
        return flat_rows(grads, self._sizes)

    def alignment(self, gradients: Tensor) -> Tensor:
        """How hack-ward a step against each gradient (b, R) is: cosines (b,) with the direction (`Gate.alignment`)."""
        return self._gates[OWN_BOOK].alignment(gradients)

    @torch.no_grad()
    def _see_gradient(self) -> None:
        """Record metrics of the gradient before the step. Raises an error, with nothing changed, if it is not finite."""
        g = self._gradient()
        require_finite_gradients(self._by_layer(g), self.steps)
        self._see("hackward_in", self._descent * g)

    def _gradient(self) -> Tensor:
        grads = [gradient(knob) for knob in self._delta_s]
        return flat(torch.zeros_like(knob) if g is None else g for knob, g in zip(self._delta_s, grads, strict=True))

    @torch.no_grad()
    def _begun_step(self) -> _Step:
        # set by a GradScaler if the optimizer itself skips steps
        found_inf = getattr(self._optimizer, "found_inf", None)
        step = _Step(flat(self._delta_s), flat(self._hack) if self._hack else torch.empty(0))
        step.skipped = found_inf is not None and bool(found_inf)
        if step.skipped:
            assert self._optimizer is not None
            parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
            step.unfilled = [p for p in parameters if "momentum_buffer" not in self._optimizer.state.get(p, {})]
            return step
        self._see_gradient()
        if self._splits("gradient"):
            self._split_gradient()
        return step

    def _split_gradient(self) -> None:
        g = self._gradient()
        moved, self._seen["fired"] = self._gates[OWN_BOOK].moved(-g)
        self._seen["fired_random"] = self._gates[CHANCE].moved(-g)[1]
        for knob, part in zip(self._delta_s, self._split(g + moved), strict=True):
            knob.grad = sharded_as(part.reshape(knob.shape).clone(), knob)
        for knob, part in zip(self._hack, self._split(-moved), strict=False):  # empty in mode="erase"
            knob.grad = sharded_as(part.reshape(knob.shape).clone(), knob)

    def _end_interrupted(self) -> None:
        """Route what an interrupted step had moved before its exception."""
        if self._step is None:
            return
        if self._step.skipped or torch.equal(self._step.delta_s, flat(self._delta_s)):
            self._step = None
        else:
            self._after_step(whole=False)

    @torch.no_grad()
    def _after_step(self, whole: bool = True) -> None:
        step, self._step = self._step, None
        if step is None:  # the step called its base class's step, which was already routed
            return
        if step.skipped:
            assert self._optimizer is not None
            for parameter in step.unfilled:  # torch's fused SGD creates the buffer, and skips without filling it
                self._optimizer.state.get(parameter, {}).pop("momentum_buffer", None)
            return
        before, after = step.delta_s, flat(self._delta_s)
        delta = after - before
        if self.level == "gradient" and self._hack:
            delta = delta + (flat(self._hack) - step.hack)  # Δθ, since at this level the optimizer moves both knobs
        self._require_finite(delta, step)
        moved = self._gated(delta)
        if self._splits("update"):
            own = moved[OWN_BOOK]
            # exact in both cases: a coordinate that is moved entirely returns to its old value, others keep their new value
            write(self._delta_s, self._split(torch.where(own == 0, after, before + (delta - own))))
            if self.mode == "route":
                write(self._hack, self._split(flat(self._hack) + own))
        self._see("hackward_update", -delta)
        self._see("hackward_out", before - flat(self._delta_s))
        if self._hack:
            self._quarantine_norm = flat(self._hack).norm()
        for name, book in self._books.items():
            book += moved[name]
        self.steps += 1
        assert self._watch is not None
        self._watch.after_step(try_out=whole)

    def _gated(self, delta: Tensor) -> dict[str, Tensor]:
        moved, fired = {}, {}
        for name, gate in self._gates.items():
            moved[name], fired[name] = gate.moved(delta)
        if not self._splits("gradient"):
            self._seen["fired"], self._seen["fired_random"] = fired[OWN_BOOK], fired[CHANCE]
        return moved

    def _require_finite(self, delta: Tensor, step: _Step) -> None:
        """Restore the knobs and raise an error if the optimizer's step produced a NaN or Inf."""
        if delta.isfinite().all():
            return
        write(self._delta_s, self._split(step.delta_s))
        if self.level == "gradient" and self._hack:
            write(self._hack, self._split(step.hack))
        bad = next(
            name for name, part in zip(self._sizes, self._split(delta), strict=True) if not part.isfinite().all()
        )
        raise ValueError(
            f"After {self.steps} steps, {type(self._optimizer).__name__}'s step put a NaN or Inf into the knobs of {bad}, "
            "from finite gradients. The knobs are as they were before this step; the optimizer's state may not be. "
            "Check its learning rate and its eps."
        )

    def _see(self, name: str, u: Tensor) -> None:
        self._seen[name] = self._gates[OWN_BOOK].hackward(u)
        self._seen[f"{name}_random"] = self._gates[CHANCE].hackward(u)

    # ── metrics and books ────────────────────────────────────────────────────────────────────────────────────────────

    def metrics(self) -> dict[str, float]:
        """Metrics of the last step, each also for a random direction of the same k and r (``…_random``).

        * ``hackward_in``: ‖relu(V g)‖ / ‖g‖ of the gradient.
        * ``hackward_update``: the same ratio for the optimizer's step.
        * ``hackward_out``: the same ratio for what is left in ``delta_s``.
        * ``fired``: share of coordinates, or of rows, where the gate fired.
        * ``quarantine_norm``: norm of everything moved so far.
        """
        book = self._books.get(OWN_BOOK)
        numbers = {name: float(value) for name, value in self._seen.items()}
        numbers["quarantine_norm"] = float(self._quarantine_norm if book is None else book.norm())
        numbers["quarantine_norm_random"] = float(self._books[CHANCE].norm())
        return numbers

    @property
    def books(self) -> tuple[str, ...]:
        """Names of the books, without the router's own random one."""
        return tuple(name for name in self._books if name != CHANCE)

    def book(self, name: str) -> dict[str, Tensor]:
        """A book, that is what a control would have moved so far: layer name → (r,).

        Raises:
            ValueError: there is no such book.
        """
        if name not in self.books:
            raise ValueError(f"There is no book {name!r}; there are {sorted(self.books)}.")
        return self._by_layer(self._books[name])

    def _by_layer(self, flat: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._sizes, self._split(flat), strict=True))

    def deployed(self, name: str | None = None) -> AbstractContextManager[None]:
        """Context without the quarantine; if a name is given, without that control's book instead.

        Raises:
            ValueError: there is no such book, or the routed adapter is not the active one.
        """
        active = next(iter(knobs(self.model).values())).adapter
        if active != self.adapter_name:
            raise ValueError(
                f"The router routes the adapter {self.adapter_name!r}, but {active!r} is active: call set_adapter first."
            )
        if name is None and self.mode == "measure":
            name = OWN_BOOK
        if name is None:
            return seen_as(self.model, View.DEPLOYED)
        return seen_as(self.model, View.TRAINED, {layer: -part for layer, part in self.book(name).items()})

    # ── continuing ───────────────────────────────────────────────────────────────────────────────────────────────────

    def save(self, path: str | Path) -> None:
        """Write the books, the direction and the number of steps to a file. The knobs are saved with the adapter."""
        Books(
            steps=self.steps,
            books={name: self._by_layer(book) for name, book in self._books.items()},
            direction=self.direction.to_tensors(),
            fingerprints=self._fingerprints,
        ).write(path)

    def load(self, path: str | Path) -> None:
        """Continue from a file that `save` wrote.

        Raises:
            ValueError: the file is not a book file, is damaged, or has other books or layers than this router. The message
                names it.
            OSError: the file cannot be read.
        """
        saved = read_books(path)
        try:
            if sorted(saved.controls) != sorted(self.books):
                raise ValueError(f"it has the books {sorted(saved.controls)}, this router has {sorted(self.books)}")
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
            raise ValueError(f"{path} does not belong to this run: {error}.") from error
        if self._watch is not None:
            self._watch.forget()  # with the books, the caller has also loaded the knobs
        self._books, self.steps = books, saved.steps

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        return flat.split(list(self._sizes.values()))


def _keep_gradient_zero(knob: nn.Parameter) -> RemovableHandle:
    if not isinstance(knob, DTensor):
        return knob.register_hook(torch.zeros_like)

    def zero(knob: Tensor) -> None:  # FSDP sets a sharded gradient itself, and calls no other hooks than these
        assert knob.grad is not None
        knob.grad.zero_()

    return knob.register_post_accumulate_grad_hook(zero)
