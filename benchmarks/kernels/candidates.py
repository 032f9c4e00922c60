"""The calls that compute one case's delta, and the check that they compute the same."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from smoa_kernels import StepPlan, can_be_one_pass, smoa_delta, smoa_linear
from smoa_kernels.backends.cpp.launch import smoa_delta_cpp
from smoa_kernels.backends.reference import smoa_delta_reference
from smoa_kernels.backends.torch import smoa_delta_torch
from smoa_kernels.cost import ALWAYS_EXPAND, ALWAYS_MODULATE, CostModel, cost_model
from smoa_kernels.testing import TOLERANCES
from torch import Tensor

from benchmarks.dense import DenseWay, published_branches
from benchmarks.gates import assert_rounded
from benchmarks.kernels import plain
from benchmarks.kernels.cases import EQUAL, Case
from benchmarks.kernels.floor import Ceilings, expand_work, modulate_work
from benchmarks.kernels.layers import LayerSet
from benchmarks.kernels.point import EXPAND, FORCED_WAYS, LOOP, MODULATE
from benchmarks.kernels.timing import Call

LARGEST_LOOP = 64
LONGEST_PASS = 256  # tokens up to which one pass is measured on a CPU
LONGEST_PLAIN_S = 1.0
GATE_TOKENS = 4


@dataclass(frozen=True, eq=False)
class Step:
    """One case on one set of layers, with its input and output.

    Attributes:
        case: tokens and adapters.
        layers: copies of the layer.
        residents: whether every slot holds blocks of dW.
        x: [T, H_in]; y: [T, H_out], written by the calls.
        slots: [T] slot of each token.
    """

    case: Case
    layers: LayerSet
    residents: bool = False
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)
    slots: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.case.tokens, self.case.layer.h_in, generator=generator)
        object.__setattr__(self, "x", x.to(self.layers.device, self.layers.dtype))
        object.__setattr__(self, "y", self.x.new_zeros(self.case.tokens, self.case.layer.h_out))
        object.__setattr__(self, "slots", self.case.slots())

    def plan(self, slots: NDArray[np.int64] | None = None, cost: CostModel | None = None) -> StepPlan:
        """A plan of this step, or of some of its tokens.

        Args:
            slots: [T], None = the step's own.
            cost: chooses the way on a GPU, where the plan does it; None = as measured or by default.
        """
        plan = StepPlan(self.case.tokens, len(self.layers.updates), self.layers.device)
        if "triton" in self.layers.copies[0].banks:
            plan.cost = cost or cost_model("triton", self.layers.device, self.layers.dtype)
            for slot, updates in enumerate(self.layers.updates):
                plan.describe(slot, updates[0].a.shape[0], self.residents)
        plan.update(self.slots if slots is None else slots)
        return plan

    def base(self) -> Call:
        """The base layer's own GEMM."""
        weights = [copy.weight for copy in self.layers.copies]
        return lambda i: F.linear(self.x, weights[i])

    def delta(self, implementation: str, cost: CostModel | None = None) -> Call:
        """`smoa_delta` by one implementation.

        Args:
            implementation: that the layers were built for.
            cost: forces a way; None = the implementation chooses.
        """
        banks, plan = [copy.banks[implementation] for copy in self.layers.copies], self.plan(cost=cost)
        run: Callable[..., None] = partial(smoa_delta, implementation=implementation)
        if cost is not None and implementation != "triton":
            run = partial({"torch": smoa_delta_torch, "cpp": smoa_delta_cpp}[implementation], cost=cost)
        return lambda i: run(self.y, self.x, banks[i], plan)

    def single_pass(self) -> Call | None:
        """Base and delta from one read of a sorted copy of the weight: the whole output; None where it cannot serve."""
        if (self.slots < 0).any() or self.case.tokens > LONGEST_PASS:
            return None
        banks, plan = self.layers.whole_banks, self.plan()
        if not can_be_one_pass(banks[0], plan):
            return None
        return lambda i: smoa_linear(self.x, banks[i], plan)

    def loop(self, implementation: str) -> Call:
        """`smoa_delta` once per adapter."""
        plans = [self.plan(np.where(self.slots == slot, slot, -1)) for slot in np.unique(self.slots[self.slots >= 0])]
        banks = [copy.banks[implementation] for copy in self.layers.copies]

        def run(i: int) -> None:
            for plan in plans:
                smoa_delta(self.y, self.x, banks[i], plan, implementation)

        return run

    def bmm_expand(self) -> Call:
        """All tokens expand, in plain torch."""
        tokens = np.flatnonzero(self.slots >= 0)
        index, slots = (torch.from_numpy(part).to(self.x.device) for part in (tokens, self.slots[tokens]))

        def run(i: int) -> None:
            for layer in self.layers.copies[i].plain:
                plain.expand(self.y, self.x, layer, index, slots)

        return run

    def bmm_modulate(self) -> Call:
        """All adapters modulate, in plain torch."""
        groups = [
            (int(slot), torch.from_numpy(np.flatnonzero(self.slots == slot)).to(self.x.device))
            for slot in np.unique(self.slots[self.slots >= 0])
        ]

        def run(i: int) -> None:
            for layer in self.layers.copies[i].plain:
                plain.modulate(self.y, self.x, layer, groups)

        return run

    def dense(self) -> Call:
        """The published way: dW of every adapter present formed densely on each call, from float32 anchors."""
        parts = torch.split(self.layers.copies[0].weight, list(self.case.layer.slices))
        used = sorted(set(self.slots.tolist()))
        published = {
            slot: [
                [branch.to(weight.device) for branch in published_branches(update, weight.cpu(), self.case.blocks)]
                for update, weight in zip(self.layers.updates[slot], parts, strict=True)
            ]
            for slot in used
        }
        way = DenseWay(parts, [published.get(slot, []) for slot in range(len(self.layers.updates))])
        slots = torch.from_numpy(self.slots)
        return lambda i: way.apply(self.y, self.x, slots)


