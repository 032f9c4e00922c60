"""An adapter in memory: the canonical form that every reader makes and every later stage takes.

Shape letters: H_in, H_out sizes of a layer, R = max_k r_k (rank of the widest branch), K blocks.
"""

import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor

from ..base.fingerprint import WeightFingerprint

Delta = Callable[[Tensor], Tensor]
"""Weight [H_out, H_in] → its update [H_out, H_in], float32."""


class AdapterKind(StrEnum):
    """What computes the update: our kernels (SMOA, HIRA) or vLLM's own LoRA."""

    SMOA = "smoa"
    HIRA = "hira"
    LORA = "lora"

    @property
    def modulates(self) -> bool:
        """True where the update multiplies the base weight, which our kernels compute."""
        return self is not AdapterKind.LORA


class OrderStatus(StrEnum):
    """Where the spectral order behind the block ids comes from."""

    RECORDED = "recorded"  # stored with the adapter when it was made: exact on any machine
    RECOMPUTED = "recomputed"  # derived from the base weight again: exact only if `order_error` is 0
    NOT_NEEDED = "not-needed"  # HiRA: one block, factors in the layer's own coordinates


@dataclass(frozen=True, eq=False)
class ModuleUpdate:
    """The update of one linear layer in the layer's own coordinates (the LoRA-slot form).

    `dW[i, j] = scaling * [row_block[i] == col_block[j]] * (b @ a)[i, j] * W[i, j]`.

    Attributes:
        a: [R, H_in]; rows at and above the rank of column j's block are zero at j.
        b: [H_out, R]; likewise for rows.
        row_block: [H_out] int16, block id of each output coordinate.
        col_block: [H_in] int16, block id of each input coordinate.
        branch_ranks: r_k of each of the K blocks; R = max(r_k, default 0).
        scaling: lora_alpha / r (1.0 when r is 0).
        base: fingerprint of the weight it was trained on; None when the file has none.
        order_error: expected relative error of the update, sqrt(2 (f_r + f_c)), from positions of the order that are
            not well determined (see base/spectral.py); 0.0 for recorded orders and HiRA.
    """

    a: Tensor
    b: Tensor
    row_block: Tensor
    col_block: Tensor
    branch_ranks: tuple[int, ...]
    scaling: float
    base: WeightFingerprint | None = None
    order_error: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """(H_out, H_in)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def num_blocks(self) -> int:
        """K."""
        return len(self.branch_ranks)

    @property
    def max_rank(self) -> int:
        """R: what must fit into a slot."""
        return self.a.shape[0]

    @property
    def num_parameters(self) -> int:
        """Trainable numbers: sum over blocks of r_k (m_k + n_k)."""
        ranks = torch.tensor(self.branch_ranks)
        return int(ranks[self.row_block.long()].sum()) + int(ranks[self.col_block.long()].sum())

    @property
    def nbytes(self) -> int:
        """Bytes of factors and block ids in host memory."""
        return sum(t.nbytes for t in (self.a, self.b, self.row_block, self.col_block))

    def dense(self, weight: Tensor) -> Tensor:
        """The update as a dense matrix, in float32: the definition, for tests, merging and comparisons.

        Args:
            weight: [H_out, H_in], any float dtype.

        Returns:
            [H_out, H_in] float32.
        """
        same = self.row_block[:, None] == self.col_block[None, :]
        product = self.b.float() @ self.a.float()
        return torch.where(same, self.scaling * product * weight.float(), torch.zeros(()))


@dataclass(frozen=True, eq=False)
class Adapter:
    """A SMoA or HiRA adapter, complete and canonical. LoRA adapters stay vLLM's and are never parsed into this.

    Attributes:
        kind: SMOA or HIRA.
        modules: Hugging Face module path of the base model ("model.layers.0.self_attn.q_proj") -> update.
        rank: total rank r of the configuration.
        num_blocks: K of the configuration.
        alpha: lora_alpha of the configuration.
        order: where the block ids come from.
        base_model: `base_model_name_or_path` as written by the trainer, for display only.
        metadata: further JSON-able facts that travel with the file but do not change the maths.
    """

    kind: AdapterKind
    modules: Mapping[str, ModuleUpdate]
    rank: int
    num_blocks: int
    alpha: float
    order: OrderStatus
    base_model: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)

    @property
    def max_rank(self) -> int:
        """Largest branch rank of any module: what `--max-lora-rank` must hold."""
        return max((m.max_rank for m in self.modules.values()), default=0)

    @property
    def total_rank(self) -> int:
        """Largest total rank of any module, from the modules themselves."""
        return max((sum(m.branch_ranks) for m in self.modules.values()), default=0)

    @property
    def most_blocks(self) -> int:
        """Largest number of blocks of any module, likewise."""
        return max((m.num_blocks for m in self.modules.values()), default=1)

    @property
    def nbytes(self) -> int:
        """Bytes of factors and block ids in host memory."""
        return sum(m.nbytes for m in self.modules.values())

    @property
    def order_error(self) -> float:
        """Worst expected relative error of any layer's update."""
        return max((m.order_error for m in self.modules.values()), default=0.0)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of everything that changes the maths: the adapter's identity, whatever file it came from."""
        h = hashlib.sha256(b"smoa-adapter-v1\0")
        for name in sorted(self.modules):
            m = self.modules[name]
            h.update(name.encode() + b"\0" + struct.pack("<d", m.scaling) + repr(m.branch_ranks).encode())
            for t in (m.a, m.b, m.row_block.to(torch.int16), m.col_block.to(torch.int16)):
                h.update(f"{t.dtype}{tuple(t.shape)}".encode())
                h.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return h.hexdigest()
