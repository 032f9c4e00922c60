"""The portable format: canonical factors, block ids, explicit scales and the fingerprint of every base weight.

A file depends on no SVD, serves exactly on any machine, and its digest is its identity. Tensors per module:
`<module>.smoa_a` [R, H_in], `.smoa_b` [H_out, R], `.smoa_row_block` [H_out] and `.smoa_col_block` [H_in] (uint8, or
uint16 from 257 blocks on). No name contains `lora_`, so that a LoRA loader refuses the file.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..base.fingerprint import WeightFingerprint
from ..errors import AdapterError
from .config import FingerprintEntry, ModuleEntry, PortableConfig, parse_config
from .keys import tensor_reasons
from .model import Adapter, ModuleUpdate
from .options import LoadOptions
from .source import CONFIG_NAME, WEIGHTS_NAME, Source

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


def load_portable(source: Source, options: LoadOptions) -> Adapter:
    """Read a portable adapter.

    Raises:
        AdapterError: with every reason found.
    """
    config = parse_config(PortableConfig, source.name, source.config)
    tensors = source.read(options)
    reasons = [] if config.modules else ["it has no factors at all, nothing would be bound"]
    expected = {f"{name}.{part}" for name in config.modules for part in FIELDS}
    reasons += [f"{name} is missing" for name in sorted(expected - set(tensors))]
    reasons += [f"{name} is no tensor of this adapter" for name in sorted(set(tensors) - expected)]
    if reasons:
        raise AdapterError(source.name, reasons)
    for name, entry in config.modules.items():
        reasons += _module_reasons(name, entry, tensors)
    if reasons:
        raise AdapterError(source.name, reasons)
    adapter = Adapter(
        kind=config.kind,
        modules={name: _update(name, entry, tensors) for name, entry in config.modules.items()},
        rank=config.rank,
        num_blocks=config.num_blocks,
        alpha=config.alpha,
        order=config.order,
        base_model=config.base_model_name_or_path,
        metadata=config.metadata,
    )
    reasons = _claim_reasons(config, adapter)
    if reasons:
        raise AdapterError(source.name, reasons)
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
    return ModuleEntry(
        branch_ranks=list(update.branch_ranks),
        scaling=update.scaling,
        order_error=update.order_error,
        base=FingerprintEntry(**asdict(update.base)) if update.base else None,
    )


def _update(name: str, entry: ModuleEntry, tensors: Mapping[str, Tensor]) -> ModuleUpdate:
    a, b, row_block, col_block = (tensors[f"{name}.{part}"] for part in FIELDS)
    return ModuleUpdate(
        a=a,
        b=b,
        row_block=row_block.to(torch.int16),
        col_block=col_block.to(torch.int16),
        branch_ranks=tuple(entry.branch_ranks),
        scaling=entry.scaling,
        base=WeightFingerprint(**entry.base.model_dump()) if entry.base else None,
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