def delta_calls(step: Step, implementations: tuple[str, ...]) -> dict[str, Call]:
    """Our implementations; on a GPU with each way of the Triton kernels forced beside their own choice."""
    calls = {name: step.delta(name) for name in implementations}
    if "triton" in implementations:
        forced = {"expand": ALWAYS_EXPAND, "modulate": ALWAYS_MODULATE}
        calls |= {name: step.delta("triton", forced[way]) for name, way in FORCED_WAYS.items()}
    return calls


def plain_calls(step: Step, implementation: str, ceilings: Ceilings) -> tuple[dict[str, Call], dict[str, str]]:
    """The plain ways and the loop over adapters, and why some of them are left out here."""
    case = step.case
    skipped: dict[str, str] = {}
    if not case.group_sizes():
        return {}, skipped
    if case.workload != EQUAL:
        return {}, dict.fromkeys((EXPAND, MODULATE, LOOP), "they are measured where adapters have equally many tokens")
    calls = {EXPAND: step.bmm_expand(), MODULATE: step.bmm_modulate()}
    for name, seconds in ((EXPAND, _expand_s(case, ceilings)), (MODULATE, _modulate_s(case, ceilings))):
        if seconds > LONGEST_PLAIN_S:
            del calls[name]
            skipped[name] = f"a call would take about {seconds:.0f} s"
    adapters = len(case.group_sizes())
    if adapters > LARGEST_LOOP:
        skipped[LOOP] = f"it only repeats itself beyond {LARGEST_LOOP} adapters"
    elif adapters > 1:
        calls[LOOP] = step.loop(implementation)
    return calls, skipped


def gate(step: Step, calls: dict[str, Call]) -> None:
    """Some tokens against float32; the rows of all of them against the first call's.

    Args:
        step: the case.
        calls: that add the delta to the step's y.

    Raises:
        AssertionError: a call computes something else.
    """
    chosen, exact = _exact(step)
    if not len(chosen):
        return
    first: Tensor | None = None
    for name, call in calls.items():
        step.y.zero_()
        call(0)
        try:
            assert_rounded(name, step.y[chosen], exact)
            _assert_rows_close(step.y, step.y if first is None else first)
        except AssertionError as error:
            raise AssertionError(f"{name} computes another delta for {step.case.row()}: {error}") from error
        first = step.y.clone() if first is None else first


def _exact(step: Step) -> tuple[NDArray[np.int64], Tensor]:
    """Some of the tokens that have an adapter, and their deltas in float32."""
    active = np.flatnonzero(step.slots >= 0)
    chosen = active[np.unique(np.linspace(0, len(active) - 1, GATE_TOKENS).astype(np.int64))] if len(active) else active
    some = np.full_like(step.slots, -1)
    some[chosen] = step.slots[chosen]
    exact, bank = step.y.float().zero_(), next(iter(step.layers.copies[0].banks.values()))
    smoa_delta_reference(exact, step.x, bank, step.plan(some))
    return chosen, exact[chosen]


def _assert_rows_close(actual: Tensor, expected: Tensor) -> None:
    """Each row as a whole: of millions of numbers that were rounded twice, some always differ."""
    error, size = (part.float().norm(dim=1) for part in (actual - expected, expected))
    worst = float((error / size.clamp(min=1e-6)).max())
    assert worst <= TOLERANCES[actual.dtype], f"a row is off by {worst:.3f} of its length"


def gate_single_pass(step: Step, single_pass: Call, delta: Call) -> None:
    """Some tokens of the single pass against float32; the rows of all of them against the base product and a delta that
    has passed its own gate.

    Raises:
        AssertionError: it computes something else.
    """
    weight = step.layers.copies[0].weight
    step.y.copy_(F.linear(step.x, weight))
    delta(0)
    found = single_pass(0)
    assert isinstance(found, Tensor)
    chosen, exact = _exact(step)
    assert_rounded("the single pass", found[chosen], F.linear(step.x[chosen].float(), weight.float()) + exact)
    _assert_rows_close(found, step.y)


def _expand_s(case: Case, ceilings: Ceilings) -> float:
    work = expand_work(case)
    passes = 12.0 * case.tokens * case.branch_rank * (case.layer.h_in + case.layer.h_out)
    return 2.0 * work.flops / ceilings.flops_per_s + passes / ceilings.bytes_per_s


def _modulate_s(case: Case, ceilings: Ceilings) -> float:
    work = modulate_work(case)
    passes = 12.0 * len(case.group_sizes()) * case.layer.numel / case.blocks
    return 2.0 * work.flops / ceilings.flops_per_s + passes / ceilings.bytes_per_s
