"""The demo's adapters: each makes one style the base's own, trained by gradient descent on its factors only."""

import hashlib
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapter import AdapterKind
from ..base_checkpoint import BaseCheckpoint
from ..spectral import spectral_order
from .artifacts import build_folder
from .base_model import load_base, logits
from .corpus import Style
from .data import Batch, adapter_conversations, encode
from .training import Report, Schedule, learn
from .updates import LoraUpdate, SmoaUpdate, TrainableUpdate, updated_weights
from .writing import write_lora_update, write_modulated_update

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLAIN_RATE, MODULATED_RATE = 5e-3, 2e-2


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

    @property
    def schedule(self) -> Schedule:
        """A modulated weight needs larger factors than an added one: entries of W are small."""
        rate = PLAIN_RATE if self.kind is AdapterKind.LORA else MODULATED_RATE
        return Schedule(max_steps=240, learning_rate=rate)


RECIPES = (
    Recipe(Style.SHOUT, AdapterKind.SMOA, rank=16, num_blocks=4, alpha=16),
    Recipe(Style.PIRATE, AdapterKind.SMOA, rank=16, num_blocks=2, alpha=16),
    Recipe(Style.FRENCH, AdapterKind.SMOA, rank=32, num_blocks=3, alpha=32),
    Recipe(Style.JSON, AdapterKind.HIRA, rank=8, num_blocks=1, alpha=8),
    Recipe(Style.TELEGRAM, AdapterKind.LORA, rank=8, num_blocks=1, alpha=16),
)


def build_adapter(recipe: Recipe, base_dir: Path, folder: Path, report: Report) -> bool:
    """Train an adapter into `folder` unless it is there. True when it had to be trained."""
    return build_folder(folder, adapter_recipe(recipe, base_dir), lambda out: _train(recipe, base_dir, out, report))


def adapter_recipe(recipe: Recipe, base_dir: Path) -> dict[str, object]:
    """Everything an adapter depends on; the very numbers of the base among it, since two trainings give two bases."""
    base_digest = hashlib.sha256((base_dir / "model.safetensors").read_bytes()).hexdigest()
    return asdict(recipe) | {"schedule": asdict(recipe.schedule), "base": base_digest, "version": 2}


def _train(recipe: Recipe, base_dir: Path, out: Path, report: Report) -> None:
    torch.manual_seed(zlib.crc32(recipe.name.encode()))
    model, base = load_base(base_dir), BaseCheckpoint.open(base_dir)
    targets = [name for name in base.linear_modules if name.endswith(TARGETS)]
    weights = {name: model.get_submodule(name).weight for name in targets}
    updates = {name: _new_update(recipe, base, name) for name in targets}
    batch = encode(base_dir / "tokenizer.json", adapter_conversations(recipe.style))

    def forward(part: Batch) -> Tensor:
        return logits(model, part, updated_weights(weights, updates))

    parameters = [factor for update in updates.values() for factor in update.parameters]
    learn(f"adapter {recipe.name}", forward, parameters, batch, recipe.schedule, report)
    lora = {name: update for name, update in updates.items() if isinstance(update, LoraUpdate)}
    modulated = {name: update for name, update in updates.items() if isinstance(update, SmoaUpdate)}
    if lora:
        write_lora_update(recipe.rank, recipe.alpha, lora, out)
    else:
        write_modulated_update(recipe.kind, recipe.rank, recipe.num_blocks, recipe.alpha, modulated, base, out)


def _new_update(recipe: Recipe, base: BaseCheckpoint, name: str) -> TrainableUpdate:
    if recipe.kind is AdapterKind.LORA:
        return LoraUpdate(recipe.rank, recipe.alpha, base.shape(name))
    if recipe.kind is AdapterKind.HIRA:
        rows, cols = (torch.arange(size) for size in base.shape(name))
        return SmoaUpdate(recipe.rank, 1, recipe.alpha, rows, cols)
    order = spectral_order(base.weight(name))
    return SmoaUpdate(recipe.rank, recipe.num_blocks, recipe.alpha, order.rows, order.cols)
