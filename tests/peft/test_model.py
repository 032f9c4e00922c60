"""Whole models: training, checkpoints that the server reads, merging, several adapters, the Trainer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("ignore::UserWarning")]
IDS = torch.tensor([[1, 5, 9, 13, 2, 7], [3, 3, 8, 20, 21, 4]])
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def base_path(tmp_path: Path) -> Path:
    """A tiny llama on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "vocab_size": 32,
        "num_hidden_layers": 2,
        "initializer_range": 0.2,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _base(path: Path) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def _config(**settings: Any) -> Any:
    from smoa_serve.peft import SMoAConfig

    defaults = {"r": 4, "num_blocks": 2, "lora_dropout": 0.0, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return SMoAConfig(**defaults | settings)


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def _trained(path: Path, **settings: Any) -> Any:
    """A PEFT model whose factors are no longer those of the start."""
    from peft import get_peft_model

    torch.manual_seed(2)
    return get_peft_model(_base(path), _config(init_lora_weights=False, **settings)).eval()


def test_only_factors_are_trained_and_they_learn(base_path: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(_base(base_path), _config())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * len(TARGETS) * 2
    assert all(".smoa_a." in name or ".smoa_b." in name for name in names)
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == sum(2 * (rows + cols) for rows, cols in [(32, 32), (16, 32), (32, 48)] * 2)


class DenseUpdate(nn.Module):
    """The definition: a whole matrix on every forward pass, gradients by autograd."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        update = layer.module_update("default")
        self.base_layer, self.scaling = layer.base_layer, update.scaling
        self.same = update.row_block[:, None] == update.col_block[None, :]
        self.a, self.b = nn.Parameter(update.a.clone()), nn.Parameter(update.b.clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base_layer.weight
        return self.base_layer(x) + x @ (self.scaling * (self.b @ self.a) * weight * self.same).t()


def _losses(model: nn.Module, parameters: list[nn.Parameter], steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
def test_fifty_steps_give_the_losses_of_the_dense_formula(base_path: Path, checkpointing: bool) -> None:
    from peft import get_peft_model

    from smoa_serve.peft import SMoALinear

    torch.manual_seed(3)
    model = get_peft_model(_base(base_path), _config(r=5, num_blocks=3, lora_alpha=10)).train()
    dense = _base(base_path).requires_grad_(False).train()
    for name, layer in list(model.base_model.model.named_modules()):
        if isinstance(layer, SMoALinear):
            parent, _, child = name.rpartition(".")
            setattr(dense.get_submodule(parent), child, DenseUpdate(layer))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    ours = _losses(model, [p for p in model.parameters() if p.requires_grad], 50)
    expected = _losses(dense, [p for p in dense.parameters() if p.requires_grad], 50)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=0, atol=2e-3)
    torch.testing.assert_close(torch.tensor(ours[:10]), torch.tensor(expected[:10]), rtol=0, atol=1e-5)
    assert ours[-1] < 0.8 * ours[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_blocks": 3, "branch_ranks": [4, 0, 0]},
        {"target_modules": "all-linear", "num_blocks": 4, "r": 6, "lora_alpha": 3, "order": "published"},
        {"layers_to_transform": [1]},
        {"num_blocks": 300, "r": 40},
        {"r": 0},
        {"task_type": None},
    ],
    ids=["plain", "rank-zero-blocks", "all-linear", "one-layer", "many-blocks", "no-rank", "no-task"],
)
def test_a_saved_adapter_is_read_by_the_server_and_by_peft(
    base_path: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    from peft import PeftModel

    from smoa_serve.adapters import load_adapter
    from smoa_serve.adapters.model import OrderStatus
    from smoa_serve.base.checkpoint import BaseCheckpoint

    model = _trained(base_path, **settings)
    expected = _logits(model)
    model.save_pretrained(tmp_path / "out")
    base = BaseCheckpoint.open(base_path)
    adapter = load_adapter(tmp_path / "out", base)  # also checks the fingerprints and the digest
    assert adapter.order is OrderStatus.RECORDED
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if hasattr(layer, "smoa_a")}
    assert set(adapter.modules) == set(layers)
    for name, update in adapter.modules.items():
        assert torch.equal(update.dense(base.weight(name)), layers[name].get_delta_weight("default"))
        assert update.base == base.fingerprint(name)
    peft_settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["metadata"]["peft"]
    assert peft_settings["order"] == settings.get("order", "gram")
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(_base(base_path), tmp_path / "out", low_cpu_mem_usage=low_memory)
        assert torch.equal(_logits(again), expected)
    assert again.peft_config["default"].r == model.peft_config["default"].r
    assert again.peft_config["default"].lora_dropout == 0.0
    again.save_pretrained(tmp_path / "again")
    assert load_adapter(tmp_path / "again", base).digest == adapter.digest


def test_resuming_takes_the_recorded_order(base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftConfig, PeftModel

    from smoa_serve.peft import layer

    _trained(base_path).save_pretrained(tmp_path / "out")

    def no_order(*_: object) -> None:
        raise AssertionError("an order was computed")

    monkeypatch.setattr(layer, "spectral_pieces", no_order)
    model = PeftModel.from_pretrained(_base(base_path), tmp_path / "out", is_trainable=True)
    assert any(p.requires_grad for p in model.parameters())
    assert PeftConfig.from_pretrained(tmp_path / "out").num_blocks == 2


def test_saving_again_and_as_a_pickle_leaves_one_portable_adapter(base_path: Path, tmp_path: Path) -> None:
    from smoa_serve.adapters import load_adapter

    model = _trained(base_path)
    model.save_pretrained(tmp_path)
    first = load_adapter(tmp_path, None).digest
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.smoa_a.default").mul_(2)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.bin").exists()
    second = load_adapter(tmp_path, None).digest
    model.save_pretrained(tmp_path)
    assert first != second == load_adapter(tmp_path, None).digest


def test_a_converted_adapter_is_read_by_peft(base_path: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from peft import PeftModel

    from smoa_serve.adapters import load_adapter, write_portable

    model = _trained(base_path)
    model.save_pretrained(tmp_path / "out")
    write_portable(replace(load_adapter(tmp_path / "out", None), metadata={}), tmp_path / "bare")
    again = PeftModel.from_pretrained(_base(base_path), tmp_path / "bare")
    assert torch.equal(_logits(again), _logits(model))
    assert again.peft_config["default"].r == 4


def test_recorded_logits_of_whole_models_are_reproduced(
    vectors: Path, vector_index: dict[str, Any], tmp_path: Path
) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from smoa_serve.base.checkpoint import BaseCheckpoint
    from smoa_serve.offline.convert import TargetFormat, convert

    for entry in vector_index["e2e"]:
        folder = vectors / entry["base"]
        expected = load_file(folder.parent / "expected.safetensors")
        for adapter in entry["adapters"]:
            name, out = adapter["name"], tmp_path / adapter["name"]
            convert(vectors / adapter["safetensors_dir"], out, TargetFormat.PORTABLE, BaseCheckpoint.open(folder))
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            model = PeftModel.from_pretrained(base.eval(), out)
            kind = "logits" if entry["base_dtype"] == "float32" else "logits_fp32"
            for merged in (False, True):
                if merged:
                    model.merge_adapter()
                with torch.no_grad():
                    logits = model(expected["prompt.0.input_ids"][None]).logits[0]
                torch.testing.assert_close(logits, expected[f"{name}.0.{kind}"], rtol=0, atol=3e-5)


def test_a_published_checkpoint_is_refused_instead_of_half_read(base_path: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import save_file

    from smoa_serve.errors import AdapterError

    config = {"peft_type": "SMOA", "r": 4, "num_blocks": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.0.weight"
    save_file({key: torch.ones(2, 16)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="is missing"):
        PeftModel.from_pretrained(_base(base_path), tmp_path)


def test_a_configuration_from_a_checkpoint_without_its_tensors_is_no_silent_start(
    base_path: Path, tmp_path: Path
) -> None:
    from peft import PeftConfig, get_peft_model

    from smoa_serve.errors import ConfigError

    _trained(base_path).save_pretrained(tmp_path / "out")
    model = get_peft_model(_base(base_path), PeftConfig.from_pretrained(tmp_path / "out"))
    with pytest.raises(ConfigError, match="were not read"):
        model(IDS)


def test_one_configuration_for_two_models_records_each_for_itself(base_path: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    from smoa_serve.adapters import load_adapter
    from smoa_serve.base.checkpoint import BaseCheckpoint

    config = _config()
    first = get_peft_model(_base(base_path), config)
    other = _base(base_path)
    other.model.layers[0].self_attn.q_proj.weight.data.mul_(2)
    get_peft_model(other, config)
    first.save_pretrained(tmp_path / "out")
    base = BaseCheckpoint.open(base_path)
    modules = load_adapter(tmp_path / "out", base).modules
    assert modules
    assert all(update.base == base.fingerprint(name) for name, update in modules.items())


def test_merging_unmerging_and_unloading(base_path: Path) -> None:
    model = _trained(base_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = _logits(model)
    model.merge_adapter()
    torch.testing.assert_close(_logits(model), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    merged = model.merge_and_unload(safe_merge=True)
    assert not any("smoa" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(_logits(merged), expected, rtol=0, atol=1e-5)


def test_adapters_with_other_blocks_live_side_by_side(base_path: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    from smoa_serve.adapters import load_adapter

    model = _trained(base_path)
    one, none = _logits(model), _logits(_base(base_path))
    model.add_adapter("two", _config(r=6, num_blocks=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    assert torch.equal(_logits(model), one)
    model.set_adapter("two")
    two = _logits(model)
    assert not torch.equal(one, two)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"two"}
    with model.disable_adapter():
        assert torch.equal(_logits(model), none)
    assert torch.equal(_logits(model), two)
    model.save_pretrained(tmp_path)
    assert load_adapter(tmp_path, None).num_blocks == 2
    assert load_adapter(tmp_path / "two", None).num_blocks == 3
    again = PeftModel.from_pretrained(_base(base_path), tmp_path)
    again.load_adapter(tmp_path / "two", adapter_name="other")
    assert torch.equal(_logits(again), one)
    again.set_adapter("other")
    assert torch.equal(_logits(again), two)
    model.delete_adapter("two")
    assert list(model.peft_config) == ["default"]
    model.set_adapter("default")
    assert torch.equal(_logits(model), one)


def test_conv1d_layers(tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    from smoa_serve.adapters import load_adapter
    from smoa_serve.base.checkpoint import BaseCheckpoint

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=32)).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = get_peft_model(base, _config(target_modules=None, fan_in_fan_out=True, init_lora_weights=False)).eval()
    expected = _logits(model)
    model.save_pretrained(tmp_path / "out")
    adapter = load_adapter(tmp_path / "out", BaseCheckpoint.open(tmp_path / "base"))
    assert adapter.modules["transformer.h.0.attn.c_attn"].shape == (72, 24)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    assert torch.equal(_logits(again.eval()), expected)
    torch.testing.assert_close(_logits(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


def test_a_bfloat16_base_keeps_float32_factors(base_path: Path, tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model

    torch.manual_seed(4)
    model = get_peft_model(_base(base_path).bfloat16(), _config(init_lora_weights=False))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "out")
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(
            _base(base_path).bfloat16(), tmp_path / "out", low_cpu_mem_usage=low_memory, is_trainable=True
        )
        assert all(p.dtype == torch.float32 for p in again.parameters() if p.requires_grad)
        assert torch.equal(_logits(again), _logits(model.eval()))


def test_the_trainer_trains_saves_and_resumes(base_path: Path, tmp_path: Path) -> None:
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from smoa_serve.adapters import load_adapter
    from smoa_serve.base.checkpoint import BaseCheckpoint

    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]

    def trainer(steps: int) -> Trainer:
        torch.manual_seed(0)
        arguments = TrainingArguments(
            tmp_path / "run",
            max_steps=steps,
            save_steps=1,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            gradient_checkpointing=True,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        return Trainer(get_peft_model(_base(base_path), _config()), arguments, train_dataset=data)

    trainer(1).train()
    base = BaseCheckpoint.open(base_path)
    first = load_adapter(tmp_path / "run" / "checkpoint-1", base)
    assert all(bool(update.b.any()) for update in first.modules.values())
    resumed = trainer(2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    second = load_adapter(tmp_path / "run" / "checkpoint-2", base)
    straight = trainer(2)
    straight.train()
    for name, update in second.modules.items():
        layer = straight.model.base_model.model.get_submodule(name)
        assert torch.equal(update.row_block, first.modules[name].row_block)
        torch.testing.assert_close(update.b, layer.smoa_b["default"].detach(), rtol=0, atol=1e-6)
