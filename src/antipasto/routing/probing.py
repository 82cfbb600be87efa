"""Does an optimizer's step depend on the values of the parameters, or on their gradients and its own state alone?

    Δ(x; g, state)  =?  Δ(x + c; g, state)          the same step, made from the parameters and from others beside them

Both steps are made by a stand-in: the optimizer's own code on copies of the parameters, of their gradients and of what it
remembers of them. c is as large as rounding allows, 0.01 / ε times the step, so that a dependence shows: Adafactor and LAMB
scale a step by the length of x, a decay pulls towards 0, schedule-free averaging towards a point that it remembers.

`Watch` warns a run of it: by trying the first steps out, until three were conclusive, and by looking whether somebody else
wrote to the parameters between two steps (Lookahead, schedule-free's ``eval``).
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from antipasto.names import AntiPastoWarning
from antipasto.unchanged import unchanged

_TRIES = 3


class RoutingWarning(AntiPastoWarning):
    """Something about a run that is routed is not what one would expect."""


class Watch:
    """Warns, once of each, of what takes θ off the run that the optimizer would make without a router.

    Args:
        optimizer: whose steps are routed.
        knobs: layer → its δS.
        tries: whether its steps are tried out.
        writes: whether writes between steps are looked for.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, knobs: Mapping[str, nn.Parameter], *, tries: bool, writes: bool
    ) -> None:
        self._optimizer, self._knobs = optimizer, dict(knobs)
        self._tries = _TRIES if tries else 0
        self._writes = writes
        self._left: Tensor | None = None  # δS as the last step left it

    def stop_trying(self) -> None:
        """A step with a closure cannot be tried out on copies."""
        self._tries = 0

    def forget(self) -> None:
        """The knobs were written to, as they should be."""
        self._left = None

    def after_step(self, *, try_out: bool) -> None:
        """Remember the knobs; where it is due, see whether another step on this gradient would depend on their values."""
        if self._writes:
            self._left = _flat(self._knobs)
        if try_out and self._tries:
            self._try_out()

    def see_writes(self, stacklevel: int) -> None:
        """Warn where a knob is not what the last step left."""
        if self._left is None:
            return
        now = _flat(self._knobs)
        left = self._left.to(now)
        if torch.allclose(now, left, rtol=1e-5, atol=1e-8):
            return
        parts = (now - left).split([knob.numel() for knob in self._knobs.values()])
        changes = {name: float(part.abs().max()) for name, part in zip(self._knobs, parts, strict=True)}
        name = max(changes, key=changes.__getitem__)
        warnings.warn(
            f"{name}: its delta_s was written to outside of a step, by up to {changes[name]:.2g} a coordinate, around "
            f"{type(self._optimizer).__name__}. Such a move is not routed: it may be hack-ward, and training is no longer "
            "what it would be without the router. Lookahead and schedule-free averaging do this.",
            RoutingWarning,
            stacklevel=stacklevel,
        )
        self._left, self._writes = None, False

    def _try_out(self) -> None:
        name = type(self._optimizer).__name__
        try:
            reads = reads_values(self._optimizer, list(self._knobs.values()))
        except Exception as error:  # of code that is not ours, on copies: it is told, and the real step goes on
            said = f"{name}'s step could not be tried out on copies of the knobs ({type(error).__name__}: {error}): if"
        else:
            self._tries -= reads is not None
            if not reads:
                return
            said = f"A step of {name} depends on the values of the knobs, and not on their gradients alone: since"
        self._tries = 0
        warnings.warn(
            f"{said} it sees delta_s without the quarantine, training is no longer what it would be without the router. Adam, "
            "AdamW with weight_decay=0, SGD, RMSprop and Lion keep it so.",
            RoutingWarning,
            stacklevel=7,
        )


def reads_values(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> bool | None:
    """Whether a step would be another one if the parameters had other values.

    Args:
        optimizer: makes no step; it is left as it is, and so are the parameters and the random generators.
        parameters: some of its parameters, with their gradients.

    Returns:
        None where the step moves nothing, which tells nothing.

    Raises:
        Exception: whatever the optimizer's own code raises.
    """
    with unchanged(draws=False):
        plain = _displacement(optimizer, parameters, 0.0)
    size, largest = float(plain.abs().max()), max(float(p.detach().abs().max()) for p in parameters)
    if size == 0:
        return None
    eps = torch.finfo(plain.dtype).eps
    shift = 0.01 / eps * size
    with unchanged(draws=False):
        shifted = _displacement(optimizer, parameters, shift)
    return not float((shifted - plain).abs().max()) <= 0.05 * size + 4 * eps * (largest + shift)


def _displacement(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], shift: float) -> Tensor:
    """Δ (R,), as the stand-in makes it from the parameters' values plus a shift."""
    twins: dict[int, nn.Parameter] = {}
    for parameter in parameters:
        twin = nn.Parameter(parameter.detach() + shift)
        twin.grad = None if parameter.grad is None else parameter.grad.detach().clone()
        twins[id(parameter)] = twin
    before = torch.cat([twin.detach().clone() for twin in twins.values()])
    stand_in = object.__new__(type(optimizer))
    vars(stand_in).update({name: value for name, value in vars(optimizer).items() if name != "step"})  # a scheduler's
    stand_in._optimizer_step_pre_hooks, stand_in._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    stand_in.state = defaultdict(dict)
    stand_in.param_groups = []
    for group in optimizer.param_groups:
        known = [p for p in group["params"] if id(p) in twins]
        if known:
            options = copy.deepcopy({name: value for name, value in group.items() if name != "params"})
            stand_in.param_groups.append({**options, "params": [twins[id(p)] for p in known]})
        for parameter in known:
            if parameter in optimizer.state:
                stand_in.state[twins[id(parameter)]] = copy.deepcopy(optimizer.state[parameter])
    type(optimizer).step(stand_in)
    return torch.cat([twin.detach() for twin in twins.values()]) - before


def _flat(knobs: Mapping[str, nn.Parameter]) -> Tensor:
    return torch.cat([knob.detach() for knob in knobs.values()])
