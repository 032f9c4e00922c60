"""Trained updates → adapter folders: portable for SMoA, PEFT's own layout for HiRA and LoRA."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from ..adapter import Adapter, AdapterKind, OrderStatus
from ..base_checkpoint import BaseCheckpoint
from ..formats import write_hira, write_portable
from .updates import LoraUpdate, SmoaUpdate

BASE_NAME = "smoa-serve-demo-base"


def write_modulated_update(
    kind: AdapterKind,
    rank: int,
    num_blocks: int,
    alpha: float,
    updates: Mapping[str, SmoaUpdate],
    base: BaseCheckpoint,
    out: Path,
) -> None:
    """Write a SMoA adapter in the portable format, or a HiRA adapter as PEFT does.

    Args:
        kind: SMOA or HIRA.
        rank: total rank r.
        num_blocks: K.
        alpha: lora_alpha.
        updates: module → trained update.
        base: what it was trained on; its fingerprints are stored.
        out: folder.
    """
    order = OrderStatus.RECORDED if kind is AdapterKind.SMOA else OrderStatus.NOT_NEEDED
    modules = {name: update.finished(base.fingerprint(name)) for name, update in updates.items()}
    adapter = Adapter(kind, modules, rank, num_blocks, alpha, order, BASE_NAME)
    write = write_portable if kind is AdapterKind.SMOA else write_hira
    write(adapter, out)


def write_lora_update(rank: int, alpha: float, updates: Mapping[str, LoraUpdate], out: Path) -> None:
    """Write a LoRA adapter as PEFT does: any vLLM loads it.

    Args:
        rank: r.
        alpha: lora_alpha.
        updates: module → trained update.
        out: folder.
    """
    tensors = {}
    for name, update in updates.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = update.a.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = update.b.detach().contiguous()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE_NAME,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in updates}),
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
