"""A result folder that appears complete or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ConfigError
from .disk import writing


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` when the block ends without an error.

    Raises:
        ConfigError: `out` exists and is no empty folder.
        StorageError: it cannot be written.
    """
    target = Path(out).expanduser()
    with writing(f"--out {target}", "choose another --out"):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"--out {target}: it exists and is not an empty folder; choose another or remove it")
        target.parent.mkdir(parents=True, exist_ok=True)
        yield from _filled(target)


def _filled(target: Path) -> Iterator[Path]:
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield temporary
        _open_to_readers(temporary)
        if target.is_dir():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """mkdtemp and safetensors create for the owner only; a result is read by servers of other users too."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
