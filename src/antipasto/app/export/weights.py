"""What ships of a run, written as files.

    checkpoint     W_out = round(W + U diag(θ) Vh)                 summed in fp64, rounded to the checkpoint's dtype
    LoRA adapter   B A ≈ U diag(θ) Vh,   A = √|θ| ⊙ Vh  (k, i),   B = U ⊙ (sign(θ) √|θ|)  (o, k)

θ = δS where the run routed: the quarantine is left out. Else δS + δS_hack, all that was trained. A and B hold the k largest
|θ_j| of a layer. U and Vh are orthonormal, so that is the best approximation of that rank (Eckart & Young 1936), with
‖ΔW − BA‖² = Σ θ_j² over the others: exact where no more than k are nonzero.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from antipasto.adapter.functional import delta_weight
from antipasto.adapter.knobs import LayerKnobs, knobs
from antipasto.adapter.layer import as_matrix
from antipasto.adapter.views import unwrap
from antipasto.app.models import quiet
from antipasto.app.runs import LoadedRun
from antipasto.files import write_tensors

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Of a tokenizer of any kind; each kind has its vocabulary's files beside them."""


# ── what ships ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Loss:
    """What writing a layer's update down cost, in squares and products so that layers add up.

    Attributes:
        update: ‖ΔW‖².
        error: ‖ΔW_out − ΔW‖², ΔW_out being what the file has: W_out − W, or BA.
        kept: ⟨ΔW_out, ΔW⟩.
    """

    update: float
    error: float
    kept: float

    @classmethod
    def of(cls, update: Tensor, written: Tensor) -> Loss:
        """Of ΔW and ΔW_out."""
        return cls(
            float(update.square().sum()), float((written - update).square().sum()), float((written * update).sum())
        )

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.update + other.update, self.error + other.error, self.kept + other.kept)

    @property
    def relative(self) -> float:
        """‖ΔW_out − ΔW‖ / ‖ΔW‖; 0 where there is no update."""
        return math.sqrt(self.error / self.update) if self.update else 0.0

    @property
    def share(self) -> float:
        """⟨ΔW_out, ΔW⟩ / ‖ΔW‖²: how much of the update is there; 1 where there is none."""
        return self.kept / self.update if self.update else 1.0


def shipped(layer: LayerKnobs, dial: float) -> Tensor:
    """θ = δS + dial δS_hack (r,), in fp64: what ships."""
    theta = layer.delta_s.detach().double()
    return theta if layer.delta_s_hack is None else theta + dial * layer.delta_s_hack.detach().double()


def merged(layer: LayerKnobs, theta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Loss]:
    """W_out = round(W + U diag(θ) Vh), (o, i), and what the rounding cost.

    Raises:
        ValueError: it does not fit into the dtype.
    """
    W, U, Vh, theta = _in_fp64(as_matrix(layer.layer.get_base_layer()).detach(), layer.U, layer.Vh, theta)
    update = delta_weight(U, Vh, theta)
    out = (W + update).to(dtype)
    if not out.isfinite().all():
        raise ValueError(
            f"The merged weight goes up to {float((W + update).abs().max()):.3g}, more than {dtype} can hold."
        )
    return out, Loss.of(update, out.double() - W)


def lora_factors(layer: LayerKnobs, theta: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Loss]:
    """A (rank, i) and B (o, rank) of the largest |θ_j|, with rows of zeros where the layer has fewer; and what that cost."""
    U, Vh, theta = _in_fp64(layer.U, layer.Vh, theta)
    top = theta.abs().topk(min(rank, theta.numel())).indices
    root = theta[top].abs().sqrt()
    A, B = torch.zeros(rank, Vh.shape[1], dtype=dtype), torch.zeros(U.shape[0], rank, dtype=dtype)
    A[: top.numel()] = root[:, None] * Vh[top]
    B[:, : top.numel()] = U[:, top] * (root * theta[top].sign())
    update = delta_weight(U, Vh, theta)
    return A, B, Loss.of(update, (B.double() @ A.double()).to(update.device))


