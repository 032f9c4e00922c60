"""`smoa-serve serve`: settings and their precedence, and the vLLM command they become."""

import json
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smoa_serve.adapters import LoadOptions, open_adapter
from smoa_serve.cli import serve as serve_command
from smoa_serve.cli.adapter_limits import adapters_in, allowed_rank, default_limits
from smoa_serve.cli.app import app, main
from smoa_serve.cli.serve_vllm import plugin_names, vllm_command
from smoa_serve.errors import AdapterError, CompatibilityError, ConfigError
from smoa_serve.settings import FIELDS, Settings, load_settings, process_settings
from smoa_serve.settings.vllm_flags import SECRET_FLAGS, TEXT_FLAGS, revealed

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LORA = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}
PUBLISHED = {"peft_type": "SMOA", "r": 32, "num_blocks": 3, "lora_alpha": 32}

MakeAdapter = Callable[..., Path]


def vllms_flags() -> dict[str, Any]:
    """vLLM's own flags -> what its parser does with them."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    places = ("vllm.entrypoints.launchers", "vllm.entrypoints.openai")  # from 0.32, before
    place = next(place for place in places if find_spec(place) and find_spec(f"{place}.cli_args"))
    parser = import_module(f"{place}.cli_args").make_arg_parser(FlexibleArgumentParser())
    return {flag: action for action in parser._actions for flag in action.option_strings}


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    """A folder that looks like an adapter from outside."""

    def make(name: str, config: Mapping[str, object]) -> Path:
        folder = tmp_path / "adapters" / name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "adapter_model.safetensors").write_bytes(b"")
        return folder

    return make


def settings_from(yaml: str, tmp_path: Path, environment: Mapping[str, str], **flags: object) -> Settings:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml)
    return load_settings(flags, environment, file)[0]


def settings_of(environment: Mapping[str, str], **flags: object) -> Settings:
    return load_settings(flags, environment, None)[0]


def opened(settings: Settings) -> dict[str, Any]:
    """vLLM's flags with their secrets."""
    return {name: revealed(value) for name, value in settings.vllm.items()}


def test_flag_wins_over_environment_over_yaml_over_default(tmp_path: Path) -> None:
    yaml = "model: from-yaml\nstrict-order: true\nallow_pickle: true\nvllm: {port: 1, max-model-len: 2, dtype: float32}"
    environment = {
        "SMOA_SERVE_MODEL": "from-environment",
        "SMOA_SERVE_STRICT_ORDER": "0",
        "SMOA_SERVE_VLLM_PORT": "3",
        "SMOA_SERVE_VLLM_MAX_MODEL_LEN": "4",
    }
    settings = settings_from(yaml, tmp_path, environment, model="from-flag")
    assert settings.model == "from-flag"
    assert settings.adapters.strict_order is False
    assert settings.adapters.allow_pickle is True
    assert settings.adapters.allow_hub is False
    assert settings.vllm == {"port": 3, "max-model-len": 4, "dtype": "float32"}


VALUES = {"adapter": "a=/x", "adapters_root": "/x", "others_get": "exclusive"}


