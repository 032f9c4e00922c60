"""What the environment says to the plugin."""

import json
import os
import re
from pathlib import Path

import pytest
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from smoa_serve.errors import ConfigError
from smoa_serve.plugin import register
from smoa_serve.settings import (
    FIELDS,
    OTHER_VARIABLES,
    Declared,
    MergePolicy,
    OthersGet,
    Settings,
    load_settings,
    process_settings,
)
from smoa_serve.settings.vllm_flags import revealed


def test_an_empty_environment_allows_nothing() -> None:
    settings = process_settings({"SMOA_ALLOW_PICKLE": "", "UNRELATED": "1"})
    assert settings == Settings()
    adapters = settings.adapters
    assert adapters.adapters_root == ()
    assert not any((adapters.allow_pickle, adapters.allow_hub, adapters.strict_order, settings.engine.required))


def test_roots_are_separated_like_path() -> None:
    value = os.pathsep.join(["/adapters", "", "/more/adapters"])
    assert process_settings({"SMOA_ADAPTER_ROOTS": value}).adapters.adapters_root == (
        Path("/adapters"),
        Path("/more/adapters"),
    )


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_switches(value: str) -> None:
    settings = process_settings({"SMOA_STRICT_ORDER": value, "SMOA_SERVE_REQUIRED": value})
    assert settings.adapters.strict_order
    assert settings.engine.required


def test_a_bad_value_names_the_variable_and_what_was_found() -> None:
    with pytest.raises(ConfigError, match="SMOA_ALLOW_PICKLE='perhaps'"):
        process_settings({"SMOA_ALLOW_PICKLE": "perhaps"})


ROOT = Path(__file__).resolve().parents[1]
SECRET = "sesame-1234"
NEAREST = "the environment variable SMOA_AUTOMERGE is not known; the nearest is SMOA_AUTO_MERGE"


def test_an_unknown_variable_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=NEAREST):
        process_settings({"SMOA_AUTOMERGE": "1"})
    with pytest.raises(ConfigError, match=NEAREST):
        load_settings({}, {"SMOA_AUTOMERGE": "1"}, None)


def test_vllms_processes_do_not_start_with_an_unknown_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_AUTOMERGE", "1")
    with pytest.raises(ConfigError, match=NEAREST):
        register()


def test_variables_of_tests_scripts_and_vllm_are_known() -> None:
    others = [*OTHER_VARIABLES, "SMOA_TEST_CRASHES", "SMOA_SERVE_VLLM_PORT", "SMOA_SERVE_VLLM_API_KEY"]
    environment = dict.fromkeys([name for name in others if name != "SMOA_SETTINGS"], "1")
    assert process_settings(environment) == Settings()


def test_every_variable_that_is_named_anywhere_is_known() -> None:
    known = {*OTHER_VARIABLES, *(variable for declared in FIELDS.values() for variable in declared.variables)}
    folders = ("smoa_serve", "kernels", "benchmarks", "scripts", "tests", "configs", "docs")
    files = [
        file for folder in folders for suffix in ("py", "md", "yaml") for file in (ROOT / folder).rglob(f"*.{suffix}")
    ]
    # As a string, an assignment or in back quotes; constants of the code are none of these.
    named = re.compile(r"""["'`$](SMOA_[A-Z_]*[A-Z])\b|\b(SMOA_[A-Z_]*[A-Z])="?[\w/{$]""")
    wrong = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in [*files, ROOT / "Makefile", ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Dockerfile"]
        if file != Path(__file__)
        for name in ("".join(found) for found in named.findall(file.read_text(encoding="utf-8")))
        if name not in known and not name.startswith(("SMOA_TEST_", "SMOA_SERVE_VLLM_"))
    }
    assert wrong - {"tests/cli/test_serve.py: SMOA_SERVE_ADAPTER_DIR"} == set()


def test_the_tree_counts_more_than_single_variables() -> None:
    tree = Settings(residence={"auto_merge": True}, store={"store_dir": "/a"}).handed_on()
    settings = process_settings({"SMOA_SETTINGS": tree, "SMOA_AUTO_MERGE": "0", "SMOA_STORE_DIR": "/b"})
    assert settings.residence.auto_merge is True
    assert settings.store.store_dir == Path("/a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "SMOA_SETTINGS cannot be read as JSON"),
        ("[1]", "SMOA_SETTINGS holds no mapping of settings, but a list"),
        ("[" * 100_000, "SMOA_SETTINGS cannot be read as JSON"),
        (
            '{"residence": {"automerge": 1}}',
            "'residence.automerge' is not known; the nearest is 'residence.auto-merge'",
        ),
        ('{"_env_file": "x"}', "'-env-file' is not known"),
        ('{"store": {"auto-merge": 1}}', "'store.auto-merge' is not known"),
        ('{"residence": 3}', "settings of SMOA_SETTINGS cannot be used: residence: "),
        ('{"engine": {"one-pass": "perhaps"}}', "engine.one-pass: .*found 'perhaps'"),
    ],
)
def test_a_wrong_tree_says_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        process_settings({"SMOA_SETTINGS": text})
    assert len(str(refused.value)) < 400


