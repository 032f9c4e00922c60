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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from safetensors.torch import save_file

from .adapters import LoadOptions, load_adapter, write_portable
from .adapters.config import kind_of
from .adapters.lora import LoraFiles, load_lora
from .adapters.model import Adapter, AdapterKind, OrderStatus
from .adapters.source import CONFIG_NAME, WEIGHTS_NAME, Source, open_source
from .base.checkpoint import BaseCheckpoint
from .base.orders import Progress
from .errors import AdapterError
from .files.disk import writing
from .files.json_file import read_json
from .settings import Settings

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
DEFAULT = LoadOptions()
LEFTOVERS = (".new-", ".old-")  # before an entry's name: what is being written, and what that replaces
_ENTRY_BEGINS = tuple(f"{kind.value}-" for kind in AdapterKind)
_STALE_S = 24 * 3600


@dataclass(frozen=True)
class StagedAdapter:
    """An accepted adapter and its private copy.

    Attributes:
        kind: who computes it.
        digest: sha256 (hex) of everything that changes the maths.
        path: folder of the private copy.
        rank: total rank r.
        max_rank: R, the widest branch: what a slot must hold.
        num_blocks: K; 1 for HiRA and LoRA.
        parameters: trainable numbers.
        nbytes: bytes of the factors and block ids in host memory.
        order: where the block ids come from; None for LoRA.
        order_error: worst expected relative error of a layer's update that comes from the order.
        source: absolute path it was read from; of an entry, the first.
    """

    kind: AdapterKind
    digest: str
    path: Path
    rank: int
    max_rank: int
    num_blocks: int
    parameters: int
    nbytes: int
    order: OrderStatus | None
    order_error: float
    source: str


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
        configured = Settings.from_environment().store.store_dir
        default = configured or user_cache_path("smoa-serve", appauthor=False) / "adapters"
        self.root = (root or default).expanduser().resolve()
        self._remove_leftovers()

    def stage(
        self,
        path: str | Path,
        base: BaseCheckpoint,
        options: LoadOptions = DEFAULT,
        *,
        progress: Progress | None = None,
    ) -> StagedAdapter:
        """Read, check and copy an adapter. The same content gives the same entry; an entry gives itself.

        Args:
            path: adapter as the user names it, or an entry of this store.
            base: base model it shall be served on.
            options: see LoadOptions.
            progress: called while spectral orders are computed.

        Raises:
            AdapterNotFoundError: nothing is there.
            AdapterError: with every reason why it cannot be served.
            StorageError: its private copy cannot be written.
        """
        known = self.entry(path)
        if known is None and self._is_inside(path):
            raise AdapterError(path, "this private copy is damaged or was never complete; load it from where it came")
        source = open_source(path, options)
        if kind_of(source.name, source.config) is AdapterKind.LORA:
            files = load_lora(source, base, options)
            staged = self._entry(_lora_summary(files, source), "", lambda folder: _write_lora(files, folder))
        else:
            adapter = load_adapter(path, base, options, progress=progress)
            staged = self._entry(_summary(adapter, source), _base_mark(adapter), lambda f: write_portable(adapter, f))
        return staged if known is None else replace(staged, source=known.source)

    def entry(self, path: str | Path) -> StagedAdapter | None:
        """What is known about a private copy; None when `path` is no intact entry of this store."""
        return self._read_manifest(Path(path).expanduser().resolve()) if self._is_inside(path) else None

    def _is_inside(self, path: str | Path) -> bool:
        try:
            return Path(path).expanduser().resolve().parent == self.root
        except (OSError, RuntimeError, ValueError):  # no path at all, which the reader says better
            return False

    def _entry(self, staged: StagedAdapter, mark: str, write: Callable[[Path], object]) -> StagedAdapter:
        """What was read, and where its content is: written when it is nowhere, rebuilt when it is damaged."""
        folder = self.root / f"{staged.kind.value}-{staged.digest}{mark}"
        found = self._read_manifest(folder)
        if found is None:
            what = f"the private copy of adapter {staged.source!r} in {self.root}"
            with writing(what, "set SMOA_STORE_DIR to another folder"):
                self.root.mkdir(parents=True, exist_ok=True)
                with FileLock(self._lock(folder.name)):
                    found = self._read_manifest(folder) or self._write(folder, staged, write)
        if found is None:
            raise AdapterError(staged.source, f"its private copy {folder} cannot be read right after it was written")
        return replace(staged, path=found.path)

    def _lock(self, entry: str) -> Path:
        """The lock that whoever writes an entry holds."""
        return self.root / f".{entry}.lock"

    def _write(self, folder: Path, staged: StagedAdapter, write: Callable[[Path], object]) -> StagedAdapter | None:
        """Write an entry whose lock is held: it is there as a whole, or as it was before."""
        if folder.exists():
            logger.warning("The private copy %s is damaged and is written again", folder)
        temporary, damaged = (folder.with_name(f"{mark}{folder.name}") for mark in LEFTOVERS)
        for leftover in (temporary, damaged):
            if leftover.exists():
                shutil.rmtree(leftover)
        temporary.mkdir(mode=0o700)
        try:
            write(temporary)
            facts = asdict(staged)
            del facts["path"]
            files = {name: _file_digest(temporary / name) for name in self.FILES}
            manifest = {"version": MANIFEST_VERSION, "files": files, "adapter": facts}
            (temporary / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            if folder.exists():
                folder.rename(damaged)
            temporary.rename(folder)
        finally:
            for leftover in (temporary, damaged):
                shutil.rmtree(leftover, ignore_errors=True)
        return self._read_manifest(folder)

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
            kind, order = AdapterKind(facts.pop("kind")), facts.pop("order")
            return StagedAdapter(kind=kind, order=OrderStatus(order) if order else None, path=folder, **facts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.debug("No usable entry at %s: %s", folder, error)
            return None


def _summary(adapter: Adapter, source: Source) -> StagedAdapter:
    return StagedAdapter(
        kind=adapter.kind,
        digest=adapter.digest,
        path=source.folder,
        rank=adapter.total_rank,
        max_rank=adapter.max_rank,
        num_blocks=adapter.most_blocks,
        parameters=adapter.num_parameters,
        nbytes=adapter.nbytes,
        order=adapter.order,
        order_error=adapter.order_error,
        source=str(source.folder.resolve()),
    )


def _lora_summary(files: LoraFiles, source: Source) -> StagedAdapter:
    return StagedAdapter(
        kind=AdapterKind.LORA,
        digest=files.digest,
        path=source.folder,
        rank=files.rank,
        max_rank=files.rank,
        num_blocks=1,
        parameters=sum(t.numel() for t in files.tensors.values()),
        nbytes=sum(t.nbytes for t in files.tensors.values()),
        order=None,
        order_error=0.0,
        source=str(source.folder.resolve()),
    )


def _base_mark(adapter: Adapter) -> str:
    """Tells apart equal factors that were made for different bases; empty without fingerprints."""
    marks = [f"{name}:{m.base.sha256}:{m.base.dtype}" for name, m in sorted(adapter.modules.items()) if m.base]
    return f"-{hashlib.sha256(' '.join(marks).encode()).hexdigest()[:16]}" if marks else ""


def _write_lora(files: LoraFiles, folder: Path) -> None:
    save_file({name: t.contiguous() for name, t in files.tensors.items()}, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(dict(files.config), indent=2) + "\n", encoding="utf-8")


def _file_digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
