"""Random models of real shapes: a base, SMoA and LoRA adapters; built once in the cache folder."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from smoa_kernels.testing import random_blocks
from torch import Tensor

from smoa_serve.adapters import write_portable
from smoa_serve.adapters.model import Adapter, AdapterKind, ModuleUpdate, OrderStatus
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.base.orders import cache_root
from smoa_serve.base.spectral import even_ranks
from tools.demo.artifacts import STAMP, build_folder

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


def random_base(shape: Shape) -> Path:
    """The folder of a bfloat16 checkpoint with Gaussian weights."""
    folder = cache_root() / "benchmarks" / shape.name / "base"
    build_folder(folder, asdict(shape) | {"version": 1}, lambda out: _write_base(shape, out))
    return folder


def random_smoa(base: Path, rank: int, num_blocks: int, index: int) -> Path:
    """A SMoA adapter over all linear layers. Like the spectral order of one base, the blocks are the same for all."""
    recipe = {"rank": rank, "num_blocks": num_blocks, "index": index, "version": 2} | _made_for(base)
    folder = _adapters_home(base) / f"smoa-r{rank}-k{num_blocks}-{index}"
    build_folder(folder, recipe, lambda out: _write_smoa(base, rank, num_blocks, index, out))
    return folder


def random_lora(base: Path, rank: int, index: int) -> Path:
    """A LoRA adapter over the same layers."""
    recipe = {"rank": rank, "index": index, "version": 1} | _made_for(base)
    folder = _adapters_home(base) / f"lora-r{rank}-{index}"
    build_folder(folder, recipe, lambda out: _write_lora(base, rank, index, out))
    return folder


def _made_for(base: Path) -> dict[str, object]:
    return {"base": json.loads((base / STAMP).read_text(encoding="utf-8"))["digest"]}


def _adapters_home(base: Path) -> Path:
    """Never beside a base that is not ours: the demo serves whatever lies in its folder of adapters."""
    return cache_root() / "benchmarks" / base.resolve().parent.name.lstrip(".") / "adapters"


def _write_base(shape: Shape, out: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: _initial(name, size, generator) for name, size in _base_shapes(shape)}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    sizes = {key: value for key, value in asdict(shape).items() if key != "name"}
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **sizes,
        "max_position_embeddings": 4096,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "eos_token_id": 0,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_tokenizer(shape.vocab_size, out)


def _base_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head = shape.hidden_size, shape.hidden_size // shape.num_attention_heads
    wide, kv = shape.intermediate_size, head * shape.num_key_value_heads
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{prefix}.self_attn.{name}_proj.bias", (rows,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.mlp.gate_proj.weight", (wide, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (wide, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, wide)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)


def _initial(name: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if "norm" in name:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.randn(size, generator=generator).mul_(0.02).bfloat16()


def _write_tokenizer(vocab_size: int, out: Path) -> None:
    """Token n is the word "tn": the load is given as token ids, so words do not matter."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{n}": n for n in range(vocab_size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t0", "model_max_length": 4096}
    (out / "tokenizer_config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")


def _write_smoa(base_dir: Path, rank: int, num_blocks: int, index: int, out: Path) -> None:
    base = BaseCheckpoint.open(base_dir)
    shared = torch.Generator().manual_seed(num_blocks)
    own = torch.Generator().manual_seed(1000 * num_blocks + index)
    ranks = even_ranks(rank, num_blocks)
    modules = {}
    for name in _targets(base):
        rows, cols = base.shape(name)
        row_block = random_blocks(rows, num_blocks, shared)
        col_block = random_blocks(cols, num_blocks, shared)
        a = torch.randn(max(ranks), cols, generator=own).bfloat16()
        b = torch.randn(rows, max(ranks), generator=own).mul_(0.1).bfloat16()
        modules[name] = ModuleUpdate(a, b, row_block, col_block, ranks, 1.0, base.fingerprint(name))
    adapter = Adapter(AdapterKind.SMOA, modules, rank, num_blocks, float(rank), OrderStatus.RECORDED, BASE_NAME)
    write_portable(adapter, out)


def _write_lora(base_dir: Path, rank: int, index: int, out: Path) -> None:
    base = BaseCheckpoint.open(base_dir)
    own = torch.Generator().manual_seed(index)
    tensors = {}
    for name in _targets(base):
        rows, cols = base.shape(name)
        a, b = torch.randn(rank, cols, generator=own), torch.randn(rows, rank, generator=own)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.mul_(0.02).bfloat16()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.mul_(0.02).bfloat16()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in _targets(base)})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _targets(base: BaseCheckpoint) -> list[str]:
    return [name for name in base.linear_modules if name.endswith("_proj")]