def test_older_names_mean_the_same() -> None:
    older = {"SMOA_MERGE_POLICY": "exclusive", "SMOA_ADAPTER_ROOTS": "/a", "SMOA_SERVE_ALLOW_HUB": "1"}
    now = {"SMOA_OTHERS_GET": "exclusive", "SMOA_ADAPTERS_ROOT": "/a", "SMOA_ALLOW_HUB": "1"}
    assert process_settings(older) == process_settings(now)
    assert MergePolicy("exclusive") is OthersGet.EXCLUSIVE


def test_each_value_says_where_it_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("model: m\nresidence: {auto-merge: true, ladder-mib: 5}\nallow-hub: true\nvllm: {port: 1, x: 2}")
    environment = {
        "SMOA_LADDER_MIB": "6",
        "SMOA_SERVE_VLLM_PORT": "3",
        "SMOA_SETTINGS": '{"engine": {"one_pass": false}}',
    }
    settings, origins = load_settings({"policy_interval_s": 2}, environment, file)
    assert (settings.residence.ladder_mib, settings.residence.auto_merge, settings.vllm) == (
        6,
        True,
        {"port": 3, "x": 2},
    )
    assert origins["model"] == origins["residence.auto-merge"] == origins["adapters.allow-hub"] == str(file)
    assert origins["residence.ladder-mib"] == "SMOA_LADDER_MIB"
    assert origins["residence.policy-interval-s"] == "--policy-interval-s"
    assert origins["engine.one-pass"] == "SMOA_SETTINGS"
    assert origins["store.store-dir"] == "default"
    assert (origins["vllm.port"], origins["vllm.x"]) == ("SMOA_SERVE_VLLM_PORT", str(file))
    assert set(origins) == {declared.key for declared in FIELDS.values()} | {"vllm.port", "vllm.x"}


def test_a_flag_of_vllm_is_replaced_and_not_mixed(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("vllm: {additional-config: {a: 1}}")
    settings, _ = load_settings({}, {"SMOA_SERVE_VLLM_ADDITIONAL_CONFIG": "{b: 2}"}, file)
    assert settings.vllm == {"additional-config": {"b": 2}}


def test_a_variable_counts_more_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("adapters: {allow_pickle: false, strict-order: null}\nstrict_order: true")
    settings, _ = load_settings({}, {"SMOA_ALLOW_PICKLE": "1"}, file)
    assert (settings.adapters.allow_pickle, settings.adapters.strict_order) == (True, True)


def test_the_kernels_get_their_limit_wherever_it_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_SETTINGS", Settings(engine={"kernels_isa": "avx2"}).handed_on())
    monkeypatch.delenv("SMOA_KERNELS_ISA", raising=False)
    monkeypatch.setattr("smoa_serve.plugin._HOOKS", {})
    register()
    assert os.environ.pop("SMOA_KERNELS_ISA") == "avx2"


def test_secrets_are_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(model="m", vllm={"api-key": [SECRET, 12], "hf-token": SECRET, "port": 1})
    assert SECRET not in f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}"
    assert settings.shown()["vllm"] == {"api-key": ["***", "***"], "hf-token": "***", "port": 1}
    assert SECRET not in settings.handed_on()
    assert revealed(settings.vllm["api-key"]) == [SECRET, "12"]
    # A setting of ours that is a secret: what was given for it stands in no message.
    secret = FieldInfo.from_annotation(SecretStr | None)
    monkeypatch.setitem(FIELDS, "ladder_mib", Declared("residence", "ladder_mib", secret))
    for environment in ({"SMOA_LADDER_MIB": SECRET}, {"SMOA_SETTINGS": json.dumps({"ladder-mib": SECRET})}):
        with pytest.raises(ConfigError, match="valid integer") as refused:
            process_settings(environment)
        assert SECRET not in str(refused.value)
    with pytest.raises(ConfigError, match="residence: ") as refused:
        process_settings({"SMOA_SETTINGS": json.dumps({"residence": SECRET})})
    assert SECRET not in str(refused.value)
