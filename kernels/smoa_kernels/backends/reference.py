"""The delta as the formula says it: fp32, one adapter and one block at a time."""

import torch
from torch import Tensor

from smoa_kernels.backend import Backend
from smoa_kernels.bank import LayerBank
from smoa_kernels.plan import StepPlan


def smoa_delta_reference(y: Tensor, x: Tensor, bank: LayerBank, plan: StepPlan) -> None:
    """Adds each token's delta to y, in fp32, rounded to y's dtype once.

    Semantics: `y[t, rows_k] += (W_k * (B_k A_k)) x[t, cols_k]` for every block k of the slot's partition, per slice; a
    slot without factors takes its resident blocks instead of `W_k * (B_k A_k)`.

    Args:
        y: [>= T, sum H_out_i] model dtype, updated in place; rows without an adapter are not touched.
        x: [>= T, H_in] model dtype.
        bank: the layer.
        plan: the step; T = plan.num_tokens.
    """
    token_to_slot = plan.token_to_slot[: plan.num_tokens]
    for group in plan.groups:
        tokens = torch.nonzero(token_to_slot == group.slot).flatten()
        offset = 0
        for index, h_out in enumerate(bank.slices):
            entry = bank.slots[group.slot][index]
            if entry is not None:
                rows = torch.arange(offset, offset + h_out, device=y.device)
                delta = torch.zeros(len(tokens), h_out, dtype=torch.float32, device=y.device)
                partition = entry.partition
                a, b = (factors.float() for factors in bank.factors(index, group.slot))
                for k, block in enumerate(partition.blocks):
                    sorted_rows = slice(block.row_start, block.row_end)
                    sorted_cols = slice(block.col_start, block.col_end)
                    if entry.rank:
                        product = b[:, sorted_rows].T @ a[:, sorted_cols]  # [m_k, n_k]
                        update = partition.store.block(k).float() * product
                    elif entry.resident is not None:
                        update = entry.resident.block(k).float()
                    else:
                        continue
                    x_k = x[tokens][:, partition.col_order[sorted_cols]].float()
                    delta[:, partition.row_order[sorted_rows]] = x_k @ update.T
                y[tokens[:, None], rows] = (y[tokens[:, None], rows].float() + delta).to(y.dtype)
            offset += h_out


class ReferenceBackend(Backend):
    """Everywhere: what others are compared with."""

    name = "reference"
    delta = staticmethod(smoa_delta_reference)


BACKEND = ReferenceBackend()
