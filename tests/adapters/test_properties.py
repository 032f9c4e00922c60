"""Reading, writing and naming, for adapters and settings of any kind."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smoa_serve.adapters import LoadOptions, load_adapter, write_hira, write_portable
from smoa_serve.adapters.config import HiraConfig, PortableConfig, PublishedConfig, parse_config
from smoa_serve.adapters.file import file_of
from smoa_serve.adapters.keys import HIRA_KEY, LORA_KEY, PREFIX, SMOA_KEY, sort_tensors
from smoa_serve.adapters.model import Adapter, AdapterKind, ModuleUpdate, OrderStatus
from smoa_serve.adapters.source import Source
from smoa_serve.base.fingerprint import WeightFingerprint
from smoa_serve.cli.serve_vllm import vllm_command
from smoa_serve.errors import AdapterError, AdapterNotFoundError, ConfigError, PathNotAllowedError, SmoaError
from smoa_serve.settings import FIELDS, Settings, load_settings, process_settings
from smoa_serve.sources.local import confine

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)


def refusal(call: Callable[[], object]) -> SmoaError | None:
    """What a call raises; only errors for users are let through."""
    try:
        call()
    except SmoaError as error:
        return error
    return None


names = st.lists(st.text("abz_019", min_size=1, max_size=5), min_size=1, max_size=4).map(".".join)


@st.composite
def updates(draw: st.DrawFn) -> ModuleUpdate:
    """An update of up to 6 x 6 in up to 4 blocks; numbers beyond a block's rank are zero."""
    ranks = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    row_block, col_block = (
        torch.tensor(draw(st.lists(st.integers(0, len(ranks) - 1), min_size=1, max_size=6)), dtype=torch.int16)
        for _ in range(2)
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    live, size = torch.arange(max(ranks))[:, None], torch.tensor(ranks)
    a = torch.randn(max(ranks), col_block.numel(), generator=generator) * (live < size[col_block.long()])
    b = torch.randn(row_block.numel(), max(ranks), generator=generator) * (live < size[row_block.long()]).T
    scaling = draw(st.floats(1e-6, 1e6) | st.floats(-10, 0))
    mark = WeightFingerprint((row_block.numel(), col_block.numel()), "bfloat16", "0" * 64)
    base = draw(st.none() | st.just(mark))
    return ModuleUpdate(a.to(dtype), b.to(dtype), row_block, col_block, tuple(ranks), scaling, base)


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    modules = draw(st.dictionaries(names, updates(), min_size=1, max_size=3))
    rank, blocks = (max(f(m.branch_ranks) for m in modules.values()) for f in (sum, len))
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    return Adapter(
        kind=draw(st.sampled_from([AdapterKind.SMOA, AdapterKind.HIRA])),
        modules=modules,
        rank=rank,
        num_blocks=blocks,
        alpha=draw(st.floats(-1e9, 1e9)),
        order=draw(st.sampled_from(list(OrderStatus))),
        base_model=draw(st.none() | text),
        metadata=draw(st.dictionaries(text, st.none() | text | st.integers(), max_size=3)),
    )


@SHARED_FOLDER
@given(adapters())
def test_the_portable_format_keeps_every_bit(tmp_path: Path, adapter: Adapter) -> None:
    found = load_adapter(write_portable(adapter, tmp_path / "x"), None)
    assert found.digest == adapter.digest
    for field in ("kind", "rank", "num_blocks", "alpha", "order", "base_model", "metadata", "max_rank", "nbytes"):
        assert getattr(found, field) == getattr(adapter, field), field
    for name, update in adapter.modules.items():
        again = found.modules[name]
        assert torch.equal(again.a, update.a)
        assert torch.equal(again.b, update.b)
        assert (again.scaling, again.branch_ranks, again.base) == (update.scaling, update.branch_ranks, update.base)


@SHARED_FOLDER
@given(adapters())
def test_hira_files_compute_the_same_update(tmp_path: Path, adapter: Adapter) -> None:
    if any(not sum(update.branch_ranks) for update in adapter.modules.values()):
        with pytest.raises(AdapterError, match="has rank 0"):
            write_hira(adapter, tmp_path / "none")
        return
    found = load_adapter(write_hira(adapter, tmp_path / "x"), None)
    for name, update in adapter.modules.items():
        ones = torch.ones(update.shape)
        torch.testing.assert_close(
            found.modules[name].dense(ones), update.dense(ones), rtol=1e-4, atol=1e-4 * abs(update.scaling)
        )


@given(st.data())
def test_factor_names_are_sorted_by_module_side_adapter_and_block(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["smoa", "hira", "lora"]))
    pattern = {"smoa": SMOA_KEY, "hira": HIRA_KEY, "lora": LORA_KEY}[kind]
    blocks = st.integers(0, 99_999) if kind == "smoa" else st.just(0)
    labels = st.from_regex(r"[a-z][a-z_]{0,5}", fullmatch=True)
    wanted = data.draw(
        st.dictionaries(
            st.tuples(names, st.sampled_from("AB"), st.none() | labels, blocks),
            st.booleans(),
            max_size=6,
        )
    )
    tensors = {}
    for (module, side, adapter, block), prefixed in wanted.items():
        parts = [module, f"{'hira' if kind == 'hira' else 'lora'}_{side}"]
        parts += [adapter] if adapter else []
        parts += [str(block)] if kind == "smoa" else []
        parts += ["weight"] if kind != "hira" else []
        tensors[(PREFIX if prefixed else "") + ".".join(parts)] = torch.tensor(len(tensors))
    found = sort_tensors(tensors, pattern)
    assert found.others == {}
    sorted_out = {
        (module, side, adapter, block)
        for adapter, modules in found.adapters.items()
        for module, slots in modules.items()
        for side, block in slots
    }
    assert sorted_out == set(wanted)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_any_configuration_is_read_or_refused_by_its_keys(data: st.DataObject) -> None:
    model, good = data.draw(
        st.sampled_from(
            [
                (PublishedConfig, {"peft_type": "SMOA", "lora_alpha": 1.0, "r": 4, "num_blocks": 2}),
                (HiraConfig, {"peft_type": "HIRA", "r": 4, "target_modules": ["q"], "rank_pattern": {"q": 1}}),
                (PortableConfig, {"peft_type": "SMOA", "format": "smoa-serve-portable", "kind": "hira"}),
            ]
        )
    )
    keys = st.sampled_from([*model.model_fields, "unknown", "bias"])
    config = good | data.draw(st.dictionaries(keys, anything, max_size=3))
    unread: Any = None
    source = Source("x", Path("x"), dict(config), unread, LoadOptions())
    for read in (lambda: parse_config(model, "x", dict(config)), lambda: file_of(source).slot_rank()):
        error = refusal(read)
        assert error is None or (isinstance(error, AdapterError) and error.reasons)
        str(error).encode("utf-8")


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[str, str]]:
    """(path, target) of links, and ("path", "") of folders, below a folder that holds "root" and "secret"."""
    paths = st.sampled_from(["root/a", "root/b", "root/c", "root/a/d", "root/b/e", "secret/f"])
    targets = st.sampled_from(
        [
            "",
            "",
            "../secret",
            "../../secret",
            "a",
            "b",
            "../b",
            ".",
            "..",
            "../a/d",
            "/etc",
            "../root",
            "loop",
            "/secret",
        ]
    )
    return draw(st.lists(st.tuples(paths, targets), max_size=7))


