"""The file commands: output, exit codes, one clear message instead of a traceback."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from smoa_serve.adapters import open_adapter
from smoa_serve.cli import files


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    files.register(app)
    return app


@pytest.fixture
def llama(vectors: Path) -> Path:
    return vectors / "e2e" / "tiny-llama"


def _run(app: typer.Typer, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_convert_verify_inspect_and_merge_one_adapter(app: typer.Typer, llama: Path, tmp_path: Path) -> None:
    published, base = llama / "adapters/qv_r8_k2", llama / "base"
    done = _run(app, "convert", published, "--out", tmp_path / "p", "--base", base, "--allow-pickle")
    assert done.exit_code == 0, done.output
    assert "portable, 4 layers" in done.output
    done = _run(app, "verify", tmp_path / "p", "--base", base, "--strict-order")
    assert done.exit_code == 0, done.output
    assert "4 layers" in done.output
    assert "names and shapes only" not in done.output
    done = _run(app, "verify", tmp_path / "missing", "--base", base)
    assert done.exit_code == 1
    done = _run(app, "verify", published, "--base", base, "--allow-pickle", "--trained-dtype", "float32")
    assert "names and shapes only" in done.output
    done = _run(app, "convert", tmp_path / "p", "--to", "hira", "--out", tmp_path / "h")
    assert done.exit_code == 0, done.output
    assert open_adapter(tmp_path / "h").kind.value == "hira"
    done = _run(app, "inspect", tmp_path / "p", "--base", base, "--json")
    report = json.loads(done.stdout)
    assert (report["base_match"], report["parameters"]) == ("exact", 3584)
    arguments = ("--base", base, "--adapter", tmp_path / "p", "--out", tmp_path / "m", "--dtype", "bfloat16")
    done = _run(app, "merge", *arguments, "--check")
    assert done.exit_code == 0, done.output
    assert "4 layers merged" in done.output
    assert "largest difference of a logit" in done.output


def test_inspect_prints_a_table_of_layers(app: typer.Typer, llama: Path) -> None:
    done = _run(app, "inspect", llama / "adapters/qv_r8_k2_safetensors")
    assert done.exit_code == 0, done.output
    for part in ("config.lora_alpha", "parameters", "3584", "needs --base"):
        assert part in done.output


def test_a_trainer_checkpoint_is_converted_with_a_configuration(app: typer.Typer, llama: Path, tmp_path: Path) -> None:
    checkpoint = llama / "adapters/qv_r8_k2_trainer/checkpoint-100"
    arguments = ("convert", checkpoint, "--base", llama / "base", "--allow-pickle", "--out", tmp_path / "p")
    assert "--config FILE" in _run(app, *arguments).output
    done = _run(app, *arguments, "--config", llama / "adapters/qv_r8_k2/adapter_config.json")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "adapters/qv_r8_k2", "--base", "base"), "--allow-pickle"),
        (("verify", "adapters/nowhere", "--base", "base"), "there is no such file or folder"),
        (("verify", "adapters/qv_r8_k2_safetensors", "--base", "adapters"), "there is no config.json"),
        (("verify", "adapters/qv_r8_k2_safetensors", "--base", "base", "--max-rank", "1"), "the limit is 1"),
        (
            ("verify", "adapters/qv_r8_k2_safetensors", "--base", "base", "--check-device", "cuda:99"),
            "there is no such device",
        ),
        (("convert", "adapters/qv_r8_k2_safetensors", "--out", "new"), "can only be read beside its base"),
        (("convert", "adapters/qv_r8_k2_safetensors", "--base", "base", "--out", "base"), "not an empty folder"),
        (
            ("merge", "--base", "base", "--adapter", "adapters/qv_r8_k2_safetensors", "--out", "base"),
            "not an empty folder",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes_give_one_message_and_exit_code_1(
    app: typer.Typer, llama: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(llama)
    done = _run(app, *arguments)
    assert done.exit_code == 1
    assert done.output.startswith("error: ")
    assert message in done.output
    assert "Traceback" not in done.output
