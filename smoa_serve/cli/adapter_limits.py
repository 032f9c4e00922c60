"""Which adapters are served from the start, and what room they need."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..adapters import LoadOptions, open_adapter
from ..adapters.source import CONFIG_NAME
from ..errors import ConfigError

# vllm.config.lora.MaxLoRARanks, the same in every supported release.
ALLOWED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
MOST_SLOTS = 16
SLOTS_FOR_LOADING = 4


def adapters_in(folder: Path) -> dict[str, str]:
    """Name → path of every sub-folder that holds an adapter.

    Raises:
        ConfigError: no such folder, no adapter in it, or it may not be read.
    """
    try:
        if not folder.is_dir():
            raise ConfigError(f"--adapters-dir {folder}: there is no such folder")
        found = {entry.name: str(entry) for entry in sorted(folder.iterdir()) if (entry / CONFIG_NAME).is_file()}
    except OSError as error:
        what = f"{error.strerror} ({error.filename})"
        raise ConfigError(f"--adapters-dir {folder} cannot be read: {what}; let the server's user read it") from error
    if not found:
        raise ConfigError(f"--adapters-dir {folder}: no sub-folder has an {CONFIG_NAME}")
    return found


def allowed_rank(needed: int) -> int:
    """The least --max-lora-rank of vLLM that holds `needed`.

    Raises:
        ConfigError: none does.
    """
    for rank in ALLOWED_RANKS:
        if rank >= needed:
            return rank
    raise ConfigError(f"an adapter has a branch of rank {needed}; vLLM's slots hold at most {ALLOWED_RANKS[-1]}")


def default_limits(adapters: Mapping[str, str], roots: Sequence[Path], options: LoadOptions) -> dict[str, int]:
    """vLLM's adapter flags as they follow from the adapters: flag name → value.

    Args:
        adapters: name → path.
        roots: not empty when more may be loaded while the server runs.
        options: how adapters are read.
    """
    needed = max((open_adapter(path, options).slot_rank() for path in adapters.values()), default=0)
    slots = min(MOST_SLOTS, max(len(adapters), SLOTS_FOR_LOADING if roots else 1))
    return {
        "max-loras": slots,
        "max-cpu-loras": max(2 * slots, len(adapters) + SLOTS_FOR_LOADING),
        # Adapters that come later are not known yet: vLLM's own default is the least then.
        "max-lora-rank": allowed_rank(max(needed, 16 if roots or not adapters else 1)),
    }