def invoked(*arguments: str) -> Settings:
    """What the command reads from its flags alone."""
    read: list[Settings] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SMOA_")]:
            patch.delenv(name)
        patch.setattr(serve_command, "vllm_command", lambda settings, *_: read.append(settings))
        patch.setattr(serve_command, "run_vllm", lambda _: None)
        result = CliRunner().invoke(app, ["serve", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return read[0]


@pytest.mark.parametrize("field", FIELDS)
def test_one_field_is_a_flag_a_key_a_variable_and_a_place_in_the_tree(field: str, tmp_path: Path) -> None:
    declared, default = FIELDS[field], FIELDS[field].info.get_default()
    number = "7" if declared.holds(int) or declared.holds(float) else "thing"
    value = VALUES.get(field, str(not default).lower() if declared.holds(bool) else number)
    settings = settings_of({declared.variables[0]: value})
    branch = getattr(settings, declared.section) if declared.section else settings
    assert getattr(branch, field) != default
    for variable in declared.variables[1:]:
        assert settings_of({variable: value}) == settings
    section, _, name = declared.key.rpartition(".")
    assert settings_from(f"{name}: {value}", tmp_path, {}) == settings
    assert settings_from(f"{section}: {{{name}: {value}}}" if section else f"{name}: {value}", tmp_path, {}) == settings
    assert settings_of({"SMOA_SETTINGS": settings.handed_on()}) == settings
    switch = f"--no-{name}" if value == "false" else f"--{name}"
    flags = [switch] if declared.holds(bool) else [f"--{name}", value]
    assert invoked(*flags if section else [value]) == settings


def test_adapters_of_all_sources_are_merged_by_name(tmp_path: Path) -> None:
    environment = {"SMOA_SERVE_ADAPTER": "b=/env c=/env"}
    settings = settings_from("adapter: {a: /yaml, b: /yaml}", tmp_path, environment, adapter=["c=/flag"])
    assert settings.adapters.adapter == {"a": "/yaml", "b": "/env", "c": "/flag"}


def test_the_settings_file_can_be_named_in_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("model: m")
    assert settings_of({"SMOA_SERVE_CONFIG": str(file), "SMOA_SERVE_REQUIRED": "1"}).model == "m"


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("modle: x", "'modle' is not known; the nearest is 'model'"),
        ("max-model-len: 3", "'max-model-len' is not known.*belong under 'vllm'"),
        ("adapters-roots: [/x]", "the nearest is 'adapters-root'"),
        ("strict-order: perhaps", "strict-order: .*found 'perhaps'"),
        ("adapter: [a]", "'a' is not NAME=PATH"),
        ("adapter: [a=/x, a=/y]", "'a' is given twice"),
        ("- a\n- b", "holds no mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_file_says_what_is_allowed(yaml: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_from(yaml, tmp_path, {})


def test_an_unknown_variable_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="ADAPTER_DIR is not known; the nearest is SMOA_SERVE_ADAPTERS_DIR"):
        settings_of({"SMOA_SERVE_ADAPTER_DIR": "/x"})


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        (LORA, 8),
        (LORA | {"rank_pattern": {"q_proj": 24}}, 24),
        (PUBLISHED, 11),
        (PUBLISHED | {"r": None, "num_blocks": None, "branch_ranks": [3, 20]}, 20),
        ({"peft_type": "HIRA", "r": 12, "target_modules": ["q_proj"]}, 12),
    ],
)
def test_slot_rank_is_the_widest_branch(config: Mapping[str, object], rank: int, make_adapter: MakeAdapter) -> None:
    assert open_adapter(make_adapter("a", config)).slot_rank() == rank


def test_a_configuration_without_rank_asks_for_the_flag(make_adapter: MakeAdapter) -> None:
    folder = make_adapter("a", PUBLISHED | {"r": None})
    with pytest.raises(AdapterError, match="--max-lora-rank"):
        open_adapter(folder).slot_rank()
    settings = Settings(model="m", adapters={"adapter": {"a": str(folder)}})
    given = ["--max-lora-rank", "32", "--max-loras=2", "--max_cpu_loras", "4"]
    assert vllm_command(settings, given, {}).argv[-len(given) :] == given


def test_allowed_rank_is_vllms_next() -> None:
    assert [allowed_rank(n) for n in (1, 8, 9, 33, 257, 512)] == [8, 8, 16, 64, 320, 512]
    with pytest.raises(ConfigError, match="at most 512"):
        allowed_rank(513)


def test_allowed_ranks_are_vllms() -> None:
    from typing import get_args

    from vllm.config import lora

    from smoa_serve.cli.adapter_limits import ALLOWED_RANKS

    assert set(ALLOWED_RANKS) <= set(get_args(lora.MaxLoRARanks))


