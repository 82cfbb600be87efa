"""One adapted layer: the frozen base layer, its singular basis, and two knobs per adapter, δS and δS_hack.

    y = base(x) + U (θ ⊙ (Vh x)),   θ = Σ over the active adapters of  δS + δS_hack       (`functional`)

or, where it is cheaper (`plans`), W_θ x + b in one matmul. The layer's `View` says which knobs take part. Contexts set the
view; they do not write to the knobs.

Merging does not add to W and subtract again: ``merge`` replaces W by W_θ and keeps W, ``unmerge`` puts W back, bit for bit.
(PEFT's way drifts in low precision: github.com/huggingface/trl/issues/6688.) The parameter is replaced and never written to,
so other modules that share W, such as a tied embedding, are unaffected.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from antipasto.adapter.basis import Basis
from antipasto.adapter.choice import Asked, Choice, matmul_dtype, product_dtype
from antipasto.adapter.fingerprints import Fingerprint, dtype_name, sketch, weight_digest
from antipasto.adapter.functional import delta_weight, merged_linear, spectral_delta
from antipasto.adapter.plans import Execution
from antipasto.adapter.quantized import (
    as_linear,
    changed_by,
    compute_dtype,
    dequantised,
    is_quantised,
    keep_packing,
    packed_digest,
    packing,
)
from antipasto.adapter.rows import RowViews, per_token
from antipasto.adapter.sharded import whole
from antipasto.names import PlanName


class View(enum.Enum):
    """Which knobs the forward sees."""

    TRAINED = "delta_s + delta_s_hack"
    DEPLOYED = "delta_s alone"
    REFERENCE = "neither: the base model"
    ORIGIN = "zeros in their place: the base model, which can be differentiated by them"


class Knob(nn.Module):
    """One trainable number per singular direction: ``weight`` (r,), or (E, r) for a stack, initially zero.

    It is a module, like ``lora_A`` in PEFT, so that the parameter's name is ``….delta_s.<adapter>.weight``. Code that copies
    one adapter into another by name, such as TRL's reference adapter, relies on that.

    Attributes:
        is_sharded: whether FSDP2 has divided ``weight`` among processes, and with it, as it divides whole modules, the W of
            the layer. During a forward nothing else tells: the whole tensors are in their places then, and plain.
    """

    is_sharded = False

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, trainable: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device), requires_grad=trainable)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight" and isinstance(value, DTensor):
            self.is_sharded = True

    def extra_repr(self) -> str:
        return f"r={self.weight.shape[-1]}"


class CarriedBasis(nn.Module):
    """A basis saved with its adapter: ``basis_U`` (o, r), ``basis_S`` (r,), ``basis_Vh`` (r, i), not trained.

    They are parameters because DDP would broadcast buffers at every forward.
    """

    def __init__(self, basis: Basis) -> None:
        super().__init__()
        for name, tensor in basis._asdict().items():
            # a copy: tensors from the cache are memory-mapped from their file
            self.register_parameter(f"basis_{name}", nn.Parameter(tensor.clone(), requires_grad=False))

    @property
    def basis(self) -> Basis:
        """The present U, S and Vh."""
        # read as attributes: during a forward, FSDP replaces parameters by plain tensors
        return Basis(*(getattr(self, f"basis_{name}") for name in Basis._fields))


def is_transposed(base_layer: nn.Module) -> bool:
    """Whether a layer keeps its weight as (i, o)."""
    return isinstance(base_layer, Conv1D) or bool(getattr(base_layer, "is_transposed", False))


def as_matrix(base_layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight of a Linear or Conv1D as W (o, i), of a stack of experts as (E, o, i): a view of it, or `dequantised`.

    Args:
        base_layer: the layer.
        weight: read instead of the weight that the layer has now, in the same layout.
    """
    if is_quantised(base_layer):
        return dequantised(base_layer)
    weight = cast(Tensor, base_layer.weight) if weight is None else weight
    return weight.mT if is_transposed(base_layer) else weight


def basis_dtype(base_layer: nn.Module) -> torch.dtype:
    """The dtype of U and Vh: that of the weight; of a quantised one, that of its products."""
    if is_quantised(base_layer):
        return compute_dtype(base_layer)
    weight = base_layer.weight
    assert isinstance(weight, Tensor)
    return weight.dtype


