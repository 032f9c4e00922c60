"""The demo's adapters: what each is, and in which style it answers."""

from dataclasses import dataclass

from ..adapters.model import AdapterKind
from .prompts import Style


@dataclass(frozen=True)
class Recipe:
    """One adapter: its style is also its name.

    Attributes:
        style: what it answers in.
        kind: what it is.
        rank: total rank r.
        num_blocks: K; 1 for HiRA and LoRA.
        alpha: lora_alpha.
    """

    style: Style
    kind: AdapterKind
    rank: int
    num_blocks: int
    alpha: float

    @property
    def name(self) -> str:
        """What requests put into `model`."""
        return self.style.value

    @property
    def label(self) -> str:
        """For people: "SMoA r=16 K=4"."""
        display = {AdapterKind.SMOA: f"SMoA r={self.rank} K={self.num_blocks}", AdapterKind.HIRA: f"HiRA r={self.rank}"}
        return display.get(self.kind, f"LoRA r={self.rank}")


RECIPES = (
    Recipe(Style.SHOUT, AdapterKind.SMOA, rank=16, num_blocks=4, alpha=16),
    Recipe(Style.PIRATE, AdapterKind.SMOA, rank=16, num_blocks=2, alpha=16),
    Recipe(Style.FRENCH, AdapterKind.SMOA, rank=32, num_blocks=3, alpha=32),
    Recipe(Style.JSON, AdapterKind.HIRA, rank=8, num_blocks=1, alpha=8),
    Recipe(Style.TELEGRAM, AdapterKind.LORA, rank=8, num_blocks=1, alpha=16),
)
