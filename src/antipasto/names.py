"""Values and defaults of options that several modules share.

Imports no torch: the command line reads this module before torch is loaded.
"""

from typing import Literal, get_args

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Dtype of a model's weights. ``"auto"``: as the checkpoint says."""
PlanName = Literal["auto", "factored", "merged", "spectral"]
"""How an adapted layer computes (`antipasto.adapter.plans`). ``auto`` picks the cheapest plan at every call. Any other plan
falls back to ``factored`` where it is not possible."""
Estimator = Literal["tstat", "mean", "svd"]
"""How a direction's rows are estimated (`antipasto.extract_direction`)."""
GateName = Literal["coordinate", "one_sided"]
"""Which part of a step a direction claims (`antipasto.routing.gates`)."""
Mode = Literal["route", "erase", "measure"]
"""What the router does with the part of a step that the gate claims (`antipasto.Router`)."""
MODES: tuple[Mode, ...] = get_args(Mode)
"""The methods of `antipasto train` that have a router, which uses a direction and keeps books."""
Level = Literal["update", "gradient"]
"""Whether the gate splits the optimizer's update or the gradient before it (`antipasto.Router`)."""
Flagged = Literal["penalty", "discount", "watch"]
"""What the trainer does with flagged rollouts (`antipasto.trl.RoutedGRPOTrainer`)."""
Method = Literal["plain", "penalty", "discount", "route", "erase", "measure"]
"""The methods of `antipasto train`. `antipasto.app.train.method` describes each in one line."""
By = Literal["score", "detector", "direction"]
"""The signal that a method uses: ``score`` and ``detector`` flag rollouts, ``direction`` routes parts of a step."""
Rule = Literal["midway", "quarter"]
"""Where a monitor's threshold lies between the scores of clean texts and hacks (`antipasto.Monitor.calibrate`)."""


class AntiPastoWarning(UserWarning):
    """Base class of this library's warnings. The command line shows these and hides all others."""


THRESHOLD = 0.65
"""Effect size above which the coordinate gate guards a coordinate."""
HELDOUT = 0.25
"""Share of the pairs that are held out to judge a direction."""
COMPLETE = "complete.json"
"""Marker file that is written last: a checkpoint folder without it is incomplete."""
