"""Spectral orders on disk, keyed by the digest of the weight: an SVD is computed once per base weight and machine."""

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError
from ..files.opened import OpenedFile
from ..files.tensors import all_tensors
from ..settings import process_settings
from .checkpoint import BaseCheckpoint
from .spectral import SpectralOrder, spectral_order

logger = logging.getLogger(__name__)

VERSION = 1
FIELDS = ("rows", "cols", "rows64", "cols64")
Positions = tuple[Tensor, Tensor]
"""Rows [H_out] and columns [H_in] int64, position → coordinate."""
Progress = Callable[[str, int, int], None]
"""Called as (module, done, total): before each module, and once more at the end."""


def cache_root() -> Path:
    """The folder for everything that can be computed again: $SMOA_CACHE_DIR or the user's cache folder."""
    configured = process_settings().store.cache_dir
    return configured.expanduser() if configured else user_cache_path("smoa-serve", appauthor=False)


class OrderCache:
    """Orders of base weights. Safe with several processes: one computes, the others wait and read.

    Args:
        root: folder of the cache; `cache_root()` by default.
        check_device: "cpu" or "cuda:N": where the float64 check runs (see `spectral_order`).

    Raises:
        ConfigError: there is no such device.
    """

    def __init__(self, root: Path | None = None, *, check_device: str = "cpu") -> None:
        self.root = (root or cache_root()) / "orders"
        if check_device not in {"cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}:
            raise ConfigError(f"check device {check_device!r}: there is no such device; use 'cpu' or 'cuda:0' and up")
        self.check_device = check_device

    def get(self, base: BaseCheckpoint, module: str) -> SpectralOrder:
        """The order of one module's weight, from disk or computed now."""
        mark = base.fingerprint(module)
        layout = "t" if base.is_transposed(module) else "n"
        key = f"{mark.sha256}-{mark.dtype}-{mark.shape[0]}x{mark.shape[1]}{layout}-v{VERSION}"
        return self.get_by_key(key, lambda: base.weight(module))

    def get_by_key(self, key: str, weight: Callable[[], Tensor]) -> SpectralOrder:
        """The order stored under `key`; computed from `weight()` [H_out, H_in] when there is none."""

        def compute() -> list[Tensor]:
            order = spectral_order(weight(), check_device=self.check_device)
            return [order.rows, order.cols, order.rows64, order.cols64]

        return SpectralOrder(*self._through(key, FIELDS, compute))

    def get_positions(self, key: str, compute: Callable[[], Positions]) -> Positions:
        """One order alone, for training, which needs no second one to compare with.

        Args:
            key: names the weight and the kind of order.
            compute: rows [H_out] and columns [H_in], position → coordinate, where none is stored.
        """
        rows, cols = self._through(f"{key}-v{VERSION}", FIELDS[:2], compute)
        return rows, cols

    def _through(self, key: str, fields: Sequence[str], compute: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        file = self.root / f"{key}.safetensors"
        found = self._read(file, fields)
        if found is not None:
            return found
        with ExitStack() as stack:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(f"{file}.lock"))
            except (OSError, NotImplementedError) as error:
                logger.warning("Orders cannot be kept in %s, and are computed each time: %s", self.root, error)
                return compute()
            found = self._read(file, fields)
            if found is None:
                found = compute()
                self._keep(file, dict(zip(fields, found, strict=True)))
        return found

    def _keep(self, file: Path, orders: Mapping[str, Tensor]) -> None:
        """What cannot be kept was computed all the same: it is right, and costs the time again."""
        try:
            self._write(file, orders)
        except (OSError, SafetensorError) as error:
            logger.warning("The order %s cannot be kept: %s. Free space there, or set SMOA_CACHE_DIR", file, error)

    def _read(self, file: Path, fields: Sequence[str]) -> Sequence[Tensor] | None:
        if not file.is_file():
            return None
        try:
            tensors = all_tensors(OpenedFile(file))
            found = [tensors[name].long() for name in fields]
        except (SafetensorError, KeyError, OSError) as error:
            logger.warning("The cached order %s is damaged and is computed again: %s", file, error)
            return None
        for positions in found:
            if not torch.equal(positions.sort().values, torch.arange(positions.numel())):
                logger.warning("The cached order %s is no permutation and is computed again", file)
                return None
        return found

    def _write(self, file: Path, orders: Mapping[str, Tensor]) -> None:
        tensors = {name: positions.to(torch.int32).contiguous() for name, positions in orders.items()}
        facts = {"torch": torch.__version__, "threads": str(torch.get_num_threads()), "check": self.check_device}
        descriptor, temporary = tempfile.mkstemp(dir=self.root, suffix=".tmp")
        os.close(descriptor)
        try:
            save_file(tensors, temporary, metadata=facts)
            Path(temporary).replace(file)
        finally:
            Path(temporary).unlink(missing_ok=True)
