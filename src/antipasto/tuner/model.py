"""Which layers of a model are adapted, and how they are put in place: PEFT's tuner for this method.

Everything that can go wrong is checked before the first layer is replaced, so that an error leaves the model as it was.
A target that cannot be adapted is an error that names it, never a silent skip.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from antipasto.basis import WEIGHT_DTYPES, Basis, load_identified_basis
from antipasto.fingerprints import Fingerprint, check_same_base

from .config import TARGET_MODULES, AntiPastoConfig
from .layer import AntiPastoLinear, as_matrix

SUPPORTED = "2-D weights of torch.nn.Linear and transformers' Conv1D, in " + ", ".join(map(str, WEIGHT_DTYPES)).replace(
    "torch.", ""
)
# model types whose fused kernels read these layers' weights past the layer's forward, as PEFT found for LoRA
_MAMBA_TYPES = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_MAMBA_LAYERS = {"out_proj", "conv1d"}
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
    if hasattr(module, "qweight") or hasattr(module, "W_q"):
        return f"it is quantised ({type(module).__name__})"
    if not isinstance(module, (nn.Linear, Conv1D)):
        return f"its type is {type(module).__name__}"
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        return "its weight is not a parameter but computed (weight_norm or another parametrisation)"
    if weight.dtype not in WEIGHT_DTYPES:
        return f"its weight is of dtype {weight.dtype}, quantised perhaps ({type(module).__name__})"
    if weight.device.type == "meta" and not shapes_only:
        return "its weight is on the meta device (offloaded, or not loaded yet), where there is nothing to decompose"
    if weight.ndim != 2:
        return f"its weight has shape {tuple(weight.shape)}"
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor: wrap before sharding or quantising"
    return None


class AntiPastoModel(BaseTuner):
    """PEFT's tuner for `AntiPastoConfig`; `get_peft_model` and `PeftModel.from_pretrained` make one."""

    prefix = "delta_s"
    tuner_layer_cls = AntiPastoLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT declares it so)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's injection, with the bases of the layers at hand while it lasts."""
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
        # in a config of the adapter's own: the caller's may be used again, on another model
        config = copy.copy(self.peft_config[adapter_name])
        layers = {n: m for n, m in model.named_modules() if isinstance(m, AntiPastoLinear) and adapter_name in m.r}
        config.base_fingerprints = {name: str(layer.fingerprint) for name, layer in layers.items()}
        self.peft_config[adapter_name] = config

    def _check_merge_allowed(self) -> None:
        """Refuse, before the first layer is merged, a layer that merged would be another function.

        PEFT's warns of weights that are tied to the embedding's; here those stay as they are (`antipasto.tuner.layer`).
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
        """Called by PeftModel around a forward, which drops what a method does not know without a word."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names, another adapter for each row of a batch, is LoRA's and not offered here: set_adapter before "
                "the call, or one call for each adapter."
            )
        yield

    def _prepare_adapter_config(self, peft_config: AntiPastoConfig, model_config: dict[str, Any]) -> AntiPastoConfig:
        return peft_config  # target_modules=None is resolved in _prepare_model, which sees the model

    def _prepare_model(self, peft_config: AntiPastoConfig, model: nn.Module) -> None:
        """Resolve the targets, refuse what cannot be adapted, load or compute every basis, check that the base is the base."""
        found = _bases_for(find_targets(peft_config, model), peft_config)
        expected = {name: Fingerprint.parse(line) for name, line in (peft_config.base_fingerprints or {}).items()}
        if peft_config.check_base:
            _check_base(peft_config, expected, found)
        if peft_config.save_basis:  # the file that they are from brings their basis
            found = {n: one._replace(fingerprint=expected.get(n, one.fingerprint)) for n, one in found.items()}
        self._bases = found

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
        if found is None:  # PEFT took the layers' names from a state dict rather than from the config
            _require_supported(current_key, target)
            found = _basis_for(current_key, target, peft_config)
        layer = target if isinstance(target, AntiPastoLinear) else AntiPastoLinear(target)
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