def test_limits_follow_from_the_adapters(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapters = {"a": str(make_adapter("a", PUBLISHED)), "b": str(make_adapter("b", LORA))}
    assert default_limits(adapters, [], LoadOptions()) == {"max-loras": 2, "max-cpu-loras": 6, "max-lora-rank": 16}
    with_roots = default_limits({"b": adapters["b"]}, [tmp_path], LoadOptions())
    assert with_roots == {"max-loras": 4, "max-cpu-loras": 8, "max-lora-rank": 16}
    assert default_limits({"b": adapters["b"]}, [], LoadOptions())["max-lora-rank"] == 8


def test_adapters_dir_gives_every_adapter_below_its_name(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    make_adapter("a", LORA)
    make_adapter("b", PUBLISHED)
    (tmp_path / "adapters" / "notes").mkdir()
    assert sorted(adapters_in(tmp_path / "adapters")) == ["a", "b"]
    with pytest.raises(ConfigError, match="no sub-folder has an"):
        adapters_in(tmp_path / "adapters" / "notes")
    with pytest.raises(ConfigError, match="no such folder"):
        adapters_in(tmp_path / "nothing")


def test_an_adapters_dir_that_may_not_be_read_is_one_clear_error(
    make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter("a", LORA)

    def closed(path: Path, *_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    for operation in ("is_dir", "iterdir", "is_file"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, operation, closed)
            with pytest.raises(ConfigError, match=r"--adapters-dir .* cannot be read: Permission denied"):
                adapters_in(tmp_path / "adapters")


def test_the_command_is_vllm_serve_with_adapters(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    folder, extra = make_adapter("a", LORA), make_adapter("b", LORA)
    adapters = {"adapter": {"x": str(folder)}, "adapters_dir": extra.parent}
    settings = Settings(model="base", adapters=adapters, vllm={"port": 1, "enforce-eager": True})
    command = vllm_command(settings, ["--port", "2", "-tp", "2"], {})
    argv = command.argv
    assert argv[:4] == ["vllm", "serve", "base", "--lora-modules"]
    modules = [json.loads(item) for item in argv[4:7]]
    assert modules == [{"name": n, "path": str(p)} for n, p in (("a", folder), ("b", extra), ("x", folder))]
    assert "--enable-lora" in argv
    assert argv[-4:] == ["--port", "2", "-tp", "2"]
    assert argv.index("--enforce-eager") < argv.index("-tp")
    assert argv[argv.index("--max-loras") + 1] == "4"
    assert argv[argv.index("--api-server-count") + 1] == "1"


@pytest.mark.parametrize(
    ("value", "flags"),
    [
        (True, ["--x"]),
        (False, ["--no-x"]),
        (None, []),
        (3, ["--x", "3"]),
        ([1, "b"], ["--x", "1", "b"]),
        ({"a": 1}, ["--x", '{"a": 1}']),
    ],
)
def test_vllm_values_become_flags(value: object, flags: list[str]) -> None:
    argv = vllm_command(Settings(model="m", vllm={"x": value}), [], {}).argv
    assert argv[-len(flags) :] == flags if flags else "--x" not in argv


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(ConfigError, match="no base model"):
        vllm_command(Settings(), [], {})
    with pytest.raises(ConfigError, match="--adapter NAME=PATH"):
        vllm_command(Settings(model="m"), ["--lora-modules", "a=b"], {})
    with pytest.raises(ConfigError, match="--grpc"):
        vllm_command(Settings(model="m"), ["--grpc"], {})
    with pytest.raises(ConfigError, match=r"'a/\.\./b' cannot be used.*'pin' cannot be used"):
        vllm_command(Settings(model="m", adapters={"adapter": {"a/../b": "x", "pin": "y"}}), [], {})
    with pytest.raises(CompatibilityError, match="VLLM_USE_RUST_FRONTEND=1"):
        vllm_command(Settings(model="m"), [], {"VLLM_USE_RUST_FRONTEND": "1"})
    with pytest.raises(ConfigError, match="no such folder"):
        vllm_command(Settings(model="m", adapters={"adapters_root": ["/does/not/exist"]}), [], {})


def test_the_plugin_reads_what_the_command_sets(tmp_path: Path) -> None:
    settings = Settings(model="m", adapters={"adapters_root": [tmp_path], "allow_pickle": True, "strict_order": True})
    environment = vllm_command(settings, [], {"SMOA_ADAPTER_ROOTS": "/elsewhere"}).environment
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment
    read = process_settings(environment)
    adapters = read.adapters
    assert adapters.adapters_root == (tmp_path.resolve(), Path("/elsewhere"))
    assert (adapters.allow_pickle, adapters.strict_order, adapters.allow_hub) == (True, True, False)
    assert read.engine.required is True


def test_plugins_that_were_chosen_stay_chosen() -> None:
    assert plugin_names("mine, other") == "mine,other,smoa_serve"
    assert plugin_names("smoa_serve") == "smoa_serve"
    assert plugin_names("") == "smoa_serve"


def test_without_a_choice_all_installed_plugins_stay() -> None:
    from importlib.metadata import entry_points

    names = plugin_names(None).split(",")
    assert names.count("smoa_serve") == 1
    assert {entry.name for entry in entry_points(group="vllm.general_plugins")} <= set(names)


@pytest.mark.parametrize("key", ["0123", "null", "1.10", "true", "~", "[a", "{a: b}", "1e3", "2024-01-01", "-x"])
def test_a_key_in_the_environment_is_taken_as_it_stands(key: str) -> None:
    settings = settings_of({"SMOA_SERVE_VLLM_API_KEY": key}, model="m")
    assert opened(settings) == {"api-key": key}
    command = vllm_command(settings, [], {})
    assert command.environment["VLLM_API_KEY"] == key
    assert "--api-key" not in command.argv


@pytest.mark.parametrize("flag", ["revision", "tokenizer", "served-model-name", "root-path", "host"])
@pytest.mark.parametrize("text", ["0123", "null", "1.10", "true"])
def test_text_flags_stay_text(flag: str, text: str) -> None:
    name = f"SMOA_SERVE_VLLM_{flag.upper().replace('-', '_')}"
    settings = settings_of({name: text}, model="m")
    assert vllm_command(settings, [], {}).argv[-2:] == [f"--{flag}", text]


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("0123", ["--x", "0123"]),
        ("null", ["--x", "null"]),
        ("1.10", ["--x", "1.10"]),
        ("1_000", ["--x", "1_000"]),
        ("16", ["--x", "16"]),
        ("true", ["--x"]),
        ("false", ["--no-x"]),
        ("[1, 1.10]", ["--x", "1", "1.1"]),
        ('{"a": 1}', ["--x", '{"a": 1}']),
        ("word", ["--x", "word"]),
    ],
)
def test_variables_become_flags_without_being_rewritten(text: str, flags: list[str]) -> None:
    settings = settings_of({"SMOA_SERVE_VLLM_X": text}, model="m")
    assert vllm_command(settings, [], {}).argv[-len(flags) :] == flags


def test_numbers_of_a_file_are_not_rewritten_either(tmp_path: Path) -> None:
    yaml = "vllm: {api-key: 0123, revision: 1.10, served-model-name: [1.10, b], port: 8000, x: 2024-01-01}"
    written = {"api-key": "0123", "revision": "1.10", "served-model-name": ["1.10", "b"], "port": 8000}
    assert opened(settings_from(yaml, tmp_path, {})) == written | {"x": "2024-01-01"}


@pytest.mark.parametrize("value", ["null", "~", "true", "", "[a, null]", '""', "None", "[None, a]"])
def test_a_key_in_a_file_that_would_be_no_key_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"put it in quotes|no key at all"):
        settings_from(f"vllm: {{api-key: {value}}}", tmp_path, {})


def test_text_flags_are_vllms() -> None:
    pytest.importorskip("vllm")
    known = vllms_flags()
    assert {f"--{name}" for name in TEXT_FLAGS | SECRET_FLAGS} <= set(known)
    for name in TEXT_FLAGS:
        assert known[f"--{name}"].nargs != 0
        assert not known[f"--{name}"].choices


SECRET = "sesame-1234"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--api-key", SECRET),
        (f"--api-key={SECRET}",),
        ("--api_key", SECRET, f"{SECRET}2"),
        ("--api-k", SECRET),
        ("--hf-token", SECRET),
        ("--api-key", SECRET, "--port", "8001"),
    ],
)
def test_a_dry_run_shows_no_key(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_SERVE_VLLM_HF_TOKEN", SECRET)
    output = invoke("base", *arguments)
    assert SECRET not in output
    assert "***" in output
    assert ("--port 8001" in output) == ("8001" in arguments)


def test_a_dry_run_shows_no_key_of_the_environment_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"model: base\nvllm: {{api-key: [{SECRET}, {SECRET}2]}}")
    assert SECRET not in invoke("--config", str(file))
    monkeypatch.setenv("SMOA_SERVE_VLLM_API_KEY", SECRET)
    output = invoke("--config", str(file))
    assert SECRET not in output
    assert "VLLM_API_KEY='***'" in output


