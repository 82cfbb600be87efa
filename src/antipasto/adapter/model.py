"""Find the target layers of a model and replace them by adapted ones: PEFT's tuner for this method.

Everything is checked before the first layer is replaced, so that an error leaves the model unchanged. A target that the user
named but that cannot be adapted is an error. From the default target set, layers of an unsupported kind are left out with a
warning that counts them; nothing is skipped silently.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from antipasto.adapter.basis import WEIGHT_DTYPES, Basis, load_identified_basis
from antipasto.adapter.fingerprints import Fingerprint, check_same_base
from antipasto.adapter.zero import is_partitioned
from antipasto.names import AntiPastoWarning

from .config import TARGET_MODULES, AntiPastoConfig
from .experts import AntiPastoExperts, Stack, mount, unmount
from .layer import AntiPastoLinear, as_matrix, basis_dtype
from .quantized import KINDS, is_of_other_codes, is_quantised, packed_digest, packing, why_not_dequantised
from .views import adapted_layers

SUPPORTED = (
    "2-D weights of torch.nn.Linear and transformers' Conv1D, and transformers' fused experts, in "
    + ", ".join(map(str, WEIGHT_DTYPES)).replace("torch.", "")
    + f"; quantised: {KINDS}"
)
# model type → layers whose weight its kernels read without calling the layer; some of these are from PEFT's LoRA
_READ_PAST: dict[str, set[str]] = {
    **{
        model_type: {"out_proj", "conv1d"}
        for model_type in ("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2")
    },
    **{model_type: {"out_proj", "conv1d", "x_proj", "dt_proj"} for model_type in ("falcon_mamba", "mamba")},
    "jamba": {"dt_proj"},
    "wavlm": {"q_proj", "k_proj", "v_proj", "out_proj"},
}
_MAX_WORKERS = 8


def why_unsupported(module: nn.Module, *, shapes_only: bool = False) -> str | None:
    """Why a module cannot be adapted, as a clause; None if it can.

    Example:
        >>> why_unsupported(nn.Embedding(4, 2))
        'its type is Embedding'
        >>> why_unsupported(nn.Linear(4, 2)) is None
        True
    """
    if isinstance(module, BaseTunerLayer):
        return f"it already carries an adapter of another method ({type(module).__module__}.{type(module).__name__})"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "it is the out_proj of nn.MultiheadAttention, which reads its weight and never calls it"
    if (reason := why_not_dequantised(module)) is not None:
        return reason
    if is_quantised(module) and module.weight.device.type != "meta":
        return None
    if not isinstance(module, (nn.Linear, Conv1D, Stack)):
        return f"its type is {type(module).__name__}"
    if isinstance(module, Stack) and module.refused is not None:
        return module.refused
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        return "its weight is not a parameter but computed (weight_norm or another parametrisation)"
    if weight.dtype not in WEIGHT_DTYPES:
        return f"its weight has dtype {weight.dtype}, perhaps quantised ({type(module).__name__})"
    if weight.device.type == "meta" and not shapes_only:
        return "its weight is on the meta device (offloaded, or not loaded yet), where there is nothing to decompose"
    if is_partitioned(weight):
        return "its weight is partitioned by DeepSpeed's ZeRO-3, so that there is nothing to decompose (use ZeRO-2 or FSDP2)"
    if weight.ndim != 2 and not isinstance(module, Stack):
        return f"its weight has shape {tuple(weight.shape)}"
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor: wrap before sharding or quantising"
    return None


def _is_of_another_kind(module: nn.Module) -> bool:
    """Whether a module can never be adapted, because of its type or the type of its weight."""
    if isinstance(module, BaseTunerLayer) or is_of_other_codes(module):
        return False
    if isinstance(module, NonDynamicallyQuantizableLinear) or not isinstance(module, (nn.Linear, Conv1D)):
        return True
    return not isinstance(module.weight, nn.Parameter) or module.weight.ndim != 2


class AntiPastoModel(BaseTuner):
    """PEFT's tuner for `AntiPastoConfig`, created by `get_peft_model` and `PeftModel.from_pretrained`."""

    prefix = "delta_s"
    tuner_layer_cls = AntiPastoLinear
    # PEFT declares lists, but one entry is a regular expression
    target_module_mapping = cast(dict[str, list[str]], TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter as PEFT does, and record the fingerprints of its layers in its config."""
        taken = [n for n, m in model.named_modules() if isinstance(m, AntiPastoLinear) and adapter_name in m.r]
        if taken:
            raise ValueError(
                f"{taken[0]} has an adapter {adapter_name!r} already: delete it first, or choose another name."
            )
        self._bases: dict[str, Found] = {}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._bases = {}
        self.peft_config[adapter_name].record_base(_fingerprints(model, adapter_name))

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: AntiPastoConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Record this model's fingerprints first: the config may have been used on another model in the meantime."""
        config.record_base(_fingerprints(model, adapter_name))
        return super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.model.modules():
            if isinstance(layer, AntiPastoLinear) and adapter_name in layer.r:
                layer.cast_adapter(adapter_name, autocast=autocast_adapter_dtype)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter that is a weighted sum of others: δS = Σ w δS, δS_hack = Σ w δS_hack. Exact at any ranks.

        Args:
            adapters: names of the adapters to add up.
            weights: one weight per adapter, of either sign.
            adapter_name: name of the new adapter, which is neither active nor trainable.
            combination_type: ``"linear"``. LoRA's other types only approximate this sum.

        Raises:
            ValueError: an adapter is unknown or also trained whole modules, the new name is taken, or the type of
                combination is not offered.
        """
        if combination_type != "linear":
            raise ValueError(
                f"combination_type={combination_type!r} is not offered: use combination_type='linear', which is exact for "
                "adapters in one basis."
            )
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter {adapter_name!r} already: delete it first, or choose another name.")
        if not adapters or len(adapters) != len(weights) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"Expected adapters and one finite weight for each, got {adapters} and {weights}.")
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"There is no adapter {name!r}; there are {sorted(self.peft_config)}.")
            if whole := self.peft_config[name].modules_to_save:
                raise ValueError(f"Adapter {name!r} also trained {whole} in full, which cannot be combined linearly.")
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, AntiPastoLinear)}
        ranks = {
            n: max(m.r[a] for a in adapters if a in m.r)
            for n, m in layers.items()
            if not m.r.keys().isdisjoint(adapters)
        }
        config = _config_of_sum([self.peft_config[name] for name in adapters], ranks)
        config.quarantine = any(name in layers[n].delta_s_hack for n in ranks for name in adapters)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for name in ranks:
            layers[name].set_to_sum(adapter_name, list(zip(adapters, weights, strict=True)))

    def _check_merge_allowed(self) -> None:
        """Raise an error before the first layer is merged, if merging would change what a layer computes.

        PEFT's version warns about weights tied to the embedding; here merging leaves the embedding unchanged (`layer`).
        """
        for name, layer in self.model.named_modules():
            reason = layer.why_not_mergeable() if isinstance(layer, AntiPastoLinear) else None
            if reason is not None:
                raise ValueError(
                    f"{name} cannot be merged: {reason}. Run the model unmerged, or leave that layer out with "
                    f"exclude_modules=[{name!r}]."
                )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse ``adapter_names``, which PeftModel would otherwise ignore silently."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names, another adapter for each row of a batch, is only supported by LoRA: call set_adapter first, "
                "and call the model once per adapter."
            )
        yield

    def _prepare_adapter_config(self, peft_config: AntiPastoConfig, model_config: dict[str, Any]) -> AntiPastoConfig:
        return peft_config  # target_modules=None is resolved in _prepare_model, which gets the model

    def _prepare_model(self, peft_config: AntiPastoConfig, model: nn.Module) -> None:
        """Resolve and check the targets, load or compute their bases, and check that the base model is the adapter's."""
        targets = find_targets(peft_config, model)
        found = _bases_for(targets, peft_config)
        expected = {name: Fingerprint.parse(line) for name, line in peft_config.expected_base.items()}
        if peft_config.check_base:
            _check_base(peft_config, expected, found)
        if peft_config.save_basis:  # the adapter's file carries its own basis
            found = {n: one._replace(fingerprint=expected.get(n, one.fingerprint)) for n, one in found.items()}
        self._bases = found
        for name, module in targets.items():
            if isinstance(module, Stack):
                experts, _, leaf = name.rpartition(".")
                mount(model.get_submodule(experts), leaf, module)  # PEFT will find it under this name

    def _create_and_replace(
        self,
        peft_config: AntiPastoConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        found = self._bases.pop(current_key, None)
        if found is None and isinstance(target, AntiPastoExperts):
            return  # matched by name, but left out with the module of experts, which `find_targets` knows
        if found is None:  # PEFT took the layer names from a state dict and not from the config
            _require_supported(current_key, target)
            found = _basis_for(current_key, target, peft_config)
        kind = AntiPastoExperts if isinstance(target, Stack) else AntiPastoLinear
        layer = target if isinstance(target, AntiPastoLinear) else kind(target)
        trainable = adapter_name in self.active_adapters and not peft_config.inference_mode
        layer.add_adapter(
            adapter_name,
            found.rank,
            found.basis,
            found.fingerprint,
            quarantine=peft_config.quarantine,
            trainable=trainable,
            carry_basis=peft_config.save_basis,
        )
        layer.plan, layer.hold_weights = peft_config.plan, peft_config.hold_weights
        if layer is not target:
            layer.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace a module as PEFT does, and a stack of experts, which is no part of the base model, by its parameter."""
        if isinstance(new_module, Stack):
            unmount(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)


def find_targets(config: AntiPastoConfig, model: nn.Module, *, shapes_only: bool = False) -> dict[str, nn.Module]:
    """Find the modules that a config adapts, by name. Resolves the config's ``target_modules`` to names in place.

    Args:
        config: which layers to adapt.
        model: the model.
        shapes_only: allow weights on the meta device, since nothing is decomposed yet.

    Raises:
        ValueError: nothing matches, or a target cannot be adapted. The message names it.
    """
    if config.target_modules is None:
        return _default_targets(config, model, shapes_only=shapes_only)
    _resolve_targets(config, model)
    targets = _match_modules(config, model) | _match_experts(config, model)
    if not targets:
        raise _nothing_matches(config, model)
    out_of_place = _out_of_place(targets, model)
    for name, module in targets.items():
        _require_supported(name, module, shapes_only=shapes_only)
        if name in out_of_place:
            raise _unsupported(name, out_of_place[name])
    return targets


def _default_targets(config: AntiPastoConfig, model: nn.Module, *, shapes_only: bool) -> dict[str, nn.Module]:
    """Find the default targets: layers named in `TARGET_MODULES`, or else by PEFT for this model type, that can be adapted.

    Warns about what is left out. Writes the result into the config, so that a saved adapter finds the same layers: names
    that match no supported layer do not become targets, and other layers that are left out are excluded.
    """
    theirs = AntiPastoModel.target_module_mapping.get(_model_type(model) or "", [])
    keys = _candidates(model)
    first: tuple[str, str] | None = None
    for names in ([t for t in TARGET_MODULES if any(_matches_name(key, t) for key in keys)], theirs):
        if not names:
            continue
        config.target_modules = names
        targets = _match_modules(config, model)
        stacked = {n: _why_not_by_default(m) for n, m in _match_experts(config, model).items()}
        others = {n: m for n, m in targets.items() if _is_of_another_kind(m)}
        left = stacked | {n: cast(str, why_unsupported(m, shapes_only=True)) for n, m in others.items()}
        left |= _out_of_place({n: m for n, m in targets.items() if n not in left}, model)
        first = first or next(iter(left.items()), None)
        targets = {n: m for n, m in targets.items() if n not in left}
        if not targets:
            continue
        for name, module in targets.items():
            _require_supported(name, module, shapes_only=shapes_only)
        if not isinstance(names, str):
            config.target_modules = [t for t in names if any(_matches_name(n, t) for n in targets)]
        if left:
            _leave_out(config, model, left, stacked)
        return targets
    config.target_modules = None
    if first is not None:
        raise _unsupported(*first)
    if any(_matches_name(key, t) for key in keys for t in TARGET_MODULES):
        raise _nothing_matches(config, model)
    raise ValueError(
        f"No module of this {type(model).__name__} has a name of the default set ({', '.join(TARGET_MODULES)}). "
        f"Pass target_modules: a list of names or 'all-linear'. {_describe_linears(model)}"
    )


def _leave_out(config: AntiPastoConfig, model: nn.Module, left: dict[str, str], stacked: dict[str, str]) -> None:
    """Exclude the layers left out from the config's targets, and warn about them."""
    # for a parameter, PEFT can only exclude the module that holds it
    excluded = {n.rpartition(".")[0] if n in stacked else n for n in left if check_target_module_exists(config, n)}
    kept = [name for name, _ in model.named_modules() if name and name not in excluded]
    shared = {leaf for leaf in set(map(_leaf, excluded)) if any(_matches_name(name, leaf) for name in kept)}
    names = {name if _leaf(name) in shared else _leaf(name) for name in excluded}
    if isinstance(config.exclude_modules, str):
        config.exclude_modules = rf"(?:{config.exclude_modules})|(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(names)))})"
    elif names:
        config.exclude_modules = sorted(names | set(config.exclude_modules or ()))
    counts = Counter((_leaf(name), reason) for name, reason in left.items())
    warnings.warn(
        f"These layers of the default target set cannot be adapted in this {type(model).__name__} and are left out: "
        + "; ".join(f"{count} × {leaf} ({reason})" for (leaf, reason), count in counts.items())
        + ". Set target_modules to choose the layers yourself.",
        AntiPastoWarning,
        stacklevel=2,
    )


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _out_of_place(targets: dict[str, nn.Module], model: nn.Module) -> dict[str, str]:
    """Targets that cannot be adapted because of how the model uses them, with the reason as a clause."""
    reasons: dict[str, str] = {}
    owners: dict[int, str] = {}
    places: dict[int, dict[tuple[int, str], str]] = {}  # module → the places that hold it; there may be several
    for name, module in model.named_modules(remove_duplicate=False):
        holder, _, leaf = name.rpartition(".")
        places.setdefault(id(module), {}).setdefault((id(model.get_submodule(holder)), leaf), name)
    model_type = _model_type(model)
    for name, module in targets.items():
        weight = module.base_weight if isinstance(module, AntiPastoLinear) else getattr(module, "weight", None)
        owner = owners.setdefault(id(weight if isinstance(weight, nn.Parameter) else module), name)
        others = [other for other in places.get(id(module), {}).values() if other != name]  # a Stack is in no place yet
        if _leaf(name) in _READ_PAST.get(model_type or "", ()):
            reasons[name] = f"the fused kernels of {model_type} models read its weight and never call it"
        elif others:
            reasons[name] = f"it is the same module as {others[0]}, and only one of them would be adapted"
        elif owner != name:
            reasons[name] = f"it shares its weight with {owner}, and separate knobs would untie the two"
    return reasons


def _matches_name(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _leaf(name: str) -> str:
    """The last part of a module's name."""
    return name.rpartition(".")[2]


def _candidates(model: nn.Module) -> list[str]:
    """Names of modules, and of parameters that may be stacked experts, so that the latter are not skipped silently."""
    return [key for key, _ in model.named_modules() if key] + [key for key, _ in _experts(model)]


def _resolve_targets(config: AntiPastoConfig, model: nn.Module) -> None:
    """Resolve ``"all-linear"`` to names, and raise an error for names that no module has."""
    _maybe_include_all_linear_layers(config, model)
    assert config.target_modules is not None
    if isinstance(config.target_modules, str):
        return
    config.target_modules = sorted(config.target_modules)
    keys = _candidates(model)
    for name in config.target_modules:
        if not any(_matches_name(key, name) for key in keys):
            raise ValueError(
                f"target_modules names {name!r}, but no module of this {type(model).__name__} has that name, or a name "
                f"that ends with '.{name}'. {_describe_linears(model)}"
            )


def _match_modules(config: AntiPastoConfig, model: nn.Module) -> dict[str, nn.Module]:
    return {
        key: module
        for key, module in _outside_adapters(model)
        if key and check_target_module_exists(config, key) and not isinstance(module, AntiPastoExperts)
    }


def _match_experts(config: AntiPastoConfig, model: nn.Module) -> dict[str, nn.Module]:
    """Those of `_experts` that match a config's targets. Excluding the module that holds them excludes them."""
    return {
        key: module
        for key, module in _experts(model)
        if not isinstance(check_target_module_exists(config, key.rpartition(".")[0]), _ExcludedModule)
        and check_target_module_exists(config, key)
    }


def _experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Parameters that may be experts, with more than two dimensions, each as a `Stack`; and adapted ones."""
    for holder, module in _outside_adapters(model):
        if isinstance(module, AntiPastoExperts):
            yield holder, module
        elif not isinstance(module, BaseTunerLayer):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 2:
                    yield f"{holder}.{name}".removeprefix("."), Stack(module, name)


def _outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules by name, without what is inside adapted layers."""
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name.startswith(adapted):
            yield name, module
            if isinstance(module, BaseTunerLayer):
                adapted = (*adapted, f"{name}.")


def _why_not_by_default(module: nn.Module) -> str:
    """Why experts are not adapted unless they are named."""
    reason = None if isinstance(module, AntiPastoExperts) else why_unsupported(module, shapes_only=True)
    return (
        reason
        or "experts in one parameter are adapted only where target_modules names them, since their bases are large"
    )


def _nothing_matches(config: AntiPastoConfig, model: nn.Module) -> ValueError:
    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    options = {name: value for name in names if (value := getattr(config, name)) is not None}
    return ValueError(f"No module of this {type(model).__name__} matches {options}. {_describe_linears(model)}")


def _describe_linears(model: nn.Module) -> str:
    modules = (*model.named_modules(), *_experts(model))
    names = sorted({_leaf(k) for k, m in modules if k and why_unsupported(m) is None})
    return f"Layers that can be adapted here: {', '.join(names) or 'none'}."


def _require_supported(name: str, module: nn.Module, *, shapes_only: bool = False) -> None:
    reason = None if isinstance(module, AntiPastoLinear) else why_unsupported(module, shapes_only=shapes_only)
    if reason is not None:
        raise _unsupported(name, reason, leave_out=name.split(".")[-2] if isinstance(module, Stack) else None)


def _unsupported(name: str, reason: str, *, leave_out: str | None = None) -> ValueError:
    return ValueError(
        f"{name} is a target, but cannot be adapted: {reason}. Supported: {SUPPORTED}. "
        f"Leave it out with exclude_modules=[{(leave_out or name)!r}], or name other target_modules."
    )


def rank_of(name: str, weight: Tensor, config: AntiPastoConfig) -> int:
    """The rank of a layer under a config, at most min(o, i)."""
    pattern = get_pattern_key(list(config.rank_pattern), name)
    sides = weight.shape[-2:]
    return min(config.rank_pattern.get(pattern, config.rank) or min(sides), *sides)


def _fingerprints(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Fingerprints of an adapter's layers, as text."""
    return {n: str(layer.fingerprint) for n, layer in adapted_layers(model).items() if adapter_name in layer.r}


def _config_of_sum(configs: Sequence[AntiPastoConfig], ranks: Mapping[str, int]) -> AntiPastoConfig:
    """Config of an adapter on exactly these layers, at these ranks."""
    differ = len(set(ranks.values())) > 1
    longest_first = sorted(ranks, key=len, reverse=True)  # a pattern also matches names that end with it
    return replace(
        configs[0],
        target_modules="|".join(map(re.escape, ranks)),  # an expression of whole names: a list would match suffixes too
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank=max(ranks.values()),
        rank_pattern={re.escape(name): ranks[name] for name in longest_first} if differ else {},
        save_basis=any(config.save_basis for config in configs),
        base_fingerprints=None,
        weights_sha256=None,
    )


class Found(NamedTuple):
    """Rank and basis for one target layer.

    Attributes:
        rank: the layer's rank under the config.
        basis: basis of at least that rank. U and Vh have the `basis_dtype`, so that their products use the same dtype as the
            base layer; S keeps its own.
        fingerprint: fingerprint of the weight and the basis.
    """

    rank: int
    basis: Basis
    fingerprint: Fingerprint


def _check_base(config: AntiPastoConfig, expected: dict[str, Fingerprint], found: dict[str, Found]) -> None:
    check_same_base(
        expected,
        {name: one.fingerprint for name, one in found.items()},
        {name: one.basis.S[..., : one.rank] for name, one in found.items()},
        what="The adapter",
        remedy="Load the base that it belongs to. To use it here anyway, set check_base=False on its config "
        "(AntiPastoConfig.from_pretrained) and pass that as config.",
        carries_basis=config.save_basis,
    )


def _bases_for(targets: dict[str, nn.Module], config: AntiPastoConfig) -> dict[str, Found]:
    """Call `_basis_for` on every target, in parallel if all of them are on the CPU.

    Each layer gets one thread if possible, since an eigendecomposition gains little from more, and hashing and disk access
    nothing. At most eight layers run at a time, because each holds fp64 copies. Layers on an accelerator run one by one.
    """
    threads = torch.get_num_threads()
    on_cpu = all(module.weight.device.type == "cpu" for module in targets.values())
    workers = min(threads, len(targets), _MAX_WORKERS) if on_cpu else 1

    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(threads // workers, 1),)) as pool:
        jobs = {
            name: pool.submit(copy_context().run, _basis_for, name, module, config) for name, module in targets.items()
        }
        try:
            # shown only if it takes longer than two seconds
            shown = tqdm(jobs.items(), desc="singular bases", unit="layer", delay=2.0, leave=False)
            return {name: job.result() for name, job in shown}
        finally:
            pool.shutdown(cancel_futures=True)  # no further layers after an error or Ctrl-C
            torch.set_num_threads(threads)  # later threads would start with the number that the workers set


def _basis_for(name: str, module: nn.Module, config: AntiPastoConfig) -> Found:
    """Return a layer's existing basis if its rank suffices; else load or compute it."""
    if isinstance(module, AntiPastoLinear):
        W, base = module.matrix(), module.get_base_layer()
        rank, there = rank_of(name, W, config), module.basis.rank
        if isinstance(module, AntiPastoExperts) and there != rank:
            raise ValueError(
                f"{name}: all adapters of experts need one rank; those that are there have {there}, this one {rank}. "
                f"Set rank or rank_pattern to {there}."
            )
        if there >= rank:
            assert module.fingerprint is not None
            return Found(rank, module.basis, module.fingerprint)
    else:
        W, base = as_matrix(module), module
        rank = rank_of(name, W, config)
    try:
        basis, fingerprint = load_identified_basis(W, rank=rank, dtype=basis_dtype(base), cache_dir=config.cache_dir)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: {error}") from error
    if (kind := packing(base)) is not None:
        fingerprint = fingerprint._replace(dtype=kind, weight=packed_digest(base))
    return Found(rank, basis, fingerprint)
