"""PEFT's HiRA files: `dW = (hira_B @ hira_A) * W`, one block, no scale."""

import json
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..base.checkpoint import BaseCheckpoint
from ..errors import AdapterError
from .canonical import Factors
from .config import HiraConfig, parse_config
from .keys import HIRA_KEY, PREFIX, foreign_reasons, named_as_stored, pick_adapter, sort_tensors, tensor_reasons
from .model import Adapter, AdapterKind, ModuleUpdate, OrderStatus
from .portable import CanonicalFile
from .source import CONFIG_NAME, WEIGHTS_NAME
from .targets import target_reasons


class HiraFile(CanonicalFile):
    """A PEFT HiRA adapter. With a base, its targets and shapes are checked against it."""

    kind = AdapterKind.HIRA
    format = "hira"

    @cached_property
    def _config(self) -> HiraConfig:
        return parse_config(HiraConfig, self.source.name, self.source.config)

    def slot_rank(self) -> int:
        """See AdapterFile."""
        return max([self._config.r, *(self._config.rank_pattern or {}).values()])

    def _parse(self, base: BaseCheckpoint | None) -> Adapter:
        config, source = self._config, self.source
        found = sort_tensors(source.tensors(), HIRA_KEY)
        modules = named_as_stored(source, pick_adapter(source, found), base)
        reasons = foreign_reasons(source, found.others)
        if not modules:
            self._refuse(reasons or ["the file holds no HiRA factors, nothing would be bound"])
        for name, factors in modules.items():
            reasons += _factor_reasons(name, factors, config, base)
        if base is not None:
            reasons += target_reasons(config, modules, base, exclude_modules=config.exclude_modules)
        self._refuse(reasons)
        return Adapter(
            kind=self.kind,
            modules={name: _update(factors) for name, factors in modules.items()},
            rank=config.r,
            num_blocks=1,
            alpha=float(config.r),
            order=OrderStatus.NOT_NEEDED,
            base_model=config.base_model_name_or_path,
        )


def write_hira(adapter: Adapter, out_dir: str | Path) -> Path:
    """Write an adapter as PEFT HiRA: block-sparse factors of the total rank, the scale folded into B.

    Args:
        adapter: SMoA (any K) or HiRA.
        out_dir: folder, made if absent.

    Returns:
        The folder.

    Raises:
        AdapterError: a module has total rank 0, which PEFT cannot hold.
    """
    empty = [name for name, update in adapter.modules.items() if not sum(update.branch_ranks)]
    if empty or not adapter.modules:
        raise AdapterError(adapter.base_model or "in memory", [f"{name} has rank 0" for name in empty] or "no factors")
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    # One rank for all modules, zeros behind: PEFT up to 0.21 ignores rank_pattern for HiRA.
    rank = max(sum(update.branch_ranks) for update in adapter.modules.values())
    for name, update in adapter.modules.items():
        tensors[f"{PREFIX}{name}.hira_A"], tensors[f"{PREFIX}{name}.hira_B"] = hira_factors(update, rank)
    save_file(tensors, out / WEIGHTS_NAME, metadata={"format": "pt"})
    config = {
        "peft_type": "HIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": rank,
        "target_modules": list(adapter.modules),
        "hira_dropout": 0.0,
        "init_weights": True,
        "fan_in_fan_out": False,
    }
    (out / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out


def hira_factors(update: ModuleUpdate, total_rank: int) -> tuple[Tensor, Tensor]:
    """`hira_A` [r, H_in] and `hira_B` [H_out, r], both float32: branch k has its own r_k of the r rows.

    The scale goes into B in float64 before the one rounding to float32; float32, float16 and bfloat16 A stay exact.

    Args:
        update: SMoA or HiRA.
        total_rank: r, at least the sum of the branch ranks; rows behind that are zero.
    """
    out_size, in_size = update.shape
    a = torch.zeros(total_rank, in_size)
    b = torch.zeros(out_size, total_rank)
    first = 0
    for k, rank in enumerate(update.branch_ranks):
        rows, cols = update.row_block == k, update.col_block == k
        a[first : first + rank, cols] = update.a[:rank, cols].float()
        b[rows, first : first + rank] = (update.b[rows, :rank].double() * update.scaling).float()
        first += rank
    return a, b


def _update(factors: Factors) -> ModuleUpdate:
    a, b = factors["A", 0], factors["B", 0]
    row_block = torch.zeros(b.shape[0], dtype=torch.int16)
    col_block = torch.zeros(a.shape[1], dtype=torch.int16)
    return ModuleUpdate(a.contiguous(), b.contiguous(), row_block, col_block, (a.shape[0],), 1.0)


def _factor_reasons(name: str, factors: Factors, config: HiraConfig, base: BaseCheckpoint | None) -> list[str]:
    missing = [f"{name}.hira_{side} is missing" for side in "AB" if (side, 0) not in factors]
    if missing:
        return missing
    a, b = factors["A", 0], factors["B", 0]
    if a.dim() != 2 or b.dim() != 2:
        return [f"{name}: the factors have shapes {list(a.shape)} and {list(b.shape)}, expected two matrices"]
    known = base is not None and name in base.linear_modules
    rows, cols = base.shape(name) if base is not None and known else (b.shape[0], a.shape[1])
    # PEFT up to 0.21 stores rank_pattern and gives every module rank r all the same.
    allowed = {config.r, *(config.rank_pattern or {}).values()}
    rank = a.shape[0] if a.shape[0] in allowed else config.r
    reasons = tensor_reasons(f"{name}.hira_A", a, (rank, cols)) + tensor_reasons(f"{name}.hira_B", b, (rows, rank))
    if a.dtype != b.dtype:
        reasons.append(f"{name}: the factors have several dtypes")
    return reasons
