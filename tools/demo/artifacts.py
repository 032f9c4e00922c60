"""Folders that are made once: written aside, renamed when complete, stamped with the recipe they were made by."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from smoa_serve.demo.shipped import STAMP, is_current, recipe_digest


def build_folder(folder: Path, recipe: Mapping[str, object], build: Callable[[Path], None]) -> bool:
    """Make `folder` with `build` unless it is current. An interrupted build leaves nothing that looks complete.

    Args:
        folder: where the result lies in the end; an outdated one is replaced.
        recipe: everything the content depends on.
        build: fills the empty folder it is given.

    Returns:
        Whether it had to be built.
    """
    if is_current(folder, recipe):
        return False
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    build(aside)
    stamp = {"digest": recipe_digest(recipe), "recipe": dict(recipe)}
    (aside / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)
    return True