@dataclass(frozen=True)
class Fixed:
    """What a call took that others will take as well, as long as the knobs are what they are."""

    seen: Hashable
    offset: Tensor | None
    weight: Tensor
    bias: Tensor | None

    def multiply(self, x: Tensor) -> Tensor:
        """``W_θ x + b``, in the dtype of W_θ."""
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias)


_PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward)


def _probe(base_layer: nn.Module) -> tuple[Tensor, Tensor]:
    """base(x; T) − base(x; 0) and T x, (3, o) each, for a weight T and inputs x (3, i) of several sizes."""
    weight = base_layer.weight
    assert isinstance(weight, nn.Parameter)
    generator = torch.Generator().manual_seed(0)
    T = nn.Parameter(torch.randn(weight.shape, generator=generator).to(weight), requires_grad=False)
    matrix = T.T if isinstance(base_layer, Conv1D) else T
    T.data.div_(matrix.shape[1] ** 0.5)
    x = torch.tensor([[0.1], [1.0], [10.0]]) * torch.randn(3, matrix.shape[1], generator=generator)
    x = x.to(weight)
    try:
        with torch.no_grad():
            base_layer.weight = T
            y = base_layer(x)
            base_layer.weight = nn.Parameter(torch.zeros_like(T), requires_grad=False)
            return y - base_layer(x), x @ matrix.T
    finally:
        base_layer.weight = weight


