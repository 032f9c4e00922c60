"""Spectral orders on disk, keyed by the digest of the weight: an SVD is computed once per base weight and machine."""

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .base_checkpoint import BaseCheckpoint
from .errors import ConfigError
from .spectral import SpectralOrder, spectral_order

logger = logging.getLogger(__name__)

CACHE_DIR_ENV = "SMOA_CACHE_DIR"
VERSION = 1
FIELDS = ("rows", "cols", "rows64", "cols64")
Progress = Callable[[str, int, int], None]
"""Called as (module, done, total): before each module, and once more at the end."""


def cache_root() -> Path:
    """The folder for everything that can be computed again: $SMOA_CACHE_DIR or the user's cache folder."""
    configured = os.environ.get(CACHE_DIR_ENV)
    return Path(configured).expanduser() if configured else user_cache_path("smoa-serve", appauthor=False)


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
        file = self.root / f"{key}.safetensors"
        order = self._read(file)
        if order is not None:
            return order
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            order = self._read(file)
            if order is None:
                order = spectral_order(weight(), check_device=self.check_device)
                self._write(file, order)
        return order

    def _read(self, file: Path) -> SpectralOrder | None:
        if not file.is_file():
            return None
        try:
            tensors = load_file(file)
            order = SpectralOrder(*(tensors[name].long() for name in FIELDS))
        except (SafetensorError, KeyError, OSError) as error:
            logger.warning("The cached order %s is damaged and is computed again: %s", file, error)
            return None
        for positions in (order.rows, order.cols, order.rows64, order.cols64):
            if not torch.equal(positions.sort().values, torch.arange(positions.numel())):
                logger.warning("The cached order %s is no permutation and is computed again", file)
                return None
        return order

    def _write(self, file: Path, order: SpectralOrder) -> None:
        tensors = {name: getattr(order, name).to(torch.int32).contiguous() for name in FIELDS}
        facts = {"torch": torch.__version__, "threads": str(torch.get_num_threads()), "check": self.check_device}
        descriptor, temporary = tempfile.mkstemp(dir=self.root, suffix=".tmp")
        os.close(descriptor)
        try:
            save_file(tensors, temporary, metadata=facts)
            Path(temporary).replace(file)
        finally:
            Path(temporary).unlink(missing_ok=True)
