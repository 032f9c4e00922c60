"""Published SMoA files: every reason for which one is refused, and what may be left out of one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from smoa_serve.adapters import LoadOptions, load_adapter, open_adapter
from smoa_serve.adapters.model import Adapter
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.errors import AdapterError, AdapterNotFoundError

MakeBase = Callable[..., Path]

PICKLE = LoadOptions(allow_pickle=True)
Q = "model.layers.0.self_attn.q_proj"


class Small:
    """A base of two layers and an adapter of q and v, K=2, r=3."""

    def __init__(self, make_base: MakeBase, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(5)
        self.weights = {
            f"model.layers.{i}.self_attn.{m}_proj.weight": torch.randn(size, 8, generator=generator)
            for i in range(2)
            for m, size in (("q", 12), ("k", 6), ("v", 6))
        }
        self.weights["model.embed_tokens.weight"] = torch.randn(20, 8, generator=generator)
        self.base_path = make_base(self.weights, name="small")
        self.base = BaseCheckpoint.open(self.base_path)
        self.folder = self.base_path.parent / "adapter"
        self.folder.mkdir()
        self.config: dict[str, Any] = {
            "peft_type": "SMOA",
            "r": 3,
            "num_blocks": 2,
            "lora_alpha": 6,
            "lora_dropout": 0.05,
            "target_modules": ["q_proj", "v_proj"],
        }
        self.tensors: dict[str, torch.Tensor] = {}
        for name, weight in self.weights.items():
            if ".q_proj" in name or ".v_proj" in name:
                self.add(name.removesuffix(".weight"), weight.shape[0], generator, dtype)

    def add(self, module: str, rows: int, generator: torch.Generator, dtype: torch.dtype) -> None:
        for k, rank in enumerate((2, 1)):
            a, b = torch.randn(rank, 4, generator=generator), torch.randn(rows // 2, rank, generator=generator)
            self.tensors[f"base_model.model.{module}.lora_A.{k}.weight"] = a.to(dtype)
            self.tensors[f"base_model.model.{module}.lora_B.{k}.weight"] = b.to(dtype)

    def write(self) -> Path:
        save_file(self.tensors, self.folder / "adapter_model.safetensors")
        (self.folder / "adapter_config.json").write_text(json.dumps(self.config))
        return self.folder

    def load(self, options: LoadOptions = LoadOptions()) -> Adapter:  # noqa: B008 - frozen
        return load_adapter(self.write(), self.base, options)

    def reasons(self, options: LoadOptions = LoadOptions()) -> list[str]:  # noqa: B008 - frozen
        with pytest.raises(AdapterError) as caught:
            self.load(options)
        return caught.value.reasons


@pytest.fixture
def small(make_base: MakeBase) -> Small:
    return Small(make_base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_factors_keep_their_dtype(make_base: MakeBase, dtype: torch.dtype) -> None:
    adapter = Small(make_base, dtype).load()
    assert {m.a.dtype for m in adapter.modules.values()} == {dtype}
    assert sum(m.num_parameters for m in adapter.modules.values()) == sum(
        2 * 4 + 2 * rows // 2 + 4 + rows // 2 for rows in (12, 6, 12, 6)
    )


def test_a_regex_names_targets_too(small: Small) -> None:
    digest = small.load().digest
    small.config["target_modules"] = r".*\.[qv]_proj"
    assert small.load().digest == digest


def test_rank_blocks_and_targets_may_follow_from_the_shapes(small: Small) -> None:
    digest = small.load().digest
    for key in ("r", "num_blocks", "target_modules"):
        del small.config[key]
    assert small.load().digest == digest


def test_shapes_that_leave_the_blocks_open_are_refused(small: Small) -> None:
    del small.config["num_blocks"], small.config["r"]
    small.tensors[f"base_model.model.{Q}.lora_A.0.weight"] = torch.zeros(2, 3)
    assert small.reasons() == [
        "no number of blocks fits the shapes of the factors; give r and num_blocks in the configuration"
    ]
    small.config["r"] = 7
    small.tensors[f"base_model.model.{Q}.lora_A.0.weight"] = torch.zeros(2, 4)
    assert small.reasons() == ["the factors have a total rank of 3, but r=7"]


def test_reasons_of_every_sort_come_in_one_message(small: Small) -> None:
    small.config["target_modules"] = ["q_proj", "v_proj", "gate_proj"]
    small.tensors["base_model.model.score.weight"] = torch.zeros(2, 2)
    small.tensors[f"base_model.model.{Q}.lora_A.0.weight"] = torch.zeros(2, 5)
    assert small.reasons(LoadOptions(max_rank=1)) == [
        "score.weight is no factor of a SMOA adapter",
        "target_modules: 'gate_proj' names no linear layer of the base",
        "its widest branch has rank 2, the limit is 1 (--max-lora-rank)",
        f"{Q}.lora_A.0 has shape [2, 5], expected [2, 4]",
    ]


def test_alpha_never_follows_from_the_shapes(small: Small) -> None:
    del small.config["lora_alpha"]
    assert small.reasons() == ["adapter_config.json: the key 'lora_alpha' is missing"]


def test_layers_to_transform_limits_what_must_be_there(small: Small) -> None:
    small.config["layers_to_transform"] = [1]
    small.tensors = {name: t for name, t in small.tensors.items() if ".1.self_attn" in name}
    assert set(small.load().modules) == {f"model.layers.1.self_attn.{m}_proj" for m in "qv"}


def test_harmless_keys_are_ignored_and_null_ones_too(small: Small) -> None:
    small.config |= {"task_type": "CAUSAL_LM", "auto_mapping": None, "something_new": None, "peft_version": "9"}
    assert small.load().rank == 3


def test_unknown_keys_that_may_change_the_maths_are_refused(small: Small) -> None:
    small.config |= {"use_rslora": True, "alpha_pattern": {}}
    reasons = small.reasons()
    assert len(reasons) == 2
    assert "'use_rslora' (True) is not known and may change the maths" in " ".join(reasons)


def test_all_wrong_settings_are_told_at_once(small: Small) -> None:
    small.config |= {"bias": "all", "modules_to_save": ["lm_head"], "r": "3", "num_blocks": 0}
    reasons = " ".join(small.reasons())
    for part in ("trained biases ('all')", "fully trained modules (lm_head)", "r: ", "num_blocks: "):
        assert part in reasons


def test_branch_ranks_must_agree_with_r_and_k(small: Small) -> None:
    small.config["branch_ranks"] = [2, 2]
    assert small.reasons() == ["adapter_config.json: branch_ranks sum to 4, but r=3"]
    small.config["branch_ranks"] = [3]
    assert small.reasons() == ["adapter_config.json: branch_ranks has 1 entries for num_blocks=2"]


def test_missing_extra_and_misshapen_tensors_are_told_at_once(small: Small) -> None:
    prefix = f"base_model.model.{Q}"
    del small.tensors[f"{prefix}.lora_A.0.weight"]
    small.tensors[f"{prefix}.lora_B.1.weight"] = torch.zeros(5, 1)
    small.tensors[f"{prefix}.lora_A.2.weight"] = torch.zeros(1, 4)
    small.tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_A.1.weight"][0, 0] = torch.nan
    assert small.reasons() == [
        f"{Q}.lora_A.0 is missing",
        f"{Q}.lora_A.2 is there, but there are only 2 blocks",
        f"{Q}.lora_B.1 has shape [5, 1], expected [6, 1]",
        "model.layers.0.self_attn.v_proj.lora_A.1: 1 of 4 numbers are not finite (NaN or Inf)",
    ]


def test_infinite_numbers_are_refused(small: Small) -> None:
    small.tensors[f"base_model.model.{Q}.lora_B.0.weight"][1] = torch.inf
    assert small.reasons() == [f"{Q}.lora_B.0: 2 of 12 numbers are not finite (NaN or Inf)"]


def test_tensors_of_a_block_of_rank_zero_are_refused(small: Small) -> None:
    small.config["branch_ranks"] = [3, 0]
    assert f"{Q}.lora_A.1 is there, but this block has rank 0" in small.reasons()


def test_a_target_without_factors_is_refused(small: Small) -> None:
    small.config["target_modules"].append("k_proj")
    assert small.reasons() == [
        f"model.layers.{i}.self_attn.k_proj is a target, but the file has no factors for it" for i in (0, 1)
    ]


def test_targets_that_name_nothing_are_refused(small: Small) -> None:
    small.config["target_modules"].append("gate_proj")
    assert small.reasons() == ["target_modules: 'gate_proj' names no linear layer of the base"]


def test_a_broken_regex_is_refused(small: Small) -> None:
    small.config["target_modules"] = "(q_proj"
    assert "no regular expression" in small.reasons()[0]


def test_factors_that_no_target_names_are_refused(small: Small) -> None:
    small.config["target_modules"] = ["q_proj"]
    assert small.reasons() == [
        f"the file has factors for model.layers.{i}.self_attn.v_proj, which target_modules does not name"
        for i in (0, 1)
    ]


def test_modules_that_the_base_lacks_or_that_are_not_linear_are_refused(small: Small) -> None:
    generator = torch.Generator().manual_seed(0)
    small.add("model.layers.9.self_attn.q_proj", 12, generator, torch.float32)
    small.add("model.embed_tokens", 12, generator, torch.float32)
    assert set(small.reasons()) == {
        "there is no module 'model.layers.9.self_attn.q_proj' in the base",
        "'model.embed_tokens' is an embedding, only linear layers are supported",
    }


def test_tensors_that_are_no_factors_are_refused(small: Small) -> None:
    small.tensors["base_model.model.lm_head.weight"] = torch.zeros(4, 4)
    small.tensors[f"base_model.model.{Q}.bias"] = torch.zeros(4)
    assert small.reasons() == [
        "lm_head.weight is no factor of a SMOA adapter",
        f"{Q}.bias is no factor of a SMOA adapter",
    ]


def test_a_lora_file_that_calls_itself_smoa_is_refused(small: Small) -> None:
    small.tensors = {f"base_model.model.{Q}.lora_{s}.weight": torch.zeros(4, 8) for s in "AB"}
    assert small.reasons() == [f"{Q}.lora_{s}.weight is a LoRA tensor, but peft_type says SMOA" for s in "AB"]


def test_a_file_without_factors_is_refused(small: Small) -> None:
    small.tensors = {}
    assert small.reasons() == ["the file holds no SMoA factors, nothing would be bound"]


def test_a_rank_over_the_limit_is_refused(small: Small) -> None:
    assert "its widest branch has rank 2, the limit is 1" in small.reasons(LoadOptions(max_rank=1))[0]
    assert small.load(LoadOptions(max_rank=2)).max_rank == 2


def test_mixed_dtypes_in_a_module_are_refused(small: Small) -> None:
    name = f"base_model.model.{Q}.lora_A.0.weight"
    small.tensors[name] = small.tensors[name].half()
    assert small.reasons() == [f"{Q}: the factors have several dtypes"]


def test_a_quantized_base_gives_no_order(small: Small) -> None:
    small.write()
    config = {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}
    (small.base_path / "config.json").write_text(json.dumps(config))
    small.base = BaseCheckpoint.open(small.base_path)
    assert "the base is quantized" in small.reasons()[0]


def test_quantized_weights_are_the_only_reason_given(small: Small, make_base: MakeBase) -> None:
    stored = {
        f"{name.removesuffix('weight')}qweight" if "_proj" in name else name: weight.int()
        if "_proj" in name
        else weight
        for name, weight in small.weights.items()
    }
    small.base = BaseCheckpoint.open(make_base(stored, name="quantized"))
    # A Trainer checkpoint has the weights it was trained on beside the factors; they do not help here.
    small.tensors[f"{Q}.weight"] = small.weights[f"{Q}.weight"]
    (reason,) = small.reasons()
    assert "the order of a published SMoA adapter can only be derived from the weights it was trained on" in reason
    assert "smoa-serve convert" in reason


def test_an_unknown_peft_type_is_refused_by_name(small: Small) -> None:
    small.config["peft_type"] = "IA3"
    assert small.reasons() == ["peft_type is 'IA3'; served are HIRA, LORA, SMOA"]
    del small.config["peft_type"]
    assert "peft_type is None" in small.reasons()[0]


def test_pickles_are_read_only_when_allowed_and_only_tensors(small: Small) -> None:
    digest = small.load().digest
    (small.folder / "adapter_model.safetensors").unlink()
    torch.save(small.tensors, small.folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"is a pickle; allow reading it with --allow-pickle"):
        load_adapter(small.folder, small.base)
    assert load_adapter(small.folder, small.base, PICKLE).digest == digest
    torch.save({"config": {"a": [1]}}, small.folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="something else than a dictionary of tensors"):
        load_adapter(small.folder, small.base, PICKLE)
    torch.save({"evil": Path("/")}, small.folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="cannot be read as a dictionary of tensors"):
        load_adapter(small.folder, small.base, PICKLE)


def test_torn_files_are_refused_with_their_name(small: Small) -> None:
    folder = small.write()
    (folder / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors cannot be read"):
        load_adapter(folder, small.base)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"adapter_config\.json cannot be read"):
        load_adapter(folder, small.base)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="does not hold a JSON object"):
        load_adapter(folder, small.base)


def test_a_published_adapter_needs_its_base(small: Small) -> None:
    with pytest.raises(AdapterError, match="can only be read beside its base model"):
        load_adapter(small.write(), None)


def test_nothing_at_the_path_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match="there is no such file or folder"):
        open_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "SMOA"}')
    with pytest.raises(AdapterError, match="there is no weight file"):
        open_adapter(tmp_path)


@pytest.mark.parametrize("name", ["../adapter", "a/b", ".."])
def test_adapter_names_do_not_lead_out_of_the_folder(small: Small, name: str) -> None:
    assert "is no plain name" in small.reasons(LoadOptions(adapter_name=name))[0]


def _trainer(small: Small, cast: torch.dtype = torch.float32) -> Path:
    state = {f"base_model.model.{name}": w.to(cast) for name, w in small.weights.items()}
    for name, tensor in small.tensors.items():
        state[name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")] = tensor
    folder = small.folder.parent / "checkpoint-7"
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def test_a_trainer_checkpoint_needs_a_configuration(small: Small) -> None:
    folder = _trainer(small)
    with pytest.raises(AdapterError, match="give one with --config FILE"):
        load_adapter(folder, small.base, PICKLE)
    (folder / "adapter_config.json").write_text('{"peft_type": "SMOA", "lora_alpha": 6}')
    assert load_adapter(folder, small.base, PICKLE).digest == small.load().digest


def test_a_trainer_checkpoint_of_another_base_is_refused(small: Small) -> None:
    small.weights[f"{Q}.weight"] = small.weights[f"{Q}.weight"] + 1e-3
    folder = _trainer(small)
    (folder / "adapter_config.json").write_text('{"peft_type": "SMOA", "lora_alpha": 6}')
    with pytest.raises(AdapterError, match=f"{Q}: the checkpoint was trained on another base"):
        load_adapter(folder, small.base, PICKLE)


def test_a_trainer_checkpoint_trained_in_another_dtype_gives_the_order_it_was_trained_with(small: Small) -> None:
    folder = _trainer(small, torch.bfloat16)
    (folder / "adapter_config.json").write_text('{"peft_type": "SMOA", "lora_alpha": 6}')
    found = load_adapter(folder, small.base, PICKLE)
    cast = {name: w.bfloat16() for name, w in small.weights.items()}
    save_file(cast, small.base_path / "model.safetensors", metadata={"format": "pt"})
    trained_on = load_adapter(small.write(), BaseCheckpoint.open(small.base_path))
    assert found.digest == trained_on.digest
    assert found.modules[Q].base == small.base.fingerprint(Q)


def test_a_base_cast_for_training_gives_the_order_when_the_dtype_is_told(small: Small) -> None:
    (small.folder.parent / "cast").mkdir()
    cast = {name: w.bfloat16() for name, w in small.weights.items()}
    save_file(cast, small.folder.parent / "cast" / "model.safetensors", metadata={"format": "pt"})
    (small.folder.parent / "cast" / "config.json").write_text('{"model_type": "llama"}')
    trained_on = load_adapter(small.write(), BaseCheckpoint.open(small.folder.parent / "cast"))
    told = small.load(LoadOptions(trained_dtype="bfloat16"))
    assert told.digest == trained_on.digest
    assert told.modules[Q].base == small.base.fingerprint(Q)
    assert small.load(LoadOptions(trained_dtype="float32")).digest == small.load().digest
