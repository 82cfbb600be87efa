"""Write what ships, as a checkpoint or as a LoRA adapter.

    checkpoint     W_out = round(W + U diag(θ) Vh)                 summed in fp64, rounded to the checkpoint's dtype
    LoRA adapter   B A ≈ U diag(θ) Vh,   A = √|θ| ⊙ Vh  (k, i),   B = U ⊙ (sign(θ) √|θ|)  (o, k)

θ = δS + dial δS_hack: by default dial is 0 for a run with a quarantine and 1 for others. A and B hold the k largest |θ_j| of a
layer. U and Vh are orthonormal, so that is the best approximation of that rank (Eckart & Young 1936), with
‖ΔW − BA‖² = Σ θ_j² over the others. It is exact if at most k of them are nonzero.
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
from antipasto.adapter.layer import as_matrix, is_transposed
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
"""Files of any tokenizer. Each kind also has its own vocabulary files."""


# ── what ships ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Loss:
    """The error of writing a layer's update, as squares and products, which add up over layers.

    Attributes:
        update: ‖ΔW‖².
        error: ‖ΔW_out − ΔW‖², where ΔW_out is the update in the file: W_out − W, or BA.
        kept: ⟨ΔW_out, ΔW⟩.
    """

    update: float
    error: float
    kept: float

    @classmethod
    def of(cls, update: Tensor, written: Tensor) -> Loss:
        """Compute it from ΔW and ΔW_out."""
        return cls(
            float(update.square().sum()), float((written - update).square().sum()), float((written * update).sum())
        )

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.update + other.update, self.error + other.error, self.kept + other.kept)

    @property
    def relative(self) -> float:
        """‖ΔW_out − ΔW‖ / ‖ΔW‖; 0 if there is no update."""
        return math.sqrt(self.error / self.update) if self.update else 0.0

    @property
    def share(self) -> float:
        """⟨ΔW_out, ΔW⟩ / ‖ΔW‖², the share of the update in the file; 1 if there is no update."""
        return self.kept / self.update if self.update else 1.0


def shipped(layer: LayerKnobs, dial: float) -> Tensor:
    """θ = δS + dial δS_hack in the knobs' shape, in fp64."""
    theta = layer.delta_s.detach().double()
    return theta if layer.delta_s_hack is None else theta + dial * layer.delta_s_hack.detach().double()


def merged(layer: LayerKnobs, theta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Loss]:
    """W_out = round(W + U diag(θ) Vh), (o, i), and the rounding error.

    Raises:
        ValueError: it overflows the dtype.
    """
    W, U, Vh, theta = _in_fp64(as_matrix(layer.layer.get_base_layer()).detach(), layer.U, layer.Vh, theta)
    update = delta_weight(U, Vh, theta)
    out = (W + update).to(dtype)
    if not out.isfinite().all():
        raise ValueError(
            f"The merged weight goes up to {float((W + update).abs().max()):.3g}, too large for {dtype}: change --dtype."
        )
    return out, Loss.of(update, out.double() - W)


def lora_factors(layer: LayerKnobs, theta: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Loss]:
    """A (rank, i) and B (o, rank) of the largest |θ_j|, padded with zeros if the layer has fewer, and the error."""
    U, Vh, theta = _in_fp64(layer.U, layer.Vh, theta)
    top = theta.abs().topk(min(rank, theta.numel())).indices
    root = theta[top].abs().sqrt()
    A, B = torch.zeros(rank, Vh.shape[1], dtype=dtype), torch.zeros(U.shape[0], rank, dtype=dtype)
    A[: top.numel()] = root[:, None] * Vh[top]
    B[:, : top.numel()] = U[:, top] * (root * theta[top].sign())
    update = delta_weight(U, Vh, theta)
    return A, B, Loss.of(update, (B.double() @ A.double()).to(update.device))


