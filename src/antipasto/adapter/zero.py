"""Parameters whose optimizer DeepSpeed divides among processes: ZeRO stages 1 and 2.

Every process holds all of a parameter x. The optimizer does not have x: it has a slice m_p of all parameters in one flat fp32
vector, the *master*, with its gradient g_p and its state:

    step     m_p ← m_p + Δ_p(g_p);   x ← gathered from m_0, m_1, …
    write    x ← v;   m_p ← the part of v in slice p

A write to x alone would be lost: the next step starts from m.

DeepSpeed calls no hooks around a step. Those of the optimizer inside are too early, because x is gathered after it, and they
run once per parameter group. So `around_steps` replaces ``step`` of the one object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_KNOWN = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"


def zero_optimizer(optimizer: Any) -> Any | None:
    """DeepSpeed's optimizer of ZeRO-1 or 2, also from accelerate's wrapper of it; None if it is a torch optimizer.

    Raises:
        ValueError: it is another one of DeepSpeed's.
    """
    for one in (optimizer, getattr(optimizer, "optimizer", None)):
        if isinstance(one, torch.optim.Optimizer) or not _is_deepspeeds(one):
            continue
        if f"{type(one).__module__}.{type(one).__qualname__}" != _KNOWN:
            raise ValueError(
                f"A router cannot split the steps of DeepSpeed's {type(one).__name__}. Use ZeRO-1 or ZeRO-2 in fp32, DDP or "
                "FSDP2, or a method without a router: RoutedGRPOTrainer(monitor=…), the penalty of antipasto train."
            )
        return one
    return None


def _is_deepspeeds(one: Any) -> bool:
    """Without an import of deepspeed, which need not be installed."""
    return any(base.__module__.partition(".")[0] == "deepspeed" for base in type(one).__mro__)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO-3 has divided this parameter among processes, and left an empty one in its place."""
    return hasattr(parameter, "ds_id")


def refuse_partitioned(model: nn.Module, what: str) -> None:
    """Raise an error if a model is under ZeRO-3.

    Its parameters are empty between forwards. It also records the order in which the first forward uses them, and no later one
    may differ: the reference, which leaves the knobs out, does.

    Raises:
        ValueError: it is.
    """
    for name, parameter in model.named_parameters():
        if is_partitioned(parameter):
            raise ValueError(
                f"{name} is partitioned by DeepSpeed's ZeRO-3, under which {what} cannot work: use ZeRO-1 or ZeRO-2, DDP or "
                "FSDP2 (torch.distributed.fsdp.fully_shard)."
            )


def groups(zero: Any) -> list[dict[str, Any]]:
    """The parameter groups that the optimizer was made with: the options of each, and the model's own parameters."""
    return [
        {**group, "params": parameters}
        for group, parameters in zip(zero.optimizer.param_groups, zero.bit16_groups, strict=True)
    ]


class around_steps:  # noqa: N801
    """Calls a function before each step and one after it, until it is removed. An error before a step prevents the step."""

    def __init__(self, zero: Any, before: Callable[[], Any], after: Callable[[], Any]) -> None:
        self._zero, step = zero, zero.step

        def routed() -> None:
            before()
            step()
            after()

        zero.step = routed

    def remove(self) -> None:
        """Give the object its class's ``step`` back."""
        del self._zero.step


def has_master(parameter: Tensor) -> bool:
    """Whether a ZeRO optimizer trains this parameter."""
    return hasattr(parameter, "_hp_mapping")


def gradient(parameter: Tensor) -> Tensor | None:
    """The gradient that the next step sees, before clipping. Under ZeRO it is gathered: all processes have to call this."""
    if not has_master(parameter):
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def write_masters(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write whole values into this process's slices of the masters, where parameters have one."""
    managed = [(p, value) for p, value in zip(parameters, values, strict=True) if has_master(p)]
    if managed:
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter, value in managed:
            safe_set_full_fp32_param(parameter, value)
