"""Parameters that FSDP2 (`torch.distributed.fsdp.fully_shard`) divides among processes.

Each process holds some rows of a sharded parameter x (r, …), which is a DTensor:

    whole(x)             all r rows, gathered: all processes have to call it, in the same order
    sharded_as(v, x)     of v, which is the same on all processes, the rows that this one holds of x; nothing is sent
    local(x)             the rows that this one holds, to be written to

Plain tensors pass through all three. Knobs are small, r numbers per layer, so whoever splits, sums or saves them works on the
whole ones and writes back the local part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from antipasto.adapter.zero import write_masters


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its rows, without gradient."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The rows that this process holds, in the tensor's own memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_as(values: Tensor, like: Tensor) -> Tensor:
    """Values, sharded as another tensor is."""
    if not isinstance(like, DTensor):
        return values
    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenate the numbers of tensors, whole: a copy."""
    return torch.cat([whole(tensor).flatten() for tensor in tensors])


def write(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write whole values, flat or not, into parameters, wherever their rows are, and into ZeRO's copies of them."""
    parts = [local(sharded_as(value.reshape(like.shape), like)) for value, like in zip(values, parameters, strict=True)]
    torch._foreach_copy_([local(parameter) for parameter in parameters], parts)
    write_masters(parameters, values)


def is_sharded(model: nn.Module) -> bool:
    """Whether each forward waits for the other processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Put sharded parameters back in place of the whole ones, which a forward without a backward leaves in the root."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