@SHARED_FOLDER
@given(
    trees(),
    st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "w", "..", ".", "secret", "root"]), min_size=1, max_size=4),
    st.booleans(),
)
def test_no_tree_of_links_leads_out_of_a_root(
    tmp_path_factory: pytest.TempPathFactory, tree: list[tuple[str, str]], parts: list[str], absolute: bool
) -> None:
    top = tmp_path_factory.mktemp("tree").resolve()
    for folder in ("root", "secret"):
        (top / folder).mkdir()
    (top / "secret" / "adapter_config.json").write_text("{}")
    (top / "secret" / "w").write_text("secret")
    for path, target in tree:
        where = top / path
        if not os.path.lexists(where) and where.parent.is_dir():
            if target:
                where.symlink_to(target.replace("/secret", str(top / "secret"), 1) if target == "/secret" else target)
            else:
                where.mkdir()
                (where / "w").write_text("fine")
    root = top / "root"
    asked = "/".join(parts)
    try:
        found = confine(str(root / asked) if absolute else asked, [root])
    except (PathNotAllowedError, AdapterNotFoundError):
        return
    assert ".." not in parts
    assert found.resolve() == found
    assert found.is_relative_to(root)
    read = found.iterdir() if found.is_dir() else [found, found.parent / "adapter_config.json"]
    assert all(file.resolve().is_relative_to(root) for file in read)


