"""A linear layer with SMoA adapters: parameters, forward pass, merging."""

import hashlib
import logging
import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters.config import ModuleEntry
from ..adapters.model import ModuleUpdate
from ..base.fingerprint import WeightFingerprint
from ..errors import ConfigError
from ..files.tensors import tensor_bytes
from .blocks import Block, block_update, blocks_of
from .config import SMoAConfig
from .start import belongs, block_ids, id_dtype, initial_factors, spectral_pieces

logger = logging.getLogger(__name__)


class SMoALayer(BaseTunerLayer):  # type: ignore[misc]
    """What PEFT looks for in a layer of this method: the names of its parts, each keyed by adapter.

    smoa_a [R, H_in] and smoa_b [H_out, R] are in the layer's own coordinates with one block id per coordinate beside
    them (the LoRA-slot form, see `ModuleUpdate`): names, shapes and numbers of the portable format. Rows of a branch
    narrower than R are zero and get no gradient.
    """

    adapter_layer_names: tuple[str, ...] = ("smoa_a", "smoa_b")
    other_param_names: tuple[str, ...] = ("smoa_row_block", "smoa_col_block", "smoa_dropout", "entries")


class SMoALinear(nn.Module, SMoALayer):
    """`nn.Linear` or transformers' Conv1D with adapters.

    Args:
        base_layer: the frozen layer.
        adapter_name: of the first adapter.
        config: its settings.
        recorded: what a checkpoint says of this module; None takes blocks and ranks from the settings and the weight.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: SMoAConfig, recorded: ModuleEntry | None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.smoa_a = nn.ParameterDict()
        self.smoa_b = nn.ParameterDict()
        self.smoa_row_block = BufferDict(persistent=True)
        self.smoa_col_block = BufferDict(persistent=True)
        self.smoa_dropout = nn.ModuleDict()
        self.entries: dict[str, ModuleEntry] = {}
        self.merged_adapters: list[str] = []
        self._awaited: set[str] = set()  # adapters whose tensors are still to be read from their checkpoint
        self._blocks: dict[str, tuple[Block, ...]] = {}
        self._replaced: list[tuple[Block, Tensor]] = []  # weights as they were before each merge, in order
        self._active_adapter = adapter_name
        self._disable_adapters = False
        self.update_layer(adapter_name, config, recorded)

    @property
    def is_transposed(self) -> bool:
        """True when the weight is stored [H_in, H_out] (Conv1D)."""
        return isinstance(self.base_layer, Conv1D)

    @property
    def matrix(self) -> Tensor:
        """The weight as it is now, [H_out, H_in]; a view."""
        weight = self.base_layer.get_parameter("weight").detach()
        return weight.t() if self.is_transposed else weight

    @property
    def pristine(self) -> Tensor:
        """The weight without any merged adapter, [H_out, H_in]: what updates, orders and fingerprints refer to."""
        if not self._replaced:
            return self.matrix
        matrix = self.matrix.clone()
        _restore(matrix, self._replaced)
        return matrix

    def update_layer(self, adapter_name: str, config: SMoAConfig, recorded: ModuleEntry | None) -> None:
        """Add an adapter; see the class."""
        weight = self.pristine
        if not weight.is_floating_point():
            raise ConfigError("SMoA modulates float weights; this base is quantized")
        base = self._fingerprint(weight)
        if recorded is None:
            ranks = config.ranks
            rows, cols = spectral_pieces(weight, len(ranks), config.order, base.sha256)
            entry = ModuleEntry(branch_ranks=list(ranks), scaling=config.scaling, base=base)
            a, b = initial_factors(rows, cols, ranks, random_b=not config.init_lora_weights)
            row_block, col_block = block_ids(rows), block_ids(cols)
        else:
            entry = recorded
            # Another dtype of the same base is fine: the blocks are recorded.
            if entry.base is not None and entry.base.dtype == base.dtype and entry.base != base:
                logger.warning("The adapter %s was trained on another weight than this layer has", adapter_name)
            widest, ids = max(entry.branch_ranks, default=0), id_dtype(len(entry.branch_ranks))
            a, b = torch.zeros(widest, weight.shape[1]), torch.zeros(weight.shape[0], widest)
            row_block, col_block = (torch.zeros(size, dtype=ids) for size in weight.shape)
            self._awaited.add(adapter_name)
        self.entries[adapter_name] = entry
        self.smoa_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.smoa_a[adapter_name] = nn.Parameter(a.to(weight.device))
        self.smoa_b[adapter_name] = nn.Parameter(b.to(weight.device))
        self.smoa_row_block[adapter_name] = row_block.to(weight.device)
        self.smoa_col_block[adapter_name] = col_block.to(weight.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)  # type: ignore[operator]

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        super().delete_adapter(adapter_name)
        self._blocks.pop(adapter_name, None)
        self._awaited.discard(adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the updates of the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:  # type: ignore[union-attr]  # PEFT's property, not a submodule
            if name not in self.smoa_a:
                continue
            dropped = self.smoa_dropout[name](x)
            if torch.is_autocast_enabled(x.device.type):
                dropped = dropped.to(torch.get_autocast_dtype(x.device.type))
            update = block_update(
                dropped,
                self.smoa_a[name],
                self.smoa_b[name],
                self.matrix,
                self.blocks(name),
                self.entries[name].scaling,
            )
            result = result + update.to(result.dtype)
        return result

    def blocks(self, adapter_name: str) -> tuple[Block, ...]:
        """The blocks of one adapter, on the device of its factors.

        Raises:
            ConfigError: its tensors were never read, or those that were do not belong to its ranks.
        """
        if adapter_name in self._awaited:
            raise ConfigError(
                f"adapter {adapter_name!r}: its configuration comes from a checkpoint, but the tensors beside it were "
                "not read; use PeftModel.from_pretrained, or make a new SMoAConfig to train from the start"
            )
        row_block, col_block = self.smoa_row_block[adapter_name], self.smoa_col_block[adapter_name]
        blocks = self._blocks.get(adapter_name)
        if blocks is None or (blocks and blocks[0].rows.device != row_block.device):
            ranks = self.entries[adapter_name].branch_ranks
            if not belongs(self.smoa_a[adapter_name], self.smoa_b[adapter_name], row_block, col_block, ranks):
                raise ConfigError(
                    f"adapter {adapter_name!r}: the tensors that were read are not those of branches of rank {ranks}; "
                    "go on with the settings that the checkpoint was made with"
                )
            blocks = blocks_of(row_block, col_block, ranks)
            self._blocks[adapter_name] = blocks
        return blocks

    def module_update(self, adapter_name: str) -> ModuleUpdate:
        """The adapter's update of this layer, as every later stage knows it."""
        self.blocks(adapter_name)  # refuses an adapter whose tensors were not read
        entry = self.entries[adapter_name]
        return ModuleUpdate(
            a=self.smoa_a[adapter_name].detach(),
            b=self.smoa_b[adapter_name].detach(),
            row_block=self.smoa_row_block[adapter_name].short(),
            col_block=self.smoa_col_block[adapter_name].short(),
            branch_ranks=tuple(entry.branch_ranks),
            scaling=entry.scaling,
        )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update as a dense float32 matrix, in the layout of the stored weight."""
        dense = self.module_update(adapter).dense(self.pristine)
        return dense.t() if self.is_transposed else dense

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the weight. What they replace is kept, so that `unmerge` is exact.

        Args:
            safe_merge: refuse before anything is written if a number is not finite.
            adapter_names: the active ones by default.

        Raises:
            ValueError: `safe_merge` found numbers that are not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.smoa_a:
                continue
            matrix, pristine = self.matrix, self.pristine
            a, b, scaling = self.smoa_a[name].detach(), self.smoa_b[name].detach(), self.entries[name].scaling
            before = [(block, block.weight(matrix, matrix.dtype)) for block in self.blocks(name)]
            after = [
                (block, (old.to(a.dtype) + block.delta(a, b, pristine, scaling)).to(old.dtype)) for block, old in before
            ]
            if safe_merge and not all(bool(new.isfinite().all()) for _, new in after):
                raise ValueError(f"adapter {name!r}: merging it gives numbers that are not finite")
            _restore(matrix, after)
            self._replaced += before
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Bring the weight back to what it was, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        _restore(self.matrix, self._replaced)
        self._replaced.clear()
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device only: PEFT would also cast the factors to the base's dtype, and they are float32."""
        target = device or self.matrix.device
        for part in (self.smoa_a, self.smoa_b):
            part[adapter_name] = nn.Parameter(part[adapter_name].to(target), part[adapter_name].requires_grad)
        for ids in (self.smoa_row_block, self.smoa_col_block):
            ids[adapter_name] = ids[adapter_name].to(target)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Blocks follow from tensors that may have changed."""
        for name in self.smoa_a:
            if f"{prefix}smoa_row_block.{name}" in state_dict:
                self._blocks.pop(name, None)
                self._awaited.discard(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fingerprint(self, weight: Tensor) -> WeightFingerprint:
        stored = (weight.t() if self.is_transposed else weight).cpu()
        dtype = str(weight.dtype).removeprefix("torch.")
        digest = hashlib.sha256(tensor_bytes(stored)).hexdigest()
        return WeightFingerprint(shape=(weight.shape[0], weight.shape[1]), dtype=dtype, sha256=digest)


def _restore(matrix: Tensor, replaced: list[tuple[Block, Tensor]]) -> None:
    """Write blocks of weights in place, the latest first."""
    for block, numbers in reversed(replaced):
        matrix[block.rows[:, None], block.cols] = numbers
