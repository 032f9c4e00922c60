"""What only a GPU can show: the compiled kernels against the reference, and one captured graph for many mixes."""

import pytest
import torch
from smoa_kernels import LayerBank, StepPlan, smoa_delta
from smoa_kernels.backends.triton.tables import TRITON_COST
from smoa_kernels.cost import ALWAYS_EXPAND, ALWAYS_MODULATE
from smoa_kernels.testing import WORKLOADS, Layer, assert_close, random_blocks, random_layer, random_update, workload

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
SLOTS, TOKENS = 8, 64


def on_gpu(layer: Layer, **options: object) -> LayerBank:
    """An empty bank of the same layer on the GPU."""
    weights = [weight.cuda() for weight in layer.weights]
    return LayerBank(
        a=[storage.cuda() for storage in layer.bank.a],
        b=[storage.cuda() for storage in layer.bank.b],
        weight_block=lambda index, rows, cols: weights[index][rows][:, cols],
        **options,
    )


def made(h_in, slices, dtype, generator, ranks) -> tuple[LayerBank, LayerBank]:
    """The same filled layer on the CPU (reference) and on the GPU (Triton)."""
    layer = random_layer(
        h_in,
        slices,
        slots=SLOTS,
        max_rank=max(ranks),
        dtype=dtype,
        generator=generator,
        implementation="reference",
    )
    gpu = on_gpu(layer, implementation="triton")
    cols = random_blocks(h_in, len(ranks), generator)
    rows = [random_blocks(size, len(ranks), generator) for size in slices]
    for slot in range(SLOTS):
        updates = [random_update(row, cols, ranks, generator) for row in rows]
        layer.bank.set(slot, updates)
        gpu.set(slot, updates)
    return layer.bank, gpu


def assert_matches_reference(cpu: LayerBank, gpu: LayerBank, slots, generator, cost=TRITON_COST) -> None:
    """The op on the GPU against the reference on the CPU; idle rows keep their bits."""
    plans = StepPlan(len(slots), SLOTS, "cpu"), StepPlan(len(slots), SLOTS, "cuda")
    plans[1].cost = cost
    for plan in plans:
        plan.update(slots)
    x = torch.randn(len(slots), cpu.h_in, generator=generator).to(cpu.dtype)
    y = torch.randn(len(slots), cpu.h_out, generator=generator).to(cpu.dtype)
    expected, found = y.clone(), y.cuda()
    smoa_delta(expected, x, cpu, plans[0], "reference")
    smoa_delta(found, x.cuda(), gpu, plans[1])
    assert_close(found.cpu(), expected)
    idle = [t for t, slot in enumerate(slots) if slot < 0]
    assert torch.equal(found.cpu()[idle], y[idle])


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("cost", [ALWAYS_EXPAND, ALWAYS_MODULATE, TRITON_COST], ids=["expand", "modulate", "chosen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_workloads(name, cost, dtype, generator):
    cpu, gpu = made(512, (384, 130), dtype, generator, (4, 4, 4, 4))
    assert_matches_reference(cpu, gpu, workload(name, TOKENS, SLOTS).tolist(), generator, cost)


@pytest.mark.parametrize(
    ("h_in", "slices", "ranks"),
    [(899, (1031,), (3, 5, 1)), (896, (896, 128, 128), (4,) * 8), (4864, (896,), (16, 16)), (1024, (4096,), (20,))],
    ids=["unequal", "packed", "down", "hira"],
)
def test_shapes(h_in, slices, ranks, generator):
    cpu, gpu = made(h_in, slices, torch.bfloat16, generator, ranks)
    assert_matches_reference(cpu, gpu, [t % (SLOTS + 1) - 1 for t in range(40)] + [0] * 200, generator)


def test_a_graph_captured_once_serves_other_mixes(generator):
    cpu, gpu = made(512, (384,), torch.bfloat16, generator, (4, 4))
    plan = StepPlan(TOKENS, SLOTS, "cuda")
    plan.update([-1] * TOKENS)
    x = torch.zeros(TOKENS, 512, dtype=torch.bfloat16, device="cuda")
    y = torch.zeros(TOKENS, 384, dtype=torch.bfloat16, device="cuda")
    for slots in ([0] * TOKENS, list(range(SLOTS)) * (TOKENS // SLOTS)):  # compiles the kernels of both ways
        plan.update(slots)
        smoa_delta(y, x, gpu, plan)
    plan.update([-1] * TOKENS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        smoa_delta(y, x, gpu, plan)
    reference = StepPlan(TOKENS, SLOTS, "cpu")
    for name in WORKLOADS:
        slots = workload(name, TOKENS - 3, SLOTS).tolist()
        update = random_update(random_blocks(384, 2, generator), random_blocks(512, 2, generator), (1, 4), generator)
        for bank in (cpu, gpu):
            bank.set(3, [update])
        plan.update(slots)
        reference.update(slots)
        inputs = torch.randn(TOKENS, 512, generator=generator).bfloat16()
        before = torch.randn(TOKENS, 384, generator=generator).bfloat16()
        expected = before.clone()
        smoa_delta(expected, inputs, cpu, reference, "reference")
        x.copy_(inputs)
        y.copy_(before)
        graph.replay()
        assert_close(y.cpu(), expected)
        assert torch.equal(y.cpu()[TOKENS - 3 :], before[TOKENS - 3 :])