def _in_fp64(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In fp64; on the CPU where the accelerator has none."""
    return tuple((t if t.device.type in ("cpu", "cuda") else t.cpu()).double() for t in tensors)


def _percent(share: float) -> str:
    return f"{share:.1%}"


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Written:
    """What was put into the folder.

    Attributes:
        dtype: of the weights.
        losses: layer → what writing its update down cost.
        rank: of the LoRA adapter; None for a checkpoint.
    """

    dtype: torch.dtype
    losses: dict[str, Loss]
    rank: int | None = None

    @property
    def what(self) -> str:
        """What it is."""
        return "checkpoint" if self.rank is None else f"LoRA adapter, rank {self.rank},"

    @property
    def dtype_name(self) -> str:
        """Without the module."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def is_approximate(self) -> bool:
        """Whether more is lost than in fp32's rounding of A and B."""
        return self.loss.relative > 1e-5

    @property
    def loss(self) -> Loss:
        """Over all layers."""
        return sum(self.losses.values(), Loss(0.0, 0.0, 0.0))

    @property
    def worst(self) -> tuple[str, Loss]:
        """The layer with the largest relative error."""
        return max(self.losses.items(), key=lambda item: item[1].relative)

    def rows(self) -> list[tuple[str, str]]:
        """As tables show it: what, how much."""
        name, worst = self.worst
        least = min(loss.share for loss in self.losses.values())
        return [
            ("update in the file", f"{_percent(self.loss.share)}, the least of a layer {_percent(least)}"),
            ("‖written − ΔW‖ / ‖ΔW‖", f"{self.loss.relative:.2g}, the worst layer {worst.relative:.2g} ({name})"),
        ]


def write_checkpoint(run: LoadedRun, folder: Path, dtype: torch.dtype, before: Dtypes, max_shard_size: str) -> Written:
    """Turn the run's model into the plain one that ships, and save it with its tokenizer.

    Args:
        run: its model is used up.
        folder: takes the files.
        dtype: of the checkpoint.
        before: the base's own.
        max_shard_size: as ``save_pretrained`` takes it.

    Raises:
        ValueError: a weight does not fit into the dtype, or a layer is not one matmul; names the layer.
        OSError: a file cannot be written.
    """
    losses = {}
    for name, layer in knobs(run.model).items():
        try:
            out, losses[name] = merged(layer, shipped(layer, run.dial), dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        reason = layer.layer.why_not_mergeable()
        if reason is not None:
            raise ValueError(f"{name} cannot be merged: {reason}. Export it with --lora.")
        base_layer, weight = layer.layer.get_base_layer(), layer.layer.base_weight
        out = (out.T.contiguous() if isinstance(base_layer, Conv1D) else out).to(weight.device)
        base_layer.weight = nn.Parameter(out, requires_grad=False)  # a new one: W may be tied to something
    model = run.model.unload()
    before.cast(model, dtype)
    if model.config.tie_word_embeddings:  # a trained copy of either (modules_to_save) would be thrown away at loading
        model.config.tie_word_embeddings = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with quiet():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    _copy_tokenizer(run, folder)
    return Written(dtype, losses)


def _copy_tokenizer(run: LoadedRun, folder: Path) -> None:
    """The base's own files, byte for byte: the run's tokenizer pads on the left, and may have got a padding token."""
    for name in sorted({*TOKENIZER_FILES, *run.tokenizer.vocab_files_names.values()}):
        found = cached_file(run.base, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            shutil.copyfile(found, folder / name)


class Dtypes:
    """The dtypes of a model's parameters and buffers, by name, while it is seen in another.

    Args:
        model: a base model with an adapter on.

    Attributes:
        main: of most of it.
    """

    def __init__(self, model: nn.Module) -> None:
        base = unwrap(model)
        self.main: torch.dtype = base.dtype  # type: ignore[assignment]
        self._named = {name.replace(".base_layer.", "."): t.dtype for name, t in _tensors(base)}

    def cast(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Cast what was of the main dtype; put back what a family keeps in another."""
        for name, tensor in _tensors(model):
            own = self._named.get(name, self.main)  # a trained copy of a module has no name of the base
            tensor.data = tensor.data.to(dtype if own == self.main else own)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, t) for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_floating_point()]


def write_lora(run: LoadedRun, folder: Path, rank: int, dtype: torch.dtype) -> Written:
    """Save a LoRA adapter that does what the knobs that ship do, as far as the rank allows.

    One rank for all layers, and lora_alpha = r: engines that serve adapters may scale every layer by lora_alpha / r of the
    config and not read rank_pattern or alpha_pattern. A layer that needs less is filled up with zeros, which change
    nothing. The rank is that of the layer that needs most, where that is below ``rank``.

    Args:
        run: the run.
        folder: takes the files.
        rank: at most.
        dtype: of A and B.

    Raises:
        ValueError: the run trained whole modules as well, which no such adapter holds.
        OSError: a file cannot be written.
    """
    if whole := run.model.peft_config["default"].modules_to_save:
        raise ValueError(f"This run trained {', '.join(whole)} as a whole, which LoRA cannot hold: leave out --lora.")
    layers = knobs(run.model)
    thetas = {name: shipped(layer, run.dial) for name, layer in layers.items()}
    rank = min(rank, max(1, *(int(theta.count_nonzero()) for theta in thetas.values())))
    losses: dict[str, Loss] = {}
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        A, B, losses[name] = lora_factors(layer, thetas[name], rank, dtype)
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        fan_in_fan_out=any(isinstance(layer.layer.get_base_layer(), Conv1D) for layer in layers.values()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=public_name(run.base),
        inference_mode=True,
    )
    config.target_modules = _targets(run.model, layers)  # a list: as an argument it becomes a set, of no order
    config.save_pretrained(str(folder))
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return Written(dtype, losses, rank)


def public_name(base: str) -> str:
    """A hub name as it is; of a folder, its last part: where it lies on this machine is nobody's business."""
    return Path(base).resolve().name if Path(base).is_dir() else base


def _targets(model: nn.Module, layers: Mapping[str, LayerKnobs]) -> list[str]:
    """The last parts of the layers' names, where these mean no others; else the whole names."""
    leaves = {name.rpartition(".")[2] for name in layers}
    meant = [name for name, _ in unwrap(model).named_modules() if name.rpartition(".")[2] in leaves]
    return sorted(leaves if set(meant) == set(layers) else layers)
