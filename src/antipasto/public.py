"""The public names, as ``antipasto`` has them: importing this registers the method with PEFT."""

from antipasto.basis import Basis, BasisCacheWarning, load_basis
from antipasto.confounds import confounds
from antipasto.directions import Direction, extract_direction
from antipasto.forms import load_forms, score_forms
from antipasto.gates import Control
from antipasto.knobs import (
    LayerKnobs,
    deployed,
    drop_quarantine,
    knobs,
    ref_logprobs,
    reference,
    save_adapter,
    scaled,
    token_logprobs,
    wrap,
)
from antipasto.monitor import Calibration, Completion, Monitor
from antipasto.pairs import ContrastPair, load_pairs
from antipasto.rollouts import RolloutGrads, rollout_grads
from antipasto.routing import Router
from antipasto.tuner import TARGET_MODULES, AntiPastoConfig

__all__ = [
    "TARGET_MODULES",
    "AntiPastoConfig",
    "Basis",
    "BasisCacheWarning",
    "Calibration",
    "Completion",
    "ContrastPair",
    "Control",
    "Direction",
    "LayerKnobs",
    "Monitor",
    "RolloutGrads",
    "Router",
    "confounds",
    "deployed",
    "drop_quarantine",
    "extract_direction",
    "knobs",
    "load_basis",
    "load_forms",
    "load_pairs",
    "ref_logprobs",
    "reference",
    "rollout_grads",
    "save_adapter",
    "scaled",
    "score_forms",
    "token_logprobs",
    "wrap",
]
