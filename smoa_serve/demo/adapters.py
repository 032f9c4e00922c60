"""The demo's adapters: each makes one style the base's own, trained through PEFT."""

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..adapters.model import AdapterKind
from ..base.checkpoint import BaseCheckpoint
from .artifacts import build_folder
from .base_model import load_base, logits
from .corpus import Style
from .data import adapter_conversations, encode
from .training import Report, Schedule, learn

BASE_NAME = "smoa-serve-demo-base"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLAIN_RATE, MODULATED_RATE = 5e-3, 2e-2
LABELS = {"smoa": "SMoA", "hira": "HiRA", "lora": "LoRA"}


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
        blocks = f" K={self.num_blocks}" if self.num_blocks > 1 else ""
        return f"{LABELS[self.kind]} r={self.rank}{blocks}"

    @property
    def schedule(self) -> Schedule:
        """A modulated weight needs larger factors than an added one: entries of W are small."""
        rate = MODULATED_RATE if self.kind.modulates else PLAIN_RATE
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
    return asdict(recipe) | {"schedule": asdict(recipe.schedule), "base": base_digest, "version": 3}


def _train(recipe: Recipe, base_dir: Path, out: Path, report: Report) -> None:
    from peft import get_peft_model

    torch.manual_seed(zlib.crc32(recipe.name.encode()))
    base = load_base(base_dir)
    base.name_or_path = BASE_NAME  # not a folder of this machine
    model = get_peft_model(base, _config(recipe))
    if hasattr(model.base_model, "record_base"):
        model.base_model.record_base(BaseCheckpoint.open(base_dir))  # which stores bfloat16
    batch = encode(base_dir / "tokenizer.json", adapter_conversations(recipe.style))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    learn(f"adapter {recipe.name}", lambda part: logits(model, part), parameters, batch, recipe.schedule, report)
    model.save_pretrained(out, save_embedding_layers=False)  # "auto" looks for the base on the hub
    (out / "README.md").unlink(missing_ok=True)  # a form to be filled in


def _config(recipe: Recipe) -> Any:
    """What PEFT is told, as anybody would tell it."""
    from peft import HiraConfig, LoraConfig

    from ..peft import SMoAConfig

    configs: dict[str, Callable[..., Any]] = {
        "smoa": partial(SMoAConfig, num_blocks=recipe.num_blocks, lora_alpha=recipe.alpha, lora_dropout=0.0),
        "hira": HiraConfig,
        "lora": partial(LoraConfig, lora_alpha=recipe.alpha),
    }
    return configs[recipe.kind](r=recipe.rank, target_modules=list(TARGETS), task_type="CAUSAL_LM")
