"""`antipasto train`: options → config → one run in a folder of its own."""

from antipasto.train.config import TrainConfig
from antipasto.train.run import run, start

__all__ = ["TrainConfig", "run", "start"]
