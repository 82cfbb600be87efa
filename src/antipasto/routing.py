"""What of every optimizer step goes into the quarantine.

    update level (default)   after optimizer.step():  Δ = δS_after − δS_before
                             moved = gate(Δ);   δS = δS_before + (Δ − moved);   δS_hack += moved
    gradient level           before the step:  the same gate on Δ = −g;  δS.grad = g + moved;  δS_hack.grad = −moved

    gate         moved
    coordinate   Δ_j where t_j Δ_j < 0 and |t_j| > τ, with t the direction's effect sizes      (default)
    one_sided    −c V,  c = relu(−V Δ)                   the hack-ward part along the direction
    no_gate      −c V,  c = −V Δ                         all that runs along the direction, either way
    reverse      −c V,  c = −relu(V Δ)                   the part that runs against the hack: a control

A gradient step moves along −g, so Δ is hack-ward where −V Δ > 0, or t_j Δ_j < 0.

θ = δS + δS_hack is the same after an update-level move: **routing never changes the training run**, with any optimizer, and
each further direction can keep a book of what it would have moved in that same run (`controls`). mode="erase" drops the moved
part instead of keeping it; mode="measure" moves nothing, and keeps the direction's own book beside the controls'.

Two guarantees at update level, whatever the optimizer's momentum does. Coordinate gate: the coordinates it guards never move
hack-ward, exactly. One-sided gate: no step moves δS hack-ward along V, up to rounding. At gradient level neither holds: Adam
rescales the small routed part to a full-size step in both knobs.

Weight decay. A decoupled decay (AdamW's) pulls δS towards zero and is part of Δ, so the gate sees it; the quarantine, which
the optimizer does not know, does not decay. Then θ leaves the plain run's trajectory, which is why 0 is the default of every
trainer this is meant for, and anything else is warned about.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from antipasto.directions import Direction
from antipasto.knobs import knobs
from antipasto.tuner.layer import View
from antipasto.tuner.views import seen_as

Mode = Literal["route", "erase", "measure"]
Level = Literal["update", "gradient"]
GateName = Literal["coordinate", "one_sided", "no_gate", "reverse"]

DEFAULT_THRESHOLD = 0.65
OWN_BOOK = "direction"
"""Name of the direction's own book in ``measure`` mode; in ``route`` mode ``delta_s_hack`` is that book."""

_FORMAT = "antipasto-books-1"
_CHANCE_SEED = 0


@dataclass(frozen=True)
class Control:
    """A further direction, gate or threshold that keeps its own book in the same run; arguments as `Router`'s."""

    direction: Direction
    gate: GateName = "coordinate"
    threshold: float | None = None
    overshoot: float = 1.0
    preserve_magnitude: bool = False


