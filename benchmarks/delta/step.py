"""One step on one layer: our calls that compute its delta, and the gates that every call passes before it is timed."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.delta.cases import Case
from benchmarks.delta.layers import LayerCopy
from benchmarks.harness import ops
from benchmarks.harness.gates import assert_rounded
from benchmarks.harness.timing import Call

FORCED_WAYS = {"triton expand": ops.ALWAYS_EXPAND, "triton modulate": ops.ALWAYS_MODULATE}
LONGEST_PASS = 256  # tokens up to which one pass is measured on a CPU
GATE_TOKENS = 4


class Step:
    """One case on copies of a layer (with `residents` every slot of theirs holds blocks of dW).

    x is [T, H_in], y [T, H_out] is written by the calls, slots [T].
    """

    def __init__(self, case: Case, copies: Sequence[LayerCopy], *, residents: bool = False) -> None:
        self.case, self.copies, self._residents = case, copies, residents
        weight = copies[0].weight
        x = torch.randn(case.tokens, case.layer.h_in, generator=torch.Generator().manual_seed(1))
        self.x = x.to(weight)
        self.y = self.x.new_zeros(case.tokens, case.layer.h_out)
        self.slots = case.slots()

    def groups(self) -> list[tuple[int, Tensor]]:
        """(slot, [t] int64 its tokens) of every adapter present."""
        slots = np.unique(self.slots[self.slots >= 0])
        return [(int(slot), self.on_device(np.flatnonzero(self.slots == slot))) for slot in slots]

    def on_device(self, numbers: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(numbers).to(self.x.device)

    def plan(self, slots: NDArray[np.int64] | None = None, cost: ops.CostModel | None = None) -> ops.StepPlan:
        """A plan of this step, or of some of its tokens; on a GPU `cost` chooses the way."""
        first = self.copies[0]
        plan = ops.StepPlan(self.case.tokens, len(first.updates), self.x.device)
        plan.cost = cost or next(iter(first.banks.values())).cost
        for slot, updates in enumerate(first.updates):
            plan.describe(slot, updates[0].a.shape[0], self._residents)
        plan.update(self.slots if slots is None else slots)
        return plan

    def base(self) -> Call:
        return lambda i: F.linear(self.x, self.copies[i].weight)

    def delta(self, implementation: str, cost: ops.CostModel | None = None) -> Call:
        """`smoa_delta` by one implementation; `cost` forces a way."""
        banks, plan = [copy.banks[implementation] for copy in self.copies], self.plan(cost=cost)
        chosen = cost or banks[0].cost

        def run(i: int) -> None:
            banks[i].cost = chosen
            ops.smoa_delta(self.y, self.x, banks[i], plan, implementation)

        return run

    def deltas(self, implementations: Sequence[str]) -> dict[str, Call]:
        """By name; on a GPU with each way of the Triton kernels forced beside their own choice."""
        forced = FORCED_WAYS if "triton" in implementations else {}
        own = {name: self.delta(name) for name in implementations}
        return own | {name: self.delta("triton", cost) for name, cost in forced.items()}

    def loop(self, implementation: str) -> Call:
        plans = [self.plan(np.where(self.slots == slot, slot, -1)) for slot, _ in self.groups()]
        banks = [copy.banks[implementation] for copy in self.copies]
        return lambda i: [ops.smoa_delta(self.y, self.x, banks[i], plan, implementation) for plan in plans]

    def single_pass(self) -> Call | None:
        """Base and delta from one read of a sorted copy of the weight: the whole output; None where it cannot serve."""
        if (self.slots < 0).any() or self.case.tokens > LONGEST_PASS:
            return None
        whole, plan = [copy.whole_bank for copy in self.copies], self.plan()
        if not ops.can_be_one_pass(whole[0], plan):
            return None
        return lambda i: ops.smoa_linear(self.x, whole[i], plan)

    def gate(self, calls: dict[str, Call], single_pass: Call | None = None) -> None:
        """Raises AssertionError unless each call adds the delta, and the single pass gives it with the base product:
        some tokens against float32, the rows of all against the first call."""
        chosen, exact = self._exact()
        first: list[Tensor] = []
        for name, call in calls.items():
            self.y.zero_()
            call(0)
            what = f"{name} computes another delta for {self.case.row()}"
            assert_rounded(what, self.y[chosen], exact)
            first = first or [self.y.float()]
            assert_rounded(what, self.y, first[0], numbers=False)
        if single_pass is not None:
            found, base = single_pass(0), F.linear(self.x.float(), self.copies[0].weight.float())
            assert isinstance(found, Tensor)
            assert_rounded("the single pass", found[chosen], base[chosen] + exact)
            assert_rounded("the single pass", found, base + first[0], numbers=False)

    def _exact(self) -> tuple[NDArray[np.int64], Tensor]:
        """Some of the tokens that have an adapter, and their deltas in float32."""
        active, some = np.flatnonzero(self.slots >= 0), np.full_like(self.slots, -1)
        chosen = active[np.linspace(0, len(active) - 1, min(GATE_TOKENS, len(active))).astype(np.int64)]
        some[chosen] = self.slots[chosen]
        exact = torch.zeros_like(self.y, dtype=torch.float32)
        ops.smoa_delta_reference(exact, self.x, next(iter(self.copies[0].banks.values())), self.plan(some))
        return chosen, exact[chosen]
