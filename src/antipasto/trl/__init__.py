"""What the library adds to TRL and the Trainer. The only package that imports trl; nothing imports it that does not train."""

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