def find_targets(config: AntiPastoConfig, model: nn.Module, *, shapes_only: bool = False) -> dict[str, nn.Module]:
    """The modules that a config adapts, by name; writes the names that its ``target_modules`` stands for into it.

    Args:
        config: which layers.
        model: the model.
        shapes_only: let weights be on the meta device: nothing is to be decomposed yet.

    Raises:
        ValueError: nothing matches, or a target cannot be adapted; names it.
    """
    _resolve_targets(config, model)
    targets = _match_targets(config, model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    owners: dict[int, str] = {}
    for name, module in targets.items():
        _require_supported(name, module, shapes_only=shapes_only)
        weight = module.base_weight if isinstance(module, AntiPastoLinear) else module.weight
        owner = owners.setdefault(id(weight), name)
        if owner != name:
            raise _unsupported(name, f"it shares its weight with {owner}, and knobs for each would make two of it")
        if model_type in _MAMBA_TYPES and name.rpartition(".")[2] in _MAMBA_LAYERS:
            raise _unsupported(name, f"the fused kernels of {model_type} models read its weight and never call it")
    return targets


def _matches_name(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _resolve_targets(config: AntiPastoConfig, model: nn.Module) -> None:
    """Turn None and ``"all-linear"`` into names; refuse names that no module has."""
    # stacked experts are parameters, not modules: they count, so that _match_targets refuses rather than passes them over
    keys = [key for key, _ in model.named_modules() if key] + [key for key, p in model.named_parameters() if p.ndim > 2]
    if config.target_modules is None:
        config.target_modules = [t for t in TARGET_MODULES if any(_matches_name(key, t) for key in keys)]
        if not config.target_modules:
            raise ValueError(
                f"No module of this {type(model).__name__} has a name of the default set ({', '.join(TARGET_MODULES)}). "
                f"Pass target_modules: a list of names or 'all-linear'. {_describe_linears(model)}"
            )
        return
    _maybe_include_all_linear_layers(config, model)
    if isinstance(config.target_modules, str):
        return
    config.target_modules = sorted(config.target_modules)
    for name in config.target_modules:
        if not any(_matches_name(key, name) for key in keys):
            raise ValueError(
                f"target_modules names {name!r}, but no module of this {type(model).__name__} has that name, or a name "
                f"that ends on '.{name}'. {_describe_linears(model)}"
            )


def _match_targets(config: AntiPastoConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the config matches, by name. At least one; parameters that look like experts are refused."""
    targets: dict[str, nn.Module] = {}
    adapted: tuple[str, ...] = ()
    for key, module in model.named_modules():
        if not key or key.startswith(adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted = (*adapted, f"{key}.")
        if check_target_module_exists(config, key):
            targets[key] = module
    for key, parameter in model.named_parameters():
        holder = key.rpartition(".")[0]
        if parameter.ndim <= 2 or isinstance(check_target_module_exists(config, holder), _ExcludedModule):
            continue
        if check_target_module_exists(config, key):
            reason = f"it is a parameter of shape {tuple(parameter.shape)}, as of stacked experts"
            raise _unsupported(key, reason, leave_out=holder.rpartition(".")[2])
    if not targets:
        options = {
            name: value
            for name in (
                "target_modules",
                "exclude_modules",
                "layers_to_transform",
                "layers_pattern",
                "modules_to_save",
            )
            if (value := getattr(config, name)) is not None
        }
        raise ValueError(f"No module of this {type(model).__name__} matches {options}. {_describe_linears(model)}")
    return targets


def _describe_linears(model: nn.Module) -> str:
    names = sorted({k.rpartition(".")[2] for k, m in model.named_modules() if k and why_unsupported(m) is None})
    return f"Layers that can be adapted here: {', '.join(names) or 'none'}."


def _require_supported(name: str, module: nn.Module, *, shapes_only: bool = False) -> None:
    reason = None if isinstance(module, AntiPastoLinear) else why_unsupported(module, shapes_only=shapes_only)
    if reason is not None:
        raise _unsupported(name, reason)


def _unsupported(name: str, reason: str, *, leave_out: str | None = None) -> ValueError:
    return ValueError(
        f"{name} is a target, but cannot be adapted: {reason}. Supported: {SUPPORTED}. "
        f"Leave it out with exclude_modules=[{(leave_out or name)!r}], or name other target_modules."
    )


def rank_of(name: str, weight: Tensor, config: AntiPastoConfig) -> int:
    """The rank that a config gives a layer."""
    pattern = get_pattern_key(list(config.rank_pattern), name)
    return min(config.rank_pattern.get(pattern, config.rank) or min(weight.shape), *weight.shape)


class Found(NamedTuple):
    """What a layer is to be adapted with.

    Attributes:
        rank: that the config gives the layer.
        basis: of at least that rank; U and Vh in the weight's dtype, so that the products are of the base layer's kind; S,
            only looked at, is not.
        fingerprint: of the weight and the basis.
    """

    rank: int
    basis: Basis
    fingerprint: Fingerprint


def _check_base(config: AntiPastoConfig, expected: dict[str, Fingerprint], found: dict[str, Found]) -> None:
    """Refuse layers that are not those whose fingerprints the config carries."""
    check_same_base(
        expected,
        {name: one.fingerprint for name, one in found.items()},
        {name: one.basis.S[: one.rank] for name, one in found.items()},
        what="The adapter",
        remedy="Load the base that it belongs to. To put it here regardless, set check_base=False on its config "
        "(AntiPastoConfig.from_pretrained) and pass that as config.",
        carries_basis=config.save_basis,
    )


def _bases_for(targets: dict[str, nn.Module], config: AntiPastoConfig) -> dict[str, Found]:
    """`_basis_for` of every target, several at a time where they are on the CPU.

    An eigendecomposition gains little from a second thread, and hashing and the disk nothing: so each layer has one. Layers
    on an accelerator are decomposed there, one after the other. At most eight at a time, since each holds fp64 copies.
    """
    threads = torch.get_num_threads()
    on_cpu = all(module.weight.device.type == "cpu" for module in targets.values())
    workers = min(threads, len(targets), _MAX_WORKERS) if on_cpu else 1

    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(threads // workers, 1),)) as pool:
        jobs = {name: pool.submit(_basis_for, name, module, config) for name, module in targets.items()}
        try:
            # shown only when it takes long enough for someone to wonder
            shown = tqdm(jobs.items(), desc="singular bases", unit="layer", delay=2.0, leave=False)
            return {name: job.result() for name, job in shown}
        finally:
            pool.shutdown(cancel_futures=True)  # no further layers after an error or Ctrl-C
            torch.set_num_threads(threads)  # what a thread sets is what later threads start with


def _basis_for(name: str, module: nn.Module, config: AntiPastoConfig) -> Found:
    """The basis that a layer has already, where it is of the config's rank; else loaded or computed."""
    W = module.matrix() if isinstance(module, AntiPastoLinear) else as_matrix(module)
    rank = rank_of(name, W, config)
    if isinstance(module, AntiPastoLinear) and module.basis is not None and module.basis.rank >= rank:
        assert module.fingerprint is not None
        return Found(rank, module.basis, module.fingerprint)
    try:
        basis, fingerprint = load_identified_basis(W, cache_dir=config.cache_dir)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: {error}") from error
    U, S, Vh = basis.truncate(rank)
    return Found(rank, Basis(U.to(W.dtype), S, Vh.to(W.dtype)), fingerprint)
