"""The delta in torch operations: any device, batched over adapters, blocks and ranks."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smoa_kernels.backend import Backend
from smoa_kernels.bank import LayerBank
from smoa_kernels.blocks.layout import BlockStore, PlainBlocks
from smoa_kernels.blocks.partition import Partition
from smoa_kernels.cost import CostModel
from smoa_kernels.plan import StepPlan, TokenGroup, TokenSet
from smoa_kernels.slots import SlotSlice

Member = tuple[TokenGroup, int]  # an adapter's tokens and its live rank


def smoa_delta_torch(y: Tensor, x: Tensor, bank: LayerBank, plan: StepPlan, cost: CostModel | None = None) -> None:
    """Adds each token's delta to y. Args as in `ops.smoa_delta`; `cost` chooses the way of each adapter group."""
    chosen_cost = cost or bank.cost
    ways = bank.memo(
        ("torch", chosen_cost, plan.num_slots),
        plan.version,
        lambda: [_choose_ways(bank, plan, i, chosen_cost) for i in range(len(bank.slices))],
    )
    offset = 0
    for index, (h_out, chosen) in enumerate(zip(bank.slices, ways, strict=True)):
        y_slice = y[:, offset : offset + h_out]
        for partition, members in chosen.expand:
            groups = tuple(group for group, _ in members)
            x_sorted = _sort_columns(x, plan, partition, groups)
            delta = _expand(x_sorted, bank, plan, index, partition, members)
            _add_rows(y_slice, delta, partition, plan.tokens(groups))
        for group, entry in chosen.alone:
            x_sorted = _sort_columns(x, plan, entry.partition, (group,))
            if entry.resident is None:
                delta = _modulate(x_sorted, bank, index, entry.partition, group, entry.rank)
            else:
                delta = _block_gemm(x_sorted, entry.partition, entry.resident)
            _add_rows(y_slice, delta, entry.partition, plan.tokens((group,)))
        offset += h_out


@dataclass(frozen=True)
class _Ways:
    """The groups of one slice.

    Attributes:
        expand: per partition the groups that expand together.
        alone: groups that modulate, or, where the entry names resident blocks, multiply with those.
    """

    expand: list[tuple[Partition, tuple[Member, ...]]]
    alone: list[tuple[TokenGroup, SlotSlice]]


def _choose_ways(bank: LayerBank, plan: StepPlan, index: int, cost: CostModel) -> _Ways:
    expand: dict[int, list[Member]] = defaultdict(list)
    alone = []
    partitions = {}
    for group in plan.groups:
        entry = bank.slots[group.slot][index]
        if entry is None or entry.idle:
            continue
        match cost.way(group.count, entry.rank, entry.resident is not None):
            case "expand":
                partitions[id(entry.partition)] = entry.partition
                expand[id(entry.partition)].append((group, entry.rank))
            case "modulate":
                alone.append((group, replace(entry, resident=None)))
            case "resident":
                alone.append((group, entry))
    # Tokens of equal rank stand together, so that their rows form one [T, r, H] view.
    together = [(partitions[key], tuple(sorted(m, key=lambda member: member[1]))) for key, m in expand.items()]
    return _Ways(together, alone)


def _sort_columns(x: Tensor, plan: StepPlan, partition: Partition, groups: tuple[TokenGroup, ...]) -> Tensor:
    """x of these groups with columns in sorted order, [T, live_cols]."""
    taken = plan.tokens(groups).take(x)
    if not partition.native_cols:
        return taken.index_select(1, partition.col_order[: partition.live_cols])
    return taken[:, : partition.live_cols]


