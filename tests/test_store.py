"""Private copies: identity by content, damage, several processes, and LoRA adapters that would be served wrongly."""

import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smoa_serve.adapters import LoadOptions, load_adapter, open_adapter
from smoa_serve.adapters.model import AdapterKind, OrderStatus
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.errors import AdapterError
from smoa_serve.store import AdapterStore, StagedAdapter

MakeBase = Callable[..., Path]
PICKLE = LoadOptions(allow_pickle=True)
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def llama(vectors: Path) -> BaseCheckpoint:
    return BaseCheckpoint.open(vectors / "e2e/tiny-llama/base")


@pytest.fixture
def published(vectors: Path) -> Path:
    return vectors / "e2e/tiny-llama/adapters/paper_targets_r6_k4_safetensors"


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


def test_a_published_adapter_becomes_a_portable_copy(
    store: AdapterStore, llama: BaseCheckpoint, published: Path
) -> None:
    staged = store.stage(store.open(published), llama)
    adapter = load_adapter(staged.path, llama)
    assert (staged.kind, staged.digest) == (AdapterKind.SMOA, adapter.digest)
    assert (staged.rank, staged.max_rank, staged.num_blocks) == (6, 2, 4)
    assert (staged.parameters, staged.bytes) == (
        sum(m.num_parameters for m in adapter.modules.values()),
        adapter.nbytes,
    )
    assert (staged.order, staged.order_error) == (OrderStatus.RECOMPUTED, 0.0)
    assert staged.source == str(published.resolve())
    assert staged.digest in staged.path.name


def test_the_manifest_is_the_one_of_earlier_releases(
    store: AdapterStore, llama: BaseCheckpoint, published: Path
) -> None:
    staged = store.stage(store.open(published), llama)
    file = staged.path / "manifest.json"
    manifest = json.loads(file.read_text())
    facts = {"kind", "digest", "rank", "max_rank", "num_blocks", "parameters", "nbytes", "order", "order_error"}
    assert (manifest["version"], set(manifest["adapter"])) == (1, {*facts, "source"})
    assert manifest["adapter"]["nbytes"] == staged.bytes
    assert store.entry(staged.path) == staged
    file.write_text(json.dumps(manifest | {"adapter": manifest["adapter"] | {"unheard": 1}}))
    assert store.entry(staged.path) is None


def test_the_same_content_is_one_entry_and_an_entry_is_itself(
    store: AdapterStore, llama: BaseCheckpoint, published: Path
) -> None:
    staged = store.stage(store.open(published), llama)
    pickled = published.with_name("paper_targets_r6_k4")
    assert store.stage(store.open(published), llama) == staged
    assert store.stage(store.open(pickled, PICKLE), llama) == staged.model_copy(
        update={"source": str(pickled.resolve())}
    )
    assert store.stage(store.open(staged.path), llama) == staged
    assert len([entry for entry in store.root.iterdir() if entry.is_dir()]) == 1


def test_the_folder_comes_from_the_environment(tmp_path: Path) -> None:
    assert AdapterStore().root == (tmp_path / "smoa-store").resolve()


@pytest.mark.parametrize("damaged", ["adapter_model.safetensors", "adapter_config.json", "manifest.json"])
def test_a_damaged_entry_is_rebuilt_from_the_source(
    store: AdapterStore, llama: BaseCheckpoint, published: Path, damaged: str
) -> None:
    staged = store.stage(store.open(published), llama)
    file = staged.path / damaged
    good = file.read_bytes()
    file.write_bytes(good[:-9] + b"[damaged]")
    with pytest.raises(AdapterError, match="damaged or was never complete"):
        store.stage(store.open(staged.path), llama)
    assert store.stage(store.open(published), llama) == staged
    assert file.read_bytes() == good
    (staged.path / "adapter_model.safetensors").unlink()
    assert store.stage(store.open(published), llama) == staged


