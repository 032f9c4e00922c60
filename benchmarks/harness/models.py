"""Random models of real shapes, built once: a base, SMoA and LoRA adapters. The only place that makes any."""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from smoa_serve import testing
from smoa_serve.base.orders import cache_root
from smoa_serve.demo.shipped import STAMP, ensure_models
from tools.demo.artifacts import build_folder


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
    folder = cache_root() / "benchmarks" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def random_base(shape: Shape) -> Path:
    """The folder of a bfloat16 checkpoint with small Gaussian weights."""
    folder = home(shape.name) / "base"
    build_folder(folder, asdict(shape) | {"version": 2}, lambda out: _write_base(shape, out))
    return folder


def demo_base() -> Path:
    """The base of the demo: a small model that was trained."""
    return ensure_models(Path(".demo"), Console(stderr=True)).base


def random_smoa(base: Path, rank: int, num_blocks: int, index: int) -> Path:
    """A SMoA adapter over all linear layers. Like the spectral order of one base, the blocks are the same for all."""
    ranks = (rank // num_blocks,) * num_blocks
    recipe = {"ranks": list(ranks), "seed": 1000 * num_blocks + index, "block_seed": num_blocks, "strength": 0.2}
    return _adapter(base, f"smoa-r{rank}-k{num_blocks}-{index}", "smoa", recipe)


def random_lora(base: Path, rank: int, index: int) -> Path:
    return _adapter(base, f"lora-r{rank}-{index}", "lora", {"ranks": [rank], "seed": index, "strength": 0.2})


def _adapter(base: Path, name: str, kind: str, recipe: dict[str, object]) -> Path:
    """Never beside a base that is not ours: the demo serves whatever lies in its folder of adapters."""
    made_for = json.loads((base / STAMP).read_text(encoding="utf-8"))["digest"]
    folder = home(base.resolve().parent.name.lstrip(".")) / "adapters" / name
    build = partial(testing.random_adapter, base=base, kind=kind, dtype=torch.bfloat16, **recipe)
    build_folder(folder, recipe | {"base": made_for, "version": 3}, build)
    return folder


def _write_base(shape: Shape, out: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {key: value for key, value in asdict(shape).items() if key != "name"}
    settings = {"max_position_embeddings": 4096, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0}
    Qwen2ForCausalLM(Qwen2Config(**sizes, **settings)).bfloat16().save_pretrained(out)
    # Token n is the word "tn": the load is given as token ids, so words do not matter.
    words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(shape.vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", model_max_length=4096).save_pretrained(out)
