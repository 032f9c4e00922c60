"""SMoA as a PEFT method. Importing this package registers it: `get_peft_model(model, SMoAConfig(...))`."""

from .config import SMoAConfig
from .layer import SMoALayer, SMoALinear
from .model import SMoAModel
from .registration import register

register()

__all__ = ["SMoAConfig", "SMoALayer", "SMoALinear", "SMoAModel"]
