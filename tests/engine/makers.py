"""Adapters with random factors, and models with an adapter's update added to the weights."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from smoa_serve.adapters import open_adapter, write_portable
from smoa_serve.adapters.lora import LoraAdapter
from smoa_serve.adapters.model import Adapter, AdapterKind, ModuleUpdate, OrderStatus
from smoa_serve.base.checkpoint import BaseCheckpoint

# Typical size of an entry of the update, in units of the weight: answers differ within a few tokens.
STRENGTH = 1.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(
    base: Path, folder: Path, kind: str, ranks: Sequence[int], *, seed: int, targets: Sequence[str] = TARGETS
) -> Path:
    """Write an adapter with random factors and a random partition of its own.

    Args:
        base: Hugging Face folder.
        folder: where to; made.
        kind: "smoa", "hira" or "lora" (PEFT's layout).
        ranks: r_k of each block.
        seed: of factors and partition.
        targets: last parts of the modules' names.
    """
    checkpoint = BaseCheckpoint.open(base)
    modules = [module for module in checkpoint.linear_modules if module.rsplit(".", 1)[-1] in targets]
    generator = torch.Generator().manual_seed(seed)
    if kind == "lora":
        return _write_lora(checkpoint, modules, folder, ranks[0], generator)
    updates = {module: _update(checkpoint, module, tuple(ranks), generator) for module in modules}
    adapter = Adapter(
        kind=AdapterKind.HIRA if kind == "hira" else AdapterKind.SMOA,
        modules=updates,
        rank=sum(ranks),
        num_blocks=len(ranks),
        alpha=float(sum(ranks)),
        order=OrderStatus.NOT_NEEDED if kind == "hira" else OrderStatus.RECORDED,
    )
    write_portable(adapter, folder)
    return folder


def make_adapters(base: Path, folder: Path, adapters: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, Path]:
    """Adapters of those names, kinds and ranks below a folder, each with random numbers of its own."""
    return {
        name: make_adapter(base, folder / name, kind, ranks, seed=seed)
        for seed, (name, (kind, ranks)) in enumerate(adapters.items())
    }


def _update(
    checkpoint: BaseCheckpoint, module: str, ranks: tuple[int, ...], generator: torch.Generator
) -> ModuleUpdate:
    h_out, h_in = checkpoint.shape(module)
    row_block = (torch.randperm(h_out, generator=generator) % len(ranks)).to(torch.int16)
    col_block = (torch.randperm(h_in, generator=generator) % len(ranks)).to(torch.int16)
    size, live = torch.tensor(ranks), torch.arange(max(ranks))[:, None]  # [K], [R, 1]
    a = torch.randn(max(ranks), h_in, generator=generator) * (live < size[col_block.long()])
    b = torch.randn(h_out, max(ranks), generator=generator) * (live < size[row_block.long()]).T
    b *= STRENGTH / max(ranks) ** 0.5
    return ModuleUpdate(a, b, row_block, col_block, ranks, 1.0, checkpoint.fingerprint(module))


def _write_lora(
    checkpoint: BaseCheckpoint, modules: Sequence[str], folder: Path, rank: int, generator: torch.Generator
) -> Path:
    tensors: dict[str, torch.Tensor] = {}
    for module in modules:
        h_out, h_in = checkpoint.shape(module)
        prefix, scale = f"base_model.model.{module}", float(checkpoint.weight(module).float().std()) / rank**0.5
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, h_in, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(h_out, rank, generator=generator) * scale
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.rsplit(".", 1)[-1] for module in modules})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged_model(base: Path, adapter: Path | None) -> Any:
    """The base model in transformers, float32, with an adapter's update added to its weights (None: as it is)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is None:
        return model.eval()
    file = open_adapter(adapter)
    if file.kind is AdapterKind.LORA:
        return _merged_lora(model, file.read()).eval()
    with torch.no_grad():
        for module, update in file.adapter(BaseCheckpoint.open(base)).modules.items():
            weight = model.get_submodule(module).weight
            weight += update.dense(weight)
    return model.eval()


@torch.no_grad()
def _merged_lora(model: Any, files: LoraAdapter) -> Any:
    """By the formula: PEFT up to 0.20 cannot load LoRA beside a running engine with newer releases of transformers."""
    scaling = float(str(files.config["lora_alpha"])) / float(str(files.config["r"]))
    for module, (a, b) in files.factors().items():
        weight = model.get_submodule(module).weight
        weight += scaling * (b.float() @ a.float())
    return model
