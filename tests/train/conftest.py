"""A tiny base with a tokenizer and a chat template, and configurations to train on it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LINES = (
    {"messages": [{"role": "user", "content": "What is a tree?"}, {"role": "assistant", "content": "A tall plant."}]},
    {"prompt": "The sky is ", "completion": "blue."},
    {"text": "Cats eat fish."},
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of one process, also where an engine of another test has left its process group. PEFT 0.19 cannot load
    LoRA beside one with a newer transformers."""
    import torch.distributed

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture
def write_data(tmp_path: Path) -> Callable[..., Path]:
    """Write JSONL lines (objects, or raw texts) into a file."""

    def write(*lines: object, name: str = "train.jsonl") -> Path:
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def make_config(tiny_base: Path, tmp_path: Path, write_data: Callable[..., Path]) -> Callable[..., Any]:
    """A TrainConfig for a few steps on the tiny base; sections are merged into the defaults."""

    def make(output: str = "out", **sections: Any) -> Any:
        from smoa_serve.train import TrainConfig

        content: dict[str, Any] = {
            "base": str(tiny_base),
            "output": str(tmp_path / output),
            "adapter": {"method": "smoa", "r": 4, "alpha": 8, "dropout": 0.1},
            "data": {"train": [str(write_data(*LINES * 4))]},
            "training": {"max_steps": 4, "batch_size": 4, "learning_rate": 0.02, "log_every": 1},
        }
        for key, value in sections.items():
            content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
        return TrainConfig.model_validate(content)

    return make
