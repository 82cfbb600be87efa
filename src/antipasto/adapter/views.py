"""Find a model's adapted layers, and contexts that change which knobs they see (`View`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .layer import AntiPastoLinear, View
from .rows import RowViews


def unwrap(model: nn.Module) -> nn.Module:
    """Return the original model inside PeftModel, DDP and torch.compile."""
    while True:
        inner = extract_model_from_parallel(model, keep_torch_compile=False)
        if isinstance(inner, PeftModel):
            inner = inner.base_model
        if isinstance(inner, BaseTuner):
            inner = inner.model
        if inner is model:
            return model
        model = inner


def adapted_layers(model: nn.Module) -> dict[str, AntiPastoLinear]:
    """The adapted layers, by their names in the base model.

    Raises:
        ValueError: the model has none.
    """
    layers = {
        # prefixes of layers that were compiled individually, or sharded by FSDP
        name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", ""): module
        for name, module in unwrap(model).named_modules()
        if isinstance(module, AntiPastoLinear)
    }
    if not layers:
        raise ValueError(
            f"This {type(model).__name__} has no AntiPaSTO layers. Adapt it first: "
            "antipasto.wrap(model), or peft.get_peft_model(model, antipasto.AntiPastoConfig())."
        )
    return layers


@contextmanager
def seen_as(model: nn.Module, view: View, offsets: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Context that changes which knobs the adapted layers see; the innermost context applies.

    Merged layers are unmerged meanwhile. In views of the base model, PEFT's ``modules_to_save`` are replaced by their
    originals as well.

    Args:
        model: the adapted model.
        view: which knobs take part.
        offsets: layer name → (r,) to add to θ; layers without an entry get none.
    """
    layers = adapted_layers(model)
    base_model = view in (View.REFERENCE, View.ORIGIN) or any(layer.disable_adapters for layer in layers.values())
    wrappers = [module for module in unwrap(model).modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    with (
        unmerged(model),
        replaced("view", dict.fromkeys(layers.values(), view)),
        replaced("offset", {layer: (offsets or {}).get(name) for name, layer in layers.items()}),
        replaced("_disable_adapters", dict.fromkeys(wrappers, base_model)),
    ):
        yield


@contextmanager
def replaced(attribute: str, values: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Context in which an attribute of some modules has other values: module → value.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> with replaced("training", {model: False}):
        ...     model.training
        False
        >>> model.training
        True
    """
    before = [(module, getattr(module, attribute)) for module in values]
    for module, value in values.items():
        setattr(module, attribute, value)
    try:
        yield
    finally:
        for module, value in before:
            setattr(module, attribute, value)


@contextmanager
def fixed(model: nn.Module) -> Iterator[None]:
    """Context in which nobody writes to the knobs, as while a model generates: they are looked at once for each view.

    Elsewhere every forward compares the knobs with those that W_θ was built of, layer by layer, and waits for a GPU's answer.
    Views may change inside, adapters be switched; a write to a knob or to a base weight is not seen until the context ends.
    Nothing changes where a gradient is wanted, rows of a batch see different knobs, or ``hold_weights`` is off.

    Args:
        model: the adapted model; one without adapted layers is left as it is.

    Example:
        >>> import torch
        >>> from antipasto import AntiPastoConfig, wrap
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> layer = wrap(model, AntiPastoConfig(target_modules=["0"], cache_dir=None))["0"]
        >>> _ = layer.delta_s.data.fill_(1.0)
        >>> x = torch.ones(1, 4)
        >>> with fixed(model), torch.no_grad():
        ...     y = model(x)
        ...     same = torch.equal(model(x), y)
        >>> same
        True
    """
    layers = [module for module in unwrap(model).modules() if isinstance(module, AntiPastoLinear)]
    with replaced("fixed", {layer: [] for layer in layers}):
        yield


@contextmanager
def mixed(model: nn.Module) -> Iterator[RowViews]:
    """Context in which rows of one batch can see different knobs, set by `RowViews.set`; initially all see both knobs.

    Merged layers are unmerged meanwhile.

    Raises:
        ValueError: the model is not adapted.

    Example:
        >>> import torch
        >>> from antipasto import AntiPastoConfig, wrap
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> layer = wrap(model, AntiPastoConfig(target_modules=["0"], cache_dir=None))["0"]
        >>> _ = layer.delta_s_hack.data.fill_(1.0)
        >>> with mixed(model) as rows:
        ...     rows.set(torch.tensor([True, False]))
        ...     y = model(torch.ones(2, 4))
        >>> torch.equal(y[0], y[1])
        False
    """
    rows = RowViews()
    layers = adapted_layers(model)
    handle = unwrap(model).register_forward_pre_hook(rows.on_forward, with_kwargs=True, prepend=True)
    try:
        with unmerged(model), replaced("rows", dict.fromkeys(layers.values(), rows)):
            yield rows
    finally:
        handle.remove()


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Context in which all layers are unmerged; on exit, exactly the weights that were merged before are put back.

    Layers that were removed from the model meanwhile (``merge_and_unload``, ``unload``) are left as they are. Layers whose
    active adapters changed stay unmerged, as after PEFT's ``set_adapter``.
    """
    before = [(layer, list(layer.active_adapters), layer.take_merged()) for layer in adapted_layers(model).values()]
    try:
        yield
    finally:
        present = set(unwrap(model).modules())
        for layer, active, merged in before:
            if layer not in present:
                continue
            layer.take_merged()
            if merged is not None and active == list(layer.active_adapters):
                layer.put_merged(merged)
