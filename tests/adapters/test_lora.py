"""LoRA files: what is accepted computes what PEFT's own loading computes, the rest is refused with the reason."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smoa_serve.adapters import LoadOptions, open_adapter
from smoa_serve.adapters.lora import LoraAdapter
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.errors import AdapterError
from smoa_serve.store import AdapterStore

PREFIX = "base_model.model."
Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
DOWN1, EMBED = "model.layers.1.mlp.down_proj", "model.embed_tokens"
QV = tuple(f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv")
TOKENS = torch.tensor([[13, 97, 88, 114, 5, 31, 64]])
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> BaseCheckpoint:
    return BaseCheckpoint.open(tiny_base)


def factors(base: BaseCheckpoint, ranks: Mapping[str, int], *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random factors of these ranks as PEFT names them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, rank in ranks.items():
        if module == EMBED:
            h_in, h_out = base.tensors[f"{EMBED}.weight"].shape
            names = ("lora_embedding_A", "lora_embedding_B")
        else:
            h_out, h_in = base.shape(module)
            names = ("lora_A.weight", "lora_B.weight")
        tensors[f"{PREFIX}{module}.{names[0]}"] = torch.randn(rank, h_in, generator=generator).to(dtype)
        tensors[f"{PREFIX}{module}.{names[1]}"] = torch.randn(h_out, rank, generator=generator).to(dtype) * 0.1
    return tensors


def written(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path, base: BaseCheckpoint | None, **options: Any) -> LoraAdapter:
    lora: LoraAdapter = open_adapter(folder, LoadOptions(**options)).read(base)
    return lora


@torch.no_grad()
def served(base: BaseCheckpoint, files: LoraAdapter) -> Tensor:
    """Logits with every module's B A added, which is all that the engine does."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    for module, (a, b) in files.factors().items():
        update = b.double() @ a.double()
        weight = model.get_submodule(module).weight
        weight += (update.T if module in files.embeddings else update).float()
    logits: Tensor = model(TOKENS).logits
    return logits


