"""For all tests: none skips in silence; recorded numbers, private cache folders, tiny base checkpoints."""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from torch import Tensor

# The same examples on every machine, however slow.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")

# Read when torch is first imported: with busy-waiting threads small SVDs take up to 90 times longer on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests about the CPU engine do not exist where vLLM would serve on a GPU."""
    about_cpu = [item for item in items if item.get_closest_marker("cpu")]
    if about_cpu and _has_gpu():
        config.hook.pytest_deselected(items=about_cpu)
        items[:] = [item for item in items if item not in about_cpu]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that skips has failed: what it needs is part of `make setup`. Only a GPU may be missing."""
    report = yield
    if not item.get_closest_marker("gpu"):
        _refuse_to_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for whole files."""
    report = yield
    _refuse_to_skip(report)
    return report


def _refuse_to_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr if isinstance(report.longrepr, tuple) else (report.longrepr,)
        report.outcome = "failed"
        report.longrepr = f"{reason}\nOnly tests marked `gpu` may skip; see Markers in CONTRIBUTING.md."


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which instruction sets the C++ kernel was tested under; see tests/kernels/conftest.py."""
    passed = terminalreporter.getreports("passed")
    ran = Counter(value for report in passed for name, value in report.user_properties if name == "instruction_set")
    if ran:
        found = ", ".join(f"{name} {count}" for name, count in sorted(ran.items()))
        terminalreporter.write_line(f"C++ kernel, tests passed by instruction set: {found}")


@pytest.fixture(scope="session")
def vectors() -> Path:
    """Folder of numbers recorded from the published layer; see its README."""
    folder = Path(__file__).resolve().parent / "data" / "vectors"
    assert (folder / "index.json").is_file(), f"the recorded vectors are missing from the checkout: {folder}"
    return folder


@pytest.fixture(scope="session")
def vector_index(vectors: Path) -> dict[str, Any]:
    return json.loads((vectors / "index.json").read_text())


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smoa-cache")


@pytest.fixture(autouse=True)
def own_logging() -> None:
    """Log lines reach `caplog`, also after an engine of this process has sent them where vLLM's go."""
    logging.disable(logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)
    for name in [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "smoa_serve"]:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate, logger.disabled = True, False
        logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def private_folders(session_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's own cache and store; orders are shared between tests, stores are not."""
    monkeypatch.setenv("SMOA_CACHE_DIR", str(session_cache))
    monkeypatch.setenv("SMOA_STORE_DIR", str(tmp_path / "smoa-store"))


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[..., Path]:
    """Write a base checkpoint from single tensors: `make_base({"model.norm.weight": ...}, model_type="llama")`."""

    from safetensors.torch import save_file

    def make(tensors: "Mapping[str, Tensor]", *, name: str = "base", **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two layers in float32 with the demo's tokenizer."""
    from smoa_serve.testing import random_base

    return random_base(tmp_path_factory.mktemp("tiny") / "base")
