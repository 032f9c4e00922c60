"""The set-up's log."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

SECRET = "p%40ss-word"
URL = f"https://somebody:{SECRET}@index.example/simple"


@pytest.fixture
def setup_env(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "scripts"))
    return importlib.import_module("setup_env")


def test_no_credentials_of_an_index_reach_the_log(setup_env: Any, tmp_path: Path) -> None:
    log = setup_env.Log(tmp_path / "setup.log")
    log.path.write_text("")
    program = "import sys; print('trying', sys.argv[2], 'with p@ss-word'); print('no such package', file=sys.stderr)"
    assert log.run([sys.executable, "-c", program, "--index-url", URL]) == 0
    log.note(f"import {URL}: ok")
    text = log.path.read_text()
    assert "index.example/simple" in text
    assert "no such package" in text
    assert not [word for word in (SECRET, "p@ss-word", "somebody") if word in text]


def test_no_credentials_of_an_index_reach_the_terminal(
    setup_env: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMOA_TORCH_INDEX_URL", URL)
    monkeypatch.setattr(setup_env, "reachable", lambda url: False)
    monkeypatch.setattr(setup_env.platform, "system", lambda: "Linux")
    assert setup_env.extra_indexes("cpu") == []
    assert "***@index.example/simple does not answer" in capsys.readouterr().out


def test_a_url_without_credentials_is_shown_as_it_is(setup_env: Any) -> None:
    text = "uv pip install --index-url https://index.example/simple a@1.0 git+https://host/x@tag"
    assert setup_env.plan.masked(text) == text
    assert setup_env.plan.credentials(text.split()) == set()
