"""What the weight of a quantised Linear is: the packings that are known, W itself, and the bytes that identify it.

Such a layer stores codes q and constants instead of W (o, i). A constant a is that of a row, or of a block of consecutive
entries:

    bitsandbytes Linear4bit            W = c[q] a        q of 4 bits, c (16,) the table of nf4 or fp4, a per block;
                                                         with double quantisation a = c'[q'] a' + m, q' of 8 bits
    bitsandbytes Linear8bitLt          W = q a / 127     q of 8 bits, a (o,) per row
    torchao Int8Tensor, Intx…Tensor    W = (q − z) a     q of up to 8 bits, a and z per row or block

The basis is the SVD of this W, computed in fp32. W_θ does not fit into the codes, so it is never built: the layer's own
forward computes W x, with its kernel and that kernel's rounding, and the knobs' term is added, y = layer(x) + U (θ ⊙ (Vh x)).
θ = 0 is the quantised layer, bit for bit. The fingerprint is taken of codes and constants: another packing of the same
weights is another base.

Nothing here imports bitsandbytes or torchao unless a layer of theirs is passed.

Sources: LLM.int8 (arXiv:2208.07339), QLoRA (arXiv:2305.14314), torchao.quantization.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from antipasto.files import digest

KINDS = "bitsandbytes' Linear4bit and Linear8bitLt; torchao's Int8Tensor and IntxUnpackedToInt8Tensor, weight-only"

_TORCHAO = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
_OF_ACTIVATIONS = ("act_quant_kwargs", "activation_quantization", "act_pre_scale")  # attributes of torchao's tensors


def packing(module: nn.Module) -> str | None:
    """Name of the packing of a Linear's weight, such as ``"bnb_nf4"``; None if it is none that is known here.

    Example:
        >>> packing(nn.Linear(4, 2)) is None
        True
    """
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor):
        return None
    library, _, _ = type(weight).__module__.partition(".")
    match library, type(weight).__name__:
        case "bitsandbytes", "Params4bit" if (state := _state4(module)) is not None:
            return f"bnb_{state.quant_type}"
        case "bitsandbytes", "Int8Params" if weight.dtype is torch.int8:
            return "bnb_int8"
        case "torchao", name if name in _TORCHAO:
            return f"torchao_{name}"
    return None


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a Linear in a packing that is known here."""
    return packing(module) is not None


def is_of_other_codes(module: nn.Module) -> bool:
    """Whether a module has the codes of a packing that is not known here, such as GPTQ's, AWQ's or HQQ's."""
    return hasattr(module, "qweight") or hasattr(module, "W_q")


def why_not_dequantised(module: nn.Module) -> str | None:
    """Why the weight of a quantised module cannot be used, as a clause; None if it can, or if the module is not quantised."""
    weight = getattr(module, "weight", None)
    name, kind = type(weight).__name__, f"it is quantised ({type(module).__name__})"
    if is_of_other_codes(module):
        return kind
    if type(weight).__module__.startswith("torchao."):
        if not is_quantised(module):
            return f"it is quantised ({type(module).__name__} with a weight of torchao's type {name})"
        if any(getattr(weight, attribute, None) is not None for attribute in _OF_ACTIVATIONS):
            return f"{kind}, and so are its inputs, through which torchao has no gradient: quantise the weight only"
    if name == "Params4bit":
        if (state := _state4(module)) is None:
            return f"it is a {type(module).__name__} that is not quantised yet: move the model to its device first"
        if getattr(state, "packing_format_for_cpu", False):
            return (
                f"{kind}, and a forward on this CPU has rounded its constants: load it again, and wrap it before that"
            )
    if name == "Int8Params" and not is_quantised(module) and not getattr(weight, "has_fp16_weights", False):
        return f"it is a {type(module).__name__} that is not quantised yet: move the model to its device first"
    return None


def dequantised(module: nn.Module) -> Tensor:
    """W (o, i) of a quantised Linear, in fp32, without rounding to the dtype that it was quantised from."""
    weight: Any = module.weight
    match type(weight).__name__:
        case "Params4bit":
            from bitsandbytes.functional import dequantize_4bit

            state = copy.copy(_state4(module))
            state.dtype = torch.float32
            return dequantize_4bit(weight.data, state)
        case "Int8Params":
            from bitsandbytes.functional import int8_vectorwise_dequant

            return int8_vectorwise_dequant(weight.data, _scale8(module))
    rows, columns = weight.block_size
    q, a, z = weight.qdata.float(), weight.scale.float(), torch.zeros_like(weight.scale)
    z = z if weight.zero_point is None else weight.zero_point.float()
    a, z = (one.repeat_interleave(rows, 0).repeat_interleave(columns, 1) for one in (a, z))
    return (q - z) * a


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a quantised weight had before: that of its products. Linear8bitLt does not know it: fp32."""
    weight: Any = module.weight
    match type(weight).__name__:
        case "Params4bit":
            return _state4(module).dtype
        case "Int8Params":
            return torch.float32
    return weight.dtype


def packed_digest(module: nn.Module) -> str:
    """sha256, in hex, of a quantised Linear's codes and constants; the same on every device."""
    weight: Any = module.weight
    match type(weight).__name__:
        case "Params4bit":
            parts = {name: value for name, value in _state4(module).as_dict().items() if not name.endswith("dtype")}
            tensors = {name: value for name, value in parts.items() if isinstance(value, Tensor)}
            others = {name: str(value) for name, value in parts.items() if name not in tensors}
            return digest({"codes": weight.data.view(torch.uint8), **tensors}, others)
        case "Int8Params":
            return digest({"codes": weight.data, "scale": _scale8(module)})
    return digest(_parts(weight))


def changed_by(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> str | None:
    """The first entry of a state dict with other codes or constants than a quantised Linear has; None if there is none."""
    own = module.state_dict(prefix=prefix)
    # by digest: bytes that are stored as floats may read as NaN, which equals nothing
    changed = (n for n in own if n in state_dict and digest(_parts(own[n])) != digest(_parts(state_dict[n])))
    return next((name for name in changed if name != f"{prefix}bias"), None)


def keep_packing(module: nn.Module) -> None:
    """Keep bitsandbytes from repacking a Linear4bit for a CPU's bf16 instructions, which rounds constants and so changes W."""
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def as_linear(module: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """A plain, frozen Linear with the dequantised weight, rounded to ``dtype``."""
    plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(dequantised(module).to(dtype), requires_grad=False)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return plain.train(module.training)


def _state4(module: nn.Module) -> Any:
    """The constants of a Linear4bit; its parameter loses them when it is replaced, as by FSDP."""
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def _scale8(module: nn.Module) -> Tensor:
    """The constants (o,) of a Linear8bitLt, which its first forward moves from the weight to the layer."""
    weight: Any = module.weight
    state: Any = module.state
    scale: Tensor = state.SCB if weight.SCB is None else weight.SCB
    return scale


def _parts(tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors that a tensor of torchao consists of; of any other tensor itself."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    return {"": tensor.detach()} if flatten is None else {name: getattr(tensor, name) for name in flatten()[0]}
