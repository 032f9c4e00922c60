"""The portable format: canonical factors, block ids, explicit scales and the fingerprint of every base weight. What
every file shares that can be brought into it.

A file depends on no SVD, serves exactly on any machine, and its digest is its identity. Tensors per module:
`<module>.smoa_a` [R, H_in], `.smoa_b` [H_out, R], `.smoa_row_block` [H_out] and `.smoa_col_block` [H_in] (uint8, or
uint16 from 257 blocks on). No name contains `lora_`, so that a LoRA loader refuses the file.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..base.checkpoint import BaseCheckpoint
from .config import ModuleEntry, PortableConfig, parse_config
from .fits import check_binding
from .keys import tensor_reasons
from .model import Adapter, Delta, ModuleUpdate
from .overflow import overflow_reasons
from .source import CONFIG_NAME, WEIGHTS_NAME, AdapterFile, Source
from .summary import Fit, LayerSummary

FIELDS = ("smoa_a", "smoa_b", "smoa_row_block", "smoa_col_block")


def write_portable(adapter: Adapter, out_dir: str | Path) -> Path:
    """Write an adapter in the portable format; the configuration comes last, so that a torn write is no adapter.

    Args:
        adapter: SMoA or HiRA.
        out_dir: folder, made if absent.

    Returns:
        The folder.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, update in adapter.modules.items():
        ids = torch.uint8 if update.num_blocks <= 256 else torch.uint16
        parts = (update.a, update.b, update.row_block.to(ids), update.col_block.to(ids))
        tensors |= {f"{name}.{part}": t.detach().cpu().contiguous() for part, t in zip(FIELDS, parts, strict=True)}
    save_file(tensors, out / WEIGHTS_NAME)
    config = PortableConfig(
        kind=adapter.kind,
        digest=adapter.digest,
        rank=adapter.total_rank,
        num_blocks=adapter.most_blocks,
        alpha=adapter.alpha,
        order=adapter.order,
        base_model_name_or_path=adapter.base_model,
        modules={name: _entry(update) for name, update in adapter.modules.items()},
        metadata=dict(adapter.metadata),
    )
    (out / CONFIG_NAME).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return out


class CanonicalFile(AdapterFile[Adapter]):
    """A file whose content our kernels compute.

    Attributes:
        records_base: it says which weights it was made for.
    """

    records_base: ClassVar[bool] = False

    @abstractmethod
    def _parse(self, base: BaseCheckpoint | None) -> Adapter: ...

    def _read(self, base: BaseCheckpoint | None) -> Adapter:
        adapter = self._parse(base)
        options = self.source.options
        reasons = options.rank_reasons(adapter.max_rank) + overflow_reasons(adapter.modules)
        if options.strict_order:
            what = "the spectral order is not fully determined, expected error of the update"
            reasons += [f"{n}: {what} {m.order_error:.3f}" for n, m in adapter.modules.items() if m.order_error > 0]
        self._refuse(reasons)
        if base is not None:
            check_binding(adapter, base, source=self.source.name)
        return adapter

    def layers(self, base: BaseCheckpoint | None = None) -> list[LayerSummary]:
        """See AdapterFile."""
        return [
            LayerSummary(name, m.shape, m.branch_ranks, m.order_error, m.num_parameters, m.nbytes)
            for name, m in self.read(base).modules.items()
        ]

    def check(self, base: BaseCheckpoint, dtype: str | None = None) -> Fit:
        """See AdapterFile. Fingerprints count when they came with the file and met a weight: a published adapter gets
        them from the base at hand, and a quantized weight has none."""
        adapter = self.read(base)
        self._refuse(overflow_reasons(adapter.modules, getattr(torch, dtype or base.dtype)))
        met = all(update.base and name not in base.quantized_modules for name, update in adapter.modules.items())
        return Fit(len(adapter.modules), self.records_base and met, adapter.order_error)

    def adapter(self, base: BaseCheckpoint | None = None) -> Adapter:
        """See AdapterFile."""
        return self.read(base)

    def deltas(self, base: BaseCheckpoint) -> dict[str, Delta]:
        """See AdapterFile."""
        return {name: update.dense for name, update in self.read(base).modules.items()}

    def base_mark(self, base: BaseCheckpoint) -> str:
        """See AdapterFile."""
        modules = sorted(self.read(base).modules.items())
        marks = [f"{name}:{m.base.sha256}:{m.base.dtype}" for name, m in modules if m.base]
        return hashlib.sha256(" ".join(marks).encode()).hexdigest()[:16] if marks else ""

    def write_private(self, folder: Path, base: BaseCheckpoint) -> None:
        """See AdapterFile: in the portable format."""
        write_portable(self.read(base), folder)


