"""What `smoa-serve convert` does: any adapter we read → the portable format or PEFT HiRA."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from ..adapters import Adapter, LoadOptions, open_adapter, write_hira, write_portable
from ..base.checkpoint import BaseCheckpoint
from ..base.orders import Progress
from ..files.folder import new_folder

DEFAULT = LoadOptions()


class TargetFormat(StrEnum):
    """What can be written."""

    PORTABLE = "portable"
    HIRA = "hira"


def convert(
    path: str | Path,
    out: str | Path,
    to: TargetFormat,
    base: BaseCheckpoint | None,
    options: LoadOptions = DEFAULT,
    *,
    progress: Progress | None = None,
) -> Adapter:
    """Read an adapter and write it in another format.

    Args:
        path: adapter as the user names it.
        out: new or empty folder.
        to: format to write.
        base: the base model; needed for a published SMoA adapter. Fingerprints that the file lacks are taken from it.
        options: see LoadOptions.
        progress: called while spectral orders are computed.

    Returns:
        The adapter that was written.

    Raises:
        AdapterError: the adapter cannot be read or does not fit the base.
        ConfigError: `out` is in use.
    """
    with new_folder(out) as folder:
        adapter = open_adapter(path, options, progress=progress).adapter(base)
        if base is not None:
            modules = {
                name: update if update.base else replace(update, base=base.fingerprint(name))
                for name, update in adapter.modules.items()
            }
            adapter = replace(adapter, modules=modules)
        if to is TargetFormat.PORTABLE:
            write_portable(adapter, folder)
        else:
            write_hira(adapter, folder)
    return adapter
