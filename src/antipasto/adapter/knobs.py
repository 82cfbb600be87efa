"""Handles on an adapted model: its knobs, and the models that it is with some of them out.

    as trained      θ = δS + δS_hack
    deployed        θ = δS                  the quarantine out
    scaled          θ = factor (δS + δS_hack)
    reference       θ = 0                   the base model, bit for bit: RL's KL reference without a second model

The contexts set what the layers see and never write to the knobs. They nest (the innermost counts) and restore on
exceptions; they belong to the model, so use them from one thread, strictly nested. With gradient checkpointing, call
``backward`` inside the context in which the loss was computed: layers are run again there, and would otherwise see other
knobs the second time.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from antipasto.adapter import AntiPastoConfig, AntiPastoLinear, View
from antipasto.adapter.fingerprints import Fingerprint
from antipasto.adapter.views import adapted_layers, seen_as, unwrap
from antipasto.files import replacing_folder


@dataclass(frozen=True)
class LayerKnobs:
    """One adapter's knobs on one layer, and the singular basis that they count in.

    Attributes:
        layer: the adapted layer; ``layer.base_layer`` is the original.
        adapter: the adapter's name.
    """

    layer: AntiPastoLinear
    adapter: str

    @property
    def delta_s(self) -> nn.Parameter:
        """δS (r,), fp32: trains, and ships."""
        return self.layer.knobs(self.adapter)[0]

    @property
    def delta_s_hack(self) -> nn.Parameter | None:
        """δS_hack (r,), fp32: the quarantine; None once it was dropped."""
        return self.layer.knobs(self.adapter)[1]

    @property
    def theta(self) -> Tensor:
        """θ = δS + δS_hack (r,), what the forward sees, without gradient; δS alone once the quarantine was dropped."""
        hack = self.delta_s_hack
        return (self.delta_s if hack is None else self.delta_s + hack).detach()

    @property
    def r(self) -> int:
        """Number of singular directions."""
        return self.layer.r[self.adapter]

    @property
    def U(self) -> Tensor:  # noqa: N802 (the field's notation)
        """Left singular vectors (o, r), in the weight's dtype."""
        assert self.layer.basis is not None
        return self.layer.basis.U[:, : self.r]

    @property
    def S(self) -> Tensor:  # noqa: N802
        """Singular values (r,), descending, fp32 unless the model was cast."""
        assert self.layer.basis is not None
        return self.layer.basis.S[: self.r]

    @property
    def Vh(self) -> Tensor:  # noqa: N802
        """Right singular vectors (r, i), in the weight's dtype."""
        assert self.layer.basis is not None
        return self.layer.basis.Vh[: self.r]


def current_fingerprints(layers: Mapping[str, LayerKnobs]) -> dict[str, Fingerprint]:
    """The fingerprint of every layer's base weight as it is now, and of its basis; hashes all the weights."""
    return {name: layer.layer.current_fingerprint() for name, layer in layers.items()}


def require_finite_gradients(gradients: Mapping[str, Tensor | None], step: int) -> None:
    """Refuse to step on a gradient with a NaN or Inf in it.

    Args:
        gradients: layer name → of its knobs, or None.
        step: number of steps done, for the message.

    Raises:
        ValueError: there is one; names the layers.
    """
    there = {name: g for name, g in gradients.items() if g is not None}
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
    """Save an adapted model's adapters as ``save_pretrained`` does, in one step: the folder is the old one, or the new.

    Args:
        model: a PeftModel, or a transformers model that `wrap` adapted; also inside DDP or torch.compile.
        folder: takes the adapter's files; what it holds is replaced as a whole.

    Raises:
        ValueError: the model has no ``save_pretrained``.
        OSError: it cannot be written; what was there before still is.
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

    Every target layer is replaced by one that computes the same and has knobs, and every parameter but the ``delta_s`` is
    frozen. A transformers model's own ``save_pretrained`` then writes the adapter, which `PeftModel.from_pretrained` loads;
    for other modules, `peft.get_peft_model_state_dict` and `peft.set_peft_model_state_dict` save and load the knobs.

    The basis is that of the weights at this moment: load weights first, wrap after.

    Args:
        model: any ``nn.Module``.
        config: which layers, at what rank; the defaults of `AntiPastoConfig` if None. It is not changed.
        adapter_name: the adapter's name.

    Returns:
        layer name → `LayerKnobs`, as `knobs`.

    Raises:
        ValueError: the model is wrapped already, a target cannot be adapted, or nothing matches.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> layers = wrap(model, AntiPastoConfig(target_modules=["0", "2"], cache_dir=None))
        >>> {name: layer.r for name, layer in layers.items()}
        {'0': 3, '2': 2}
    """
    if any(isinstance(module, AntiPastoLinear) for module in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} is wrapped already. Use antipasto.knobs(model) to get at its knobs; "
            "for a second adapter use peft's PeftModel.add_adapter."
        )
    inject_adapter_in_model(copy.deepcopy(config or AntiPastoConfig()), model, adapter_name)
    if isinstance(model, PreTrainedModel):
        # else its save_pretrained would write the adapted layers under names that no base model has
        model._hf_peft_config_loaded = True
    return knobs(model, adapter_name=adapter_name)


