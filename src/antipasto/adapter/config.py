"""The adapter's configuration: PEFT's usual options, plus ``rank``, ``quarantine``, and where and how to compute."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from antipasto.adapter.basis import DEFAULT_CACHE, check_rank
from antipasto.adapter.fingerprints import Fingerprint
from antipasto.files import write_json
from antipasto.names import PlanName
from antipasto.options import check_types


def _peft_type(name: str) -> PeftType:
    """Add a member to PEFT's enum of methods, which cannot be extended by subclassing.

    A plain string would work in PEFT's registries, but transformers reads ``.value`` and pickle calls ``PeftType(name)``.
    """
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._value2member_map_.setdefault(name, member)
    return cast(PeftType, PeftType._value2member_map_[name])


PEFT_TYPE = _peft_type("ANTIPASTO")
"""The method's key in PEFT's registries."""

FORMAT = 1
"""Version of the adapter's files. It changes when an older version of this library would misread them."""

Names = list[str] | tuple[str, ...] | set[str]

TARGET_MODULES = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),  # attention
    *("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"),  # GatedDeltaNet
    *("up_proj", "gate_proj", "down_proj"),  # MLP
)
"""Names of the layers adapted by default, where the model has them."""


@dataclass
class AntiPastoConfig(PeftConfig):
    """Configuration of the AntiPaSTO adapter: one trainable number per singular direction of each target layer.

    Args:
        target_modules: which layers to adapt, as in PEFT: a list of names (or name suffixes), a regular expression, or
            ``"all-linear"``. None means those of `TARGET_MODULES` that the model has. Experts in one parameter are adapted
            only where the parameter is named, as in ``["experts.gate_up_proj", "experts.down_proj"]``.
        exclude_modules: which of those to leave out: a list of names, or a regular expression.
        rank: keep the top ``rank`` singular directions of each layer. None, the default, keeps all min(o, i) of them, and so
            does a larger rank.
        rank_pattern: exceptions to ``rank``: name or regular expression of a layer → its rank, as in PEFT's LoRA.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the ``nn.ModuleList`` that ``layers_to_transform`` indexes.
        modules_to_save: further modules to train and save in full.
        quarantine: give each layer a ``delta_s_hack`` in addition to its ``delta_s``. `drop_quarantine` sets it to False.
        cache_dir: where to cache the singular bases: a folder; ``"auto"`` for ``$ANTIPASTO_CACHE`` or the user's cache
            folder; None for no cache. Not saved with the adapter, since it concerns one machine. (In ``from_pretrained``,
            the argument of this name is the hub's cache, as everywhere in PEFT: set the attribute afterwards.)
        plan: how layers compute (`plans`): ``"auto"``, the cheapest way for each call; ``"factored"``, with the least
            memory and with second derivatives; ``"merged"`` or ``"spectral"`` wherever possible. Experts in one parameter
            are always merged. Not saved.
        hold_weights: keep each layer's W_θ from one forward without gradient to the next, until the knobs change.
            Generation and evaluation then run at the base model's speed, and the adapted weights take twice the memory. In
            bf16, and under autocast to it, W_θ is kept during training as well. None is kept where FSDP2 shards the layer.
            Not saved.
        save_basis: save U, S and Vh with the adapter, for weights that may be loaded in another dtype or decomposed by
            another library. This stores (o + i + 1) r numbers per layer instead of r. The basis is then made of parameters,
            which FSDP2 divides among the processes.
        check_base: refuse a base model whose weights do not match ``base_fingerprints``. Not saved.
        base_fingerprints: layer name → `Fingerprint`, as text, of the base that an adapter belongs to. Written by the
            library.
        weights_sha256: hash of the safetensors file that was saved together with this config. Written by the library.
        format: version of the saved files.

    Raises:
        ValueError: a rank is below 1, the plan is unknown, options exclude each other, or the file has a later format.

    Example:
        >>> AntiPastoConfig(rank=64, rank_pattern={"down_proj": 128}).rank
        64
    """

    target_modules: Names | str | None = None
    exclude_modules: Names | str | None = None
    rank: int | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    layers_to_transform: list[int] | tuple[int, ...] | set[int] | int | None = None
    layers_pattern: Names | str | None = None
    modules_to_save: Names | None = None
    quarantine: bool = True
    cache_dir: str | None = DEFAULT_CACHE
    plan: PlanName = "auto"
    hold_weights: bool = True
    save_basis: bool = False
    check_base: bool = True
    base_fingerprints: dict[str, str] | None = field(default=None, repr=False)
    weights_sha256: str | None = field(default=None, repr=False)
    format: int = FORMAT

    def __post_init__(self) -> None:
        super().__post_init__()
        check_types(self, list(AntiPastoConfig.__annotations__))
        for line in (self.base_fingerprints or {}).values():
            Fingerprint.parse(line)
        if not 1 <= self.format <= FORMAT:
            raise ValueError(
                f"The adapter has format {self.format!r}; this version of antipasto reads formats 1 to {FORMAT}. "
                "It was written by a later version: update antipasto."
            )
        self.peft_type = PEFT_TYPE
        self._records_base = False
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} needs target_modules to be a list of names or None, "
                f"got the string {self.target_modules!r}. Put the layer indices into the expression instead."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform.")
        check_rank(self.rank)
        for layer, rank in self.rank_pattern.items():
            check_rank(rank, f"rank_pattern[{layer!r}]")

    @property
    def expected_base(self) -> dict[str, str]:
        """``base_fingerprints`` if they were read from a file; empty if they only record the last use of this config.

        As everywhere in PEFT, the config belongs to the caller, who may use it again on another model.
        """
        return {} if self._records_base else self.base_fingerprints or {}

    def record_base(self, fingerprints: dict[str, str]) -> None:
        """Record the fingerprints of the layers that the config was used on."""
        self._records_base = not self.expected_base
        self.base_fingerprints = fingerprints

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it is saved: without machine-specific options, and with sorted names."""
        saved = asdict(self)
        for name in ("cache_dir", "plan", "hold_weights", "check_base"):
            del saved[name]
        # sets, which PEFT's types allow, are no JSON
        return {name: sorted(value) if isinstance(value, (set, tuple)) else value for name, value in saved.items()}

    def save_pretrained(self, save_directory: str, *, auto_mapping_dict: dict[str, str] | None = None) -> None:  # type: ignore[override]
        """Save the config as PEFT does, but atomically and with the hash of the adapter's weights file.

        PEFT writes the weights first. If the process is killed before the config is written, `from_pretrained` detects that
        the two files do not match. `antipasto.save_adapter` replaces both in one step.

        Args:
            save_directory: the adapter's folder.
            auto_mapping_dict: as in PEFT: which model class the adapter is for.

        Raises:
            OSError: the file cannot be written.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        saved = self.to_dict() | ({} if auto_mapping_dict is None else {"auto_mapping": auto_mapping_dict})
        saved["weights_sha256"] = _sha256(folder / SAFETENSORS_WEIGHTS_NAME)
        # flush=False, to be quick: until the config is replaced, it does not match the new weights file
        write_json(folder / CONFIG_NAME, dict(sorted(saved.items())), flush=False)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> AntiPastoConfig:
        """Load a config as PEFT does, and check that it belongs to the weights file in the same folder.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository on the hub.
            subfolder: subfolder of that.
            **kwargs: as in PEFT: how to download from the hub.

        Raises:
            ValueError: the config is damaged, or does not match the weights file. The message names the file.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if not (folder / CONFIG_NAME).is_file():
                raise
            raise ValueError(f"{folder / CONFIG_NAME} is not a valid adapter config: {error}") from error
        if not isinstance(config, AntiPastoConfig):
            raise ValueError(f"{folder / CONFIG_NAME} belongs to the PEFT method {config.peft_type}, not to AntiPaSTO.")
        numbers = folder / SAFETENSORS_WEIGHTS_NAME
        if config.weights_sha256 is not None and _sha256(numbers) not in (None, config.weights_sha256):
            raise ValueError(
                f"{numbers} is damaged, or was not saved together with the {CONFIG_NAME} next to it. Perhaps a process was "
                "stopped while saving. Save the adapter again, or download both files again."
            )
        return config


def _sha256(path: Path) -> str | None:
    """sha256 of a file, in hex; None if there is none."""
    if not path.is_file():
        return None
    result = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            result.update(block)
    return result.hexdigest()
