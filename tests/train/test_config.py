"""The YAML configuration: unknown keys are errors, single settings can be changed from outside."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from smoa_serve.errors import ConfigError
from smoa_serve.train import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CONTENT: dict[str, Any] = {
    "base": "b",
    "output": "o",
    "adapter": {"method": "smoa", "r": 8},
    "data": {"train": "a.jsonl"},
}


def written(tmp_path: Path, **changes: Any) -> Path:
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(CONTENT | changes))
    return file


@pytest.mark.parametrize("name", ["train-smoa.yaml", "train-demo.yaml"])
def test_the_examples_are_valid(name: str) -> None:
    config = load_config(CONFIGS / name)
    assert config.adapter.method == "smoa"
    assert config.training.learning_rate in (2e-3, 2e-2)


def test_settings_are_changed_by_dotted_keys(tmp_path: Path) -> None:
    config = load_config(
        written(tmp_path),
        ["adapter.r=16", "training.learning_rate=1e-3", "training.max_steps=7", "data.train=[x, y]", "seed=3"],
    )
    assert (config.adapter.r, config.training.learning_rate, config.training.max_steps, config.seed) == (16, 1e-3, 7, 3)
    assert config.data.train == [Path("x"), Path("y")]
    assert load_config(written(tmp_path)).data.train == [Path("a.jsonl")]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("adapter.rank=4", r"adapter\.rank: this key is not known; Allowed are r, dropout"),
        ("adapter.num_block=4", "did you mean num_blocks"),
        ("training.learning-rate=1", "did you mean learning_rate"),
        ("sed=1", "did you mean seed"),
        ("adapter.method=dora", r"expected tags: 'smoa', 'hira', 'lora'"),
        ("adapter.method=hira", None),
        ("adapter.dropout=1.5", r"adapter\.dropout: Input should be less than 1, found 1\.5"),
        ("training.epochs=0", r"training\.epochs: Input should be greater than 0"),
        ("adapter.r.x=1", r"adapter\.r is a value"),
        ("adapter.r", "is not KEY=VALUE"),
        (
            "adapter={method: lora, target_modules: all-linear, layers_to_transform: 1}",
            "needs target_modules as a list",
        ),
        ("data.train=[]", "at least 1 item"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, assignment: str, message: str | None) -> None:
    if message is None:
        assert load_config(written(tmp_path), [assignment]).adapter.method == "hira"
        return
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path), [assignment])


def test_a_setting_of_another_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.alpha: this key is not known"):
        load_config(written(tmp_path, adapter={"method": "hira", "alpha": 4}))


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("base: x\nadapter: {method: lora, num_blocks: 2}\nsurprise: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    text = str(caught.value)
    assert all(part in text for part in ("output: this key is missing", "data: this key is missing", "surprise"))
    assert "adapter.num_blocks: this key is not known" in text


@pytest.mark.parametrize(("text", "found"), [("", "nothing"), ("- 1\n", "a list"), ("a: [", "cannot be read")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, found: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=found):
        load_config(file)