def test_an_accepted_adapter_survives_its_source(
    store: AdapterStore, llama: BaseCheckpoint, published: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for file in published.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    staged = store.stage(store.open(own), llama)
    for file in own.iterdir():
        file.unlink()
    assert load_adapter(staged.path, llama).digest == staged.digest


def test_a_refused_adapter_leaves_nothing_behind(store: AdapterStore, vectors: Path, published: Path) -> None:
    other = BaseCheckpoint.open(vectors / "e2e/tiny-qwen2/base")
    copy = AdapterStore(store.root / "first").stage(
        open_adapter(published), BaseCheckpoint.open(vectors / "e2e/tiny-llama/base")
    )
    with pytest.raises(AdapterError, match="another base"):
        store.stage(store.open(copy.path), other)
    with pytest.raises(AdapterError, match="the limit is 1"):
        store.stage(store.open(published, LoadOptions(max_rank=1)), other)
    assert [entry.name for entry in store.root.iterdir()] == ["first"]


def _stage_in_process(root: Path, base: Path, adapter: Path) -> StagedAdapter:
    return AdapterStore(root).stage(open_adapter(adapter), BaseCheckpoint.open(base))


def test_several_processes_may_stage_the_same_adapter(
    store: AdapterStore, llama: BaseCheckpoint, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The parent is a pytest run in importlib mode, whose modules a spawned child cannot import: fork instead.
    torch.set_num_threads(1)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.starmap(_stage_in_process, [(store.root, llama.path, published)] * 6)
    assert len(set(found)) == 1
    assert load_adapter(found[0].path, llama).digest == found[0].digest


def test_equal_factors_for_two_bases_are_two_entries(store: AdapterStore, make_base: MakeBase, tmp_path: Path) -> None:
    from smoa_serve.adapters import write_portable

    weight = torch.randn(6, 4)
    bases = [BaseCheckpoint.open(make_base({f"{Q}.weight": weight + i}, name=f"base{i}")) for i in range(2)]
    hira = _hira(tmp_path, (6, 4))
    plain = load_adapter(hira, bases[0])
    assert store.stage(store.open(hira), bases[0]) == store.stage(store.open(hira), bases[1])
    staged = set()
    for i, base in enumerate(bases):
        marked = replace(plain, modules={Q: replace(plain.modules[Q], base=base.fingerprint(Q))})
        staged.add(store.stage(store.open(write_portable(marked, tmp_path / f"portable{i}")), base).path)
    assert len(staged) == 2


def test_what_a_lying_file_says_is_not_said_of_an_honest_one(
    store: AdapterStore, llama: BaseCheckpoint, published: Path, tmp_path: Path
) -> None:
    from smoa_serve.adapters import write_portable

    honest = load_adapter(published, llama)
    name, update = next(iter(honest.modules.items()))
    lie = dict(honest.modules) | {name: replace(update, order_error=0.9)}
    liar = write_portable(replace(honest, modules=lie, order=OrderStatus.RECORDED, alpha=1e6), tmp_path / "liar")
    first = store.stage(store.open(liar), llama)
    assert (first.order, first.order_error, first.source) == (OrderStatus.RECORDED, 0.9, str(liar.resolve()))
    staged = store.stage(store.open(published), llama)
    assert staged.path == first.path
    assert (staged.order, staged.order_error) == (OrderStatus.RECOMPUTED, 0.0)
    assert staged.source == str(published.resolve())
    assert store.stage(store.open(liar), llama) == first


@pytest.mark.parametrize(
    ("claim", "what"),
    [
        ({"rank": 1}, "a total rank of 6, its configuration says 1"),
        ({"rank": 600}, "a total rank of 6, its configuration says 600"),
        ({"num_blocks": 2}, "have 4 blocks, its configuration says 2"),
        ({"digest": "0" * 64}, "its configuration says '000000000000'"),
    ],
)
def test_a_portable_file_that_lies_about_its_tensors_is_refused(
    llama: BaseCheckpoint, published: Path, tmp_path: Path, claim: dict[str, Any], what: str
) -> None:
    from smoa_serve.adapters import write_portable

    folder = write_portable(load_adapter(published, llama), tmp_path / "liar")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | claim))
    with pytest.raises(AdapterError, match=what):
        load_adapter(folder, llama)


