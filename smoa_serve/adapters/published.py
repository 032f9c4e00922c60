"""The published SMoA format: factors indexed by an order that the file does not hold (see base/spectral.py)."""

import hashlib
import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from ..base.checkpoint import BaseCheckpoint
from ..base.orders import OrderCache, Progress
from ..base.spectral import SpectralOrder
from ..errors import AdapterError
from ..files.tensors import tensor_bytes
from .canonical import Factors, branch_ranks, canonical_update, factor_reasons
from .config import PublishedConfig, parse_config
from .keys import SMOA_KEY, foreign_reasons, named_as_stored, pick_adapter, sort_tensors
from .model import Adapter, AdapterKind, ModuleUpdate, OrderStatus
from .options import LoadOptions, limit_reasons
from .source import Source
from .target_check import target_reasons

logger = logging.getLogger(__name__)


def load_published(
    source: Source, base: BaseCheckpoint, options: LoadOptions, progress: Progress | None = None
) -> Adapter:
    """Read a published SMoA adapter and bring it into the layer's own coordinates.

    Args:
        source: where it lies.
        base: the very checkpoint it was trained on: the order is recomputed from its stored bytes.
        options: see LoadOptions.
        progress: called before each module's order is looked up or computed.

    Raises:
        AdapterError: with every reason found.
    """
    config = parse_config(PublishedConfig, source.name, source.config)
    found = sort_tensors(source.read(options), SMOA_KEY)
    modules = named_as_stored(source, pick_adapter(source, found, options.adapter_name), base)
    ranks = _checked_ranks(source, config, modules, found.others, base, options)
    total = sum(ranks)
    scaling = config.lora_alpha / total if total else 1.0
    orders = _orders(modules, found.others, base, options, progress)
    _report(source, orders)
    return Adapter(
        kind=AdapterKind.SMOA,
        modules={name: _update(factors, orders[name], ranks, scaling, base, name) for name, factors in modules.items()},
        rank=total,
        num_blocks=len(ranks),
        alpha=config.lora_alpha,
        order=OrderStatus.RECOMPUTED,
        base_model=config.base_model_name_or_path,
    )


def _checked_ranks(
    source: Source,
    config: PublishedConfig,
    modules: Mapping[str, Factors],
    others: Mapping[str, Tensor],
    base: BaseCheckpoint,
    options: LoadOptions,
) -> tuple[int, ...]:
    """The rank of each block, once nothing speaks against the adapter. Costs no SVD."""
    if base.is_quantized:
        raise AdapterError(
            source.name,
            "the base is quantized, and the order of a published SMoA adapter can only be derived from the weights it "
            "was trained on; convert it to the portable format with the original base (smoa-serve convert --base)",
        )
    reasons = foreign_reasons(source, others)
    if not modules:
        raise AdapterError(source.name, reasons or "the file holds no SMoA factors, nothing would be bound")
    shapes = {name: base.shape(name) for name in modules if name in base.linear_modules}
    reasons += target_reasons(config, modules, base)
    ranks, open_reasons = branch_ranks(config, modules, shapes)
    reasons += open_reasons + limit_reasons(max(ranks, default=0), options)
    for name, shape in shapes.items():
        if ranks:
            reasons += factor_reasons(name, modules[name], shape, ranks)
        reasons += _trained_weight_reasons(name, others, base)
    if reasons:
        raise AdapterError(source.name, reasons)
    return ranks


def _update(
    factors: Factors, order: SpectralOrder, ranks: tuple[int, ...], scaling: float, base: BaseCheckpoint, name: str
) -> ModuleUpdate:
    return canonical_update(
        factors,
        order.rows,
        order.cols,
        ranks,
        scaling,
        base=base.fingerprint(name),
        order_error=order.order_error,
    )


def _trained_weight_reasons(name: str, others: Mapping[str, Tensor], base: BaseCheckpoint) -> list[str]:
    """A Trainer checkpoint holds the base weights it was trained on: they must be the base's, up to a cast."""
    trained = others.get(f"{name}.weight")
    if trained is None:
        return []
    stored = base.stored(name).read()
    if trained.shape == stored.shape and (
        torch.equal(trained.to(stored.dtype), stored) or torch.equal(stored.to(trained.dtype), trained)
    ):
        return []
    return [f"{name}: the checkpoint was trained on another base: its own copy of the weight differs"]


def _orders(
    modules: Mapping[str, Factors],
    others: Mapping[str, Tensor],
    base: BaseCheckpoint,
    options: LoadOptions,
    progress: Progress | None,
) -> dict[str, SpectralOrder]:
    """The spectral order of every module's weight as it was when the adapter was created."""
    cache = OrderCache(check_device=options.check_device)
    orders = {}
    for done, name in enumerate(modules):
        if progress:
            progress(name, done, len(modules))
        weight = _trained_weight(name, others, base, options)
        if weight is None:
            orders[name] = cache.get(base, name)
        else:
            orders[name] = cache.get_by_key(_key(weight), lambda weight=weight: weight)  # type: ignore[misc]
    if progress:
        progress("", len(modules), len(modules))
    return orders


def _trained_weight(
    name: str, others: Mapping[str, Tensor], base: BaseCheckpoint, options: LoadOptions
) -> Tensor | None:
    """The weight [H_out, H_in] as it was at training, where that is not simply the stored one."""
    trained = others.get(f"{name}.weight")
    if trained is None and options.trained_dtype is not None:
        trained = base.stored(name).read().to(getattr(torch, options.trained_dtype))
    if trained is None or _dtype(trained) == base.fingerprint(name).dtype:
        return None
    return trained.t() if base.is_transposed(name) else trained


def _key(weight: Tensor) -> str:
    digest = hashlib.sha256(tensor_bytes(weight)).hexdigest()
    return f"{digest}-{_dtype(weight)}-{weight.shape[0]}x{weight.shape[1]}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _report(source: Source, orders: Mapping[str, SpectralOrder]) -> None:
    """Never silent: an order that is not fully determined makes the served update differ from the trained one."""
    unsure = {name: order.order_error for name, order in orders.items() if order.order_error > 0}
    if not unsure:
        return
    worst = max(unsure, key=lambda name: unsure[name])
    logger.warning(
        "Adapter %s: the spectral order of %d of %d layers is not fully determined by the base weights. Expected error "
        "of the update up to %.3f (at %s). Have the adapter converted where it was trained, or train it with an order "
        "that is recorded.",
        source.name,
        len(unsure),
        len(orders),
        unsure[worst],
        worst,
    )
