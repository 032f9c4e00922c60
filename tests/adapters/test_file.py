"""Whatever stands in a file: an answer or an AdapterError, never another exception."""

import gc
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smoa_serve.adapters import load_adapter, write_portable
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.errors import AdapterError
from smoa_serve.offline.inspect import inspect_adapter
from smoa_serve.store import AdapterStore

MakeBase = Callable[..., Path]
Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}"
SHAPES: list[tuple[int, ...]] = [(), (0,), (4,), (1, 1, 1), (0, 0), (7, 9)]
CONFIGS: dict[str, dict[str, Any]] = {
    "published": {"peft_type": "SMOA", "r": 2, "num_blocks": 2, "lora_alpha": 2, "target_modules": ["q_proj"]},
    "published without r and K": {"peft_type": "SMOA", "lora_alpha": 2},
    "hira": {"peft_type": "HIRA", "r": 2, "target_modules": ["q_proj"]},
    "lora": {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]},
}


def _tensors(kind: str) -> dict[str, torch.Tensor]:
    if kind.startswith("published"):
        a = {f"{KEY}.lora_A.{k}.weight": torch.ones(1, 4) for k in range(2)}
        return a | {f"{KEY}.lora_B.{k}.weight": torch.ones(3, 1) for k in range(2)}
    suffix = ".weight" if kind == "lora" else ""
    return {f"{KEY}.{kind}_A{suffix}": torch.ones(2, 8), f"{KEY}.{kind}_B{suffix}": torch.ones(6, 2)}


@pytest.fixture
def base(make_base: MakeBase) -> BaseCheckpoint:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    return BaseCheckpoint.open(make_base({f"{Q}.weight": weight}))


@pytest.mark.parametrize("kind", CONFIGS)
def test_tensors_of_any_shape_are_refused_in_words(base: BaseCheckpoint, tmp_path: Path, kind: str) -> None:
    folder, store = tmp_path / "adapter", AdapterStore(tmp_path / "store")
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIGS[kind]))
    good = _tensors(kind)
    save_file(good, folder / "adapter_model.safetensors")
    assert store.stage(store.open(folder), base).rank == 2
    for name in good:
        for shape in SHAPES:
            save_file(good | {name: torch.ones(shape)}, folder / "adapter_model.safetensors")
            with pytest.raises(AdapterError):
                store.stage(store.open(folder), base)
            if kind.startswith("published"):
                assert inspect_adapter(folder, base).base_match == "no"


def test_portable_tensors_of_any_shape_are_refused_in_words(base: BaseCheckpoint, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIGS["published"]))
    save_file(_tensors("published"), folder / "adapter_model.safetensors")
    portable = write_portable(load_adapter(folder, base), tmp_path / "portable")
    for name in (f"{Q}.smoa_{part}" for part in ("a", "b", "row_block", "col_block")):
        for shape in SHAPES:
            write_portable(load_adapter(folder, base), portable)
            state = load_file(portable / "adapter_model.safetensors")
            state[name] = torch.ones(shape, dtype=state[name].dtype)
            save_file(state, portable / "adapter_model.safetensors")
            with pytest.raises(AdapterError):
                load_adapter(portable, base)


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [None], True, -1, 1e999])
@pytest.mark.parametrize("kind", ["published", "hira"])
def test_settings_of_any_type_are_taken_or_refused_in_words(
    base: BaseCheckpoint, tmp_path: Path, kind: str, value: object
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(_tensors(kind), folder / "adapter_model.safetensors")
    keys = {*CONFIGS[kind], "branch_ranks", "layers_to_transform", "layers_pattern", "bias", "rank_pattern"}
    for key in sorted(keys):
        (folder / "adapter_config.json").write_text(json.dumps(CONFIGS[kind] | {key: value}))
        with suppress(AdapterError):
            assert load_adapter(folder, base).modules


def test_more_blocks_than_an_id_can_name_are_refused(base: BaseCheckpoint, tmp_path: Path) -> None:
    save_file(_tensors("published"), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIGS["published"] | {"num_blocks": 10**12}))
    with pytest.raises(AdapterError, match=r"num_blocks: .* less than or equal to 32767"):
        load_adapter(tmp_path, base)


def test_reading_an_adapter_again_and_again_keeps_nothing(vectors: Path) -> None:
    """`safetensors.torch.load_file` of release 0.8 keeps two numbers of each tensor."""
    path, base = (
        vectors / "e2e/tiny-llama/adapters/qv_r8_k2_safetensors",
        BaseCheckpoint.open(vectors / "e2e/tiny-llama/base"),
    )
    load_adapter(path, base)
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(50):
        load_adapter(path, base)
    gc.collect()
    assert (sys.getallocatedblocks() - before) / 50 < 8, "blocks of memory a read; its 16 tensors would make it 32"
