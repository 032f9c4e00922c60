"""Random models of real shapes: a base, SMoA, HiRA and LoRA adapters. The only place that makes any."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.harness.ops import random_blocks
from smoa_serve.adapters import write_portable
from smoa_serve.adapters.model import Adapter, AdapterKind, ModuleUpdate, OrderStatus
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.base.orders import cache_root
from smoa_serve.base.spectral import even_ranks
from smoa_serve.demo.artifacts import STAMP, build_folder

BASE_NAME = "benchmark-base"


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 model with tied embeddings."""

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int


QWEN_05B = Shape("qwen2.5-0.5b", 896, 24, 14, 2, 4864, 151_936)
# The same layers, fewer of them, and a vocabulary in proportion.
QWEN_05B_THIRD = replace(QWEN_05B, name="qwen2.5-0.5b-8-layers", num_hidden_layers=8, vocab_size=51_200)
QWEN_05B_QUICK = replace(QWEN_05B, name="qwen2.5-0.5b-4-layers", num_hidden_layers=4, vocab_size=25_600)


def home(name: str) -> Path:
    """A folder of the cache, made if it is not there."""
    folder = cache_root() / "benchmarks" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def random_base(shape: Shape) -> Path:
    """The folder of a bfloat16 checkpoint with Gaussian weights; built once."""
    folder = home(shape.name) / "base"
    build_folder(folder, asdict(shape) | {"version": 2}, lambda out: _write_base(shape, out))
    return folder


def demo_base() -> Path:
    """The base of the demo: a small model that was trained."""
    from smoa_serve.demo.models import ensure_models

    return ensure_models(Path(".demo"), Console(stderr=True)).base


def random_smoa(base: Path, rank: int, num_blocks: int, index: int) -> Path:
    """A SMoA adapter over all linear layers. Like the spectral order of one base, the blocks are the same for all."""
    shared, own = (torch.Generator().manual_seed(seed) for seed in (num_blocks, 1000 * num_blocks + index))
    return _adapter(
        base,
        f"smoa-r{rank}-k{num_blocks}-{index}",
        {"rank": rank, "num_blocks": num_blocks, "index": index, "version": 2},
        lambda out: write_smoa(base, out, rank, num_blocks, own, blocks=shared, strength=0.1),
    )


def random_lora(base: Path, rank: int, index: int) -> Path:
    """A LoRA adapter over the same layers."""
    own = torch.Generator().manual_seed(index)
    return _adapter(
        base,
        f"lora-r{rank}-{index}",
        {"rank": rank, "index": index, "version": 1},
        lambda out: write_lora(base, out, rank, own, strength=0.02),
    )


def write_smoa(
    base_dir: Path,
    out: Path,
    rank: int,
    num_blocks: int,
    own: torch.Generator,
    *,
    blocks: torch.Generator | None = None,
    strength: float,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a SMoA adapter in the portable format; with one block it is a HiRA adapter.

    `own` draws the factors, and the blocks where `blocks` does not; entries of A have size 1, of B `strength`.
    """
    base = BaseCheckpoint.open(base_dir)
    ranks = even_ranks(rank, num_blocks)
    modules = {}
    for name in _targets(base):
        rows, cols = base.shape(name)
        ids = [random_blocks(size, num_blocks, blocks or own) for size in (rows, cols)]
        a = torch.randn(max(ranks), cols, generator=own).to(dtype)
        b = torch.randn(rows, max(ranks), generator=own).mul_(strength).to(dtype)
        modules[name] = ModuleUpdate(a, b, *ids, ranks, 1.0, base.fingerprint(name))
    kind, order = AdapterKind.SMOA, OrderStatus.RECORDED
    if num_blocks == 1:
        kind, order = AdapterKind.HIRA, OrderStatus.NOT_NEEDED
    write_portable(Adapter(kind, modules, rank, num_blocks, float(rank), order, BASE_NAME), out)


def write_lora(
    base_dir: Path,
    out: Path,
    rank: int,
    own: torch.Generator,
    *,
    strength: float,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a PEFT LoRA adapter; its factors' entries are of size `strength`."""
    base = BaseCheckpoint.open(base_dir)
    tensors = {}
    for name in _targets(base):
        rows, cols = base.shape(name)
        for factor, size in (("A", (rank, cols)), ("B", (rows, rank))):
            entries = torch.randn(size, generator=own).mul_(strength).to(dtype)
            tensors[f"base_model.model.{name}.lora_{factor}.weight"] = entries
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in _targets(base)})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _adapter(base: Path, name: str, recipe: dict[str, object], build: Callable[[Path], None]) -> Path:
    """Built once. Never beside a base that is not ours: the demo serves whatever lies in its folder of adapters."""
    made_for = json.loads((base / STAMP).read_text(encoding="utf-8"))["digest"]
    folder = home(base.resolve().parent.name.lstrip(".")) / "adapters" / name
    build_folder(folder, recipe | {"base": made_for}, build)
    return folder


def _write_base(shape: Shape, out: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {key: value for key, value in asdict(shape).items() if key != "name"}
    settings = {"max_position_embeddings": 4096, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0}
    Qwen2ForCausalLM(Qwen2Config(**sizes, **settings)).bfloat16().save_pretrained(out)
    _write_tokenizer(shape.vocab_size, out)


def _write_tokenizer(vocab_size: int, out: Path) -> None:
    """Token n is the word "tn": the load is given as token ids, so words do not matter."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{n}": n for n in range(vocab_size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t0", "model_max_length": 4096}
    (out / "tokenizer_config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")


def _targets(base: BaseCheckpoint) -> list[str]:
    return [name for name in base.linear_modules if name.endswith("_proj")]
