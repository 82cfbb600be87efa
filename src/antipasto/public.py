"""The public names of ``antipasto``. Importing this module registers the method with PEFT."""

from antipasto.adapter import TARGET_MODULES, AntiPastoConfig
from antipasto.adapter.basis import Basis, BasisCacheWarning, load_basis
from antipasto.adapter.knobs import (
    LayerKnobs,
    deployed,
    dequantize,
    drop_quarantine,
    knobs,
    ref_logprobs,
    reference,
    save_adapter,
    scaled,
    token_logprobs,
    wrap,
)
from antipasto.adapter.rollouts import RolloutGrads, rollout_grads
from antipasto.adapter.views import fixed
from antipasto.routing.confounds import confounds
from antipasto.routing.directions import Direction, extract_direction
from antipasto.routing.forms import load_forms, score_forms
from antipasto.routing.gates import Control
from antipasto.routing.monitor import Calibration, Completion, Monitor
from antipasto.routing.pairs import ContrastPair, load_pairs
from antipasto.routing.router import Router

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
    "dequantize",
    "drop_quarantine",
    "extract_direction",
    "fixed",
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
