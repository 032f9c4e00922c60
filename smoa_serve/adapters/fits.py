"""Every tensor of an adapter against the base: all reasons at once."""

import logging

from ..base.checkpoint import BaseCheckpoint
from ..errors import AdapterError
from .model import Adapter, ModuleUpdate

logger = logging.getLogger(__name__)


def check_binding(adapter: Adapter, base: BaseCheckpoint, *, source: object = "in memory") -> None:
    """Make sure that every module of an adapter has its place in the base, and that it is the base it was made for.

    A module that the base stores quantized has no fingerprint: only its shape is checked, and the log says so. Whether
    the engine can multiply with its weight is the engine's to say.

    Args:
        adapter: complete adapter.
        base: checkpoint it shall be served on.
        source: what the user calls the adapter, for the message.

    Raises:
        AdapterError: with every reason: unknown modules, shapes that do not fit, another base, nothing to bind.
    """
    reasons = [reason for name in adapter.modules for reason in _module_reasons(name, adapter.modules[name], base)]
    if not adapter.modules:
        reasons.append("it has no factors at all, nothing would be bound")
    if reasons:
        raise AdapterError(source, reasons)
    unknown = [name for name in adapter.modules if name in base.quantized_modules]
    if unknown:
        logger.warning(
            "Adapter %s: %d of its %d layers are quantized in this base. Its updates multiply the dequantized weights; "
            "that these were made from the weights it was trained on cannot be checked.",
            source,
            len(unknown),
            len(adapter.modules),
        )


def _module_reasons(name: str, update: ModuleUpdate, base: BaseCheckpoint) -> list[str]:
    if name not in base.linear_modules:
        return [base.why_not_linear(name)]
    if update.shape != base.shape(name):
        return [f"{name}: the factors are for a layer of {_by(update.shape)}, the base has {_by(base.shape(name))}"]
    if update.base is None or name in base.quantized_modules:
        return []
    found = base.fingerprint(name)
    if update.base.dtype != found.dtype:
        return [f"{name}: trained on {update.base.dtype} weights, but this base stores {found.dtype}: another base"]
    if update.base != found:
        digests = f"{update.base.sha256[:12]}…, this base has {found.sha256[:12]}…"
        return [f"{name}: trained on another base: its weight has the digest {digests}"]
    return []


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} × {shape[1]}"