class PortableFile(CanonicalFile):
    """A file in the portable format; its configuration says which kind it holds."""

    format = "portable"
    records_base = True

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._config = parse_config(PortableConfig, source.name, source.config)
        self.kind = self._config.kind

    def slot_rank(self) -> int:
        """See AdapterFile."""
        return max((rank for module in self._config.modules.values() for rank in module.branch_ranks), default=0)

    def _parse(self, base: BaseCheckpoint | None) -> Adapter:
        config, tensors = self._config, self.source.tensors()
        reasons = [] if config.modules else ["it has no factors at all, nothing would be bound"]
        expected = {f"{name}.{part}" for name in config.modules for part in FIELDS}
        reasons += [f"{name} is missing" for name in sorted(expected - set(tensors))]
        self._refuse(reasons + [f"{name} is no tensor of this adapter" for name in sorted(set(tensors) - expected)])
        self._refuse([r for name, entry in config.modules.items() for r in _module_reasons(name, entry, tensors)])
        adapter = Adapter(
            kind=config.kind,
            modules={name: module_update(name, entry, tensors) for name, entry in config.modules.items()},
            rank=config.rank,
            num_blocks=config.num_blocks,
            alpha=config.alpha,
            order=config.order,
            base_model=config.base_model_name_or_path,
            metadata=config.metadata,
        )
        self._refuse(_claim_reasons(config, adapter))
        return adapter


def _claim_reasons(config: PortableConfig, adapter: Adapter) -> list[str]:
    """What a configuration says about its tensors and what is not so."""
    reasons = []
    if adapter.digest != config.digest:
        found = f"its contents have the digest {adapter.digest[:12]}…, its configuration says {config.digest[:12]!r}…"
        reasons.append(f"{found}: it was changed or damaged")
    if adapter.total_rank != config.rank:
        reasons.append(f"its modules have a total rank of {adapter.total_rank}, its configuration says {config.rank}")
    if adapter.most_blocks != config.num_blocks:
        reasons.append(f"its modules have {adapter.most_blocks} blocks, its configuration says {config.num_blocks}")
    return reasons


def _entry(update: ModuleUpdate) -> ModuleEntry:
    ranks = list(update.branch_ranks)
    return ModuleEntry(branch_ranks=ranks, scaling=update.scaling, order_error=update.order_error, base=update.base)


def module_update(name: str, entry: ModuleEntry, tensors: Mapping[str, Tensor]) -> ModuleUpdate:
    """One module of a portable file, of which everything is there."""
    a, b, row_block, col_block = (tensors[f"{name}.{part}"] for part in FIELDS)
    return ModuleUpdate(
        a=a,
        b=b,
        row_block=row_block.to(torch.int16),
        col_block=col_block.to(torch.int16),
        branch_ranks=tuple(entry.branch_ranks),
        scaling=entry.scaling,
        base=entry.base,
        order_error=entry.order_error,
    )


def _module_reasons(name: str, entry: ModuleEntry, tensors: Mapping[str, Tensor]) -> list[str]:
    a, b, row_block, col_block = (tensors[f"{name}.{part}"] for part in FIELDS)
    rank = max(entry.branch_ranks, default=0)
    rows, cols = b.shape[0] if b.dim() else 0, a.shape[-1] if a.dim() else 0
    reasons = tensor_reasons(f"{name}.smoa_a", a, (rank, cols)) + tensor_reasons(f"{name}.smoa_b", b, (rows, rank))
    if a.dtype != b.dtype:
        reasons.append(f"{name}: the factors have several dtypes")
    if not (rows and cols and entry.branch_ranks):
        reasons.append(f"{name}: an update of {rows} x {cols} in {len(entry.branch_ranks)} blocks holds nothing")
    for part, ids, size in (("smoa_row_block", row_block, rows), ("smoa_col_block", col_block, cols)):
        if ids.dtype not in {torch.uint8, torch.uint16} or tuple(ids.shape) != (size,):
            reasons.append(f"{name}.{part} must be uint8 or uint16 of shape [{size}]")
        elif size and int(ids.to(torch.int32).max()) >= len(entry.branch_ranks):
            reasons.append(f"{name}.{part} names a block beyond the {len(entry.branch_ranks)} there are")
    if reasons:
        return reasons
    ranks = torch.tensor(entry.branch_ranks)
    index = torch.arange(rank)
    beyond_a = index[:, None] >= ranks[col_block.long()][None, :]
    beyond_b = index[None, :] >= ranks[row_block.long()][:, None]
    if bool(a[beyond_a].any()) or bool(b[beyond_b].any()):
        reasons.append(f"{name}: numbers beyond the rank of their block")
    return reasons
