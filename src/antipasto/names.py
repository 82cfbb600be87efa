"""Options that several modules take: what their values are called, and what some are by default.

No torch: the command line reads them first.
"""

from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Of a model's weights; ``"auto"``: as its checkpoint says."""
PlanName = Literal["auto", "factored", "merged", "spectral"]
"""How an adapted layer computes (`antipasto.adapter.plans`); ``auto`` takes the cheapest of the others at every call, these
themselves wherever they are possible, else ``factored``."""
Estimator = Literal["tstat", "mean", "svd"]
"""Of a direction's rows (`antipasto.extract_direction`)."""
GateName = Literal["coordinate", "one_sided"]
"""Which part of a step a direction claims (`antipasto.routing.gates`)."""
Mode = Literal["route", "erase", "measure"]
"""What becomes of what the gate claims (`antipasto.Router`)."""
Level = Literal["update", "gradient"]
"""Whether a gate splits the optimizer's step or the gradient before it (`antipasto.Router`)."""
Flagged = Literal["penalty", "discount", "watch"]
"""What becomes of flagged rollouts (`antipasto.trl.RoutedGRPOTrainer`)."""
Method = Literal["plain", "penalty", "discount", "route", "erase", "measure"]
"""What `antipasto train` makes of what its gate claims; `antipasto.app.train.gating` has a line on each."""
By = Literal["score", "detector", "direction"]
"""What the method goes by: what flags a rollout, or which part of a step is routed."""
Rule = Literal["midway", "quarter"]
"""Where a monitor's threshold lies between clean texts and hacks (`antipasto.Monitor.calibrate`)."""


class AntiPastoWarning(UserWarning):
    """Every warning of this library: the command line shows these, and keeps those of others off the screen."""


THRESHOLD = 0.65
"""Of the gates by coordinate: the effect size above which a coordinate is guarded."""
HELDOUT = 0.25
"""Share of the pairs that a direction is not made from, but judged by."""
COMPLETE = "complete.json"
"""The file that a checkpoint's folder has when all of it is there."""
