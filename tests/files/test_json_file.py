"""JSON that anybody may have written."""

import json
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from smoa_serve.adapters import LoadOptions, load_adapter, open_adapter
from smoa_serve.errors import AdapterError
from smoa_serve.files import json_file
from smoa_serve.files.json_file import JsonError, read_json
from smoa_serve.store import AdapterStore

Q = "model.layers.0.self_attn.q_proj"
SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)

REFUSED = {
    "nested deeply": ("[" * 100_000 + "]" * 100_000, "nested deeper than 64 levels"),
    "nested in a key": ('{"a":' * 200 + "1" + "}" * 200, "nested deeper than 64 levels"),
    "half a surrogate pair": (
        '{"peft_type": "HIRA", "r": 2, "target_modules": ["\\ud800"]}',
        "half of a surrogate pair",
    ),
    "half a pair in a key": ('{"\\udc00": 1}', "half of a surrogate pair"),
    "a key twice": ('{"r": 2, "r": 64}', "the key 'r' is there twice"),
    "no number": ('{"lora_alpha": NaN}', "NaN is no JSON number"),
    "endless": ('{"lora_alpha": -Infinity}', "-Infinity is no JSON number"),
    "too large a number": ('{"lora_alpha": 1e999}', "1e999 is too large"),
    "too long a number": ('{"r": ' + "9" * 5000 + "}", "it is no JSON"),
    "a million keys": ("{" + ",".join(f'"k{i}": 1' for i in range(10**6)) + "}", "1000000 entries, allowed are 100000"),
    "a million names": ('{"target_modules": [' + ",".join(['"q"'] * 10**6) + "]}", "1000000 entries"),
    "a list": ("[1]", "does not hold a JSON object"),
    "nothing": ("", "it is no JSON"),
    "no text": (b"\xff\xfe{}", "it is no JSON"),
}


def hira(folder: Path, config: str | bytes) -> Path:
    """A good weight file beside any configuration."""
    folder.mkdir(exist_ok=True)
    tensors = {f"base_model.model.{Q}.hira_A": torch.randn(2, 4), f"base_model.model.{Q}.hira_B": torch.randn(6, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes(config.encode() if isinstance(config, str) else config)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_no_trainer_writes_is_refused_soon(case: str, tmp_path: Path) -> None:
    text, reason = REFUSED[case]
    path = hira(tmp_path / "adapter", text)
    started = time.process_time()
    read = open_adapter if case == "a million keys" else lambda path, options: load_adapter(path, None, options)
    with pytest.raises(AdapterError, match=f"adapter_config.json cannot be read: .*{reason}") as refused:
        read(path, LoadOptions())
    assert len(str(refused.value).encode()) < 20_000
    assert time.process_time() - started < 60


def test_a_configuration_of_any_size_is_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "BYTES_LIMIT", 1000)
    config = '{"peft_type": "HIRA", "r": 2, "target_modules": ["q_proj"], "note": null, "hira_dropout": "%s"}'
    assert load_adapter(hira(tmp_path / "small", config % ""), None).rank == 2
    with pytest.raises(AdapterError, match="more than 1000 bytes"):
        load_adapter(hira(tmp_path / "large", config % ("x" * 1000)), None)


def test_many_reasons_are_cut(tmp_path: Path) -> None:
    keys = ",".join(f'"new_{i}": "{"x" * 5000}"' for i in range(3000))
    path = hira(tmp_path / "adapter", f'{{"peft_type": "HIRA", "r": 2, {keys}}}')
    with pytest.raises(AdapterError, match="and 2900 more reasons") as refused:
        load_adapter(path, None)
    assert len(refused.value.reasons) == 3000
    assert len(str(refused.value)) < 200_000


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "\u202e", "x" * 2000])
def test_names_that_cannot_be_shown_are_refused(name: str, tmp_path: Path) -> None:
    path = hira(tmp_path / "adapter", '{"peft_type": "HIRA", "r": 2}')
    save_file({f"{name}.hira_A": torch.randn(2, 4)}, path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="is no module's: too long, or not to be printed") as refused:
        load_adapter(path, None)
    assert len(str(refused.value)) < 1000
    assert len(str(refused.value).splitlines()) == 2


@pytest.mark.parametrize("damage", ["[" * 100_000, '{"version": 1, "version": 1}', '{"version": "\\ud800"}', "[]", ""])
def test_a_manifest_that_nobody_writes_is_no_entry(damage: str, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    entry = store.root / f"hira-{'0' * 64}"
    entry.mkdir(parents=True)
    (entry / "manifest.json").write_text(damage)
    assert store.entry(entry) is None


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@SHARED_FOLDER
@given(st.dictionaries(st.text(), plain, max_size=5), st.booleans())
def test_what_json_writes_is_read_as_json_reads_it(tmp_path: Path, value: dict[str, object], ascii_only: bool) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(value, ensure_ascii=ascii_only), encoding="utf-8")
    assert read_json(file) == json.loads(file.read_text(encoding="utf-8"))


@SHARED_FOLDER
@given(st.binary(max_size=60) | st.text('{}[]",:0123eE.-untrlfsaN\\d8 ', max_size=30).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(data)
    try:
        value = read_json(file)
    except JsonError as error:
        str(error).encode("utf-8")  # can be shown
        return
    written = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    assert json.loads(written) == value
