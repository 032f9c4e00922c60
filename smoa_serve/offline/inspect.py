"""What `smoa-serve inspect` and `verify` tell about an adapter, with or without its base."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..adapters import LoadOptions, load_adapter
from ..adapters.config import is_portable, kind_of
from ..adapters.keys import SMOA_KEY, pick_adapter, sort_tensors
from ..adapters.lora import load_lora
from ..adapters.model import Adapter, AdapterKind
from ..adapters.overflow import overflow_reasons
from ..adapters.source import Source, open_source
from ..base.checkpoint import BaseCheckpoint
from ..base.orders import Progress
from ..errors import AdapterError

DEFAULT = LoadOptions()


@dataclass(frozen=True)
class ModuleReport:
    """One adapted layer.

    Attributes:
        name: module path.
        shape: (H_out, H_in); None while only the base could tell.
        branch_ranks: rank of each block.
        order_error: expected relative error of the update that comes from the order; None while it is not known.
    """

    name: str
    shape: tuple[int, int] | None
    branch_ranks: tuple[int, ...]
    order_error: float | None


@dataclass(frozen=True)
class AdapterReport:
    """Everything that is known about an adapter.

    Attributes:
        path: as given.
        kind: what computes it.
        format: "published", "portable", "hira" or "lora": the file format.
        config: adapter_config.json as read.
        parameters: trainable numbers.
        factor_bytes: bytes of the factors (and block ids) in memory.
        file_bytes: size of the weight file.
        digest: identity of its content; None for a published adapter without its base.
        rank: total rank r.
        num_blocks: K.
        max_rank: widest branch: what a slot must hold.
        order: where the block ids come from.
        order_error: worst of the modules'; None while it is not known.
        base_match: "exact" (the fingerprints of all weights agree), "shapes" (the file has no fingerprints; names and
            shapes fit), "no" (see problems), or None without a base.
        problems: every reason why it does not.
        modules: adapted layers.
    """

    path: str
    kind: AdapterKind
    format: str
    config: dict[str, object]
    parameters: int
    factor_bytes: int
    file_bytes: int
    digest: str | None = None
    rank: int | None = None
    num_blocks: int | None = None
    max_rank: int | None = None
    order: str | None = None
    order_error: float | None = None
    base_match: str | None = None
    problems: list[str] = field(default_factory=list)
    modules: list[ModuleReport] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """For `--json`."""
        return asdict(self)


def inspect_adapter(
    path: str | Path,
    base: BaseCheckpoint | None = None,
    options: LoadOptions = DEFAULT,
    *,
    progress: Progress | None = None,
) -> AdapterReport:
    """Look at an adapter without serving it.

    Args:
        path: adapter as the user names it.
        base: when given, orders are computed and every tensor is bound; what does not fit is reported, not raised.
        options: see LoadOptions.
        progress: called while spectral orders are computed.

    Raises:
        AdapterError: the file itself cannot be read.
    """
    source = open_source(path, options)
    kind = kind_of(source.name, source.config)
    if kind is AdapterKind.LORA:
        return _lora(source, base, options)
    problems: list[str] = []
    if base is not None:
        try:
            adapter = load_adapter(path, base, options, progress=progress)
            match = "exact" if _is_exact(source, adapter, base) else "shapes"
            return _canonical(source, adapter, base_match=match, problems=[])
        except AdapterError as error:
            problems = error.reasons
    mismatch = None if base is None else "no"
    if kind is AdapterKind.SMOA and not is_portable(source.config):
        return _published(source, options, base_match=mismatch, problems=problems)
    return _canonical(source, load_adapter(path, None, options), base_match=mismatch, problems=problems)


@dataclass(frozen=True)
class Verification:
    """An adapter that fits its base.

    Attributes:
        layers: number of layers bound.
        exact: whether the file's fingerprints were found in the base, so that it is known to be this very base.
        order_error: worst expected relative error of a layer's update that comes from the order.
    """

    layers: int
    exact: bool
    order_error: float


def verify_adapter(
    path: str | Path,
    base: BaseCheckpoint,
    options: LoadOptions = DEFAULT,
    *,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Bind every tensor of an adapter against its base, as a server would.

    Args:
        path: adapter as the user names it.
        base: base model it shall be served on.
        options: see LoadOptions.
        dtype: that the model is served in, e.g. "float16"; as its configuration says by default.
        progress: called while spectral orders are computed.

    Raises:
        AdapterError: with every reason why it cannot be served.
    """
    source = open_source(path, options)
    if kind_of(source.name, source.config) is AdapterKind.LORA:
        return Verification(len(load_lora(source, base, options).factors()), exact=False, order_error=0.0)
    adapter = load_adapter(path, base, options, progress=progress)
    reasons = overflow_reasons(adapter.modules, getattr(torch, dtype or base.dtype))
    if reasons:
        raise AdapterError(source.name, reasons)
    return Verification(len(adapter.modules), _is_exact(source, adapter, base), adapter.order_error)


