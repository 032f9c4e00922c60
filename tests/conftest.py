"""Fixtures for all tests: recorded numbers, private cache folders, tiny base checkpoints."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from torch import Tensor

# The same examples on every machine, however slow.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")

# Read when torch is first imported: with busy-waiting threads small SVDs take up to 90 times longer on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Folder of numbers recorded from the published layer; see its README."""
    folder = Path(__file__).resolve().parent / "data" / "vectors"
    assert (folder / "index.json").is_file(), f"the recorded vectors are missing from the checkout: {folder}"
    return folder


@pytest.fixture(scope="session")
def vector_index(vectors: Path) -> dict[str, Any]:
    return json.loads((vectors / "index.json").read_text())


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smoa-cache")


@pytest.fixture(autouse=True)
def own_logging() -> None:
    """Log lines reach `caplog`, also after an engine of this process has sent them where vLLM's go."""
    logger = logging.getLogger("smoa_serve")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def private_folders(session_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's own cache and store; orders are shared between tests, stores are not."""
    monkeypatch.setenv("SMOA_CACHE_DIR", str(session_cache))
    monkeypatch.setenv("SMOA_STORE_DIR", str(tmp_path / "smoa-store"))


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[..., Path]:
    """Write a base checkpoint from single tensors: `make_base({"model.norm.weight": ...}, model_type="llama")`."""

    from safetensors.torch import save_file

    def make(tensors: "Mapping[str, Tensor]", *, name: str = "base", **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two layers in float32 with the demo's tokenizer; head_dim 32, the least that vLLM takes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from smoa_serve.demo.tokenizer import VOCAB_SIZE, special_ids, write_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "base"
    folder.mkdir()
    write_tokenizer(folder)
    pad, end = special_ids(folder / "tokenizer.json")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **heads, vocab_size=VOCAB_SIZE, pad_token_id=pad, eos_token_id=end, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
