"""A server that was asked for the plugin starts with it everywhere, or not at all."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from smoa_serve.engine.host.compat import SUPPORTED, check_signatures, check_version
from smoa_serve.errors import CompatibilityError
from smoa_serve.testing import ServerStartError

# A process that has the plugin in the API server but not in the workers it starts.
API_SERVER_ONLY = """
import os, sys

if __name__ == "__main__":
    import smoa_serve.plugin

    smoa_serve.plugin.register()
    os.environ["VLLM_PLUGINS"] = "none"
    sys.argv = ["vllm", *sys.argv[1:]]
    from vllm.entrypoints.cli.main import main

    main()
"""


@pytest.mark.parametrize("version", ["0.25.1", "0.33.0", "1.0", "unknown"])
def test_a_vllm_outside_the_known_releases_is_refused(version: str) -> None:
    with pytest.raises(CompatibilityError, match=f"vLLM {version} is installed; smoa-serve enters vLLM 0.26 to 0.32"):
        check_version(version)


def test_the_known_releases_are_accepted() -> None:
    for major, minor in SUPPORTED:
        check_version(f"{major}.{minor}.3+cpu")


def test_every_changed_seam_is_named() -> None:
    def moved(self: object, other: int) -> None: ...

    def same(self: object, x: int, extra: int = 0) -> None: ...

    with pytest.raises(CompatibilityError) as caught:
        check_signatures({"A.moved": (moved, ("x",)), "A.same": (same, ("x",)), "A.gone": (moved, ("other", "y"))})
    assert "A.moved takes (other), known is (x)" in str(caught.value)
    assert "A.gone" in str(caught.value)
    assert "A.same" not in str(caught.value)


@pytest.mark.matrix
def test_the_installed_vllm_has_the_known_seams() -> None:
    import vllm.v1.worker.lora_model_runner_mixin as mixin

    from smoa_serve.engine.host.seams import check_worker_seams

    check_worker_seams(mixin)


def test_a_worker_module_without_the_seam_is_refused() -> None:
    from smoa_serve.engine.host.seams import check_worker_seams

    with pytest.raises(CompatibilityError, match="LRUCacheWorkerLoRAManager"):
        check_worker_seams(ModuleType("lora_model_runner_mixin"))


def test_registering_imports_nothing_of_vllm() -> None:
    code = "import sys, smoa_serve.plugin as p; p.register(); p.register(); print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.matrix
def test_stock_vllm_takes_no_portable_adapter_for_lora(vectors: Path, makers: Any, tmp_path: Path) -> None:
    """Without the plugin there must be an error, not wrong maths in silence."""
    from vllm.lora.peft_helper import PEFTHelper

    path = makers.make_adapter(vectors / "e2e/tiny-llama/base", tmp_path / "smoa", "smoa", (2, 2), seed=1)
    with pytest.raises(ValueError, match=r"(?i)missing required configuration"):
        PEFTHelper.from_local_dir(str(path), 256)


@pytest.mark.engine
def test_a_worker_without_the_plugin_stops_the_start(
    vectors: Path, serving: Callable[..., Any], tmp_path: Path
) -> None:
    script = tmp_path / "api_server_only.py"
    script.write_text(API_SERVER_ONLY)
    arguments = ("--dtype", "float32", "--enforce-eager", "--enable-lora")
    with (
        pytest.raises(ServerStartError, match="a worker runs without the smoa-serve plugin"),
        serving(vectors / "e2e/tiny-llama/base", *arguments, command=(sys.executable, str(script))),
    ):
        pytest.fail("the server started")