def _expand(
    x: Tensor, bank: LayerBank, plan: StepPlan, index: int, partition: Partition, members: tuple[Member, ...]
) -> Tensor:
    """`sum_rho b_rho * (W_k (a_rho * x_k))` for all tokens of a partition: [T, live_rows] fp32."""
    token_row, factor_row = plan.cached(("expand", bank.max_rank, members), lambda: _row_index(bank, plan, members))
    rows, cols = partition.live_rows, partition.live_cols
    a, b = bank.a[index].flatten(0, 1), bank.b[index].flatten(0, 1)  # [S * R, H]
    expanded = x.index_select(0, token_row)
    expanded = expanded * a.index_select(0, factor_row)[:, :cols]  # [U, live_cols]
    u = _block_gemm(expanded, partition, partition.store).float()  # [U, live_rows]
    u *= b.index_select(0, factor_row)[:, :rows]
    parts, start = [], 0
    for tokens, rank in _equal_ranks(members):
        end = start + tokens * rank
        parts.append(u[start:end].view(tokens, rank, rows).sum(1))
        start = end
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _equal_ranks(members: Sequence[Member]) -> list[tuple[int, int]]:
    """(tokens, rank) of each run of equal rank."""
    tokens: dict[int, int] = defaultdict(int)
    for group, rank in members:
        tokens[rank] += group.count
    return [(count, rank) for rank, count in tokens.items()]


def _row_index(bank: LayerBank, plan: StepPlan, members: Sequence[Member]) -> tuple[Tensor, Tensor]:
    """Of every row (t, rho): its token's position among the members' tokens, and its row of the flattened factors."""
    token_rows, factor_rows, start = [], [], 0
    for group, rank in members:
        token_rows.append(torch.arange(start, start + group.count).repeat_interleave(rank))
        first = group.slot * bank.max_rank
        factor_rows.append(torch.arange(first, first + rank).repeat(group.count))
        start += group.count
    return torch.cat(token_rows).to(plan.device), torch.cat(factor_rows).to(plan.device)


def _block_gemm(rows: Tensor, partition: Partition, store: BlockStore) -> Tensor:
    """rows [U, live_cols] through the block-diagonal matrix of a store: [U, live_rows] in model dtype."""
    blocks = partition.blocks
    if isinstance(store, PlainBlocks) and store.stacked is not None:
        if len(blocks) == 1:
            return rows @ store.stacked[0].T
        k, m, n = store.stacked.shape
        product = torch.bmm(rows.view(-1, k, n).transpose(0, 1), store.stacked.transpose(1, 2))  # [K, U, m]
        return product.transpose(0, 1).reshape(-1, k * m)
    return torch.cat(
        [rows[:, block.col_start : block.col_end] @ store.block(k).T for k, block in enumerate(blocks)], dim=1
    )


def _modulate(x: Tensor, bank: LayerBank, index: int, partition: Partition, group: TokenGroup, rank: int) -> Tensor:
    """`(W_k * (B_k A_k)) x_k` for the tokens of one adapter: [T, live_rows] in model dtype."""
    a, b = bank.a[index][group.slot, :rank], bank.b[index][group.slot, :rank]
    parts = []
    for k, block in enumerate(partition.blocks):
        b_k, a_k = b[:, block.row_start : block.row_end], a[:, block.col_start : block.col_end]
        modulated = (b_k.T @ a_k).mul_(partition.store.block(k))  # [m_k, n_k]
        parts.append(x[:, block.col_start : block.col_end] @ modulated.T)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _add_rows(y: Tensor, delta: Tensor, partition: Partition, tokens: TokenSet) -> None:
    """Adds delta [T, live_rows] (sorted rows) to those tokens' native rows of y; other rows are not written."""
    whole = partition.live_rows == y.shape[1]
    if whole and not partition.native_rows:
        delta = delta.index_select(1, partition.row_inverse)
    if whole and tokens.rows is not None:
        y[tokens.rows] += delta
    elif whole and tokens.index is not None:
        y.index_copy_(0, tokens.index, (y.index_select(0, tokens.index) + delta).to(y.dtype))
    else:
        _add_some(y, delta, partition.row_order[: partition.live_rows], tokens)


def _add_some(y: Tensor, delta: Tensor, columns: Tensor, tokens: TokenSet) -> None:
    """Adds delta [T, n] to n columns only: rows of the weight without a block stay bit-identical."""
    rows = torch.arange(tokens.rows.start, tokens.rows.stop, device=y.device) if tokens.rows else tokens.index
    place = (rows[:, None] if rows is not None else slice(None), columns)
    y[place] = (y[place] + delta).to(y.dtype)


class TorchBackend(Backend):
    """Everywhere, where nothing faster can."""

    name = "torch"
    delta = staticmethod(smoa_delta_torch)


BACKEND = TorchBackend()
