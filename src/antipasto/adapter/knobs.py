"""Access to an adapted model's knobs, and contexts in which the model runs without some of them.

    as trained      θ = δS + δS_hack
    deployed        θ = δS                  without the quarantine
    scaled          θ = factor (δS + δS_hack)
    reference       θ = 0                   the base model, bit for bit: RL's KL reference without a second model

The contexts change what the layers see and never write to the knobs. They nest (the innermost applies) and restore on
exceptions. They change the model's state, so use them from one thread. With gradient checkpointing, call ``backward`` inside
the context in which the loss was computed: the backward runs the layers again, and must see the same knobs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from antipasto.adapter import AntiPastoConfig, AntiPastoLinear, View
from antipasto.adapter.fingerprints import Fingerprint
from antipasto.adapter.quantized import as_linear, is_quantised
from antipasto.adapter.sharded import whole
from antipasto.adapter.views import adapted_layers, seen_as, unwrap
from antipasto.files import replacing_folder


@dataclass(frozen=True)
class LayerKnobs:
    """One adapter's knobs on one layer, and the singular basis of that layer.

    Attributes:
        layer: the adapted layer; ``layer.base_layer`` is the original.
        adapter: the adapter's name.
    """

    layer: AntiPastoLinear
    adapter: str

    @property
    def delta_s(self) -> nn.Parameter:
        """δS (r,), fp32, which trains and ships; (E, r) for a stack of experts, here and below."""
        return self.layer.knobs(self.adapter)[0]

    @property
    def delta_s_hack(self) -> nn.Parameter | None:
        """δS_hack (r,), fp32, the quarantine; None after `drop_quarantine`."""
        return self.layer.knobs(self.adapter)[1]

    @property
    def theta(self) -> Tensor:
        """θ = δS + δS_hack (r,), without gradient; δS alone after `drop_quarantine`."""
        hack = self.delta_s_hack
        return (self.delta_s if hack is None else self.delta_s + hack).detach()

    @property
    def r(self) -> int:
        """Number of singular directions; of each expert."""
        return self.layer.r[self.adapter]

    @property
    def numbers(self) -> int:
        """Number of coordinates: r, or E·r. Directions, books and gradients have them flat, expert by expert."""
        return self.delta_s.numel()

    @property
    def U(self) -> Tensor:  # noqa: N802 (the field's notation)
        """Left singular vectors (o, r), in the weight's dtype."""
        return self.layer.basis.U[..., : self.r]

    @property
    def S(self) -> Tensor:  # noqa: N802
        """Singular values (r,), descending, fp32 unless the model was cast."""
        return self.layer.basis.S[..., : self.r]

    @property
    def Vh(self) -> Tensor:  # noqa: N802
        """Right singular vectors (r, i), in the weight's dtype."""
        return self.layer.basis.Vh[..., : self.r, :]


def current_fingerprints(layers: Mapping[str, LayerKnobs]) -> dict[str, Fingerprint]:
    """Fingerprints of every layer's present base weight and of its basis; hashes all the weights."""
    return {name: layer.layer.current_fingerprint() for name, layer in layers.items()}


def require_finite_gradients(gradients: Mapping[str, Tensor | None], step: int) -> None:
    """Raise an error if a gradient contains a NaN or Inf.

    Args:
        gradients: layer name → gradient of its knobs, or None.
        step: number of steps done, for the message.

    Raises:
        ValueError: a gradient is not finite. The message names the layer.
    """
    there = {name: whole(g) for name, g in gradients.items() if g is not None}
    if not there or torch.stack([g.abs().amax() for g in there.values()]).isfinite().all():
        return
    bad = [name for name, g in there.items() if not g.isfinite().all()]
    raise ValueError(
        f"After {step} steps, the gradient of {bad[0]} has a NaN or Inf in it"
        f"{f', and so have {len(bad) - 1} of the other {len(gradients) - 1} layers' if len(bad) > 1 else ''}. The knobs are "
        "as they were before this step. Look for an overflow in half precision, a learning rate that is too high, or an "
        "input that is not finite."
    )


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Save an adapted model's adapters as ``save_pretrained`` does, but replace the folder atomically.

    Args:
        model: a PeftModel, or a transformers model that `wrap` adapted; also inside DDP or torch.compile.
        folder: where to save. Existing contents are replaced as a whole.

    Raises:
        ValueError: the model has no ``save_pretrained``.
        OSError: the folder cannot be written; its previous contents are kept.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(model, (PeftModel, PreTrainedModel)):
        raise ValueError(
            f"A {type(model).__name__} has no save_pretrained: save peft.get_peft_model_state_dict(model) instead."
        )
    with replacing_folder(folder) as temporary:
        model.save_pretrained(str(temporary))


