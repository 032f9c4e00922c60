"""Trained models on their way into the package, and how those that ship are known to be current.

Two things can make them outdated. Other texts, sizes or schedules change the recipe in a folder's stamp. Other code
changes the digest of the training sources. A test fails then, until `make demo-models ARGS=--ship` has been run.
"""

import ast
import hashlib
import json
import shutil
from pathlib import Path

from smoa_serve.demo import shipped

from .books import books

HERE = Path(__file__).parent
SOURCES = (
    *(HERE / f"{name}.py" for name in ("adapters", "base_model", "books", "data", "tokenizer", "training")),
    *(shipped.FOLDER.parent / f"{name}.py" for name in ("prompts", "recipes")),
)


def sources_digest() -> str:
    """sha256 (hex) of the code and the texts that the weights are made by.

    Import lines do not count: a module that moves makes no other weights.
    """
    h = hashlib.sha256()
    for file in SOURCES:
        h.update(_without_imports(file.read_text(encoding="utf-8")).encode())
    for book in books():
        h.update(book.encode())
    return h.hexdigest()


def problems() -> list[str]:
    """Why the shipped weights are not what they are said to be; empty when all is well."""
    found = shipped.damaged()
    if shipped.MANIFEST.is_file():
        recorded = json.loads(shipped.MANIFEST.read_text(encoding="utf-8"))["sources"]
        found += [] if recorded == sources_digest() else ["the code or the texts that made them have changed"]
    return found


def ship(root: Path) -> int:
    """Put freshly trained models into the project in the place of those that ship now.

    Args:
        root: folder of the demo, complete.

    Returns:
        Bytes of all files.
    """
    folder = shipped.FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for stamp in sorted([root / "base" / shipped.STAMP, *(root / "adapters").glob(f"*/{shipped.STAMP}")]):
        shutil.copytree(stamp.parent, folder / stamp.parent.relative_to(root))
    manifest = {"sources": sources_digest(), "files": shipped.files_of(folder)}
    shipped.MANIFEST.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _without_imports(source: str) -> str:
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return "".join(lines)
