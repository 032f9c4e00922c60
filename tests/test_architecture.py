"""Data flows one way: a module imports only from its own stage and from those before it."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# As in docs/explain/architecture.md, first to last.
STAGES = (
    ("basics", ("errors", "program", "settings", "files")),
    ("base model", ("base",)),
    ("adapters", ("adapters",)),
    ("without an engine", ("offline",)),
    ("training", ("peft", "train")),
    ("store", ("store",)),
    ("sources", ("sources",)),
    ("registry", ("registry",)),
    ("engine", ("engine",)),
    ("residence", ("residence",)),
    ("server", ("server",)),
    ("entry into vLLM", ("plugin",)),
    ("workshop", ("testing",)),
    ("demo", ("demo",)),
    ("CLI", ("cli",)),
)
RANK = {module: rank for rank, (_, modules) in enumerate(STAGES) for module in modules}
KERNELS_FROM = RANK["engine"]  # the first that computes deltas
FILES = sorted((ROOT / "smoa_serve").rglob("*.py"))
KERNEL_FILES = sorted((ROOT / "kernels").rglob("*.py"))
HEAVY = ("vllm", "triton")
OBJECT_STORES = ("fsspec", "s3fs", "gcsfs", "adlfs")
TRAINING = ("peft", "train")
TRAINERS = ("cli/train.py",)  # which imports it when it trains


def imported(file: Path, tree: ast.AST) -> Iterator[str]:
    """Absolute names of everything a file imports, wherever in it."""
    package = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def stage_module(name: str) -> str | None:
    """ "smoa_serve.adapters.hira.write_hira" → "formats"; None outside the package."""
    parts = name.split(".")
    return parts[1] if parts[0] == "smoa_serve" and len(parts) > 1 and parts[1] in RANK else None


def violations(file: Path, source: str) -> list[str]:
    """Imports of a file that go against the stream."""
    own = file.relative_to(ROOT / "smoa_serve").parts[0].removesuffix(".py")
    found = []
    for name in imported(file, ast.parse(source)):
        target = stage_module(name)
        if target is not None and RANK[target] > RANK[own]:
            found.append(f"{own} imports {name}, which comes later")
        if name.split(".")[0] == "smoa_kernels" and RANK[own] < KERNELS_FROM:
            found.append(f"{own} imports {name}, but only the engine computes deltas")
    return found


def test_every_module_has_a_stage() -> None:
    modules = {file.relative_to(ROOT / "smoa_serve").parts[0].removesuffix(".py") for file in FILES}
    assert modules - {"__init__", "__main__"} == set(RANK)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_only_from_stages_before(file: Path) -> None:
    if file.parent.name == "smoa_serve" and file.stem.startswith("__"):
        assert not list(imported(file, ast.parse(file.read_text())))
        return
    assert violations(file, file.read_text()) == []


@pytest.mark.parametrize("file", KERNEL_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_kernels_know_nothing_of_serving(file: Path) -> None:
    names = list(imported(file, ast.parse(file.read_text())))
    assert not [name for name in names if name.split(".")[0] in ("smoa_serve", "vllm")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_vllm_is_imported_at_module_level_only_by_what_lives_inside_it(file: Path) -> None:
    if file.relative_to(ROOT / "smoa_serve").parts[0] in ("engine", "residence", "server"):
        return
    top = ast.Module(
        [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)], []
    )
    assert not [name for name in imported(file, top) if name.split(".")[0] in HEAVY]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_serving_never_imports_training(file: Path) -> None:
    path = file.relative_to(ROOT / "smoa_serve")
    if path.parts[0] in TRAINING or path.as_posix() in TRAINERS:
        return
    names = list(imported(file, ast.parse(file.read_text())))
    assert not [name for name in names if name.split(".")[0] == "peft" or stage_module(name) in TRAINING]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_fsspec_is_known_to_sources_only_and_imported_when_it_is_used(file: Path) -> None:
    tree = ast.parse(file.read_text())
    if file.relative_to(ROOT / "smoa_serve").parts[0] == "sources":
        tree = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not [name for name in imported(file, tree) if name.split(".")[0] in OBJECT_STORES]


def test_an_import_against_the_stream_is_seen() -> None:
    file = ROOT / "smoa_serve" / "adapters" / "new.py"
    assert violations(file, "from ..cli.loadgen import run_load") == [
        "adapters imports smoa_serve.cli.loadgen.run_load, which comes later"
    ]
    assert violations(file, "import smoa_kernels") == [
        "adapters imports smoa_kernels, but only the engine computes deltas"
    ]
    assert violations(file, "from .model import Adapter\nfrom ..base.spectral import even_ranks") == []


def kind_forks(source: str) -> list[str]:
    """Comparisons and tables that ask which kind an adapter is of; what differs is a method of its file's class."""

    def names_kind(node: ast.expr) -> bool:
        text = ast.unparse(node)
        return "AdapterKind." in text or text == "kind" or text.endswith(".kind")

    found = []
    for node in ast.walk(ast.parse(source)):
        asked: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            asked = [node.subject]
        elif isinstance(node, ast.Dict):
            asked = [key for key in node.keys if key is not None]
        if any(map(names_kind, asked)):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_adapter_files_ask_for_the_kind(file: Path) -> None:
    if file.relative_to(ROOT / "smoa_serve").parts[0] != "adapters":
        assert kind_forks(file.read_text()) == []


def test_a_fork_on_the_kind_is_seen() -> None:
    for source in (
        "if file.kind is AdapterKind.LORA: pass",
        "x = 1 if kind == 'lora' else 2",
        "match staged.kind:\n    case 'lora': pass",
        "x = {AdapterKind.HIRA: 1}[kind]",
        "x = AdapterKind.SMOA in kinds",
    ):
        assert len(kind_forks(source)) == 1, source
    assert kind_forks("x = Recipe(AdapterKind.LORA) if kind.modulates else None") == []


def test_no_module_imports_itself_in_a_circle() -> None:
    # What only type checkers import, and what a function imports when it runs, is no part of it.
    sources = {module_name(file): file for file in (*FILES, *KERNEL_FILES)}
    graph = {name: {found for found in at_import(file) if found in sources} for name, file in sources.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) == len(sources)


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT / "kernels" if file in KERNEL_FILES else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def at_import(file: Path) -> Iterator[str]:
    """Every module that is imported when a file is, and no package for a module in it."""
    names = [module_name(other) for other in (*FILES, *KERNEL_FILES)]
    statements = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    for name in imported(file, ast.Module(statements, [])):
        whole = f"{name.removeprefix('kernels.')}."
        yield max((found for found in names if whole.startswith(f"{found}.")), key=len, default="")