@pytest.mark.parametrize(
    "yaml",
    [
        f"vllm: [api-key={SECRET}]",
        f"vllm: api-key={SECRET}",
        f'vllm:\n  api-key: "{SECRET}',
        f"vllm:\n  api-key: *{SECRET}",
        f"vllm:\n  api-key: !{SECRET} x",
        f"vllm:\n  api-key: {SECRET}: b",
        f"vllm:\n  api-key: [true, {SECRET}]",
        f"vllm:\n  api-key: {{? {SECRET} : b}}\n  hf-token: [",
    ],
)
def test_no_error_shows_a_key(yaml: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        settings_from(yaml, tmp_path, {})
    assert SECRET not in str(refused.value)


def test_no_error_shows_the_value_of_a_variable_for_vllm() -> None:
    with pytest.raises(ConfigError, match="ADDITIONAL_CONFIG cannot be read as a YAML value") as refused:
        settings_of({"SMOA_SERVE_VLLM_ADDITIONAL_CONFIG": f"{{token: {SECRET}"})
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("flag", ["allow_pickle", "strict_order", "allow_hub"])
def test_a_switch_turned_off_overrules_an_inherited_variable(flag: str) -> None:
    inherited = {f"SMOA_{flag.upper()}": "1"}
    for value, expected in ((False, False), (True, True), (None, True)):
        settings = settings_of(inherited, model="m", **({} if value is None else {flag: value}))
        environment = inherited | vllm_command(settings, [], inherited).environment
        assert getattr(process_settings(environment).adapters, flag) is expected


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["serve", *arguments, "--dry-run"], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_dry_run_as_json_shows_the_whole_tree_and_who_set_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SMOA_SERVE_VLLM_HF_TOKEN", SECRET)
    monkeypatch.setenv("SMOA_AUTO_MERGE", "1")
    output = invoke("base", "--adapters-root", str(tmp_path), "--api-key", SECRET, "--json")
    assert SECRET not in output
    shown = json.loads(output)
    assert shown["settings"]["residence"]["auto-merge"] is True
    assert shown["settings"]["adapters"]["adapters-root"] == [str(tmp_path)]
    assert shown["settings"]["engine"]["required"] is True
    assert shown["settings"]["vllm"] == {"hf-token": "***"}
    assert shown["from"]["residence.auto-merge"] == "SMOA_AUTO_MERGE"
    assert shown["from"]["adapters.adapters-root"] == "--adapters-root"
    assert shown["from"]["store.store-dir"] == "SMOA_STORE_DIR"
    assert shown["command"][-2:] == ["--api-key", "***"]
    # What is printed is a settings file.
    file = tmp_path / "printed.yaml"
    file.write_text(json.dumps(shown["settings"]))
    again = load_settings({}, {}, file)[0]
    assert again.residence.auto_merge is True
    assert again.adapters.adapters_root == (tmp_path,)


def test_json_is_for_a_dry_run() -> None:
    with pytest.raises(ConfigError, match="--json belongs to --dry-run"):
        CliRunner().invoke(app, ["serve", "m", "--json"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--automerge", "--auto-merge"),
        ("--adapters-roots=/x", "--adapters-root"),
        ("--no-allow-pickel", "--no-allow-pickle"),
        ("--store_dirs", "--store-dir"),
    ],
)
def test_a_mistyped_flag_of_ours_names_the_nearest(flag: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"is not known; the nearest is {near}$"):
        CliRunner().invoke(app, ["serve", "m", "--dry-run", flag], catch_exceptions=False)


def test_no_flag_of_vllm_is_taken_for_one_of_ours() -> None:
    vllms = [flag for flag in vllms_flags() if flag.startswith("--")]
    assert {f"--{declared.name}" for declared in FIELDS.values() if declared.section}.isdisjoint(vllms)
    serve_command.refuse_mistyped(vllms)


def test_the_model_comes_first_and_unknown_flags_are_vllms(make_adapter: MakeAdapter) -> None:
    folder = make_adapter("a", LORA)
    output = invoke("base", "--adapter", f"a={folder}", "--max-model-len", "64", "--enforce-eager", "-tp", "2")
    assert "vllm serve base" in output
    assert output.rstrip().endswith("--max-model-len 64 --enforce-eager -tp 2")


def test_a_flags_value_is_not_taken_for_the_model(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("model: from-yaml")
    assert "vllm serve from-yaml" in invoke("--config", str(file), "--port", "8001")


@pytest.mark.parametrize("name", ["demo", "single-gpu", "tp-node"])
def test_the_configs_are_settings(name: str) -> None:
    settings, _ = load_settings({}, {}, CONFIGS / f"{name}.yaml")
    assert settings.model
    assert settings.vllm["served-model-name"] == "base"


def test_configs_name_flags_that_vllm_has() -> None:
    known = vllms_flags()
    for file in (file for file in CONFIGS.glob("*.yaml") if not file.name.startswith("train")):
        flags = load_settings({}, {}, file)[0].vllm
        assert not [name for name in flags if f"--{name}" not in known], file


def test_main_runs_vllms_own_command_in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = []
    monkeypatch.setattr(serve_command, "run_vllm", started.append)
    monkeypatch.setattr("sys.argv", ["smoa-serve", "serve", "base", "--adapters-root", str(tmp_path), "--port", "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert started[0].argv[-2:] == ["--port", "1"]
    assert process_settings(started[0].environment).adapters.adapters_root == (tmp_path,)


def test_main_shows_an_error_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["smoa-serve", "serve", "base", "--adapters-dir", "/does/not/exist"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "error: --adapters-dir /does/not/exist: there is no such folder" in capsys.readouterr().err
