"""PEFT HiRA files, against PEFT itself."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smoa_serve.adapters import LoadOptions, load_adapter, open_adapter, write_hira
from smoa_serve.adapters.hira import hira_factors
from smoa_serve.adapters.model import Adapter, AdapterKind, ModuleUpdate, OrderStatus
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.errors import AdapterError

MakeBase = Callable[..., Path]
Q = "model.layers.0.self_attn.q_proj"


def _peft_hira(base: Path, out: Path, **config: Any) -> dict[str, torch.Tensor]:
    """Let PEFT make, save and merge a HiRA adapter with random factors; returns the merged weights."""
    from peft import HiraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(model, HiraConfig(task_type="CAUSAL_LM", init_weights=False, **config))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.1)
    wrapped.save_pretrained(out)
    merged = wrapped.merge_and_unload()
    return {name: parameter.detach() for name, parameter in merged.named_parameters()}


def _load_with_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns about missing or unexpected keys
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: parameter.detach() for name, parameter in merged.named_parameters()}


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "target_modules": "all-linear"},
        {"r": 4, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}},
        {"r": 3, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"r": 2, "target_modules": r".*\.(k|o)_proj", "exclude_modules": ["model.layers.0.self_attn.o_proj"]},
    ],
    ids=["suffixes", "all linear", "rank pattern", "layers", "regex and exceptions"],
)
def test_what_peft_saves_is_what_peft_merges(vectors: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = vectors / "e2e" / "tiny-llama" / "base"
    merged = _peft_hira(folder, tmp_path / "hira", **config)
    base = BaseCheckpoint.open(folder)
    assert open_adapter(tmp_path / "hira").kind is AdapterKind.HIRA
    adapter = load_adapter(tmp_path / "hira", base)
    assert (adapter.kind, adapter.order, adapter.num_blocks) == (AdapterKind.HIRA, OrderStatus.NOT_NEEDED, 1)
    changed = [name for name in base.linear_modules if not torch.equal(merged[f"{name}.weight"], base.weight(name))]
    assert set(changed) == set(adapter.modules)
    for name, update in adapter.modules.items():
        expected = merged[f"{name}.weight"]
        torch.testing.assert_close(base.weight(name) + update.dense(base.weight(name)), expected, rtol=0, atol=1e-6)
    assert load_adapter(tmp_path / "hira", None).digest == adapter.digest


def test_every_recorded_smoa_adapter_is_a_hira_adapter_for_peft(
    vectors: Path, vector_index: dict[str, Any], tmp_path: Path
) -> None:
    model = vector_index["e2e"][0]
    base = BaseCheckpoint.open(vectors / model["base"])
    for entry in model["adapters"]:
        adapter = load_adapter(vectors / entry["safetensors_dir"], base)
        merged = _load_with_peft(base.path, write_hira(adapter, tmp_path / entry["name"]))
        for name, update in adapter.modules.items():
            expected = base.weight(name) + update.dense(base.weight(name))
            torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=0, atol=1e-6)
        again = load_adapter(tmp_path / entry["name"], base)
        assert again.rank == adapter.rank


def test_conv1d_layers_are_exported_the_right_way_round(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    size = {"n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16, "n_positions": 8}
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(tmp_path / "base")
    base = BaseCheckpoint.open(tmp_path / "base")
    name = "transformer.h.0.attn.c_proj"  # square: a transposed merge would go unnoticed by its shape
    update = _update(rows=8, cols=8, ranks=(2, 1), scaling=1.5)
    folder = write_hira(_adapter({name: update}), tmp_path / "hira")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": True}))
    merged = _load_with_peft(tmp_path / "base", folder)
    expected = base.weight(name) + update.dense(base.weight(name))
    torch.testing.assert_close(merged[f"{name}.weight"], expected.t(), rtol=0, atol=1e-6)


def _update(rows: int, cols: int, ranks: tuple[int, ...], scaling: float, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(rows * cols)
    row_block = torch.randint(len(ranks), (rows,), generator=generator).to(torch.int16)
    col_block = torch.randint(len(ranks), (cols,), generator=generator).to(torch.int16)
    limit, index = torch.tensor(ranks), torch.arange(max(ranks))
    a = torch.randn(max(ranks), cols, generator=generator) * (index[:, None] < limit[col_block.long()][None, :])
    b = torch.randn(rows, max(ranks), generator=generator) * (index[None, :] < limit[row_block.long()][:, None])
    return ModuleUpdate(a.to(dtype), b.to(dtype), row_block, col_block, ranks, scaling)


def _adapter(modules: dict[str, ModuleUpdate]) -> Adapter:
    return Adapter(AdapterKind.SMOA, modules, rank=3, num_blocks=2, alpha=3.0, order=OrderStatus.RECORDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(2, 2), (3, 0, 1), (4,)], ids=str)
def test_block_sparse_factors_give_the_dense_update(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    update = _update(11, 7, ranks, scaling=0.37, dtype=dtype)
    a, b = hira_factors(update, sum(update.branch_ranks))
    assert a.shape == (sum(ranks), 7)
    weight = torch.randn(11, 7, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close((b @ a) * weight, update.dense(weight), rtol=1e-5, atol=1e-6)
    same = update.row_block[:, None] == update.col_block[None, :]
    assert not bool((b @ a)[~same].any())


def test_a_scale_that_is_a_power_of_two_changes_no_bit() -> None:
    update = _update(9, 9, (2, 2), scaling=0.5)
    a, b = hira_factors(update, sum(update.branch_ranks))
    weight = torch.eye(9)
    assert torch.equal((b @ a).diagonal(), update.dense(weight).diagonal())


def test_rank_zero_cannot_be_exported(tmp_path: Path) -> None:
    empty = ModuleUpdate(
        torch.zeros(0, 4), torch.zeros(4, 0), torch.zeros(4).short(), torch.zeros(4).short(), (0,), 1.0
    )
    with pytest.raises(AdapterError, match=f"{Q} has rank 0"):
        write_hira(_adapter({Q: empty}), tmp_path)


def test_different_total_ranks_are_padded_with_zeros(tmp_path: Path, make_base: MakeBase) -> None:
    names = {Q: (2, 1), "model.layers.1.self_attn.q_proj": (1, 1)}
    base = BaseCheckpoint.open(make_base({f"{name}.weight": torch.randn(6, 4) for name in names}))
    adapter = _adapter({name: _update(6, 4, ranks, 1.0) for name, ranks in names.items()})
    again = load_adapter(write_hira(adapter, tmp_path / "hira"), base)
    for name, update in again.modules.items():
        assert update.max_rank == 3
        torch.testing.assert_close(update.dense(base.weight(name)), adapter.modules[name].dense(base.weight(name)))


def test_ranks_of_a_rank_pattern_are_accepted(spoiled: "Spoiled") -> None:
    spoiled.config |= {"r": 5, "rank_pattern": {"0.self_attn.q_proj": 2}}
    spoiled.tensors = {name: t for name, t in spoiled.tensors.items() if ".0." in name}
    spoiled.config["layers_to_transform"] = [0]
    assert load_adapter(spoiled.write(), spoiled.base).modules[Q].max_rank == 2


class Spoiled:
    """A HiRA adapter of rank 2 on two layers, to be spoiled."""

    def __init__(self, make_base: MakeBase) -> None:
        layers = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
        self.path = make_base({f"{name}.weight": torch.randn(6, 4) for name in layers})
        self.base = BaseCheckpoint.open(self.path)
        self.config: dict[str, Any] = {"peft_type": "HIRA", "r": 2, "target_modules": ["q_proj"], "hira_dropout": 0.1}
        self.tensors = {f"base_model.model.{name}.hira_A": torch.randn(2, 4) for name in layers}
        self.tensors |= {f"base_model.model.{name}.hira_B": torch.randn(6, 2) for name in layers}

    def write(self) -> Path:
        folder = self.path.parent / "hira"
        folder.mkdir(exist_ok=True)
        save_file(self.tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        return folder

    def reasons(self, options: LoadOptions | None = None) -> list[str]:
        with pytest.raises(AdapterError) as caught:
            load_adapter(self.write(), self.base, options or LoadOptions())
        return caught.value.reasons


@pytest.fixture
def spoiled(make_base: MakeBase) -> Spoiled:
    return Spoiled(make_base)


def test_missing_and_misshapen_factors_are_told_at_once(spoiled: Spoiled) -> None:
    del spoiled.tensors["base_model.model.model.layers.1.self_attn.q_proj.hira_A"]
    spoiled.tensors[f"base_model.model.{Q}.hira_A"] = torch.zeros(3, 4)
    spoiled.tensors[f"base_model.model.{Q}.hira_B"][0] = torch.nan
    assert set(spoiled.reasons()) == {
        f"{Q}.hira_A has shape [3, 4], expected [2, 4]",
        f"{Q}.hira_B: 2 of 12 numbers are not finite (NaN or Inf)",
        "model.layers.1.self_attn.q_proj.hira_A is missing",
    }


def test_a_lora_file_that_calls_itself_hira_is_refused(spoiled: Spoiled) -> None:
    spoiled.tensors = {f"base_model.model.{Q}.lora_{s}.weight": torch.zeros(2, 2) for s in "AB"}
    assert spoiled.reasons() == [f"{Q}.lora_{s}.weight is a LoRA tensor, but peft_type says HIRA" for s in "AB"]


def test_a_smoa_file_that_calls_itself_hira_is_refused(spoiled: Spoiled) -> None:
    spoiled.tensors = {f"base_model.model.{Q}.lora_{s}.0.weight": torch.zeros(2, 2) for s in "AB"}
    assert spoiled.reasons() == [f"{Q}.lora_{s}.0.weight is a SMoA tensor, but peft_type says HIRA" for s in "AB"]


def test_embeddings_are_refused(spoiled: Spoiled) -> None:
    spoiled.tensors["base_model.model.model.embed_tokens.hira_embedding_A"] = torch.zeros(2, 4)
    assert spoiled.reasons() == ["model.embed_tokens.hira_embedding_A is no factor of a HIRA adapter"]


def test_targets_without_factors_and_factors_without_targets_are_refused(spoiled: Spoiled) -> None:
    del spoiled.tensors[f"base_model.model.{Q}.hira_A"], spoiled.tensors[f"base_model.model.{Q}.hira_B"]
    assert spoiled.reasons() == [f"{Q} is a target, but the file has no factors for it"]
    spoiled.config["layers_to_transform"] = 0
    assert (
        f"the file has factors for {Q.replace('.0.', '.1.')}, which target_modules does not name" in spoiled.reasons()
    )


def test_unknown_keys_and_wrong_values_are_refused(spoiled: Spoiled) -> None:
    spoiled.config |= {"use_magic": True, "r": 0, "modules_to_save": ["lm_head"]}
    reasons = " ".join(spoiled.reasons())
    for part in ("'use_magic' (True) is not known", "r: ", "fully trained modules (lm_head)"):
        assert part in reasons


def test_a_rank_over_the_limit_is_refused(spoiled: Spoiled) -> None:
    assert "has rank 2, the limit is 1" in spoiled.reasons(LoadOptions(max_rank=1))[0]


def test_shapes_are_those_of_the_file_when_there_is_no_base(tmp_path: Path) -> None:
    save_file({f"base_model.model.{Q}.hira_A": torch.ones(2, 4)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "HIRA", "r": 2}')
    with pytest.raises(AdapterError, match=f"{Q}.hira_B is missing"):
        load_adapter(tmp_path, None)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {f"base_model.model.{Q}.hira_A"}
