"""What is known about an adapter once it was read: of the whole, of each layer, and of how it fits a base."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from .model import AdapterKind, OrderStatus


class AdapterSummary(BaseModel):
    """Facts about an adapter's content. The same JSON in manifests, routes and reports."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: AdapterKind = Field(description="smoa, hira or lora")
    digest: str = Field(description="sha256 of everything that changes the maths")
    rank: int = Field(description="total rank r")
    max_rank: int = Field(description="widest branch: what a slot must hold")
    num_blocks: int = Field(description="K; 1 for HiRA and LoRA")
    parameters: int = Field(description="trainable numbers")
    bytes: int = Field(description="factors and block ids in host memory")
    order: OrderStatus | None = Field(description="recorded, recomputed or not-needed; none for LoRA")
    order_error: float = Field(description="worst expected relative error of a layer's update from the order")


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer.

    Attributes:
        name: module path.
        shape: (H_out, H_in); None while only the base could tell.
        branch_ranks: rank of each block.
        order_error: expected relative error of the update that comes from the order; None while it is not known.
        parameters: trainable numbers.
        bytes: factors and block ids in host memory.
    """

    name: str
    shape: tuple[int, int] | None
    branch_ranks: tuple[int, ...]
    order_error: float | None
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Fit:
    """An adapter that fits its base.

    Attributes:
        layers: number of layers bound.
        exact: whether the file's fingerprints were found in the base, so that it is known to be this very base.
        order_error: worst expected relative error of a layer's update that comes from the order.
    """

    layers: int
    exact: bool
    order_error: float
