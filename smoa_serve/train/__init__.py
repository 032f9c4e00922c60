"""Config-driven fine-tuning: what `smoa-serve train` does."""

from .config import TrainConfig, load_config
from .run import train

__all__ = ["TrainConfig", "load_config", "train"]
