"""Backends: the core knows none by name, others know the package by its door, and one more is one more folder."""

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from smoa_kernels import ImplementationError, StepPlan, available_implementations, default_implementation, smoa_delta
from smoa_kernels.backend import GROUP, backends
from smoa_kernels.cost import DEFAULT_COST, cost_model
from smoa_kernels.testing import assert_close, merge_slot, random_blocks, random_layer, random_update

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "smoa_kernels"
README = (ROOT / "kernels" / "README.md").read_text()
CORE = [*KERNELS.glob("*.py"), *(KERNELS / "blocks").glob("*.py")]
BACKENDS = sorted((KERNELS / "backends").rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """Every smoa_kernels module that a file imports from, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if is_module(name) else node.module for name in inside]
        yield from (name for name in names if name.split(".")[0] == "smoa_kernels")


def is_module(name: str) -> bool:
    path = KERNELS.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize("file", CORE, ids=lambda file: str(file.relative_to(KERNELS)))
def test_the_core_imports_no_backend(file: Path) -> None:
    # `testing` lists the instruction sets of one; nothing that serves imports it.
    allowed = {"smoa_kernels.backends.cpp.build"} if file.name == "testing.py" else set()
    assert {name for name in imported(file) if name.startswith("smoa_kernels.backends")} <= allowed
    assert file.name == "testing.py" or "smoa_kernels.testing" not in set(imported(file))


@pytest.mark.parametrize("file", BACKENDS, ids=lambda file: str(file.relative_to(KERNELS)))
def test_a_backend_imports_no_other_backend(file: Path) -> None:
    own = f"smoa_kernels.backends.{file.relative_to(KERNELS / 'backends').parts[0].removesuffix('.py')}"
    assert not [
        name for name in imported(file) if name.startswith("smoa_kernels.backends") and not name.startswith(own)
    ]


@pytest.mark.parametrize(
    "file", sorted((ROOT / "smoa_serve").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT))
)
def test_serving_knows_the_package_by_its_door(file: Path) -> None:
    """`smoa_kernels.testing` is a second door, for what makes random adapters. Tests and benchmarks measure inside."""
    allowed = {"smoa_kernels"} | ({"smoa_kernels.testing"} if file.name == "testing.py" else set())
    assert set(imported(file)) <= allowed


def install(folder: Path, code: str, entry: str) -> None:
    """What a package installer leaves of a package with one module and one entry point."""
    (folder / "smoa_toy").mkdir()
    (folder / "smoa_toy" / "__init__.py").write_text(code)
    information = folder / "smoa_toy-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: smoa_toy\nVersion: 1\n")
    (information / "entry_points.txt").write_text(f"[{GROUP}]\n{entry}\n")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, empty."""
    monkeypatch.syspath_prepend(tmp_path)
    backends.cache_clear()
    yield tmp_path
    backends.cache_clear()
    sys.modules.pop("smoa_toy", None)


@pytest.fixture
def toy(packages: Path) -> None:
    """The backend of the README, installed as it says."""
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    (project,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    ((name, value),) = tomllib.loads(project)["project"]["entry-points"][GROUP].items()
    install(packages, code, f"{name} = {value}")
    importlib.invalidate_caches()


@pytest.mark.usefixtures("toy")
def test_a_new_backend_is_chosen_for_what_it_serves() -> None:
    assert available_implementations("cpu", torch.float16)[0] == "toy"
    assert default_implementation("cpu", torch.float16) == "toy"
    assert "toy" not in available_implementations("cpu", torch.bfloat16)
    assert cost_model("toy", torch.device("cpu"), torch.float16) is DEFAULT_COST


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
def test_a_new_backend_computes_the_delta_of_a_mixed_batch(merged: bool, generator: torch.Generator) -> None:
    layer = random_layer(40, (24, 9), slots=4, max_rank=4, dtype=torch.float16, generator=generator)
    assert layer.bank.implementation == "toy"
    for slot, ranks in {0: (4, 1, 3), 1: (2, 2), 2: (4,)}.items():
        cols = random_blocks(40, len(ranks), generator)
        rows = [random_blocks(size, len(ranks), generator) for size in layer.bank.slices]
        layer.bank.set(slot, [random_update(own, cols, ranks, generator, 0.5) for own in rows])
    layer.bank.make_resident(1)
    if merged:
        merge_slot(layer.bank, 2)
    plan = StepPlan(8, 4, "cpu")
    plan.update([0, 1, -1, 4 if merged else 2, 0, 3, 1], merged)
    x, y = (torch.randn(7, size, generator=generator).half() for size in (40, 33))
    expected, before = y.clone(), y.clone()
    smoa_delta(expected, x, layer.bank, plan, "reference")
    smoa_delta(y, x, layer.bank, plan)
    assert_close(y, expected)
    assert not torch.equal(y, before)


@pytest.mark.usefixtures("toy")
def test_the_reason_of_a_new_backend_is_told(generator: torch.Generator) -> None:
    with pytest.raises(ImplementationError, match=r"'toy' cannot serve torch.bfloat16 on cpu; available: .*torch(.*\n)*"
                       r"  - not toy: it serves float16 on CPUs, not torch.bfloat16 on cpu\."):  # fmt: skip
        random_layer(8, (8,), slots=1, max_rank=1, dtype=torch.bfloat16, generator=generator, implementation="toy")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nothing_of_that_name", r"smoa_toy:BACKEND cannot be loaded: No module named .*uninstall it"),
        ("from smoa_kernels.backends.torch import BACKEND", "two backends are named 'torch'; uninstall"),
        (
            "from smoa_kernels import Backend\nclass Half(Backend):\n    name = 'half'\nBACKEND = Half()",
            "cannot be loaded: Can't instantiate abstract class Half",
        ),
    ],
    ids=["not importable", "name taken", "half written"],
)
def test_a_backend_that_is_none_is_named(packages: Path, code: str, message: str) -> None:
    install(packages, code, "toy = smoa_toy:BACKEND")
    with pytest.raises(ImplementationError, match=message):
        available_implementations("cpu", torch.float32)