def wrap(
    model: nn.Module, config: AntiPastoConfig | None = None, *, adapter_name: str = "default"
) -> dict[str, LayerKnobs]:
    """Adapt a model in place, without a PeftModel around it.

    Every target layer is replaced by one that computes the same function and has knobs. Every parameter except the
    ``delta_s`` is frozen. A transformers model's own ``save_pretrained`` then writes the adapter, which
    `PeftModel.from_pretrained` loads. For other modules, `peft.get_peft_model_state_dict` and
    `peft.set_peft_model_state_dict` save and load the knobs.

    The basis is computed from the present weights: load weights first, wrap afterwards.

    Args:
        model: any ``nn.Module``.
        config: which layers to adapt and at what rank; the defaults of `AntiPastoConfig` if None. It is not modified.
        adapter_name: the adapter's name.

    Returns:
        Layer name → `LayerKnobs`, as `knobs`.

    Raises:
        ValueError: the model is already wrapped, a target cannot be adapted, or nothing matches.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> layers = wrap(model, AntiPastoConfig(target_modules=["0", "2"], cache_dir=None))
        >>> {name: layer.r for name, layer in layers.items()}
        {'0': 3, '2': 2}
    """
    if any(isinstance(module, AntiPastoLinear) for module in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} is already wrapped. Use antipasto.knobs(model) to get its knobs; "
            "for a second adapter use peft's PeftModel.add_adapter."
        )
    inject_adapter_in_model(copy.deepcopy(config or AntiPastoConfig()), model, adapter_name)
    if isinstance(model, PreTrainedModel):
        # otherwise its save_pretrained would write the adapted layers under names that no base model has
        model._hf_peft_config_loaded = True
    return knobs(model, adapter_name=adapter_name)


def knobs(model: nn.Module, *, adapter_name: str | None = None) -> dict[str, LayerKnobs]:
    """Return the knobs of an adapted model.

    Args:
        model: a model that `wrap` or PEFT adapted, also inside DDP or torch.compile.
        adapter_name: which adapter; the active one if None.

    Returns:
        Layer name in the base model, such as ``"model.layers.0.mlp.up_proj"``, → `LayerKnobs`, for the layers that the
        adapter targets.

    Raises:
        ValueError: the model is not adapted, has no adapter of that name, or has several active ones and no name is given.
    """
    layers = adapted_layers(model)
    known = sorted({name for layer in layers.values() for name in layer.r})
    if adapter_name is None:
        active = next(iter(layers.values())).active_adapters
        if len(active) != 1:
            raise ValueError(
                f"Active adapters are {active}: activate one alone, or pass adapter_name to knobs, one of {known}."
            )
        (adapter_name,) = active
    if adapter_name not in known:
        raise ValueError(f"There is no adapter {adapter_name!r}; there are {known}.")
    return {name: LayerKnobs(layer, adapter_name) for name, layer in layers.items() if adapter_name in layer.r}


def reference(model: nn.Module) -> AbstractContextManager[None]:
    """Context without both knobs: the model is the base model, bit for bit.

    Raises:
        ValueError: the model is not adapted.
    """
    return seen_as(model, View.REFERENCE)


def deployed(model: nn.Module, dial: float = 0.0) -> AbstractContextManager[None]:
    """Context without the quarantine, θ = δS: the model that `drop_quarantine` would leave.

    Args:
        model: an adapted model.
        dial: keep this multiple of the quarantine, θ = δS + dial δS_hack. 0 is the deployed model, 1 the model as trained; a
            negative dial subtracts the quarantine.

    Raises:
        ValueError: the model is not adapted, or ``dial`` is not 0 and the quarantine was dropped.
    """
    if dial == 0.0:
        return seen_as(model, View.DEPLOYED)
    offsets = {}
    for name, layer in knobs(model).items():
        if layer.delta_s_hack is None:
            raise ValueError(f"{name}: dial={dial} needs a quarantine, but this model's quarantine was dropped.")
        offsets[name] = dial * layer.delta_s_hack.detach()
    return seen_as(model, View.DEPLOYED, offsets)


