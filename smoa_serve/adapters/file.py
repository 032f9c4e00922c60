"""Which reader takes an adapter: the only place that chooses."""

from pathlib import Path

from ..base.checkpoint import BaseCheckpoint
from ..base.orders import Progress
from ..errors import AdapterError
from .config import is_portable, kind_of
from .fits import check_binding
from .hira import load_hira
from .model import Adapter, AdapterKind
from .options import LoadOptions, limit_reasons
from .overflow import overflow_reasons
from .portable import load_portable
from .published import load_published
from .source import Source, open_source

DEFAULT = LoadOptions()


def detect_kind(path: str | Path, options: LoadOptions = DEFAULT) -> AdapterKind:
    """The kind of the adapter at `path`; its configuration's `peft_type` decides, nothing else.

    Raises:
        AdapterNotFoundError: nothing is there.
        AdapterError: no configuration, no weights, or a kind that is not served.
    """
    source = open_source(path, options)
    return kind_of(source.name, source.config)


def load_adapter(
    path: str | Path,
    base: BaseCheckpoint | None,
    options: LoadOptions = DEFAULT,
    *,
    progress: Progress | None = None,
) -> Adapter:
    """Read a published SMoA, PEFT HiRA or portable adapter and check it against its base.

    Args:
        path: adapter folder, Trainer checkpoint, or weight file.
        base: the base model; a published SMoA adapter cannot be read without.
        options: see LoadOptions.
        progress: called while spectral orders are computed.

    Raises:
        AdapterNotFoundError: nothing is there.
        AdapterError: with every reason; also for a LoRA adapter, which vLLM reads itself.
    """
    source = open_source(path, options)
    adapter = _read(source, base, options, progress)
    reasons = _option_reasons(adapter, options)
    if reasons:
        raise AdapterError(source.name, reasons)
    if base is not None:
        check_binding(adapter, base, source=source.name)
    return adapter


def _read(source: Source, base: BaseCheckpoint | None, options: LoadOptions, progress: Progress | None) -> Adapter:
    kind = kind_of(source.name, source.config)
    if kind is AdapterKind.LORA:
        raise AdapterError(source.name, "it is a LoRA adapter: vLLM reads those itself")
    if is_portable(source.config):
        return load_portable(source, options)
    if kind is AdapterKind.HIRA:
        return load_hira(source, base, options)
    if base is None:
        raise AdapterError(
            source.name, "a published SMoA adapter can only be read beside its base model: its order is not in the file"
        )
    return load_published(source, base, options, progress)


def _option_reasons(adapter: Adapter, options: LoadOptions) -> list[str]:
    reasons = limit_reasons(adapter.max_rank, options) + overflow_reasons(adapter.modules)
    if options.strict_order:
        reasons += [
            f"{name}: the spectral order is not fully determined, expected error of the update {update.order_error:.3f}"
            for name, update in adapter.modules.items()
            if update.order_error > 0
        ]
    return reasons