def _in_fp64(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to fp64, on the CPU if the accelerator has no fp64."""
    return tuple((t if t.device.type in ("cpu", "cuda") else t.cpu()).double() for t in tensors)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Written:
    """Description of the written files.

    Attributes:
        dtype: of the weights.
        losses: layer → error of its update in the file.
        rank: of the LoRA adapter; None for a checkpoint.
    """

    dtype: torch.dtype
    losses: dict[str, Loss]
    rank: int | None = None

    @property
    def what(self) -> str:
        return "checkpoint" if self.rank is None else f"LoRA adapter, rank {self.rank},"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def is_approximate(self) -> bool:
        """Whether the error is larger than that of rounding A and B to fp32."""
        return self.loss.relative > 1e-5

    @property
    def loss(self) -> Loss:
        """The error over all layers."""
        return sum(self.losses.values(), Loss(0.0, 0.0, 0.0))

    @property
    def worst(self) -> tuple[str, Loss]:
        """The layer with the largest relative error."""
        return max(self.losses.items(), key=lambda item: item[1].relative)

    def rows(self) -> list[tuple[str, str]]:
        """Rows of a table: name and value."""
        name, worst = self.worst
        least = min(loss.share for loss in self.losses.values())
        return [
            ("update in the file", f"{self.loss.share:.1%}, lowest of a layer {least:.1%}"),
            ("‖written − ΔW‖ / ‖ΔW‖", f"{self.loss.relative:.2g}, worst layer {worst.relative:.2g} ({name})"),
        ]


def write_checkpoint(run: LoadedRun, folder: Path, dtype: torch.dtype, before: Dtypes, max_shard_size: str) -> Written:
    """Merge the run's model into a plain one, and save it with its tokenizer.

    Args:
        run: the run; its model cannot be used afterwards.
        folder: where to write the files.
        dtype: of the checkpoint.
        before: dtypes of the base model.
        max_shard_size: as ``save_pretrained`` takes it.

    Raises:
        ValueError: a weight overflows the dtype, or a layer cannot be merged; names the layer.
        OSError: a file cannot be written.
    """
    losses = {}
    for name, layer in knobs(run.model).items():
        reason = layer.layer.why_not_mergeable()
        if reason is not None:
            raise ValueError(f"{name} cannot be merged: {reason}. Export it with --lora.")
        try:
            out, losses[name] = merged(layer, shipped(layer, run.dial), dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        base_layer, weight = layer.layer.get_base_layer(), layer.layer.base_weight
        out = (out.mT.contiguous() if is_transposed(base_layer) else out).to(weight.device)
        base_layer.weight = nn.Parameter(out, requires_grad=False)  # a new Parameter, since W may be tied
    model = run.model.unload()
    before.cast(model, dtype)
    if model.config.tie_word_embeddings:  # loading would tie them again and lose a trained copy (modules_to_save)
        model.config.tie_word_embeddings = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with quiet():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    _copy_tokenizer(run, folder)
    return Written(dtype, losses)


def _copy_tokenizer(run: LoadedRun, folder: Path) -> None:
    """Copy the base's own files: the run's tokenizer differs in padding side, and perhaps in its padding token."""
    for name in sorted({*TOKENIZER_FILES, *run.tokenizer.vocab_files_names.values()}):
        found = cached_file(run.base, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            shutil.copyfile(found, folder / name)


class Dtypes:
    """Remembers the dtypes of a model's parameters and buffers by name.

    Args:
        model: a base model with an adapter.

    Attributes:
        main: the model's main dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        base = unwrap(model)
        self.main: torch.dtype = base.dtype  # type: ignore[assignment]
        self._named = {name.replace(".base_layer.", "."): t.dtype for name, t in _tensors(base)}

    def cast(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Cast what had the main dtype; restore the dtype of everything else."""
        for name, tensor in _tensors(model):
            own = self._named.get(name, self.main)  # a trained copy of a module has no such name in the base
            tensor.data = tensor.data.to(dtype if own == self.main else own)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, t) for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_floating_point()]


def write_lora(run: LoadedRun, folder: Path, rank: int, dtype: torch.dtype) -> Written:
    """Save the update that ships as a LoRA adapter, as exactly as the rank allows.

    All layers have the same rank, and lora_alpha = r, because serving engines may ignore rank_pattern and alpha_pattern.
    Layers that need less are padded with zeros. The rank is reduced to what the most demanding layer needs.

    Args:
        folder: where to write the files.
        rank: maximum rank.
        dtype: of A and B.

    Raises:
        ValueError: the run also trained whole modules, or experts in one parameter, which a LoRA adapter cannot hold.
        OSError: a file cannot be written.
    """
    if whole := run.model.peft_config["default"].modules_to_save:
        raise ValueError(f"This run trained {', '.join(whole)} in full, which LoRA cannot hold: leave out --lora.")
    layers = knobs(run.model)
    for name, layer in layers.items():
        if layer.delta_s.ndim > 1:
            raise ValueError(f"{name} has a matrix for each expert, which this LoRA cannot hold: leave out --lora.")
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
    config.target_modules = _targets(run.model, layers)  # as an argument it would become an unordered set
    config.save_pretrained(str(folder))
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return Written(dtype, losses, rank)


def public_name(base: str) -> str:
    """A hub name as it is; of a local folder only its name."""
    return Path(base).resolve().name if Path(base).is_dir() else base


def _targets(model: nn.Module, layers: Mapping[str, LayerKnobs]) -> list[str]:
    """The last parts of the layers' names if they match no other layers, else the full names."""
    leaves = {name.rpartition(".")[2] for name in layers}
    meant = [name for name, _ in unwrap(model).named_modules() if name.rpartition(".")[2] in leaves]
    return sorted(leaves if set(meant) == set(layers) else layers)
