"""Adapters with random factors, and models with an adapter's update added to the weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from smoa_serve.adapters import LoadOptions, detect_kind, load_adapter
from smoa_serve.adapters.lora import load_lora
from smoa_serve.adapters.model import AdapterKind
from smoa_serve.adapters.source import open_source
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.testing import LINEAR_LAYERS, random_adapter


def make_adapter(
    base: Path, folder: Path, kind: str, ranks: Sequence[int], *, seed: int, targets: Sequence[str] = LINEAR_LAYERS
) -> Path:
    """`random_adapter` with scaling 1 and a partition of its own."""
    return random_adapter(folder, base, kind=kind, ranks=ranks, seed=seed, targets=targets)


def make_adapters(base: Path, folder: Path, adapters: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, Path]:
    """Adapters of those names, kinds and ranks below a folder, each with random numbers of its own."""
    return {
        name: make_adapter(base, folder / name, kind, ranks, seed=seed)
        for seed, (name, (kind, ranks)) in enumerate(adapters.items())
    }


def merged_model(base: Path, adapter: Path | None) -> Any:
    """The base model in transformers, float32, with an adapter's update added to its weights (None: as it is)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is None:
        return model.eval()
    if detect_kind(adapter) is AdapterKind.LORA:
        return _merged_lora(model, adapter).eval()
    with torch.no_grad():
        for module, update in load_adapter(adapter, BaseCheckpoint.open(base)).modules.items():
            weight = model.get_submodule(module).weight
            weight += update.dense(weight)
    return model.eval()


@torch.no_grad()
def _merged_lora(model: Any, adapter: Path) -> Any:
    """By the formula: PEFT up to 0.20 cannot load LoRA beside a running engine with newer releases of transformers."""
    files = load_lora(open_source(adapter, LoadOptions()), None, LoadOptions())
    scaling = float(str(files.config["lora_alpha"])) / float(str(files.config["r"]))
    for module, (a, b) in files.factors().items():
        weight = model.get_submodule(module).weight
        weight += scaling * (b.float() @ a.float())
    return model