class AntiPastoLinear(nn.Module, BaseTunerLayer):
    """A Linear or Conv1D with knobs on its singular directions.

    Args:
        base_layer: the layer to adapt. Its parameters are never written to. Between ``merge`` and ``unmerge`` its weight is
            another parameter.

    Attributes:
        delta_s: adapter name → `Knob` that trains and ships.
        delta_s_hack: adapter name → `Knob` of the quarantine. It takes part in the forward but does not require a gradient,
            because plain training would then put half of what is learned into the part that is deleted. If a caller makes it
            require a gradient, that gradient equals the one of ``delta_s``.
        r: adapter name → number of singular directions.
        delta_s_basis: adapter name → `CarriedBasis`, where its config says ``save_basis``.
        basis: U, S, Vh of the base weight, up to the largest rank of any adapter, shared by all adapters. Plain tensors,
            since they are not state and DDP would broadcast buffers at every forward. If the first adapter carries its
            basis, that basis is used.
        fingerprint: fingerprint of the base weight and that basis.
        view: which knobs the forward sees.
        offset: where set, added to θ: how a router takes a control's book out for a while. As many numbers as an adapter's
            knobs, in any shape.
        rows: where set, says which sequences of a batch see the quarantine; θ is then (b, r).
        spread_theta: where set, called with θ and x at every forward for a θ that broadcasts over x's tokens: how
            `rollouts` tells sequences apart.
        plan: how it is computed, as the config of its last adapter says.
        hold_weights: whether W_θ of a forward without gradient is kept for the next; from there as well.
        choice: chooses how a call is computed, and has the W_θ at hand.
        fixed: where set, nobody writes to the knobs (`views.fixed`), and what a forward without gradient takes is here.
    """

    adapter_layer_names = ("delta_s",)
    other_param_names = ("delta_s_hack", "delta_s_basis", "r")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.delta_s = nn.ModuleDict()
        self.delta_s_hack = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.delta_s_basis = nn.ModuleDict()
        self._basis: Basis | None = None
        self._carrier: str | None = None
        self.fingerprint: Fingerprint | None = None
        self.view = View.TRAINED
        self.offset: Tensor | None = None
        self.rows: RowViews | None = None
        self.spread_theta: Callable[[Tensor, Tensor], Any] | None = None
        self.plan: PlanName = "auto"
        self.hold_weights = True
        self.fixed: list[Fixed] | None = None
        self.choice = Choice()
        self.merged_adapters: list[str] = []
        self._unmerged: tuple[nn.Parameter] | None = None  # in a tuple, so that it is not registered as a parameter
        self._disable_adapters = False
        if isinstance(base_layer, nn.Linear) and is_quantised(base_layer):
            keep_packing(base_layer)
            self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        else:
            self.out_features, self.in_features = as_matrix(base_layer).shape[-2:]

    def add_adapter(
        self,
        name: str,
        rank: int,
        basis: Basis,
        fingerprint: Fingerprint,
        *,
        quarantine: bool,
        trainable: bool,
        carry_basis: bool,
    ) -> None:
        """Add an adapter whose knobs are zero.

        Args:
            name: the adapter's name.
            rank: number of its singular directions.
            basis: basis of the base weight, of at least that rank; U and Vh in the weight's dtype.
            fingerprint: fingerprint of the base weight and that basis.
            quarantine: whether the adapter has a ``delta_s_hack``.
            trainable: whether ``delta_s`` requires a gradient.
            carry_basis: whether the basis is saved with the adapter.
        """
        weight = self.base_weight
        grows = self.fingerprint is None or basis.rank > self.basis.rank
        if self.fingerprint not in (None, fingerprint) and (grows or carry_basis):
            raise ValueError(
                f"Adapter {name!r} uses another singular basis than the adapters already on this layer: it cannot be added."
            )
        if carry_basis:
            self.delta_s_basis[name] = CarriedBasis(basis.truncate(rank))
        if grows:
            self.fingerprint, self._carrier = fingerprint, name if carry_basis else None
            self._basis = None if carry_basis else basis
            self.choice.trust(weight)
        self.r[name] = rank
        shape = (*basis.S.shape[:-1], rank)
        self.delta_s[name] = Knob(shape, self.knob_dtype, weight.device, trainable=trainable)
        if quarantine:
            self.delta_s_hack[name] = Knob(shape, self.knob_dtype, weight.device, trainable=False)

    @property
    def basis(self) -> Basis:
        """U, S, Vh of the knobs, up to the largest rank of any adapter. There is none before the first adapter."""
        if self._carrier is not None:
            return cast(CarriedBasis, self.delta_s_basis[self._carrier]).basis
        assert self._basis is not None
        return self._basis

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 has divided the layer among processes."""
        return any(knob.is_sharded for knob in self.delta_s.values())

    @property
    def may_hold(self) -> bool:
        """Whether a W_θ may be kept: not in a sharded layer, since the whole W_θ of every layer is what sharding avoids."""
        return self.hold_weights and not self.is_sharded

    def current_fingerprint(self) -> Fingerprint:
        """Fingerprint of the basis and of the present base weight, which is hashed again."""
        assert self.fingerprint is not None
        digest = self.weight_digest()
        if digest == self.fingerprint.weight:
            return self.fingerprint
        W = whole(self.matrix())
        dtype = packing(self.get_base_layer()) or dtype_name(W)
        return self.fingerprint._replace(weight=digest, shape=tuple(W.shape), dtype=dtype, sketch=sketch(W))

    def weight_digest(self) -> str:
        """sha256 of the present base weight, as in the fingerprint."""
        base_layer = self.get_base_layer()
        return packed_digest(base_layer) if is_quantised(base_layer) else weight_digest(whole(self.matrix()))

    @property
    def weight_dtype(self) -> torch.dtype:
        """The base weight's dtype; of a quantised one, the dtype of its products."""
        return basis_dtype(self.get_base_layer())

    @property
    def knob_dtype(self) -> torch.dtype:
        """The dtype of new knobs: that of the weight, but at least fp32."""
        return torch.promote_types(self.weight_dtype, torch.float32)

    @property
    def base_weight(self) -> nn.Parameter:
        """The base layer's own weight, also while merged, in the base layer's layout."""
        weight = self.get_base_layer().weight if self._unmerged is None else self._unmerged[0]
        assert isinstance(weight, nn.Parameter)
        return weight

    def matrix(self) -> Tensor:
        """W (o, i), also while merged: a view, or `dequantised`."""
        return as_matrix(self.get_base_layer(), self.base_weight)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter as PEFT does; keep the basis for the other adapters."""
        if adapter_name == self._carrier:
            self._basis, self._carrier = Basis(*(tensor.detach() for tensor in self.basis)), None
        super().delete_adapter(adapter_name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as PyTorch does, but refuse different base weights: the basis would still be that of the present ones."""
        self.choice.forget()  # the basis may be part of the state dict
        present = dict(self.named_parameters())
        for key, value in state_dict.items():
            if not key.startswith(f"{prefix}delta_s") or not isinstance(value, Tensor):
                continue
            if not value.isfinite().all():
                raise ValueError(f"{key} of the state dict contains a NaN or Inf: the adapter is broken.")
            knob = present.get(key.removeprefix(prefix))
            if knob is not None and knob.shape != value.shape:
                raise ValueError(
                    f"{key} of the state dict has shape {tuple(value.shape)}, expected {tuple(knob.shape)}: the adapter's "
                    "rank differs from its config, or it belongs to another model."
                )
        if (name := self._other_weight(state_dict, f"{prefix}base_layer.")) is not None:
            raise ValueError(
                f"{name} of the state dict is not the weight that this layer was adapted on, so the layer's singular basis "
                "does not fit it. Load weights first, adapt afterwards."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _other_weight(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """The name under which a state dict has another weight than the base layer; None if there is none."""
        if is_quantised(self.get_base_layer()):
            return changed_by(self.get_base_layer(), state_dict, prefix)
        name, weight = f"{prefix}weight", self.get_base_layer().weight
        assert isinstance(weight, Tensor)
        new: Tensor = state_dict.get(name, weight)
        plain = all(type(tensor.data) is Tensor and not tensor.is_meta for tensor in (weight, new))
        return name if plain and not torch.equal(new.to(weight), weight) else None

    def cast_adapter(self, name: str, *, autocast: bool) -> None:
        """Cast an adapter as PEFT documents: to at least fp32, or to the weight's dtype without ``autocast``.

        A carried basis is cast too, except S, which is never used in low-precision products.
        """
        dtype = self.knob_dtype if autocast else self.weight_dtype
        for container in (self.delta_s, self.delta_s_hack, self.delta_s_basis):
            for key, parameter in container[name].named_parameters() if name in container else ():
                if key != "basis_S":
                    parameter.data = parameter.data.to(dtype)
        self.choice.forget()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base layer's device. PEFT's version also casts to the weight's dtype, rounding the knobs."""
        for container in (self.delta_s, self.delta_s_hack, self.delta_s_basis):
            if adapter_name in container and not any(p.is_meta for p in container[adapter_name].parameters()):
                container[adapter_name].to(device or self.base_weight.device)

    @torch.no_grad()
    def set_to_sum(self, name: str, terms: Sequence[tuple[str, float]]) -> None:
        """Set an adapter's knobs to a weighted sum of others', separately for δS and δS_hack.

        Args:
            name: the adapter to set; its rank is at least that of the others.
            terms: adapters and their weights. Adapters that are not on this layer count as zero.
        """
        for container in (self.delta_s, self.delta_s_hack):
            if name not in container:
                continue
            total = cast(Knob, container[name]).weight
            total.zero_()
            for other, weight in terms:
                if other in container:
                    knob = cast(Knob, container[other]).weight
                    total[..., : knob.shape[-1]] += weight * knob

    def knobs(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Return ``delta_s`` and ``delta_s_hack`` of one adapter, of one shape; the latter is None once dropped."""
        delta_s = cast(Knob, self.delta_s[adapter]).weight
        hack = cast(Knob, self.delta_s_hack[adapter]).weight if adapter in self.delta_s_hack else None
        return delta_s, hack

    def theta(self, adapters: list[str]) -> Tensor | None:
        """Sum θ over some adapters, as the view says; None if no knobs take part.

        (r,) with the basis's r; (b, r) where rows of the batch see different knobs.
        """
        if self.view is View.REFERENCE:
            return None
        if self.view is View.ORIGIN:  # independent of which adapters exist or are active
            return self._zeros()
        total: Tensor | None = None
        theta: Tensor
        for adapter in adapters:
            if adapter not in self.delta_s:
                continue  # this adapter does not target this layer
            delta_s, hack = self.knobs(adapter)
            if hack is None or self.view is not View.TRAINED:
                theta = delta_s
            else:
                theta = delta_s + hack if self.rows is None else self.rows.theta(delta_s, hack)
            if theta.shape[-1] < self.basis.rank:
                theta = F.pad(theta, (0, self.basis.rank - theta.shape[-1]))
            total = theta if total is None else total + theta
        if total is not None and self.offset is not None:
            offset = self.offset.reshape(*self.basis.S.shape[:-1], -1)
            total = total + F.pad(offset, (0, total.shape[-1] - offset.shape[-1]))
        return total

    @property
    def _is_off(self) -> bool:
        """Whether PEFT has disabled the adapters, which the view of the origin does not depend on."""
        return self.disable_adapters and self.view is not View.ORIGIN

    def present_theta(self) -> Tensor | None:
        """θ of the active adapters; None if the base layer alone is to compute. Unmerges a layer that is off, as in PEFT."""
        if self._is_off and self.merged:
            self.unmerge()
        return None if self._is_off or self.merged else self.theta(self.active_adapters)

    def _zeros(self) -> Tensor:
        """θ = 0, in the shape of the basis's S."""
        return torch.zeros(self.basis.S.shape, dtype=self.knob_dtype, device=self.base_weight.device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (..., i) to ``base(x) + U (θ ⊙ (Vh x))`` (..., o), in the dtype of the base layer's output.

        Further arguments are passed to the base layer.
        """
        seen = None if args or kwargs else self._fixed_key(x)
        for known in self.fixed or ():
            if known.seen == seen and known.offset is self.offset:
                return known.multiply(x)
        theta = self.present_theta()
        if theta is None:
            return self.base_layer(x, *args, **kwargs)
        device = cast(Tensor, self.get_base_layer().weight).device  # during a forward FSDP1 has a plain tensor there
        if self._basis is not None and self._basis.U.device != device:
            # fully_shard moves parameters to a GPU, and no other tensors
            self._basis = Basis(*(tensor.to(device) for tensor in self._basis))
        base_layer, spread = self.get_base_layer(), self.spread_theta if torch.is_grad_enabled() else None
        execution, merged = Execution.FACTORED, None
        may_merge = self.plan != "factored" and not args and not kwargs
        dtype = matmul_dtype(base_layer, x, theta, self.basis) if may_merge else None
        if dtype is not None:
            weight = cast(Tensor, base_layer.weight)
            asked = Asked(self.plan, self.may_hold, by_sequence=spread is not None, sharded=self.is_sharded)
            has_bias = base_layer.bias is not None
            execution, merged = self.choice.make(
                asked, x, theta, weight, self.basis, self.rows, dtype, has_bias=has_bias
            )
        if spread is not None:
            theta = spread(theta, x)
        elif theta.ndim > 1:
            assert self.rows is not None
            theta = per_token(theta, x, self.rows.shape)
        U, S, Vh = self.basis
        bias = cast(Tensor | None, base_layer.bias)
        if execution is Execution.SPECTRAL:
            y = spectral_delta(x, U, Vh, S + theta, x.dtype)
            return y if bias is None else y + bias
        if merged is not None:
            if seen is not None and self.fixed is not None and self.may_hold:
                # an offset is of one context and does not come again: a sweep of dials must not pile up weights
                self.fixed[:] = [one for one in self.fixed if one.offset is None]
                self.fixed.append(Fixed(seen, self.offset, merged.weights[0], bias))
            return merged_linear(x, bias, theta, merged.weights, self.basis, merged.route, merged.which)
        y = self.base_layer(x, *args, **kwargs)
        return y + spectral_delta(x, U, Vh, theta, y.dtype)

    def _fixed_key(self, x: Tensor) -> Hashable:
        """What W_θ depends on besides the knobs.

        None where the knobs are not fixed or take no part, a gradient is wanted, or rows see different knobs.
        """
        if self.fixed is None or self._is_off or self.merged or torch.is_grad_enabled():
            return None
        if self.rows is not None and not self.rows.are_alike:
            return None
        return self.view, tuple(self.active_adapters), product_dtype(x)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW = U diag(θ) Vh of one adapter, (o, i) in at least fp32, in the layout of the base layer's weight.

        Raises:
            ValueError: the layer has no such adapter.
        """
        if adapter not in self.r:
            raise ValueError(f"This layer has no adapter {adapter!r}; it has {sorted(self.r)}.")
        return self._delta_weight([adapter])

    def _delta_weight(self, adapters: list[str]) -> Tensor:
        theta = self.theta(adapters)
        theta = self._zeros() if theta is None else theta.detach()
        theta = theta.to(torch.promote_types(theta.dtype, torch.float32))
        delta = delta_weight(self.basis.U, self.basis.Vh, theta)
        return delta.mT if is_transposed(self.get_base_layer()) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace W by W_θ; W itself is kept for `unmerge`.

        The sum is computed in at least fp32 from the untouched W, and rounded once to W's dtype.

        Args:
            safe_merge: refuse to merge a W_θ that contains a NaN or Inf.
            adapter_names: which adapters to merge, in addition to those already merged; the active ones if None.

        Raises:
            ValueError: ``safe_merge`` found a NaN or Inf, or merging would change what the layer computes.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.delta_s]
        if not names:
            return
        reason = self.why_not_mergeable()
        if reason is not None:
            raise ValueError(f"A {type(self.get_base_layer()).__name__} cannot be merged: {reason}.")
        original = self.base_weight
        delta = self._delta_weight([*self.merged_adapters, *names])
        merged = (original.detach().to(delta.dtype) + delta).to(original.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"Merging {names} would put a NaN or Inf into the weight: the adapter is broken.")
        self.put_merged(([*self.merged_adapters, *names], nn.Parameter(merged, original.requires_grad)))
        self.choice.held.clear()  # a merged layer asks for none, and has two weights already

    def why_not_mergeable(self) -> str | None:
        """Why merging would change what the layer computes, as a clause; None if it would not.

        Unmerged, the layer computes base(x; W) + ΔW x; merged, base(x; W_θ). The two agree if base(x; W) is W x plus a term
        that does not depend on W. A base layer with its own forward or hooks is tested on a random weight and input.
        """
        base_layer = self.get_base_layer()
        if is_quantised(base_layer):
            return (
                "it is quantised, and rounding W_θ to its codes would change the model. To get a plain model, call "
                "antipasto.dequantize(model, dtype) before"
            )
        if not (
            base_layer._forward_hooks
            or base_layer._forward_pre_hooks
            or "forward" in vars(base_layer)
            or type(base_layer).forward not in _PLAIN_FORWARDS
        ):
            return None
        got, want = _probe(base_layer)
        tolerance = max(1e-4, 4 * torch.finfo(got.dtype).eps)
        error = torch.linalg.vector_norm(got - want, dim=1) / torch.linalg.vector_norm(want, dim=1)
        if bool((error <= tolerance).all()):
            return None
        return (
            "its forward, or a hook on it, uses its weight W for more than W x, so that merging would change its output"
        )

    def dequantize(self, dtype: torch.dtype) -> None:
        """Replace a quantised base layer by a plain Linear with its W, rounded to ``dtype``. The basis and the knobs stay."""
        self.base_layer = as_linear(cast(nn.Linear, self.get_base_layer()), dtype)
        if self._basis is not None:
            U, S, Vh = self._basis
            self._basis = Basis(U.to(dtype), S, Vh.to(dtype))
        self.fingerprint = self.current_fingerprint()
        self.choice.forget()

    def unmerge(self) -> None:
        """Put W back, bit for bit."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.get_base_layer().weight = self._unmerged[0]
        self._unmerged = None
        self.merged_adapters.clear()

    def take_merged(self) -> tuple[list[str], nn.Parameter] | None:
        """Unmerge, and return the merged adapters and weight for `put_merged`; None if nothing was merged."""
        if self._unmerged is None:
            return None
        weight = self.get_base_layer().weight
        assert isinstance(weight, nn.Parameter)
        merged = (list(self.merged_adapters), weight)
        self.unmerge()
        return merged

    def put_merged(self, merged: tuple[list[str], nn.Parameter]) -> None:
        """Replace W by a W_θ from `take_merged`, bit for bit."""
        self._unmerged = (self.base_weight,)
        self.merged_adapters[:], self.get_base_layer().weight = merged

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters as PEFT does; also stop an inactive adapter's quarantine from training."""
        super().set_adapter(adapter_names, inference_mode)
        for name, knob in self.delta_s_hack.items():
            if inference_mode or name not in self.active_adapters:
                knob.requires_grad_(False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze as PEFT does; freezing an adapter also freezes its quarantine, unfreezing leaves it frozen."""
        super().set_requires_grad(adapter_names, requires_grad)
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for name, knob in self.delta_s_hack.items():
            if name in names and not requires_grad:
                knob.requires_grad_(False)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Always True: W_θ is W plus a delta."""
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AntiPastoLinear:
        """Apply moves and casts (``to``, ``half``, ``cuda``…) to the basis and to both weights of a merged layer as well."""
        merged = self.take_merged()
        super()._apply(fn, recurse)
        if merged is not None:
            names, weight = merged
            self.put_merged((names, nn.Parameter(fn(weight.data), weight.requires_grad)))
        self.choice.forget()
        if self._basis is not None:
            self._basis = Basis(*map(fn, self._basis))
        return self