def knobs(model: nn.Module, *, adapter_name: str | None = None) -> dict[str, LayerKnobs]:
    """The knobs of an adapted model, however it was adapted.

    Args:
        model: a model that `wrap` or PEFT adapted, also inside DDP or torch.compile.
        adapter_name: which adapter; the active one if None.

    Returns:
        Layer name in the base model, such as ``"model.layers.0.mlp.up_proj"``, → `LayerKnobs`. Only the layers that the
        adapter targets.

    Raises:
        ValueError: the model is not adapted, has no adapter of that name, or has several active ones and no name is given.
    """
    layers = adapted_layers(model)
    known = sorted({name for layer in layers.values() for name in layer.r})
    if adapter_name is None:
        active = next(iter(layers.values())).active_adapters
        if len(active) != 1:
            raise ValueError(f"Active adapters are {active}: pass adapter_name, one of {known}.")
        (adapter_name,) = active
    if adapter_name not in known:
        raise ValueError(f"There is no adapter {adapter_name!r}; there are {known}.")
    return {name: LayerKnobs(layer, adapter_name) for name, layer in layers.items() if adapter_name in layer.r}


def reference(model: nn.Module) -> AbstractContextManager[None]:
    """Context: both knobs out. The model is the base model, bit for bit.

    Raises:
        ValueError: the model is not adapted.
    """
    return seen_as(model, View.REFERENCE)


def deployed(model: nn.Module, dial: float = 0.0) -> AbstractContextManager[None]:
    """Context: the quarantine out, θ = δS. The model is what `drop_quarantine` would leave.

    Args:
        model: an adapted model.
        dial: how much of the quarantine is left in, θ = δS + dial δS_hack: 1 is the model as trained, less than 0 goes on in
            the direction in which it was taken out.

    Raises:
        ValueError: the model is not adapted, or has no quarantine of which something could be left in.
    """
    if dial == 0.0:
        return seen_as(model, View.DEPLOYED)
    offsets = {}
    for name, layer in knobs(model).items():
        if layer.delta_s_hack is None:
            raise ValueError(f"{name}: dial={dial} needs a quarantine, and this model's was dropped.")
        offsets[name] = dial * layer.delta_s_hack.detach()
    return seen_as(model, View.DEPLOYED, offsets)


def scaled(model: nn.Module, factor: float) -> AbstractContextManager[None]:
    """Context: θ at a fraction of its length, θ → factor θ. Shrinking any update removes some of what it taught: a control.

    Raises:
        ValueError: the model is not adapted.
    """
    offsets = {name: (factor - 1) * layer.theta for name, layer in knobs(model).items()}
    return seen_as(model, View.TRAINED, offsets)


def drop_quarantine(model: nn.Module) -> None:
    """Delete the quarantine of every adapter, for good; the model is then what `deployed` showed.

    The adapter saves and loads without it from here on. What was merged is merged again without it.

    Raises:
        ValueError: the model is not adapted.
    """
    for layer in adapted_layers(model).values():
        merged = layer.take_merged()
        layer.drop_quarantine()
        if merged is not None:
            layer.merge(adapter_names=merged[0])
    for config in getattr(unwrap(model), "peft_config", {}).values():
        if isinstance(config, AntiPastoConfig):
            config.quarantine = False


def token_logprobs(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Log-probability of each token given those before it.

    Args:
        logits: (b, s, v), any float dtype; the softmax is taken in fp32.
        input_ids: (b, s).

    Returns:
        (b, s-1) in fp32: entry t is log p(input_ids[:, t+1] | input_ids[:, :t+1]).

    Raises:
        ValueError: the shapes do not fit.

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
    """`token_logprobs` of the base model, computed by the adapted one with its knobs out: π_ref without a second model.

    The model is left in its train or eval mode: with dropout, call ``model.eval()`` first.

    Args:
        model: an adapted causal LM whose output has ``logits``.
        input_ids: (b, s).
        attention_mask: (b, s) or None, given to the model as it is.

    Returns:
        (b, s-1) in fp32, without gradient.

    Raises:
        ValueError: the model is not adapted.
    """
    with reference(model):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return token_logprobs(logits, input_ids)
