"""What others test against: random bases and adapters, and the example that stands in the module."""

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from smoa_serve import testing
from smoa_serve.adapters import load_adapter
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.testing import LINEAR_LAYERS, random_adapter, random_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_base(tmp_path_factory.mktemp("testing") / "base")


@pytest.mark.parametrize(
    ("kind", "ranks", "blocks"),
    [("smoa", (4, 4), 2), ("smoa", (3, 1, 2), 3), ("hira", (4, 4), 1)],
    ids=["even", "uneven", "hira"],
)
def test_an_adapter_binds_to_its_base_and_has_the_size_asked_for(
    base: Path, tmp_path: Path, kind: str, ranks: tuple[int, ...], blocks: int
) -> None:
    adapter = load_adapter(
        random_adapter(tmp_path / "x", base, kind=kind, ranks=ranks, alpha=12), BaseCheckpoint.open(base)
    )
    assert (adapter.kind.value, adapter.rank, adapter.num_blocks, adapter.alpha) == (kind, sum(ranks), blocks, 12)
    assert len(adapter.modules) == 2 * len(LINEAR_LAYERS)


@pytest.mark.parametrize("kind", ["smoa", "hira", "lora"])
def test_an_update_is_as_large_as_asked_in_units_of_the_weight(base: Path, tmp_path: Path, kind: str) -> None:
    import torch
    from safetensors.torch import load_file

    path = random_adapter(tmp_path / "x", base, kind=kind, ranks=(4,), alpha=8, strength=0.5)
    checkpoint, name = BaseCheckpoint.open(base), "model.layers.0.mlp.up_proj"
    weight = checkpoint.weight(name).float()
    if kind == "lora":
        tensors = load_file(path / "adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        update = 2 * b @ a
    else:
        update = load_adapter(path, checkpoint).modules[name].dense(weight)
    assert update.std() / weight.std() == pytest.approx(0.5, rel=0.3)
    assert torch.isfinite(update).all()


def test_the_same_seed_gives_the_same_numbers_and_blocks_can_be_shared(base: Path, tmp_path: Path) -> None:
    def made(name: str, **settings: Any) -> Any:
        return load_adapter(random_adapter(tmp_path / name, base, **settings), BaseCheckpoint.open(base))

    assert made("a", seed=1).digest == made("b", seed=1).digest != made("c", seed=2).digest
    first, second = (made(f"shared-{seed}", seed=seed, block_seed=5) for seed in (1, 2))
    assert first.digest != second.digest
    for name, update in first.modules.items():
        assert update.row_block.equal(second.modules[name].row_block)
        assert update.col_block.equal(second.modules[name].col_block)


def test_a_base_depends_on_its_seed_alone(base: Path, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(5)
    weights = [
        (folder / "model.safetensors").read_bytes()
        for folder in (base, random_base(tmp_path / "same"), random_base(tmp_path / "other", seed=1))
    ]
    assert weights[0] == weights[1] != weights[2]


def test_what_cannot_be_made_is_refused_with_what_can(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'dora' is not a valid AdapterKind"):
        random_adapter(tmp_path / "x", base, kind="dora")
    with pytest.raises(ValueError, match=r"called qkv; it has .*down_proj, .*q_proj"):
        random_adapter(tmp_path / "x", base, targets=("qkv",))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gemma2"])
def test_a_base_of_another_family_has_the_tokenizer_and_the_dtype_asked_for(tmp_path: Path, model_type: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = random_base(tmp_path / "base", model_type, dtype=torch.bfloat16, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.model_type, model.config.num_hidden_layers, model.dtype) == (model_type, 1, torch.bfloat16)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder))


@pytest.mark.engine
def test_the_example_in_the_module_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"\n\n((?:    .+\n)+)", testing.__doc__ or "")
    names: dict[str, Any] = vars(testing) | {"folder": tmp_path}
    exec(textwrap.dedent(example), names)
    assert names["answer"].model == "tuned"
    assert names["answer"].choices[0].text
