"""What the environment says to the plugin."""

import os
from pathlib import Path

import pytest

from smoa_serve.errors import ConfigError
from smoa_serve.settings import Settings


def test_an_empty_environment_allows_nothing() -> None:
    settings = Settings.from_environment({"SMOA_ALLOW_PICKLE": "", "UNRELATED": "1"})
    assert settings == Settings()
    adapters = settings.adapters
    assert adapters.adapters_root == ()
    assert not any((adapters.allow_pickle, adapters.allow_hub, adapters.strict_order, settings.engine.required))


def test_roots_are_separated_like_path() -> None:
    value = os.pathsep.join(["/adapters", "", "/more/adapters"])
    assert Settings.from_environment({"SMOA_ADAPTER_ROOTS": value}).adapters.adapters_root == (
        Path("/adapters"),
        Path("/more/adapters"),
    )


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_switches(value: str) -> None:
    settings = Settings.from_environment({"SMOA_STRICT_ORDER": value, "SMOA_SERVE_REQUIRED": value})
    assert settings.adapters.strict_order
    assert settings.engine.required


def test_a_bad_value_names_the_variable_and_what_was_found() -> None:
    with pytest.raises(ConfigError, match="SMOA_ALLOW_PICKLE='perhaps'"):
        Settings.from_environment({"SMOA_ALLOW_PICKLE": "perhaps"})