@torch.no_grad()
def by_peft(base: BaseCheckpoint, folder: Path) -> Tensor:
    """Logits of PEFT's own loading; it warns about what it leaves out."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    logits: Tensor = PeftModel.from_pretrained(model, folder).eval()(TOKENS).logits
    return logits


QV4 = dict.fromkeys(QV, 4)
ALL = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "self_attn.k_proj")]
# name → (ranks of the factors, what the configuration says beside PLAIN)
EXACT: dict[str, tuple[Mapping[str, int], dict[str, Any]]] = {
    "plain": (QV4, {}),
    "defaults of r and lora_alpha": (dict.fromkeys(QV, 8), {"r": ..., "lora_alpha": ...}),
    "rslora": (QV4, {"use_rslora": True}),
    "negative alpha": (QV4, {"lora_alpha": -3}),
    "zero alpha": (QV4, {"lora_alpha": 0}),
    "alpha with a fraction": (QV4, {"lora_alpha": 0.7}),
    "rank_pattern by name": (QV4 | {Q0: 2}, {"rank_pattern": {Q0: 2}}),
    "rank_pattern by suffix": (
        {m: 2 if "v_proj" in m else 4 for m in QV},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 12}},
    ),
    "rank_pattern by expression": (QV4 | {V1: 8}, {"rank_pattern": {r"layers\.1\.self_attn\.v.*": 8}}),
    "the first key that matches counts": (
        QV4 | {V1: 8},
        {"rank_pattern": {r"1\.self_attn\.v_proj": 8, "v_proj": 4}, "alpha_pattern": {V1: 1, "self_attn.v_proj": 3}},
    ),
    "anchored with the whole name": (QV4, {"alpha_pattern": {rf"^{Q0}": 24}}),
    "rslora with patterns": (
        QV4 | {Q0: 2},
        {"use_rslora": True, "rank_pattern": {Q0: 2}, "alpha_pattern": {"v_proj": 1.3}},
    ),
    "targets by expression": (QV4, {"target_modules": r".*\.(q|v)_proj"}),
    "a target that is nowhere": (QV4, {"target_modules": ["q_proj", "v_proj", "query_key_value"]}),
    "exclude_modules": (
        {m: 4 for m in QV if m != V1},
        {"exclude_modules": ["layers.1.self_attn.v_proj"]},
    ),
    "layers_to_transform": ({m: 4 for m in QV if ".1." in m}, {"layers_to_transform": [1]}),
    "layers_pattern": (
        {m: 4 for m in QV if ".0." in m},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "init of the factors alone": (QV4, {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}),
    "orthogonal": (QV4, {"init_lora_weights": "orthogonal"}),
    "gaussian": (QV4, {"init_lora_weights": "gaussian"}),
    "not initialised": (QV4, {"init_lora_weights": False}),
    "embedding": (QV4 | {EMBED: 4}, {"target_modules": ["q_proj", "v_proj", "embed_tokens"]}),
    "embedding with patterns": (
        QV4 | {EMBED: 2},
        {"target_modules": ["q_proj", "v_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 2}},
    ),
    "what later releases may add, switched off": (QV4, {"use_later": False, "later_config": None, "later": []}),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_accepted_configurations_compute_what_peft_computes(base: BaseCheckpoint, tmp_path: Path, name: str) -> None:
    ranks, said = EXACT[name]
    config = {key: value for key, value in (PLAIN | said).items() if value is not ...}
    folder = written(tmp_path / "adapter", factors(base, ranks), config)
    files = read(folder, base)
    expected = by_peft(base, folder)
    torch.testing.assert_close(served(base, files), expected, rtol=0, atol=2e-4)
    # The private copy is a LoRA adapter of its own, which reads as itself.
    copy = written(tmp_path / "copy", files.tensors, files.config)
    torch.testing.assert_close(by_peft(base, copy), expected, rtol=0, atol=2e-4)
    assert read(copy, base).digest == files.digest
    plain = written(tmp_path / "plain", load_file(folder / "adapter_model.safetensors"), config | {"peft_version": "9"})
    assert read(plain, base).digest == files.digest


FREEZING = r"(?:[a-z._0-9]+){1,1000}(?!.)\bx?y"  # no engine ends on it without a limit
REFUSED_CONFIG: dict[str, tuple[dict[str, Any], str]] = {
    "r above the tensors' rank": ({"r": 8}, "the factors have rank 4, r or rank_pattern says 8"),
    "r left out": ({"r": ...}, "rank 4, r or rank_pattern says 8"),
    "r 0": ({"r": 0}, "r: "),
    "r negative": ({"r": -4}, "r: "),
    "r true": ({"r": True}, "r: "),
    "r as a text": ({"r": "4"}, "r: "),
    "r null": ({"r": None}, "r is None, expected a number"),
    "alpha null": ({"lora_alpha": None}, "lora_alpha is None, expected a number"),
    "alpha true": ({"lora_alpha": True}, "lora_alpha: "),
    "alpha as a text": ({"lora_alpha": "6"}, "lora_alpha: "),
    "alpha 1e300": ({"lora_alpha": 1e300}, "the factors are not finite in float32"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "adapter_config.json cannot be read: Infinity is no JSON number"),
    "rank_pattern that takes for ever": (
        {"rank_pattern": {FREEZING: 4}},
        "takes more than 2 s",
    ),
    "target_modules that take for ever": (
        {"target_modules": FREEZING},
        "takes more than 2 s",
    ),
    "rank_pattern against the tensors": ({"rank_pattern": {"q_proj": 2}}, "rank 4, r or rank_pattern says 2"),
    "rank_pattern 0": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj"),
    "rank_pattern of texts": ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern.q_proj"),
    "alpha_pattern that is anchored": ({"alpha_pattern": {"^q_proj": 12}}, "'^q_proj' decides for none of the modules"),
    "alpha_pattern of nothing": ({"alpha_pattern": {"nothing": 12}}, "'nothing' decides for none of the modules"),
    "alpha_pattern behind another": ({"alpha_pattern": {"q_proj": 1, Q0: 2}}, "decides for none of the modules"),
    "alpha_pattern that is no expression": ({"alpha_pattern": {"(": 12}}, "expression"),
    "rslora as a text": ({"use_rslora": "no"}, "use_rslora"),
    "trainable_token_indices": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set"),
    "target_parameters": ({"target_parameters": ["mlp.up_proj.weight"]}, "target_parameters: single parameters"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
    "pissa": ({"init_lora_weights": "pissa"}, "'pissa' changes the base weights"),
    "pissa in steps": ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
    "olora": ({"init_lora_weights": "olora"}, "'olora' changes the base weights"),
    "corda": ({"init_lora_weights": "corda"}, "'corda' changes the base weights"),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "'loftq' changes the base weights"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "'lora_ga' changes the base weights"),
    "an init that is not known": ({"init_lora_weights": "xyz"}, "'xyz' changes the base weights"),
    "dora": ({"use_dora": True}, "use_dora is set"),
    "lora_bias": ({"lora_bias": True}, "lora_bias is set"),
    "bias": ({"bias": "lora_only"}, "trained biases ('lora_only')"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "fully trained modules (lm_head)"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is set"),
    "megatron_config": ({"megatron_config": {"a": 1}}, "megatron_config is set"),
    "alora": ({"alora_invocation_tokens": [5, 31]}, "alora_invocation_tokens is set"),
    "arrow": ({"arrow_config": {}}, "arrow_config is set"),
    "tied": ({"ensure_weight_tying": True}, "ensure_weight_tying is set"),
    "qalora": ({"use_qalora": True}, "use_qalora is set"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is set"),
    "kasa": ({"kasa_config": {}}, "kasa_config is set"),
    "monteclora": ({"monteclora_config": {}}, "monteclora_config is set"),
    "a later feature": ({"use_later": True}, "the key 'use_later' (True) is not known and may change the maths"),
    "no targets": ({"target_modules": []}, "target_modules names nothing"),
    "targets left out": ({"target_modules": ...}, "target_modules names nothing"),
    "a target short": ({"target_modules": ["q_proj"]}, f"factors for {V1}, which target_modules does not name"),
    "a target without factors": (
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        f"{DOWN1} is a target, but the file has no factors for it",
    ),
    "excluded": (
        {"exclude_modules": ["layers.1.self_attn.v_proj"]},
        f"factors for {V1}, which target_modules does not",
    ),
    "another layer": ({"layers_to_transform": [0]}, f"factors for {V1}, which target_modules does not name"),
    "layers beside an expression": (
        {"target_modules": ".*(q|v)_proj", "layers_to_transform": [0]},
        "layers_to_transform and layers_pattern go with a list",
    ),
    "a pattern alone": ({"layers_pattern": "layers"}, "layers_pattern goes with layers_to_transform"),
    "targets that are no expression": ({"target_modules": "(q_proj"}, "expression"),
}


@pytest.mark.parametrize("name", REFUSED_CONFIG)
def test_other_configurations_are_refused_with_the_reason(base: BaseCheckpoint, tmp_path: Path, name: str) -> None:
    said, reason = REFUSED_CONFIG[name]
    config = {key: value for key, value in (PLAIN | said).items() if value is not ...}
    folder = written(tmp_path / "adapter", factors(base, QV4), config)
    with pytest.raises(AdapterError) as caught:
        AdapterStore(tmp_path / "store").stage(open_adapter(folder), base)
    assert any(reason in found for found in caught.value.reasons), caught.value.reasons
    # `smoa-serve verify` says the same.
    with pytest.raises(AdapterError) as verified:
        open_adapter(folder).check(base)
    assert verified.value.reasons == caught.value.reasons


def _q0(side: str) -> str:
    return f"{PREFIX}{Q0}.lora_{side}.weight"


def _without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def _with(**tensors: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda found: found | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


REFUSED_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "none at all": (lambda tensors: {}, "the file holds no LoRA factors, nothing would be bound"),
    "A without B": (_without(_q0("B")), f"{Q0}.lora_B is missing"),
    "B without A": (_without(_q0("A")), f"{Q0}.lora_A is missing"),
    "half a file": (
        _without(f"{PREFIX}{V1}.lora_A.weight", f"{PREFIX}{V1}.lora_B.weight"),
        f"{V1} is a target, but the file has no factors for it",
    ),
    "NaN": (lambda t: t | {_q0("A"): t[_q0("A")] * torch.nan}, f"{Q0}.lora_A: 256 of 256 numbers are not finite"),
    "Inf": (lambda t: t | {_q0("B"): t[_q0("B")] / 0}, f"{Q0}.lora_B: "),
    "float64 beyond float32": (
        lambda t: t | {_q0("A"): t[_q0("A")].double() * 1e200},
        f"{Q0}: with its scale of 1.5 the factors are not finite in float32",
    ),
    "whole numbers": (lambda t: t | {_q0("A"): t[_q0("A")].int()}, f"{Q0}.lora_A is int32"),
    "three dimensions": (lambda t: t | {_q0("A"): t[_q0("A")][None]}, f"{Q0}.lora_A has shape [1, 4, 64], expected a"),
    "another width": (lambda t: t | {_q0("A"): torch.ones(4, 32)}, f"{Q0}.lora_A has shape [4, 32], expected [4, 64]"),
    "another height": (lambda t: t | {_q0("B"): torch.ones(32, 4)}, f"{Q0}.lora_B has shape [32, 4], expected [64, 4]"),
    "ranks that differ": (lambda t: t | {_q0("B"): torch.ones(64, 2)}, f"{Q0}.lora_B has shape [64, 2], expected [64"),
    "a module that is not there": (
        _with(model__layers__7__self_attn__q_proj__lora_A__weight=torch.ones(4, 64),
              model__layers__7__self_attn__q_proj__lora_B__weight=torch.ones(64, 4)),
        "there is no module 'model.layers.7.self_attn.q_proj' in the base",
    ),
    "the output head": (
        _with(lm_head__lora_A__weight=torch.ones(4, 64), lm_head__lora_B__weight=torch.ones(512, 4)),
        "lm_head is the output head; adapters on it are not supported",
    ),
    "DoRA's magnitudes": (
        _with(model__layers__0__self_attn__q_proj__lora_magnitude_vector=torch.ones(64)),
        f"{Q0}.lora_magnitude_vector is no factor of a LORA adapter",
    ),
    "a trained bias": (
        _with(model__layers__0__self_attn__q_proj__lora_B__bias=torch.ones(64)),
        f"{Q0}.lora_B.bias is no factor of a LORA adapter",
    ),
    "a trained module": (_with(score__weight=torch.ones(2, 64)), "score.weight is no factor of a LORA adapter"),
    "an embedding that is not the base's": (
        _with(model__embed_tokens__base_layer__weight=torch.ones(3, 64)),
        "model.embed_tokens.base_layer.weight is not the base's",
    ),
    "a factor twice": (
        lambda t: t | {f"_orig_mod.{_q0('A')}": t[_q0("A")].clone()},
        f"the file holds {Q0}.lora_A.weight twice",
    ),
    "a block of SMoA": (
        _with(model__layers__0__self_attn__q_proj__lora_A__0__weight=torch.ones(1, 4)),
        f"{Q0}.lora_A.0.weight is a SMoA tensor, but peft_type says LORA",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_TENSORS)
def test_other_tensors_are_refused_with_the_reason(base: BaseCheckpoint, tmp_path: Path, name: str) -> None:
    change, reason = REFUSED_TENSORS[name]
    folder = written(tmp_path / "adapter", change(factors(base, QV4)), PLAIN)
    with pytest.raises(AdapterError) as caught:
        AdapterStore(tmp_path / "store").stage(open_adapter(folder), base)
    assert any(reason in found for found in caught.value.reasons), caught.value.reasons


def test_every_reason_comes_at_once(base: BaseCheckpoint, tmp_path: Path) -> None:
    tensors = factors(base, QV4) | {"x": torch.ones(1), _q0("A"): torch.full((4, 64), torch.nan)}
    said = {"use_dora": True, "alpha_pattern": {"nothing": 1}, "target_modules": ["q_proj"], "r": 8}
    with pytest.raises(AdapterError) as caught:
        read(written(tmp_path / "adapter", tensors, PLAIN | said), base, max_rank=4)
    text = "\n".join(caught.value.reasons)
    for part in (
        "use_dora",
        "'nothing'",
        V1,
        "not finite",
        "x is no factor",
        "rank 4, r or rank_pattern says 8",
        "limit",
    ):
        assert part in text


def test_names_with_wrappers_bind_to_the_layer_that_is_meant(base: BaseCheckpoint, tmp_path: Path) -> None:
    tensors = factors(base, QV4)
    expected = read(written(tmp_path / "plain", tensors, PLAIN), base).digest
    spellings: dict[str, Callable[[str], str]] = {
        "compiled": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod.").replace(
            ".self_attn", "._orig_mod.self_attn"
        ),
        "compiled outside": lambda name: f"_orig_mod.{name}",
        "without model": lambda name: name.replace("model.layers", "layers"),
        "in a wrapper": lambda name: name.replace("model.layers", "model.language_model.layers"),
        "in a wrapper of before": lambda name: name.replace("model.layers", "language_model.model.layers"),
        "without PEFT's prefix": lambda name: name.removeprefix(PREFIX),
        "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    }
    for spelling, rename in spellings.items():
        folder = written(tmp_path / spelling, {rename(name): t for name, t in tensors.items()}, PLAIN)
        assert read(folder, base).digest == expected, spelling


def test_smoa_and_hira_names_lose_what_torch_compile_puts_before_them(base: BaseCheckpoint, tmp_path: Path) -> None:
    from smoa_serve.adapters import load_adapter

    h_out, h_in = base.shape(Q0)
    pair = {"hira_A": torch.ones(2, h_in), "hira_B": torch.ones(h_out, 2)}
    config = {"peft_type": "HIRA", "r": 2, "target_modules": [Q0]}
    for spelling in (PREFIX, f"{PREFIX}_orig_mod.", f"_orig_mod.{PREFIX}"):
        folder = written(tmp_path / "hira", {f"{spelling}{Q0}.{side}": t for side, t in pair.items()}, config)
        assert list(load_adapter(folder, base).modules) == [Q0]
    twice = {f"{spelling}{Q0}.{side}": t.clone() for spelling in ("", "_orig_mod.") for side, t in pair.items()}
    with pytest.raises(AdapterError, match=f"holds {Q0}.hira_A twice"):
        load_adapter(written(tmp_path / "twice", twice, config), base)


@pytest.mark.parametrize("tensors", ["factors", "none"])
def test_hira_without_targets_or_tensors_is_refused(base: BaseCheckpoint, tmp_path: Path, tensors: str) -> None:
    from smoa_serve.adapters import load_adapter

    h_out, h_in = base.shape(Q0)
    pair = {f"{PREFIX}{Q0}.hira_A": torch.ones(2, h_in), f"{PREFIX}{Q0}.hira_B": torch.ones(h_out, 2)}
    config = {"peft_type": "HIRA", "r": 2, "target_modules": []}
    folder = written(tmp_path / "hira", pair if tensors == "factors" else {}, config)
    with pytest.raises(AdapterError, match="target_modules names nothing"):
        load_adapter(folder, base)


def test_scales_stay_in_the_files_dtype_where_that_is_exact(base: BaseCheckpoint, tmp_path: Path) -> None:
    tensors = factors(base, QV4, dtype=torch.bfloat16)
    for alpha, dtype in ((8, torch.bfloat16), (7, torch.float32)):
        files = read(written(tmp_path / "adapter", tensors, PLAIN | {"lora_alpha": alpha}), base)
        _, b = files.pairs[Q0]
        assert b.dtype == dtype
        assert torch.equal(b.double(), tensors[_q0("B")].double() * alpha / 4)


def test_copies_of_the_bases_embedding_are_left_out(base: BaseCheckpoint, tmp_path: Path) -> None:
    """As PEFT saves beside an adapter on the embedding."""
    weight = base.tensors[f"{EMBED}.weight"].read()
    config = PLAIN | {"target_modules": ["q_proj", "v_proj", "embed_tokens"]}
    tensors = factors(base, QV4 | {EMBED: 4})
    saved = tensors | {f"{PREFIX}{EMBED}.base_layer.weight": weight.bfloat16()}
    files = read(written(tmp_path / "saved", saved, config), base)
    assert set(files.tensors) == set(tensors)
    changed = saved | {f"{PREFIX}{EMBED}.base_layer.weight": weight + 1}
    with pytest.raises(AdapterError, match="is not the base's"):
        read(written(tmp_path / "changed", changed, config), base)


def test_a_file_of_several_adapters_needs_a_choice(base: BaseCheckpoint, tmp_path: Path) -> None:
    one, other = factors(base, QV4), {name: t * 2 for name, t in factors(base, QV4).items()}
    both = {name.replace(".weight", ".one.weight"): t for name, t in one.items()} | {
        name.replace(".weight", ".other.weight"): t for name, t in other.items()
    }
    folder = written(tmp_path / "both", both, PLAIN)
    with pytest.raises(AdapterError, match="choose one with --adapter-name"):
        read(folder, base)
    expected = read(written(tmp_path / "other", other, PLAIN), base).digest
    assert read(folder, base, adapter_name="other").digest == expected
