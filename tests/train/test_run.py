"""Whole fine-tunes of a tiny base: what they write, that they go on where they stopped, and their errors."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from smoa_serve.adapters import load_adapter, open_adapter
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.errors import BaseModelError, ConfigError
from smoa_serve.train import run, train
from smoa_serve.train.progress import DivergedError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
QUIET = Console(quiet=True)
METHODS = {
    "smoa": {"method": "smoa", "r": 6, "num_blocks": 3, "alpha": 12},
    "hira": {"method": "hira", "r": 4},
    "lora": {"method": "lora", "r": 4, "alpha": 8},
}
AVAILABLE = [method for method in METHODS if method != "hira" or hasattr(peft, "HiraConfig")]  # PEFT 0.19 has none


@pytest.mark.matrix
@pytest.mark.parametrize("method", AVAILABLE)
def test_every_method_writes_an_adapter_and_a_report(
    make_config: Callable[..., Any], tiny_base: Path, tmp_path: Path, method: str
) -> None:
    config = make_config().model_copy(update={"adapter": _settings(method)})
    shown = io.StringIO()
    report = train(config, Console(file=shown, width=200))
    assert json.loads((tmp_path / "out" / "training_report.json").read_text()) == json.loads(json.dumps(report))
    base = BaseCheckpoint.open(tiny_base)
    summary = open_adapter(tmp_path / "out").summary(base)
    assert (summary.kind, summary.digest) == (method, report["adapter"]["digest"])
    assert report["adapter"]["kind"] == method
    assert report["adapter"]["modules"] == 10
    assert (report["steps"], report["seed"], report["resumed_from_step"]) == (4, 0, None)
    assert report["loss"]["last"] < report["loss"]["first"]
    assert len(report["loss"]["curve"]) == 4
    assert report["examples"] == {"used": 12, "cut": 0, "dropped": 0}
    assert report["tokens"]["seen"] == pytest.approx(report["tokens"]["of_one_epoch"] * 4 / 3, rel=0.5)
    assert report["config"]["adapter"]["method"] == method
    assert len(report["base"]["fingerprint"]) == 64
    assert "step 4/4: loss" in shown.getvalue()
    assert not list(tmp_path.glob("out/tmp*"))


def test_a_second_run_is_the_same_to_the_bit_and_another_seed_is_not(make_config: Callable[..., Any]) -> None:
    digests = [
        train(make_config(output, seed=seed), QUIET)["adapter"]["digest"]
        for output, seed in (("one", 0), ("two", 0), ("three", 1))
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.matrix
@pytest.mark.parametrize("method", AVAILABLE)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    from smoa_serve.peft import layer

    def config(output: str) -> Any:
        return make_config(output, training={"max_steps": 7, "save_every": 2}).model_copy(
            update={"adapter": _settings(method)}
        )

    expected = train(config("straight"), QUIET)["adapter"]["digest"]

    class Interruption(run.ProgressCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "ProgressCallback", Interruption)
        with pytest.raises(KeyboardInterrupt):
            train(config("broken"), QUIET)

    def no_order(*_: object) -> None:
        raise AssertionError("an order was computed")

    monkeypatch.setattr(layer, "spectral_pieces", no_order)
    report = train(config("broken"), QUIET, resume=True)
    assert report["resumed_from_step"] == 4
    assert report["steps"] == 7
    assert report["adapter"]["digest"] == expected


def _settings(method: str) -> Any:
    from smoa_serve.train.config import HiraSettings, LoraSettings, SmoaSettings

    classes: dict[str, Any] = {"smoa": SmoaSettings, "hira": HiraSettings, "lora": LoraSettings}
    return classes[method](**METHODS[method])


def test_only_the_same_fine_tune_can_be_resumed(make_config: Callable[..., Any], write_data: Any) -> None:
    config = make_config()
    with pytest.raises(ConfigError, match="start without --resume"):
        train(config, QUIET, resume=True)
    train(config, QUIET)
    with pytest.raises(ConfigError, match="exists and is not an empty folder; go on with it"):
        train(config, QUIET)
    changed = make_config(adapter={"method": "smoa", "r": 8}, training={"max_steps": 5, "learning_rate": 0.5})
    with pytest.raises(ConfigError, match=r"adapter\.r was 4, now 8; .*learning_rate was 0\.02, now 0\.5"):
        train(changed, QUIET, resume=True)
    longer = make_config(training={"max_steps": 6})
    assert train(longer, QUIET, resume=True)["steps"] == 6
    write_data({"text": "Other."})
    with pytest.raises(ConfigError, match=r"the content of .* has changed"):
        train(longer, QUIET, resume=True)


def test_the_stored_weights_are_recorded_whatever_the_dtype_in_memory(
    make_config: Callable[..., Any], tiny_base: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    half = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).save_pretrained(half)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (half / file).write_bytes((tiny_base / file).read_bytes())
    for dtype in ("auto", "float32"):
        config = make_config(dtype, base=str(half), dtype=dtype)
        train(config, QUIET)
        adapter = load_adapter(config.output, BaseCheckpoint.open(half))
        assert all(update.base is not None and update.base.dtype == "bfloat16" for update in adapter.modules.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"training": {"gradient_checkpointing": True, "gradient_accumulation": 2, "schedule": "linear"}},
        {"training": {"schedule": "constant", "warmup_steps": 2, "evaluate_every": 2}, "validation": True},
        {
            "adapter": {
                "method": "smoa",
                "order": "published",
                "layers_to_transform": [1],
            }
        },
    ],
    ids=["bf16", "checkpointing", "validation", "published-order"],
)
def test_settings_reach_the_trainer(
    make_config: Callable[..., Any], write_data: Callable[..., Path], tiny_base: Path, settings: dict[str, Any]
) -> None:
    settings = dict(settings)
    if settings.pop("validation", False):
        settings["data"] = {"validation": [str(write_data({"text": "Fish."}, name="v.jsonl"))]}
    config = make_config(**settings)
    report = train(config, QUIET)
    assert report["loss"]["last"] < report["loss"]["first"]
    assert len(report["loss"]["validation"]) == (2 if config.data.validation else 0)
    modules = load_adapter(config.output, BaseCheckpoint.open(tiny_base)).modules
    assert len(modules) == (5 if config.adapter.layers_to_transform else 10)


def test_targets_that_are_not_there_are_named_with_those_that_are(make_config: Callable[..., Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"target_modules: qkv names no linear layer .* there are down_proj, gate_proj"
    ):
        train(make_config(adapter={"target_modules": ["q_proj", "qkv"]}), QUIET)
    with pytest.raises(ConfigError, match="is no regular expression"):
        train(make_config(adapter={"target_modules": "(q"}), QUIET)
    with pytest.raises(ConfigError, match="leave no layer to train"):
        train(make_config(adapter={"layers_to_transform": [9]}), QUIET)


def test_a_method_that_this_peft_does_not_know_is_named(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(peft, "HiraConfig", raising=False)
    config = make_config().model_copy(update={"adapter": _settings("hira")})
    with pytest.raises(ConfigError, match=r"HiRA came with PEFT 0\.20, this is"):
        train(config, QUIET)


def test_a_missing_base_is_named(make_config: Callable[..., Any]) -> None:
    with pytest.raises(BaseModelError, match="no/such/base"):
        train(make_config(base="no/such/base"), QUIET)


def test_a_base_that_cannot_be_trained_is_named(
    make_config: Callable[..., Any], tiny_base: Path, tmp_path: Path
) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_base, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(BaseModelError, match=r"bare': its tokenizer cannot be read"):
        train(make_config(base=str(bare)), QUIET)
    strange = tmp_path / "strange"
    shutil.copytree(tiny_base, strange)
    settings = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(settings | {"model_type": "no-such-model"}))
    with pytest.raises(BaseModelError, match=r"strange': (its tokenizer cannot be read|transformers cannot load it)"):
        train(make_config(base=str(strange)), QUIET)
    quantized = tmp_path / "quantized"
    shutil.copytree(tiny_base, quantized)
    (quantized / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ConfigError, match=r"quantized' is quantized; train on the float checkpoint"):
        train(make_config(base=str(quantized)), QUIET)


def test_a_run_that_ended_before_its_first_checkpoint_leaves_nothing_in_the_way(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Early(run.ProgressCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "ProgressCallback", Early)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(), QUIET)
    assert train(make_config(), QUIET)["steps"] == 4


def test_a_loss_that_is_no_number_ends_the_training(make_config: Callable[..., Any]) -> None:
    config = make_config(training={"learning_rate": 1e30, "max_grad_norm": 1e30})
    with pytest.raises(DivergedError, match=r"loss is (nan|inf) at step \d: lower training\.learning_rate"):
        train(config, QUIET)


def test_the_command(make_config: Callable[..., Any], tmp_path: Path) -> None:
    import yaml

    from smoa_serve.cli.app import app

    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(make_config().model_dump(mode="json", exclude_none=True)))
    result = CliRunner().invoke(app, ["train", str(file), "--set", "training.max_steps=2"])
    assert result.exit_code == 0, result.output
    assert "2 steps" in result.output
    assert "digest" in result.output
    failed = CliRunner().invoke(app, ["train", str(file), "--set", "adapter.ranks=2"])
    assert isinstance(failed.exception, ConfigError)
