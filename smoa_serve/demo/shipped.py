"""The weights that ship with the project: what the demo serves at once, and how they are known to be current.

Two things can make them outdated. Other texts, sizes or schedules change the recipe in a folder's stamp: that folder is
trained at the next start. Other code changes the digest of the training sources: a test fails then, until
`make demo-models ARGS=--ship` has been run.
"""

import ast
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from .artifacts import STAMP, is_current
from .corpus import books

FOLDER = Path(__file__).parent / "weights"
MANIFEST = FOLDER / "manifest.json"
SOURCES = ("adapters", "base_model", "corpus", "data", "tokenizer", "training")


def sources_digest() -> str:
    """sha256 (hex) of the code and the texts that the weights are made by.

    Import lines do not count: a module that moves makes no other weights.
    """
    h = hashlib.sha256()
    for name in SOURCES:
        h.update(_without_imports((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")).encode())
    for book in books():
        h.update(book.encode())
    return h.hexdigest()


def files_of(root: Path) -> dict[str, str]:
    """Every file below a folder of demo models with its sha256 (hex)."""
    folders = (root / "base", root / "adapters")
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def problems() -> list[str]:
    """Why the shipped weights are not what they are said to be; empty when all is well."""
    try:
        manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    found = [] if manifest["sources"] == sources_digest() else ["the code or the texts that made them have changed"]
    wanted, present = manifest["files"], files_of(FOLDER)
    return found + [f"{name} is not the recorded one" for name in sorted(wanted.keys() | present.keys())
                    if wanted.get(name) != present.get(name)]  # fmt: skip


def take(folder: Path, name: str, recipe: Mapping[str, object]) -> bool:
    """Copy a shipped folder to where the demo serves it from, if it was made by this recipe and is undamaged.

    Args:
        folder: what it becomes; an outdated one is replaced.
        name: below the shipped folder: "base", "adapters/pirate".
        recipe: what it must have been made by.

    Returns:
        Whether it was copied.
    """
    shipped = FOLDER / name
    if not is_current(shipped, recipe) or not _is_intact(name):
        return False
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(shipped, aside)
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
    return True


def ship(root: Path) -> int:
    """Put freshly trained models into the project in the place of those that ship now.

    Args:
        root: folder of the demo, complete.

    Returns:
        Bytes of all files.
    """
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for stamp in sorted([root / "base" / STAMP, *(root / "adapters").glob(f"*/{STAMP}")]):
        target = FOLDER / stamp.parent.relative_to(root)
        shutil.copytree(stamp.parent, target)
    manifest = {"sources": sources_digest(), "files": files_of(FOLDER)}
    MANIFEST.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())


def _without_imports(source: str) -> str:
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return "".join(lines)


def _is_intact(name: str) -> bool:
    try:
        recorded: dict[str, str] = json.loads(MANIFEST.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return False
    files = [file for file in recorded if file.startswith(f"{name}/")]
    return all(_digest(FOLDER / file) == recorded[file] for file in files) and bool(files)


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