class _Gate:
    """One gate over all layers at once: knobs as one vector (R,), V as (K, R) with zeros where a layer has fewer rows."""

    def __init__(self, control: Control, sizes: Mapping[str, int], device: torch.device) -> None:
        v = control.direction
        _check_gate(control)
        rows = max(len(V) for V in v.values())
        self.kind = control.gate
        self.threshold = DEFAULT_THRESHOLD if control.threshold is None else control.threshold
        self.overshoot, self.preserve_magnitude = control.overshoot, control.preserve_magnitude
        self.layers = len(sizes)
        self.segment = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes.values()))).to(device)
        blocks = [torch.zeros(rows, r) for r in sizes.values()]
        for block, name in zip(blocks, sizes, strict=True):
            if name in v:
                block[: len(v[name])] = v[name]
        self.V = torch.cat(blocks, 1).to(device)  # (K, R)
        self.rows = sum(len(V) for V in v.values())
        effect = [(v.effect or {}).get(name, torch.zeros(r)) for name, r in sizes.items()]
        self.effect = torch.cat(effect).to(device)  # (R,)
        self.guarded = self.effect.abs() > self.threshold

    def along(self, u: Tensor) -> Tensor:
        """V u of every layer: (R,) to (K, L)."""
        products = self.V * u  # (K, R)
        return products.new_zeros(len(self.V), self.layers).index_add_(1, self.segment, products)

    def hackward(self, u: Tensor) -> Tensor:
        """‖relu(V u)‖ / ‖u‖ of something that points as a gradient does: a scalar; 0 for u = 0."""
        return self.along(u).relu().norm() / u.norm().clamp_min(torch.finfo(u.dtype).tiny)

    def moved(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The part of a displacement that goes into the quarantine, (R,), and the share of places where the gate fired."""
        if self.kind == "coordinate":
            mask = self.guarded & (self.effect * delta < 0)
            moved, fired = torch.where(mask, delta, torch.zeros_like(delta)), mask.float().mean()
        else:
            c = -self.along(delta)  # (K, L)
            c = {"one_sided": c.relu(), "no_gate": c, "reverse": -(-c).relu()}[self.kind]
            moved = -(c[:, self.segment] * self.V).sum(0)
            fired = (c != 0).sum() / self.rows
        moved = moved * self.overshoot
        if self.preserve_magnitude:
            moved = delta - self._rescaled(delta - moved, delta)
        return moved, fired

    def _rescaled(self, kept: Tensor, delta: Tensor) -> Tensor:
        """What is kept, at the length that each layer's displacement had; left alone where nothing is kept."""
        both = torch.stack([kept, delta.to(kept.dtype)]).square()  # (2, R)
        squares = both.new_zeros(2, self.layers).index_add_(1, self.segment, both)
        scale = torch.where(squares[0] > 0, (squares[1] / squares[0]).sqrt(), torch.ones_like(squares[0]))
        return kept * scale[self.segment]


class Router:
    """Routes what each optimizer step learns, by a direction, into the quarantine; keeps the books of controls.

    Args:
        model: an adapted model. Its active adapter is the one that is routed.
        direction: which way is hack-ward.
        mode: ``"route"`` moves into the quarantine, ``"erase"`` drops, ``"measure"`` only watches.
        level: ``"update"`` or ``"gradient"``. At gradient level ``delta_s_hack`` is made to require a gradient: create the
            optimizer afterwards, with both knobs in it.
        gate: ``"coordinate"``, ``"one_sided"``, ``"no_gate"`` or ``"reverse"``.
        threshold: of the coordinate gate: the effect size above which a coordinate is guarded; 0.65 if None.
        overshoot: how many times the gated part to move; 1 moves it exactly out.
        preserve_magnitude: rescale what δS keeps of a step to the step's own length, layer by layer.
        controls: name → `Direction`, under the same gate and threshold, or `Control`; each keeps a book of what it would have
            moved of the same displacements, at update level.
        refresh: gives a new direction, as extracted from the model that it finds; called with the quarantine out.
        refresh_every: after how many steps, again and again.
        min_overlap: a refreshed direction that agrees less than this with the present one is refused, with a warning.

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
        overshoot: float = 1.0,
        preserve_magnitude: bool = False,
        controls: Mapping[str, Direction | Control] | None = None,
        refresh: Callable[[], Direction] | None = None,
        refresh_every: int | None = None,
        min_overlap: float = 0.5,
    ) -> None:
        _check_options(mode, level, refresh, refresh_every, min_overlap)
        self.model, self.mode, self.level = model, mode, level
        self.refresh, self.refresh_every, self.min_overlap = refresh, refresh_every, min_overlap
        self.steps = 0
        self.last_overlap: float | None = None
        layers = knobs(model)
        self.adapter_name = next(iter(layers.values())).adapter
        self._sizes = {name: layer.r for name, layer in layers.items()}
        self._delta_s = [layer.delta_s for layer in layers.values()]
        hack = [layer.delta_s_hack for layer in layers.values()] if mode == "route" else []
        self._hack = [knob for knob in hack if knob is not None]
        if len(self._hack) < len(hack):
            raise ValueError("mode='route' needs a quarantine, and this model's was dropped. Use 'erase' or 'measure'.")
        if level == "gradient":
            for knob in self._hack:
                knob.requires_grad_(True)
        self._options = Control(direction, gate, threshold, overshoot, preserve_magnitude)
        self._set_direction(direction)
        entries = dict(controls or {})
        if OWN_BOOK in entries:
            raise ValueError(f"{OWN_BOOK!r} is the name of the direction's own book: give the control another.")
        self._gates: dict[str, _Gate] = {}
        for name, entry in entries.items():
            control = (
                entry if isinstance(entry, Control) else Control(entry, gate, threshold, overshoot, preserve_magnitude)
            )
            control.direction.check_base(model)
            self._gates[name] = _Gate(control, self._sizes, self._device)
        kept = [*self._gates, *([OWN_BOOK] if mode == "measure" else [])]
        self._books = {name: torch.zeros(sum(self._sizes.values()), device=self._device) for name in kept}
        self._chance_book = torch.zeros(sum(self._sizes.values()), device=self._device)
        self._seen: dict[str, Tensor] = {}
        self._hack_before = torch.empty(0)
        self._before: Tensor | None = None
        self._attached = False

    @property
    def _device(self) -> torch.device:
        return self._delta_s[0].device

    def _set_direction(self, direction: Direction) -> None:
        direction.check_base(self.model)
        o = self._options
        options = (o.gate, o.threshold, o.overshoot, o.preserve_magnitude)
        gate = _Gate(Control(direction, *options), self._sizes, self._device)
        self._chance = _Gate(Control(direction.random(_CHANCE_SEED), *options), self._sizes, self._device)
        self.direction, self._gate = direction, gate

    # ── in the loop ──────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def attach(self, optimizer: torch.optim.Optimizer) -> Iterator[Router]:
        """Context: every ``optimizer.step()`` is routed. Leaves no hook behind, also after an exception.

        Args:
            optimizer: any torch optimizer (or accelerate's wrapper of one) that has the ``delta_s`` of all routed layers.

        Raises:
            ValueError: a knob is not in the optimizer, or the router is attached already.

        Warns:
            UserWarning: the optimizer decays the knobs (see the module's text).
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
        self._attached = True
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._attached = False
            if self._before is not None:  # a step that ended in an exception: what it moved is routed all the same
                self._after_step()

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if self._attached:
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
        if any(groups[id(knob)].get("weight_decay") for knob in self._delta_s):
            warnings.warn(
                "The optimizer decays the knobs. The decay is routed as part of each step and the quarantine does not decay, "
                "so that training is no longer what it would be without the router; weight_decay=0 keeps it so.",
                UserWarning,
                stacklevel=4,
            )

    def _on_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = any(value is not None for value in (*args[1:], kwargs.get("closure")))  # args[0] is the optimizer
        if closure and self.level == "gradient" and self.mode != "measure":
            raise ValueError(
                "level='gradient' cannot route a step with a closure, which computes gradients of its own."
            )
        self._before_step()

    @torch.no_grad()
    def _before_step(self) -> None:
        if self._before is None:  # else the step before ended in an exception, and what it moved is still to be routed
            self._before = _flat(self._delta_s)
        g = _flat([torch.zeros_like(knob) if knob.grad is None else knob.grad for knob in self._delta_s])
        self._see("hackward_in", g)
        if self.level == "gradient" and self.mode != "measure":
            self._hack_before = _flat(self._hack) if self._hack else torch.zeros_like(g)
            moved, self._seen["fired"] = self._gate.moved(-g)
            self._seen["fired_random"] = self._chance.moved(-g)[1]
            for knob, part in zip(self._delta_s, self._split(g + moved), strict=True):
                knob.grad = part.clone()
            for knob, part in zip(self._hack, self._split(-moved), strict=False):  # none where the moved part is erased
                knob.grad = part.clone()

    @torch.no_grad()
    def _after_step(self) -> None:
        assert self._before is not None
        before, after = self._before, _flat(self._delta_s)
        delta = after - before
        if self.level == "gradient" and self._hack:
            delta = delta + (_flat(self._hack) - self._hack_before)  # of θ: here the optimizer moves both knobs
        moved, fired = self._gate.moved(delta)
        chance_moved, chance_fired = self._chance.moved(delta)
        if self.level == "update" or self.mode == "measure":
            self._seen["fired"], self._seen["fired_random"] = fired, chance_fired
        if self.level == "update" and self.mode != "measure":
            # exact on both sides: what is moved entirely ends where it began, what is not moved stays where the step put it
            _write(self._delta_s, self._split(torch.where(moved == 0, after, before + (delta - moved))))
            if self.mode == "route":
                _write(self._hack, self._split(_flat(self._hack) + moved))
        self._see("hackward_update", -delta)
        self._see("hackward_out", before - _flat(self._delta_s))
        self._keep_books(delta, moved, chance_moved)
        self._before = None
        self.steps += 1
        if self.refresh_every and self.steps % self.refresh_every == 0:
            self._refresh()

    def _keep_books(self, delta: Tensor, moved: Tensor, chance_moved: Tensor) -> None:
        self._chance_book += chance_moved
        if self.mode == "measure":
            self._books[OWN_BOOK] += moved
        for name, gate in self._gates.items():
            self._books[name] += gate.moved(delta)[0]

    def _refresh(self) -> None:
        assert self.refresh is not None
        with self.deployed():
            new = self.refresh()
        self.last_overlap = new.overlap(self.direction).overall
        if self.last_overlap < self.min_overlap:
            warnings.warn(
                f"Step {self.steps}: the refreshed direction agrees only {self.last_overlap:.2f} with the present one, less "
                f"than min_overlap={self.min_overlap}. It is refused; routing goes on with the present one.",
                UserWarning,
                stacklevel=2,
            )
        else:
            self._set_direction(new)

    def _see(self, name: str, u: Tensor) -> None:
        self._seen[name] = self._gate.hackward(u)
        self._seen[f"{name}_random"] = self._chance.hackward(u)

    # ── what it says ─────────────────────────────────────────────────────────────────────────────────────────────────

    def metrics(self) -> dict[str, float]:
        """Numbers of the last step, each beside what a random direction of the same k and r gets (``…_random``).

        ``hackward_in``: ‖relu(V g)‖ / ‖g‖ of the gradient; ``hackward_update``: the same of the step that the optimizer made;
        ``hackward_out``: of what ``delta_s`` moved in the end; ``fired``: share of coordinates, or of rows, where the gate
        fired; ``quarantine_norm``: length of all that was moved so far; ``refresh_overlap``: of the last refresh, if any.
        """
        own = self._hack if self.mode == "route" else None
        book = _flat(own) if own else self._books.get(OWN_BOOK)
        numbers = {name: float(value) for name, value in self._seen.items()}
        numbers["quarantine_norm"] = 0.0 if book is None else float(book.norm())
        numbers["quarantine_norm_random"] = float(self._chance_book.norm())
        if self.last_overlap is not None:
            numbers["refresh_overlap"] = self.last_overlap
        return numbers

    def book(self, name: str) -> dict[str, Tensor]:
        """What a control would have moved so far: layer name → (r,).

        Raises:
            ValueError: there is no such book.
        """
        if name not in self._books:
            raise ValueError(f"There is no book {name!r}; there are {sorted(self._books)}.")
        return dict(zip(self._sizes, self._split(self._books[name]), strict=True))

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
        """Write the books, the direction as it is by now, and the number of steps; the adapter holds ``delta_s_hack``."""
        tensors = {f"book/{book}/{layer}": part for book in self._books for layer, part in self.book(book).items()}
        tensors |= {f"chance/{n}": part for n, part in zip(self._sizes, self._split(self._chance_book), strict=True)}
        tensors |= self.direction.to_tensors()
        facts = {"steps": self.steps, "books": sorted(self._books), "last_overlap": self.last_overlap}
        save_file(
            {k: t.cpu().clone() for k, t in tensors.items()}, path, metadata={"format": _FORMAT, **_as_json(facts)}
        )

    def load(self, path: str | Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            ValueError: the file is no book file, is damaged, or has other books or layers than this router; names it.
            OSError: the file cannot be read.
        """
        try:
            saved = _read_books(path)
            if sorted(saved.books) != sorted(self._books):
                raise ValueError(f"it has the books {sorted(saved.books)}, this router {sorted(self._books)}")
            books = {
                name: torch.cat([saved.books[name][layer] for layer in self._sizes]).to(self._device)
                for name in self._books
            }
            chance = torch.cat([saved.chance[layer] for layer in self._sizes])
            if any(len(book) != len(self._chance_book) for book in (chance, *books.values())):
                raise ValueError("its layers have another r")
            if self.refresh is not None:
                self._set_direction(Direction.from_tensors(saved.direction, self.direction.fingerprints))
        except (SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"{path} does not continue this run: {error}.") from error
        self._chance_book = chance.to(self._device)
        self._books, self.steps, self.last_overlap = books, saved.steps, saved.last_overlap

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        return flat.split(list(self._sizes.values()))


class Books(NamedTuple):
    """What `Router.save` wrote: what each control would have moved, name → layer → (r,), and what belongs to it."""

    steps: int
    books: dict[str, dict[str, Tensor]]
    chance: dict[str, Tensor]
    direction: dict[str, Tensor]
    last_overlap: float | None


def read_books(path: str | Path) -> Books:
    """Read what `Router.save` wrote, without a router.

    Raises:
        ValueError: the file is no book file, or is damaged; names it.
        OSError: the file cannot be read.
    """
    try:
        return _read_books(path)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a book file that can be used: {error}.") from error


def _read_books(path: str | Path) -> Books:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"format {metadata.get('format')!r}, expected {_FORMAT!r}")
        facts = {key: json.loads(value) for key, value in metadata.items() if key != "format"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    chance = {key.removeprefix("chance/"): t for key, t in tensors.items() if key.startswith("chance/")}
    return Books(
        steps=facts["steps"],
        books={name: {layer: tensors[f"book/{name}/{layer}"] for layer in chance} for name in facts["books"]},
        chance=chance,
        direction={key: t for key, t in tensors.items() if not key.startswith(("book/", "chance/"))},
        last_overlap=facts["last_overlap"],
    )


def _as_json(facts: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in facts.items()}


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach() for tensor in tensors])


def _write(parameters: list[nn.Parameter], values: tuple[Tensor, ...]) -> None:
    torch._foreach_copy_([parameter.detach() for parameter in parameters], list(values))


def _check_gate(control: Control) -> None:
    if control.gate not in ("coordinate", "one_sided", "no_gate", "reverse"):
        raise ValueError(f"gate must be coordinate, one_sided, no_gate or reverse, got {control.gate!r}.")
    if control.gate == "coordinate" and control.direction.effect is None:
        raise ValueError(
            "gate='coordinate' needs a direction with effect sizes; this one has rows only: use 'one_sided'."
        )
    if control.gate != "coordinate" and control.threshold is not None:
        raise ValueError(f"threshold={control.threshold} belongs to the coordinate gate; {control.gate!r} has none.")
    if control.threshold is not None and not (math.isfinite(control.threshold) and control.threshold >= 0):
        raise ValueError(f"threshold is an effect size of at least 0, got {control.threshold}.")
    if not (math.isfinite(control.overshoot) and control.overshoot > 0):
        raise ValueError(f"overshoot must be above 0, got {control.overshoot}.")


def _check_options(mode: str, level: str, refresh: object, refresh_every: int | None, min_overlap: float) -> None:
    if mode not in ("route", "erase", "measure"):
        raise ValueError(f"mode must be route, erase or measure, got {mode!r}.")
    if level not in ("update", "gradient"):
        raise ValueError(f"level must be update or gradient, got {level!r}.")
    if (refresh is None) != (refresh_every is None):
        raise ValueError("refresh and refresh_every belong together: what to call, and after how many steps.")
    if refresh_every is not None and refresh_every < 1:
        raise ValueError(f"refresh_every must be at least 1, got {refresh_every}.")
    if not -1 <= min_overlap <= 1:
        raise ValueError(f"min_overlap is a cosine, got {min_overlap}.")
