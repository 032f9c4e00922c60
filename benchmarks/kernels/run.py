"""`python -m benchmarks kernels`: the table, and its bars."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from smoa_kernels import available_implementations

from benchmarks.bars import Bar
from benchmarks.gates import assert_rounded
from benchmarks.kernels import lora
from benchmarks.kernels.bars import bars
from benchmarks.kernels.candidates import Step, delta_calls, gate, gate_single_pass, plain_calls
from benchmarks.kernels.cases import EQUAL, Case, Grid, LayerShape, grid
from benchmarks.kernels.ceilings import measure_ceilings
from benchmarks.kernels.floor import Ceilings
from benchmarks.kernels.layers import LayerSet, build_layers
from benchmarks.kernels.point import BASE, DENSE, SINGLE_PASS, Point
from benchmarks.kernels.timing import Budget, Call, measure

DTYPE = torch.bfloat16
BUDGET = Budget(seconds_each=0.12, least=4, most=25, patience_s=1.0)
QUICK_BUDGET = Budget(seconds_each=0.1, least=4, most=15, patience_s=1.0)
DENSE_BUDGET = Budget(seconds_each=1.0, least=3, most=10, patience_s=2.0)
DENSE_TOKENS, DENSE_ADAPTERS = 8, (1, 8)  # where the dense way is measured; it costs the same per adapter elsewhere


def run(
    quick: bool, device: str = "cpu", layers: Sequence[str] | None = None
) -> tuple[list[dict[str, object]], list[Bar]]:
    """Measures all points.

    Args:
        quick: fewer and smaller ones, in at most 90 s on two cores.
        device: "cpu" or "cuda".
        layers: names out of `cases.SHAPES`; None = those of the device.

    Returns:
        Rows for JSON and the bars.
    """
    console, place = Console(stderr=True), torch.device(device)
    chosen = grid(place.type, quick=quick)
    ceilings = measure_ceilings(place)
    implementations = tuple(n for n in available_implementations(place, DTYPE) if n != "reference")
    missing = lora.vllm_missing()
    console.print(
        f"ceilings {ceilings.bytes_per_s / 1e9:.1f} GB/s, {ceilings.flops_per_s / 1e12:.3f} TFLOP/s; implementations "
        f"{', '.join(implementations)}; LoRA through {missing or 'vLLM'}"
    )
    session = _Session(implementations, ceilings, QUICK_BUDGET if quick else BUDGET, missing is None)
    points = []
    for shape in chosen.shapes(layers):
        for rank, blocks in chosen.configurations:
            for point in session.points(chosen, shape, rank, blocks, place):
                console.print(point.line(), highlight=False, soft_wrap=True)
                points.append(point)
    extra = {
        "kind": "kernels",
        "device": place.type,
        "dtype": str(DTYPE).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "ceilings": asdict(ceilings),
    }
    return [extra | point.row() for point in points], bars(points, place.type)


class _Session:
    """What all points of a run share."""

    def __init__(self, implementations: tuple[str, ...], ceilings: Ceilings, budget: Budget, has_vllm: bool) -> None:
        self._implementations, self._ceilings, self._budget = implementations, ceilings, budget
        self._has_vllm = has_vllm

    def points(self, chosen: Grid, shape: LayerShape, rank: int, blocks: int, device: torch.device) -> Iterator[Point]:
        """The points of one layer and (r, K)."""
        layers = build_layers(
            shape, rank, blocks, slots=chosen.slots, implementations=self._implementations, device=device, dtype=DTYPE
        )
        factors: list[lora.LoraFactors] = []
        for case in chosen.cases(shape, rank, blocks):
            factors = factors or [lora.random_factors(case, chosen.slots, device, DTYPE) for _ in layers.copies]
            yield self._point(case, layers, factors)

    def _point(self, case: Case, layers: LayerSet, factors: list[lora.LoraFactors]) -> Point:
        step = Step(case, layers)
        own = delta_calls(step, self._implementations)
        others, skipped = plain_calls(step, self._implementations[0], self._ceilings)
        slow = {DENSE: step.dense()} if _dense_belongs(case) else {}
        gate(step, own | others | slow)
        calls = {BASE: step.base(), **own, **others, **self._lora(step, factors, skipped)}
        single_pass = step.single_pass()
        if single_pass is not None:
            gate_single_pass(step, single_pass, own[self._implementations[0]])
            calls[SINGLE_PASS] = single_pass
        times = measure(calls, len(layers.copies), layers.device, self._budget)
        if slow:
            partner = self._implementations[0]
            found = measure(
                {DENSE: slow[DENSE], partner: own[partner]}, len(layers.copies), layers.device, DENSE_BUDGET
            )
            times |= {DENSE: found[DENSE], f"{partner} beside {DENSE}": found[partner]}
        else:
            skipped[DENSE] = f"it is measured at {DENSE_TOKENS} tokens; it forms the same matrices at any number"
        return Point(case, times, skipped, self._implementations, self._ceilings)

    def _lora(self, step: Step, factors: list[lora.LoraFactors], skipped: dict[str, str]) -> dict[str, Call]:
        if not step.case.group_sizes():
            return {}
        simple = lora.torch_call(step.case, factors, step.y, step.x)
        if not self._has_vllm:
            return {"lora (torch)": simple}
        too_large = lora.gather_too_large(step.case, step.x.device)
        if too_large:
            skipped["lora (vllm)"] = too_large
            return {"lora (torch)": simple}
        call = lora.vllm_call(step.case, factors, step.y, step.x)
        exact, active = step.y.float().zero_(), torch.from_numpy(step.slots >= 0)
        lora.torch_call(step.case, [factors[0].float()], exact, step.x.float())(0)
        for name, candidate in (("lora (torch)", simple), ("lora (vllm)", call)):
            step.y.zero_()
            candidate(0)
            assert_rounded(name, step.y[active], exact[active])
        return {"lora (vllm)": call}


def _dense_belongs(case: Case) -> bool:
    return case.workload == EQUAL and case.tokens == DENSE_TOKENS and case.adapters in DENSE_ADAPTERS
