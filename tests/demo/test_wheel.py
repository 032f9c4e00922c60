"""The wheel: what is in it, and that the demo runs from it alone, in an empty folder."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from smoa_serve import __version__
from smoa_serve.demo.prompts import DEMO_PROMPTS
from smoa_serve.demo.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]


def run(command: Sequence[str | Path], folder: Path = ROOT) -> str:
    """What a command prints, without anything that leads to the checkout."""
    ours = ("PYTHON", "SMOA_", "VLLM_", "PYTEST")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment | {"SMOA_STORE_DIR": str(folder / "store"), "SMOA_CACHE_DIR": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "--wheel-dir", out, ROOT], out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment: the wheel, and the packages beside this checkout's editable install."""
    venv = tmp_path_factory.mktemp("environment") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", venv])
    (site,) = (venv / "lib").glob("*/site-packages")
    # A folder named in a .pth file gives its packages, but its own .pth files, one of which leads here, are not read.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run([sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "--no-deps", "--no-index", wheel])
    return venv / "bin"


@pytest.mark.engine
def test_the_wheel_holds_what_the_demo_serves_and_not_what_makes_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith(f"smoa_serve-{__version__}-")
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"smoa_serve", "smoa_kernels", f"smoa_serve-{__version__}.dist-info"}
    shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / "smoa_serve/demo/weights").rglob("*.*")}
    assert shipped <= set(names)
    assert {"smoa_serve/py.typed", "smoa_kernels/py.typed"} <= set(names)
    assert [name for name in names if name.startswith("smoa_kernels/") and name.endswith(".cpp")]
    assert wheel.stat().st_size < 15_000_000


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_the_demo_runs_from_the_wheel_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = run([installed / "python", "-c", "import smoa_serve; print(smoa_serve.__file__)"], tmp_path)
    assert where.startswith(str(installed.parent))
    assert run([installed / "smoa-serve", "--version"], tmp_path) == f"smoa-serve {__version__}\n"
    shown = run([installed / "smoa-serve", "demo"], tmp_path)
    assert f"all {len(DEMO_PROMPTS) * len(RECIPES)} answers of the adapters differ" in shown
    assert {entry.name for entry in tmp_path.iterdir()} >= {".demo"}
    *_, last = shown.splitlines()
    assert f"{installed}/smoa-serve --help" in last
    assert f"source {installed}/activate" in last