def scaled(model: nn.Module, factor: float) -> AbstractContextManager[None]:
    """Context with θ scaled, θ → factor θ. A control: shrinking any update removes some of what it taught.

    Raises:
        ValueError: the model is not adapted.
    """
    offsets = {name: (factor - 1) * layer.theta for name, layer in knobs(model).items()}
    return seen_as(model, View.TRAINED, offsets)


def drop_quarantine(model: nn.Module) -> None:
    """Delete the quarantine of every adapter for good. The model is then the one that `deployed` shows.

    From then on the adapter saves and loads without a quarantine. Merged layers are merged again without it.

    Raises:
        ValueError: the model is not adapted.
    """
    for layer in adapted_layers(model).values():
        merged = layer.take_merged()
        layer.delta_s_hack.clear()
        if merged is not None:
            layer.merge(adapter_names=merged[0])
    for config in getattr(unwrap(model), "peft_config", {}).values():
        if isinstance(config, AntiPastoConfig):
            config.quarantine = False


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every quantised Linear of an adapted model by a plain one with the same W, in place.

    The adapter stays. The model can then be merged, and saved as any other; it takes the memory of its unquantised weights.
    Outputs change by the rounding of W to ``dtype``, and by that of the quantised kernels.

    Args:
        model: an adapted model.
        dtype: of the plain layers; that of the rest of the model.

    Raises:
        ValueError: the model is not adapted, or has no quantised layer.
    """
    base, layers = unwrap(model), adapted_layers(model)
    quantised = {name: module for name, module in base.named_modules() if is_quantised(module)}
    if not quantised:
        raise ValueError(f"This {type(model).__name__} has no quantised layer: there is nothing to dequantise.")
    for layer in layers.values():
        if is_quantised(layer.get_base_layer()):
            layer.dequantize(dtype)
    for name, module in quantised.items():
        if base.get_submodule(name) is module:  # not of an adapted layer
            base.set_submodule(name, as_linear(cast(nn.Linear, module), dtype))
    if getattr(base, "hf_quantizer", None) is not None:  # otherwise saving would write that it is quantised
        cast(PreTrainedModel, base).hf_quantizer.remove_quantization_config(base)


def token_logprobs(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Log-probability of each token given the tokens before it.

    Args:
        logits: (b, s, v), any float dtype; the softmax is taken in fp32.
        input_ids: (b, s).

    Returns:
        (b, s-1) in fp32: entry t is log p(input_ids[:, t+1] | input_ids[:, :t+1]).

    Raises:
        ValueError: the shapes do not match.

    Example:
        >>> token_logprobs(torch.zeros(1, 2, 4), torch.tensor([[0, 1]])).exp()
        tensor([[0.2500]])
    """
    if logits.ndim != 3 or logits.shape[:2] != input_ids.shape:
        raise ValueError(
            f"Expected logits (b, s, v) and input_ids (b, s), got {tuple(logits.shape)} and {tuple(input_ids.shape)}."
        )
    b, s, v = logits.shape
    nll = F.cross_entropy(logits[:, :-1].reshape(-1, v).float(), input_ids[:, 1:].reshape(-1), reduction="none")
    return -nll.view(b, s - 1)


@torch.no_grad()
def ref_logprobs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """`token_logprobs` of the base model, computed by the adapted model without its knobs: π_ref without a second model.

    The model stays in train or eval mode: if it has dropout, call ``model.eval()`` first.

    Args:
        model: an adapted causal LM whose output has ``logits``.
        input_ids: (b, s).
        attention_mask: (b, s) or None, passed to the model unchanged.

    Returns:
        (b, s-1) in fp32, without gradient.

    Raises:
        ValueError: the model is not adapted.
    """
    with reference(model):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return token_logprobs(logits, input_ids)
