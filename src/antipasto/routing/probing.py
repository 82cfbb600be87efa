"""Does an optimizer's step depend on the values of the parameters, or on their gradients and its own state alone?

    Δ(x; g, state)  =?  Δ(x + c; g, state)          the same step, made from the parameters and from others beside them

Both steps are made by a stand-in: the optimizer's own code on copies of the parameters, of their gradients and of what it
remembers of them. c is as large as rounding allows, 0.01 / ε times the step, so that a dependence shows: Adafactor and LAMB
scale a step by the length of x, a decay pulls towards 0, schedule-free averaging towards a point that it remembers.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from antipasto.unchanged import unchanged


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
