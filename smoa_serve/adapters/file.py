"""Which class reads an adapter: the only place that chooses."""

from pathlib import Path
from typing import Any

from ..base.checkpoint import BaseCheckpoint
from ..base.orders import Progress
from ..errors import AdapterError
from .config import is_portable
from .hira import HiraFile
from .lora import LoraFile
from .model import Adapter
from .portable import PortableFile
from .published import SmoaFile
from .source import AdapterFile, LoadOptions, Source, open_source

DEFAULT = LoadOptions()
FORMATS: dict[str, type[AdapterFile[Any]]] = {"SMOA": SmoaFile, "HIRA": HiraFile, "LORA": LoraFile}


def open_adapter(
    path: str | Path, options: LoadOptions = DEFAULT, *, progress: Progress | None = None
) -> AdapterFile[Any]:
    """Open an adapter, once; its answers come from what was opened.

    Args:
        path: adapter folder, Trainer checkpoint, or weight file.
        options: see LoadOptions.
        progress: called while spectral orders are computed.

    Raises:
        AdapterNotFoundError: nothing is there.
        AdapterError: no configuration, no weights, or a kind that is not served.
    """
    return file_of(open_source(path, options, progress))


def file_of(source: Source) -> AdapterFile[Any]:
    """The class for a configuration: its `peft_type` decides, and the marker of the portable format.

    Raises:
        AdapterError: a kind that is not served.
    """
    peft_type = source.config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in FORMATS:
        raise AdapterError(source.name, f"peft_type is {peft_type!r}; served are {', '.join(sorted(FORMATS))}")
    return PortableFile(source) if is_portable(source.config) else FORMATS[peft_type](source)


def load_adapter(path: str | Path, base: BaseCheckpoint | None, options: LoadOptions = DEFAULT) -> Adapter:
    """A SMoA or HiRA adapter in the canonical form; raises as `open_adapter` and `AdapterFile.adapter` do."""
    return open_adapter(path, options).adapter(base)
