"""What a user may say about reading an adapter."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoadOptions:
    """How an adapter is read.

    Attributes:
        allow_pickle: read .bin files (through `torch.load(weights_only=True)`).
        strict_order: refuse an adapter whose spectral order is not fully determined (`order_error` above 0).
        config_path: adapter_config.json to use instead of the one beside the weights.
        adapter_name: which adapter of a folder or file that holds several.
        max_rank: refuse branches of a higher rank (R, not the total rank r).
        trained_dtype: "float32", "bfloat16" or "float16": the dtype that the base was loaded in for training, where
            that is not the stored one. A published adapter's order is then derived from weights cast the same way.
        check_device: where the float64 check of an order runs.
    """

    allow_pickle: bool = False
    strict_order: bool = False
    config_path: Path | None = None
    adapter_name: str | None = None
    max_rank: int | None = None
    trained_dtype: str | None = None
    check_device: str = "cpu"


def limit_reasons(rank: int, options: LoadOptions) -> list[str]:
    """Why an adapter whose widest branch has this rank cannot be taken."""
    if options.max_rank is None or rank <= options.max_rank:
        return []
    return [f"its widest branch has rank {rank}, the limit is {options.max_rank} (--max-lora-rank)"]