def test_the_rank_of_an_entry_comes_from_its_factors(
    store: AdapterStore, llama: BaseCheckpoint, tmp_path: Path
) -> None:
    folder = _hira(tmp_path, llama.shape(Q))
    config = {"peft_type": "HIRA", "r": 64, "rank_pattern": {"q_proj": 2}, "target_modules": [Q]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert store.stage(store.open(folder), llama).rank == 2


def _hira(folder: Path, shape: tuple[int, int]) -> Path:
    out = folder / "hira"
    out.mkdir()
    tensors = {"A": torch.randn(2, shape[1]), "B": torch.randn(shape[0], 2)}
    save_file(
        {f"base_model.model.{Q}.hira_{side}": t for side, t in tensors.items()}, out / "adapter_model.safetensors"
    )
    (out / "adapter_config.json").write_text(json.dumps({"peft_type": "HIRA", "r": 2, "target_modules": ["q_proj"]}))
    return out


def test_hira_keeps_its_kind(store: AdapterStore, llama: BaseCheckpoint, tmp_path: Path) -> None:
    folder = _hira(tmp_path, llama.shape(Q))
    config = {"peft_type": "HIRA", "r": 2, "target_modules": [Q]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    staged = store.stage(store.open(folder), llama)
    assert (staged.kind, staged.order, staged.num_blocks) == (AdapterKind.HIRA, OrderStatus.NOT_NEEDED, 1)
    assert store.stage(store.open(staged.path), llama) == staged


# --- LoRA ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(llama: BaseCheckpoint, tmp_path: Path) -> Path:
    """A LoRA adapter as PEFT saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama.path)
    targets = ["q_proj", "v_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def _change(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | (tensors or {}), file)
    settings = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def test_lora_is_copied_with_its_scale_and_never_as_a_pickle(
    store: AdapterStore, llama: BaseCheckpoint, lora: Path
) -> None:
    staged = store.stage(store.open(lora), llama)
    assert (staged.kind, staged.rank, staged.max_rank, staged.order) == (AdapterKind.LORA, 4, 4, None)
    state = load_file(lora / "adapter_model.safetensors")
    assert staged.parameters == sum(t.numel() for t in state.values())
    config = json.loads((staged.path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    for name, tensor in load_file(staged.path / "adapter_model.safetensors").items():
        assert torch.equal(tensor, state[name] * (2 if ".lora_B." in name else 1))
    assert store.stage(store.open(staged.path), llama) == staged
    (lora / "adapter_model.safetensors").unlink()
    torch.save(state, lora / "adapter_model.bin")
    with pytest.raises(AdapterError, match="--allow-pickle"):
        store.stage(store.open(lora), llama)
    assert store.stage(store.open(lora, PICKLE), llama) == staged
    assert not list(staged.path.glob("*.bin"))


def test_lora_identity_is_configuration_and_tensors(store: AdapterStore, llama: BaseCheckpoint, lora: Path) -> None:
    first = store.stage(store.open(lora), llama)
    _change(lora, lora_alpha=16)
    second = store.stage(store.open(lora), llama)
    _change(lora, {f"base_model.model.{Q}.lora_B.weight": torch.ones(128, 4)})
    third = store.stage(store.open(lora), llama)
    assert len({first.digest, second.digest, third.digest}) == 3


def test_a_smoa_file_that_calls_itself_lora_is_refused(
    store: AdapterStore, llama: BaseCheckpoint, published: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "liar"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes((published / "adapter_model.safetensors").read_bytes())
    config = json.loads((published / "adapter_config.json").read_text()) | {"peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError) as caught:
        store.stage(store.open(folder), llama)
    text = str(caught.value)
    assert "adapter_config.json has 'num_blocks': this is a SMoA adapter, but peft_type says LORA" in text
    assert f"{Q}.lora_A.0.weight is a SMoA tensor, but peft_type says LORA" in text


def test_lora_tensors_must_fit_the_base(store: AdapterStore, llama: BaseCheckpoint, lora: Path) -> None:
    _change(
        lora,
        {
            f"base_model.model.{Q}.lora_A.weight": torch.zeros(4, 64),
            "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(4, 128),
            "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": torch.zeros(128, 4),
        },
    )
    with pytest.raises(AdapterError) as caught:
        store.stage(store.open(lora), llama)
    assert caught.value.reasons == [
        f"{Q}.lora_A has shape [4, 64], expected [4, 128]",
        "there is no module 'model.layers.7.self_attn.q_proj' in the base",
    ]


def test_lora_halves_and_broken_numbers_are_refused(store: AdapterStore, llama: BaseCheckpoint, lora: Path) -> None:
    _change(
        lora,
        {
            f"base_model.model.{Q}.lora_A.weight": torch.full((4, 128), torch.nan),
            "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(4, 128),
        },
        target_modules=["q_proj", "v_proj", "layers.0.mlp.up_proj"],
    )
    with pytest.raises(AdapterError) as caught:
        store.stage(store.open(lora), llama)
    assert set(caught.value.reasons) == {
        f"{Q}.lora_A: 512 of 512 numbers are not finite (NaN or Inf)",
        "model.layers.0.mlp.up_proj.lora_B is missing",
    }


def test_lora_rank_limit_and_empty_files(store: AdapterStore, llama: BaseCheckpoint, lora: Path) -> None:
    with pytest.raises(AdapterError, match="it has rank 4, the limit is 2"):
        store.stage(store.open(lora, LoadOptions(max_rank=2)), llama)
    save_file({"x.weight": torch.zeros(1)}, lora / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="nothing would be bound"):
        store.stage(store.open(lora), llama)


def test_lora_is_never_parsed_into_our_own_form(llama: BaseCheckpoint, lora: Path) -> None:
    with pytest.raises(AdapterError, match="vLLM reads those itself"):
        load_adapter(lora, llama)


def test_reading_files_imports_no_engine() -> None:
    import subprocess

    code = (
        "import sys, smoa_serve, smoa_serve.store, smoa_serve.offline.convert, smoa_serve.offline.checkpoint\n"
        "import smoa_serve.offline.inspect\n"
        "import smoa_serve.offline.check, smoa_serve.cli.files\n"
        "print(sorted({'vllm', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