def _is_exact(source: Source, adapter: Adapter, base: BaseCheckpoint) -> bool:
    """Fingerprints count when they came with the file and met a weight: a published adapter gets them from the base at
    hand, and a quantized weight has none."""
    return is_portable(source.config) and all(
        update.base and name not in base.quantized_modules for name, update in adapter.modules.items()
    )


def _canonical(source: Source, adapter: Adapter, *, base_match: str | None, problems: list[str]) -> AdapterReport:
    hira = adapter.kind is AdapterKind.HIRA
    published = "hira" if hira else "published"
    return AdapterReport(
        path=source.name,
        kind=adapter.kind,
        format="portable" if is_portable(source.config) else published,
        config=source.config,
        parameters=adapter.num_parameters,
        factor_bytes=adapter.nbytes,
        file_bytes=source.weights.stat().st_size,
        digest=adapter.digest,
        rank=adapter.rank,
        num_blocks=adapter.num_blocks,
        max_rank=adapter.max_rank,
        order=adapter.order.value,
        order_error=adapter.order_error,
        base_match=base_match,
        problems=problems,
        modules=[
            ModuleReport(name, update.shape, update.branch_ranks, update.order_error)
            for name, update in adapter.modules.items()
        ],
    )


def _published(source: Source, options: LoadOptions, *, base_match: str | None, problems: list[str]) -> AdapterReport:
    """A published adapter without a base that fits: only what the tensors themselves tell."""
    modules = pick_adapter(source, sort_tensors(source.read(options), SMOA_KEY), options.adapter_name)
    reports = []
    for name, factors in modules.items():
        ranks = {k: t.shape[0] for (side, k), t in factors.items() if side == "A" and t.dim() == 2}
        reports.append(
            ModuleReport(name, None, tuple(ranks.get(k, 0) for k in range(max(ranks, default=-1) + 1)), None)
        )
    tensors = [t for factors in modules.values() for t in factors.values()]
    return AdapterReport(
        path=source.name,
        kind=AdapterKind.SMOA,
        format="published",
        config=source.config,
        parameters=sum(t.numel() for t in tensors),
        factor_bytes=sum(t.nbytes for t in tensors),
        file_bytes=source.weights.stat().st_size,
        max_rank=max((max(report.branch_ranks, default=0) for report in reports), default=0),
        base_match=base_match,
        problems=problems,
        modules=reports,
    )


def _lora(source: Source, base: BaseCheckpoint | None, options: LoadOptions) -> AdapterReport:
    problems: list[str] = []
    try:
        files = load_lora(source, base, options)
    except AdapterError as error:
        if base is None:
            raise
        problems, files = error.reasons, load_lora(source, None, options)
    tensors = files.tensors.values()
    return AdapterReport(
        path=source.name,
        kind=AdapterKind.LORA,
        format="lora",
        config=source.config,
        parameters=sum(t.numel() for t in tensors),
        factor_bytes=sum(t.nbytes for t in tensors),
        file_bytes=source.weights.stat().st_size,
        digest=files.digest,
        rank=files.rank,
        num_blocks=1,
        max_rank=files.rank,
        base_match=None if base is None else "no" if problems else "shapes",
        problems=problems,
        modules=[
            ModuleReport(name, (b.shape[0], a.shape[1]), (a.shape[0],), 0.0) for name, (a, b) in files.factors().items()
        ],
    )
