"""The demo's adapters: each makes one style the base's own, trained through PEFT."""

import hashlib
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from smoa_serve.adapters.model import AdapterKind
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.demo.recipes import Recipe

from .artifacts import build_folder
from .base_model import load_base, logits
from .data import adapter_conversations, encode
from .training import Report, Schedule, learn

BASE_NAME = "smoa-serve-demo-base"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLAIN_RATE, MODULATED_RATE = 5e-3, 2e-2


def schedule(recipe: Recipe) -> Schedule:
    """A modulated weight needs larger factors than an added one: entries of W are small."""
    rate = PLAIN_RATE if recipe.kind is AdapterKind.LORA else MODULATED_RATE
    return Schedule(max_steps=240, learning_rate=rate)


def build_adapter(recipe: Recipe, base_dir: Path, folder: Path, report: Report) -> bool:
    """Train an adapter into `folder` unless it is there. True when it had to be trained."""
    return build_folder(folder, adapter_recipe(recipe, base_dir), lambda out: _train(recipe, base_dir, out, report))


def adapter_recipe(recipe: Recipe, base_dir: Path) -> dict[str, object]:
    """Everything an adapter depends on; the very numbers of the base among it, since two trainings give two bases."""
    base_digest = hashlib.sha256((base_dir / "model.safetensors").read_bytes()).hexdigest()
    return asdict(recipe) | {"schedule": asdict(schedule(recipe)), "base": base_digest, "version": 3}


def _train(recipe: Recipe, base_dir: Path, out: Path, report: Report) -> None:
    from peft import get_peft_model

    torch.manual_seed(zlib.crc32(recipe.name.encode()))
    base = load_base(base_dir)
    base.name_or_path = BASE_NAME  # not a folder of this machine
    model = get_peft_model(base, _config(recipe))
    if recipe.kind is AdapterKind.SMOA:
        model.base_model.record_base(BaseCheckpoint.open(base_dir))  # which stores bfloat16
    batch = encode(base_dir / "tokenizer.json", adapter_conversations(recipe.style))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    learn(f"adapter {recipe.name}", lambda part: logits(model, part), parameters, batch, schedule(recipe), report)
    model.save_pretrained(out, save_embedding_layers=False)  # "auto" looks for the base on the hub
    (out / "README.md").unlink(missing_ok=True)  # a form to be filled in


def _config(recipe: Recipe) -> Any:
    """What PEFT is told, as anybody would tell it."""
    shared: dict[str, Any] = {"r": recipe.rank, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    if recipe.kind is AdapterKind.SMOA:
        from smoa_serve.peft import SMoAConfig

        return SMoAConfig(**shared, num_blocks=recipe.num_blocks, lora_alpha=recipe.alpha, lora_dropout=0.0)
    from peft import HiraConfig, LoraConfig

    if recipe.kind is AdapterKind.HIRA:
        return HiraConfig(**shared)
    return LoraConfig(**shared, lora_alpha=recipe.alpha)
