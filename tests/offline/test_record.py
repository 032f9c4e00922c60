"""A merged checkpoint knows what it holds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.cli.app import app
from smoa_serve.errors import AdapterError, BaseModelError
from smoa_serve.offline.checkpoint import load_deltas, merge
from smoa_serve.offline.convert import TargetFormat, convert
from smoa_serve.offline.record import RECORD_NAME, merged_note, read_record

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(make_base: Callable[..., Path]) -> BaseCheckpoint:
    generator = torch.Generator().manual_seed(0)
    return BaseCheckpoint.open(make_base({f"{Q}.weight": torch.randn(6, 4, generator=generator)}, name="base"))


def adapter(folder: Path, kind: str, seed: int, **config: object) -> Path:
    """A HiRA, LoRA or published SMoA adapter of one layer, as trainers write it."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    names = {"HIRA": "hira_{}", "LORA": "lora_{}.weight", "SMOA": "lora_{}.0.weight"}
    shapes = {"A": (2, 4), "B": (6, 2)}
    tensors = {names[kind].format(side): torch.randn(*shape, generator=generator) for side, shape in shapes.items()}
    save_file({f"base_model.model.{Q}.{n}": t for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    settings = {"HIRA": {}, "LORA": {"lora_alpha": 2}, "SMOA": {"lora_alpha": 2.0, "num_blocks": 1}}[kind]
    shared = {"peft_type": kind, "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(shared | settings | config))
    return folder


def merged(base: BaseCheckpoint, path: Path, out: Path, *, force: bool = False) -> BaseCheckpoint:
    return BaseCheckpoint.open(merge(base, load_deltas(path, base), out, force=force).path)


@pytest.mark.parametrize("kind", ["HIRA", "LORA", "SMOA"])
def test_the_same_adapter_is_not_merged_twice(base: BaseCheckpoint, tmp_path: Path, kind: str) -> None:
    path = adapter(tmp_path / "legal", kind, 1)
    once = merged(base, path, tmp_path / "once")
    (entry,) = read_record(once).adapters
    assert (entry.name, entry.kind, read_record(once).base) == ("legal", kind.lower(), "base")
    with pytest.raises(AdapterError, match=r"merged into 'once' before, as 'legal'\n.*with --force"):
        merged(once, path, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()
    twice = merged(once, path, tmp_path / "twice", force=True)
    assert [entry.name for entry in read_record(twice).adapters] == ["legal", "legal"]
    assert not torch.equal(twice.weight(Q), once.weight(Q))


def test_a_converted_copy_of_what_is_merged_is_the_same(base: BaseCheckpoint, tmp_path: Path) -> None:
    path = adapter(tmp_path / "legal", "HIRA", 1)
    once = merged(base, path, tmp_path / "once")
    convert(path, tmp_path / "copy", TargetFormat.PORTABLE, None)
    with pytest.raises(AdapterError, match="merged into 'once' before, as 'legal'"):
        merged(once, tmp_path / "copy", tmp_path / "twice")


def test_one_that_names_another_base_wants_force(base: BaseCheckpoint, tmp_path: Path) -> None:
    once = merged(base, adapter(tmp_path / "legal", "HIRA", 1), tmp_path / "once")
    other = adapter(tmp_path / "other", "HIRA", 2, base_model_name_or_path="somebody/base")
    with pytest.raises(AdapterError, match="trained on 'somebody/base', and 'once' holds 'legal' besides"):
        merged(once, other, tmp_path / "twice")
    merged(once, other, tmp_path / "forced", force=True)
    on_it = adapter(tmp_path / "on-it", "HIRA", 3, base_model_name_or_path="/models/Once")
    assert [entry.name for entry in read_record(merged(once, on_it, tmp_path / "twice")).adapters] == ["legal", "on-it"]
    assert merged(base, other, tmp_path / "plain").path.name == "plain"


def test_one_of_another_shape_is_refused_whatever_is_forced(base: BaseCheckpoint, tmp_path: Path) -> None:
    path = adapter(tmp_path / "legal", "HIRA", 1)
    tensors = load_file(path / "adapter_model.safetensors")
    wider = {name: torch.cat([t, t], -1) if "hira_A" in name else t for name, t in tensors.items()}
    once = merged(base, path, tmp_path / "once")
    save_file(wider, path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"has shape \[2, 8\], expected \[2, 4\]"):
        merged(once, path, tmp_path / "twice", force=True)


def test_a_record_that_cannot_be_read_is_an_error(base: BaseCheckpoint, tmp_path: Path) -> None:
    once = merged(base, adapter(tmp_path / "legal", "HIRA", 1), tmp_path / "once")
    for text in ("{", '{"base": 1}', "[" * 100_000):
        (once.path / RECORD_NAME).write_text(text)
        with pytest.raises(BaseModelError, match=f"{RECORD_NAME} cannot be read"):
            merged_note(once)


def test_the_commands_warn_of_a_base_that_holds_an_adapter(base: BaseCheckpoint, tmp_path: Path) -> None:
    path = adapter(tmp_path / "legal", "HIRA", 1)
    once = merged(base, path, tmp_path / "once")
    warning = "warning: base model 'once' holds merged adapters ('legal')"
    run = CliRunner().invoke
    assert warning in run(app, ["verify", str(path), "--base", str(once.path)]).output
    assert warning not in run(app, ["verify", str(path), "--base", str(base.path)]).output
    assert warning in run(app, ["convert", str(path), "--base", str(once.path), "--out", str(tmp_path / "a")]).output
    command = ["merge", "--base", str(once.path), "--adapter", str(path), "--out", str(tmp_path / "b")]
    refused = run(app, command)
    assert refused.exit_code == 1
    assert warning in refused.output
    assert "with --force it is merged all the same" in refused.output
    assert run(app, [*command, "--force"]).exit_code == 0