def test_a_weight_file_whose_configuration_leads_out_is_refused(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    (root / "legal").mkdir(parents=True)
    secret.mkdir()
    (secret / "adapter_config.json").write_text("{}")
    weights = root / "legal" / "adapter_model.safetensors"
    weights.write_bytes(b"")
    assert confine(str(weights), [root]) == weights
    (root / "legal" / "adapter_config.json").symlink_to(secret / "adapter_config.json")
    for path in (str(weights), "legal/adapter_model.safetensors", "legal"):
        with pytest.raises(PathNotAllowedError, match=r"adapter_config.json of the adapter .* is a link out"):
            confine(path, [root])


def test_a_folder_that_may_not_be_read_is_refused_and_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root" / "closed").mkdir(parents=True)

    def closed(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    for operation in ("iterdir", "exists"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, operation, closed)
            with pytest.raises(AdapterError, match="permission denied; let the server's user read it"):
                confine("closed", [tmp_path / "root"])
            with pytest.raises(PathNotAllowedError):
                confine(str(tmp_path / "elsewhere"), [tmp_path / "root"])


values = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(values)
def test_any_text_flag_of_the_environment_reaches_vllm_as_it_is(text: str) -> None:
    environment = {"SMOA_SERVE_VLLM_API_KEY": text, "SMOA_SERVE_VLLM_REVISION": text, "SMOA_SERVE_MODEL": "m"}
    if text == "None":
        return
    command = vllm_command(load_settings({}, environment, None)[0], [], {})
    assert command.environment["VLLM_API_KEY"] == text
    assert command.argv[-2:] == ["--revision", text]
    assert "VLLM_API_KEY='***'" in command.shown()


@given(st.dictionaries(st.sampled_from(["X", "MAX_MODEL_LEN", "ADDITIONAL_CONFIG"]), values, max_size=3))
def test_any_variable_is_a_flag_or_refused(variables: dict[str, str]) -> None:
    environment = {f"SMOA_SERVE_VLLM_{name}": value for name, value in variables.items()}
    try:
        argv = vllm_command(load_settings({"model": "m"}, environment, None)[0], [], {}).argv
    except ConfigError:
        return
    assert all(isinstance(argument, str) for argument in argv)


@given(
    st.dictionaries(
        st.sampled_from([name for field in FIELDS.values() for name in field.variables]), values, max_size=3
    )
)
def test_any_environment_is_read_or_refused_by_its_variable(environment: dict[str, str]) -> None:
    error = refusal(lambda: process_settings(environment))
    assert error is None or any(name in str(error) for name in environment)


@given(
    st.dictionaries(
        st.sampled_from([*FIELDS, *Settings.model_fields, "_env_file", "_build_sources", "automerge"]),
        anything,
        max_size=4,
    )
)
@SHARED_FOLDER
def test_any_settings_file_is_read_or_refused(tmp_path: Path, content: dict[str, object]) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(json.dumps(content))
    error = refusal(lambda: load_settings({}, {}, file))
    assert error is None or str(file) in str(error)
