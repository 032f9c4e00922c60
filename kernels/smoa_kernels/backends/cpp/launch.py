"""The delta by the C++ kernel: hands it the tables of the layer and of the step."""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smoa_kernels.backends.cpp.build import library
from smoa_kernels.backends.cpp.packed import PackedBlocks
from smoa_kernels.bank import LayerBank
from smoa_kernels.blocks.layout import BlockStore
from smoa_kernels.blocks.partition import Partition
from smoa_kernels.cost import CostModel
from smoa_kernels.errors import ImplementationError
from smoa_kernels.plan import StepPlan


class _Layer(ctypes.Structure):
    """`Layer` of csrc/tables.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("slices", "entries", "partitions")] + [
        (name, ctypes.c_int64) for name in ("num_slices", "num_slots", "num_partitions", "max_rank", "h_in")
    ]


class _Step(ctypes.Structure):
    """`Step` of csrc/tables.h."""

    _fields_ = [
        ("groups", ctypes.c_void_p),
        ("token_order", ctypes.c_void_p),
        ("num_groups", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("form", ctypes.c_double),
        ("form_per_rank", ctypes.c_double),
        ("resident", ctypes.c_double),
    ]


_REPEATED = 256  # tokens of a step that is kept ready


class LayerTable:
    """What the kernel reads of a bank: pointers to its storages and partitions, and what each slot holds."""

    def __init__(self, bank: LayerBank) -> None:
        self.kernel = _kernel(bank.dtype)
        whole = [bank.whole_partition(index) for index in range(len(bank.slices))]
        used = [entry.partition for slot in bank.slots for entry in slot if entry is not None]
        partitions = {p.serial: p for p in (*used, *whole) if p is not None}
        # The arrays and the partitions live as long as the pointers to them.
        self._partitions: Sequence[Partition] = tuple(partitions.values())
        index = {key: i for i, key in enumerate(partitions)}
        entries = np.full((len(bank.slices), len(bank.slots), 3), (-1, 0, 0), np.int64)
        for slot, held in enumerate(bank.slots):
            for i, entry in enumerate(held):
                if entry is not None and entry.partition.blocks:
                    resident = _packed(entry.resident).weights.data_ptr() if entry.resident else 0
                    entries[i, slot] = index[entry.partition.serial], entry.rank, resident
        offsets = np.cumsum((0, *bank.slices))
        slices = [
            (a.data_ptr(), b.data_ptr(), size, offset, -1 if own is None else index[own.serial])
            for a, b, size, offset, own in zip(bank.a, bank.b, bank.slices, offsets[:-1], whole, strict=True)
        ]
        self._orders = [(p.row_inverse.int(), p.col_order.int()) for p in self._partitions]
        rows = [_partition_row(*pair) for pair in zip(self._partitions, self._orders, strict=True)]
        self._arrays = (np.array(slices, np.int64), entries, np.array(rows, np.int64))
        self.layer = _Layer(
            *(array.ctypes.data for array in self._arrays),
            len(bank.slices), len(bank.slots), len(self._partitions), bank.max_rank, bank.h_in,
        )  # fmt: skip
        self.address = ctypes.addressof(self.layer)


class StepTable:
    """What the kernel reads of a plan."""

    def __init__(self, plan: StepPlan, cost: CostModel) -> None:
        rows = [(group.slot, group.start, group.end) for group in plan.groups]
        self._groups: NDArray[np.int64] = np.array(rows, np.int64)
        self.step = _Step(
            self._groups.ctypes.data, plan.token_order.data_ptr(), len(rows), plan.num_tokens,
            cost.form, cost.form_per_rank, cost.resident,
        )  # fmt: skip
        self.address = ctypes.addressof(self.step)


class _Call:
    """What a step does in a layer, made ready by the kernel."""

    def __init__(self, layer: LayerTable, step: StepTable, whole: bool) -> None:
        self._tables = layer, step  # the kernel reads them at every run
        self._kernel = layer.kernel
        self._handle = self._kernel.smoa_new_call(layer.address, step.address, whole)

    def __del__(self) -> None:
        self._kernel.smoa_delete_call(self._handle)

    def run(self, y: Tensor, x: Tensor, plan: StepPlan, bias: Tensor | None) -> None:
        """Writes y; see `_call`."""
        scratch = plan.scratch(1)
        needed = 1
        while needed:
            needed = self._kernel.smoa_run_call(
                self._handle, y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0),
                scratch.data_ptr(), scratch.numel(), None if bias is None else bias.data_ptr(),
            )  # fmt: skip
            if needed:
                scratch = plan.scratch(needed)


def _kernel(dtype: torch.dtype) -> ctypes.CDLL:
    kernel = library(dtype)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    kernel.smoa_new_call.argtypes, kernel.smoa_new_call.restype = [pointer, pointer, size], pointer
    kernel.smoa_delete_call.argtypes, kernel.smoa_delete_call.restype = [pointer], None
    kernel.smoa_run_call.argtypes = [pointer, pointer, size, pointer, size, pointer, size, pointer]
    kernel.smoa_run_call.restype = size
    return kernel


def _partition_row(partition: Partition, orders: tuple[Tensor, Tensor]) -> tuple[int, ...]:
    store = _packed(partition.store)
    return (
        *(order.data_ptr() for order in orders),
        store.table.ctypes.data,
        store.weights.data_ptr(),
        len(partition.blocks),
        len(store.table),
        store.packed_cols,
        partition.live_rows,
        store.whole,
    )


def _packed(store: BlockStore) -> PackedBlocks:
    if not isinstance(store, PackedBlocks):
        raise ImplementationError(
            "the bank's blocks are not packed for the C++ kernel; make the bank with implementation='cpp'."
        )
    return store


def smoa_delta_cpp(y: Tensor, x: Tensor, bank: LayerBank, plan: StepPlan, cost: CostModel | None = None) -> None:
    """Adds each token's delta to y. Args as in `ops.smoa_delta`; `cost` chooses the way of each adapter group.

    Raises:
        ImplementationError: the kernel cannot be built here, or the bank's blocks are not packed for it.
    """
    _call(y, x, bank, plan, cost, False, None)


def smoa_linear_cpp(
    x: Tensor, bank: LayerBank, plan: StepPlan, bias: Tensor | None = None, cost: CostModel | None = None
) -> Tensor:
    """The layer's output, deltas included. Args as in `ops.smoa_linear`; cost as in `smoa_delta_cpp`."""
    y = x.new_empty(plan.num_tokens, bank.h_out)
    _call(y, x, bank, plan, cost, True, bias)
    return y


def _call(
    y: Tensor, x: Tensor, bank: LayerBank, plan: StepPlan, cost: CostModel | None, whole: bool, bias: Tensor | None
) -> None:
    cost = cost or bank.cost

    def make() -> _Call:
        layer = bank.memo("cpp", 0, lambda: LayerTable(bank))
        return _Call(layer, plan.cached(("cpp", cost), lambda: StepTable(plan, cost)), whole)

    # Decoding repeats a step; one with more tokens will not come again, and would only be held.
    again = plan.num_tokens <= _REPEATED
    (bank.memo(("call", cost, whole, id(plan)), plan.version, make) if again else make()).run(y, x, plan, bias)
