"""Test whether an optimizer's step depends on the parameters' values, or only on gradients and optimizer state.

    Δ(x; g, state)  =?  Δ(x + c; g, state)          the same step, from the parameters and from shifted parameters

Both steps are made by a stand-in: the optimizer's code, run on copies of the parameters, their gradients and their optimizer
state. The shift c is as large as rounding allows, 0.01 / ε times the step, so that a dependence becomes visible. Adafactor
and LAMB scale a step by ‖x‖, weight decay pulls towards 0, and schedule-free averaging pulls towards a stored point.

`Watch` warns during a run. It tests the first steps until three of them were conclusive. It also detects writes to the
parameters between two steps, as by Lookahead or schedule-free's ``eval``.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from antipasto.adapter.sharded import flat
from antipasto.names import AntiPastoWarning
from antipasto.unchanged import unchanged

_TRIES = 3


class RoutingWarning(AntiPastoWarning):
    """A routed run may differ from the same run without a router."""


class Watch:
    """Warns, once per cause, if θ differs from what it would be in the same run without a router.

    Args:
        optimizer: the optimizer whose steps are routed.
        knobs: layer → its δS.
        tries: whether to test the first steps.
        writes: whether to look for writes between steps.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, knobs: Mapping[str, nn.Parameter], *, tries: bool, writes: bool
    ) -> None:
        self._optimizer, self._knobs = optimizer, dict(knobs)
        self._tries = _TRIES if tries else 0
        self._writes = writes
        self._left: Tensor | None = None  # δS as the last step left it

    def stop_trying(self) -> None:
        """Stop testing steps: a step with a closure cannot be run on copies."""
        self._tries = 0

    def forget(self) -> None:
        """Accept the knobs' present values, after an intended write."""
        self._left = None

    def after_step(self, *, try_out: bool) -> None:
        """Remember the knobs; if due, test whether a further step on this gradient would depend on their values."""
        if self._writes:
            self._left = flat(self._knobs.values())
        if try_out and self._tries:
            self._try_out()

    def see_writes(self, stacklevel: int) -> None:
        """Warn if a knob was changed since the last step."""
        if self._left is None:
            return
        now = flat(self._knobs.values())
        left = self._left.to(now)
        if torch.allclose(now, left, rtol=1e-5, atol=1e-8):
            return
        parts = (now - left).split([knob.numel() for knob in self._knobs.values()])
        changes = {name: float(part.abs().max()) for name, part in zip(self._knobs, parts, strict=True)}
        name = max(changes, key=changes.__getitem__)
        warnings.warn(
            f"{name}: its delta_s was written to outside of a step, by up to {changes[name]:.2g} per coordinate (optimizer "
            f"{type(self._optimizer).__name__}). Such a change is not routed: it may be hack-ward, and training is no longer "
            "what it would be without the router. Lookahead and schedule-free averaging do this.",
            RoutingWarning,
            stacklevel=stacklevel,
        )
        self._left, self._writes = None, False

    def _try_out(self) -> None:
        name = type(self._optimizer).__name__
        try:
            reads = reads_values(self._optimizer, list(self._knobs.values()))
        except Exception as error:  # foreign code, run on copies: report the error and go on with the real step
            said = f"{name}'s step could not be tried out on copies of the knobs ({type(error).__name__}: {error}): if"
        else:
            self._tries -= reads is not None
            if not reads:
                return
            said = f"A step of {name} depends on the values of the knobs, not only on their gradients: since"
        self._tries = 0
        warnings.warn(
            f"{said} it sees delta_s without the quarantine, training is no longer what it would be without the router. Use "
            "Adam, AdamW with weight_decay=0, SGD, RMSprop or Lion to avoid this.",
            RoutingWarning,
            stacklevel=7,
        )


def reads_values(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> bool | None:
    """Whether a step would differ if the parameters had other values.

    Args:
        optimizer: the optimizer. It, the parameters and the random generators are left unchanged.
        parameters: some of its parameters, with their gradients.

    Returns:
        True or False; None if the step moves nothing, which is inconclusive.

    Raises:
        Exception: whatever the optimizer's own code raises.
    """
    plain = _displacement(optimizer, parameters, 0.0)
    size, largest = float(plain.abs().max()), float(flat(parameters).abs().max())
    if size == 0:
        return None
    eps = torch.finfo(plain.dtype).eps
    shift = 0.01 / eps * size
    shifted = _displacement(optimizer, parameters, shift)
    return not float((shifted - plain).abs().max()) <= 0.05 * size + 4 * eps * (largest + shift)


@unchanged(draws=False)
def _displacement(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], shift: float) -> Tensor:
    """Δ (R,) of the stand-in's step from the parameters plus a shift."""
    twins: dict[int, nn.Parameter] = {}
    for parameter in parameters:
        twin = nn.Parameter(parameter.detach() + shift)
        twin.grad = None if parameter.grad is None else parameter.grad.detach().clone()
        twins[id(parameter)] = twin
    before = flat(twins.values())
    stand_in = object.__new__(type(optimizer))
    # without "step", which schedulers wrap
    vars(stand_in).update({name: value for name, value in vars(optimizer).items() if name != "step"})
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
    return flat(twins.values()) - before
