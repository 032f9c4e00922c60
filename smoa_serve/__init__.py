"""smoa-serve: many SMoA, HiRA and LoRA adapters on one vLLM engine."""

__version__ = "0.1.0"
