"""Extensions of TRL and the Trainer. Only this package imports trl, and only code that trains imports this package."""

from trl import GRPOConfig, GRPOTrainer

from antipasto.trl.callbacks import CompleteCheckpoints, FirstLook, Interrupts, MetricsLog, RoutingCallback
from antipasto.trl.live import ProgressBar
from antipasto.trl.trainer import RoutedGRPOTrainer

__all__ = [
    "CompleteCheckpoints",
    "FirstLook",
    "GRPOConfig",
    "GRPOTrainer",
    "Interrupts",
    "MetricsLog",
    "ProgressBar",
    "RoutedGRPOTrainer",
    "RoutingCallback",
]
