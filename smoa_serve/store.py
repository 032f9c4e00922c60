"""Content-addressed private copies of adapters: one that was accepted once can always be read again.

An entry is a folder `<kind>-<digest>[-<base>]` with adapter_config.json, adapter_model.safetensors (SMoA and HiRA in
the portable format, LoRA as PEFT writes it, never a pickle) and manifest.json, which holds what is known about the
adapter and a digest of each file. The content alone decides which entry is an adapter's. What a file says beyond its
content (order, source) belongs to whoever read it, and is theirs whatever the first reader's file said.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from pydantic import Field

from .adapters import AdapterFile, AdapterKind, AdapterSummary, LoadOptions, open_adapter
from .adapters.source import CONFIG_NAME, WEIGHTS_NAME
from .base.checkpoint import BaseCheckpoint
from .errors import AdapterError
from .files.disk import writing
from .files.json_file import read_json
from .settings import process_settings

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
DEFAULT = LoadOptions()
LEFTOVERS = (".new-", ".old-")  # before an entry's name: what is being written, and what that replaces
_ENTRY_BEGINS = tuple(f"{kind.value}-" for kind in AdapterKind)
_STALE_S = 24 * 3600


class StagedAdapter(AdapterSummary):
    """An accepted adapter and its private copy."""

    path: Path = Field(description="folder of the private copy")
    source: str = Field(description="absolute path it was read from; of an entry, the first")


class AdapterStore:
    """The private copies of one machine. Safe with several processes.

    What a process left half-written that ended meanwhile is removed with the next start.

    Args:
        root: folder; $SMOA_STORE_DIR or the user's cache folder by default.

    Attributes:
        FILES: of every entry, besides its manifest.
    """

    FILES = (CONFIG_NAME, WEIGHTS_NAME)

    def __init__(self, root: Path | None = None) -> None:
        configured = process_settings().store.store_dir
        default = configured or user_cache_path("smoa-serve", appauthor=False) / "adapters"
        self.root = (root or default).expanduser().resolve()
        self._remove_leftovers()

    def open(self, path: str | Path, options: LoadOptions = DEFAULT) -> AdapterFile[Any]:
        """`open_adapter`, which also raises AdapterError for an entry of this store that is damaged."""
        if self._is_inside(path) and self.entry(path) is None:
            raise AdapterError(path, "this private copy is damaged or was never complete; load it from where it came")
        return open_adapter(path, options)

    def stage(self, file: AdapterFile[Any], base: BaseCheckpoint) -> StagedAdapter:
        """Check an adapter and copy what was read. The same content gives the same entry; an entry gives itself.

        Args:
            file: an adapter, or an entry of this store.
            base: base model it shall be served on.

        Raises:
            AdapterError: with every reason why it cannot be served.
            StorageError: its private copy cannot be written.
        """
        known = self.entry(file.source.folder)
        summary, mark = file.summary(base), file.base_mark(base)
        folder = self.root / "-".join(filter(None, (summary.kind.value, summary.digest, mark)))
        source = str(file.source.folder.resolve()) if known is None else known.source
        staged = StagedAdapter(**dict(summary), path=folder, source=source)
        if self._read_manifest(folder) is not None:
            return staged
        what = f"the private copy of adapter {source!r} in {self.root}"
        with writing(what, "set SMOA_STORE_DIR to another folder"):
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self._lock(folder.name)):
                found = self._read_manifest(folder)
                if found is None:
                    self._write(staged, lambda temporary: file.write_private(temporary, base))
                    found = self._read_manifest(folder)
        if found is None:
            raise AdapterError(source, f"its private copy {folder} cannot be read right after it was written")
        return staged

    def entry(self, path: str | Path) -> StagedAdapter | None:
        """What is known about a private copy; None when `path` is no intact entry of this store."""
        return self._read_manifest(Path(path).expanduser().resolve()) if self._is_inside(path) else None

    def _is_inside(self, path: str | Path) -> bool:
        try:
            return Path(path).expanduser().resolve().parent == self.root
        except (OSError, RuntimeError, ValueError):  # no path at all, which the reader says better
            return False

    def _lock(self, entry: str) -> Path:
        """The lock that whoever writes an entry holds."""
        return self.root / f".{entry}.lock"

    def _write(self, staged: StagedAdapter, write: Callable[[Path], object]) -> None:
        """Write an entry whose lock is held: it is there as a whole, or as it was before."""
        folder = staged.path
        if folder.exists():
            logger.warning("The private copy %s is damaged and is written again", folder)
        temporary, damaged = (folder.with_name(f"{mark}{folder.name}") for mark in LEFTOVERS)
        for leftover in (temporary, damaged):
            if leftover.exists():
                shutil.rmtree(leftover)
        temporary.mkdir(mode=0o700)
        try:
            write(temporary)
            facts = staged.model_dump(mode="json", exclude={"path"})
            facts["nbytes"] = facts.pop("bytes")
            files = {name: _file_digest(temporary / name) for name in self.FILES}
            manifest = {"version": MANIFEST_VERSION, "files": files, "adapter": facts}
            (temporary / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            if folder.exists():
                folder.rename(damaged)
            temporary.rename(folder)
        finally:
            for leftover in (temporary, damaged):
                shutil.rmtree(leftover, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """Remove what was left half-written, unless somebody still writes it. A folder that cannot be changed stays."""
        try:
            left = [(mark, folder) for mark in LEFTOVERS for folder in self.root.glob(f"{mark}*")]
        except OSError as error:
            logger.warning("The folder of private copies %s cannot be looked through: %s", self.root, error)
            return
        for mark, folder in left:
            entry = folder.name.removeprefix(mark)
            try:
                if entry.startswith(_ENTRY_BEGINS):
                    with FileLock(self._lock(entry), timeout=0):
                        shutil.rmtree(folder)
                elif folder.stat().st_mtime < time.time() - _STALE_S:  # of an earlier release, with another lock
                    shutil.rmtree(folder)
            except (OSError, Timeout, NotImplementedError) as error:
                logger.debug("Left %s where it is: %s", folder, error)

    def _read_manifest(self, folder: Path) -> StagedAdapter | None:
        """What the entry holds, or None when it is missing, incomplete or damaged."""
        try:
            manifest = read_json(folder / MANIFEST_NAME)
            if manifest["version"] != MANIFEST_VERSION:
                return None
            if any(_file_digest(folder / name) != digest for name, digest in manifest["files"].items()):
                return None
            facts = manifest["adapter"]
            return StagedAdapter(bytes=facts.pop("nbytes"), path=folder, **facts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.debug("No usable entry at %s: %s", folder, error)
            return None


def _file_digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
