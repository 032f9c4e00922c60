"""The published SMoA format: factors indexed by an order that the file does not hold (see base/spectral.py)."""

import hashlib
import logging
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from ..base.checkpoint import BaseCheckpoint
from ..base.orders import OrderCache
from ..base.spectral import SpectralOrder, even_ranks
from ..errors import AdapterError
from ..files.tensors import tensor_bytes
from .canonical import Factors, branch_ranks, canonical_update, factor_reasons
from .config import PublishedConfig, parse_config
from .keys import SMOA_KEY, foreign_reasons, named_as_stored, pick_adapter, sort_tensors
from .model import Adapter, AdapterKind, ModuleUpdate, OrderStatus
from .portable import CanonicalFile
from .source import LoadOptions, Source
from .summary import LayerSummary
from .targets import target_reasons

logger = logging.getLogger(__name__)


class SmoaFile(CanonicalFile):
    """A published SMoA adapter. Its order is recomputed from the very checkpoint it was trained on."""

    kind = AdapterKind.SMOA
    format = "published"
    needs_base = True

    @cached_property
    def _config(self) -> PublishedConfig:
        return parse_config(PublishedConfig, self.source.name, self.source.config)

    def slot_rank(self) -> int:
        """See AdapterFile."""
        config = self._config
        if config.branch_ranks is not None:
            return max(config.branch_ranks, default=0)
        if config.r is not None:
            return max(even_ranks(config.r, config.num_blocks or 1))
        raise AdapterError(
            self.source.name, "its configuration has no r; say what a slot must hold with --max-lora-rank"
        )

    def layers(self, base: BaseCheckpoint | None = None) -> list[LayerSummary]:
        """See AdapterFile."""
        if base is not None:
            return super().layers(base)
        modules = pick_adapter(self.source, sort_tensors(self.source.tensors(), SMOA_KEY))
        return [_layer(name, factors) for name, factors in modules.items()]

    def _parse(self, base: BaseCheckpoint | None) -> Adapter:
        if base is None:
            what = "a published SMoA adapter can only be read beside its base model"
            raise AdapterError(self.source.name, f"{what}: its order is not in the file")
        config, source = self._config, self.source
        found = sort_tensors(source.tensors(), SMOA_KEY)
        modules = named_as_stored(source, pick_adapter(source, found), base)
        ranks = self._checked_ranks(modules, found.others, base)
        total = sum(ranks)
        scaling = config.lora_alpha / total if total else 1.0
        orders = _orders(source, modules, found.others, base)
        _report(source, orders)
        return Adapter(
            kind=self.kind,
            modules={n: _update(factors, orders[n], ranks, scaling, base, n) for n, factors in modules.items()},
            rank=total,
            num_blocks=len(ranks),
            alpha=config.lora_alpha,
            order=OrderStatus.RECOMPUTED,
            base_model=config.base_model_name_or_path,
        )

    def _checked_ranks(
        self, modules: Mapping[str, Factors], others: Mapping[str, Tensor], base: BaseCheckpoint
    ) -> tuple[int, ...]:
        """The rank of each block, once nothing speaks against the adapter. Costs no SVD."""
        source = self.source
        if base.is_quantized:
            raise AdapterError(
                source.name,
                "the base is quantized, and the order of a published SMoA adapter can only be derived from the weights "
                "it was trained on; convert it to the portable format with the original base (smoa-serve convert "
                "--base)",
            )
        reasons = foreign_reasons(source, others)
        if not modules:
            self._refuse(reasons or ["the file holds no SMoA factors, nothing would be bound"])
        shapes = {name: base.shape(name) for name in modules if name in base.linear_modules}
        reasons += target_reasons(self._config, modules, base)
        ranks, open_reasons = branch_ranks(self._config, modules, shapes)
        reasons += open_reasons + source.options.rank_reasons(max(ranks, default=0))
        for name, shape in shapes.items():
            if ranks:
                reasons += factor_reasons(name, modules[name], shape, ranks)
            reasons += _trained_weight_reasons(name, others, base)
        self._refuse(reasons)
        return ranks


def _layer(name: str, factors: Factors) -> LayerSummary:
    """What the factors tell without a base."""
    ranks = {k: t.shape[0] for (side, k), t in factors.items() if side == "A" and t.dim() == 2}
    branches = tuple(ranks.get(k, 0) for k in range(max(ranks, default=-1) + 1))
    tensors = factors.values()
    return LayerSummary(name, None, branches, None, sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors))


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
    source: Source, modules: Mapping[str, Factors], others: Mapping[str, Tensor], base: BaseCheckpoint
) -> dict[str, SpectralOrder]:
    """The spectral order of every module's weight as it was when the adapter was created."""
    cache = OrderCache(check_device=source.options.check_device)
    orders = {}
    for done, name in enumerate(modules):
        if source.progress:
            source.progress(name, done, len(modules))
        weight = _trained_weight(name, others, base, source.options)
        if weight is None:
            orders[name] = cache.get(base, name)
        else:
            orders[name] = cache.get_by_key(_key(weight), lambda weight=weight: weight)  # type: ignore[misc]
    if source.progress:
        source.progress("", len(modules), len(modules))
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
