"""The delta's own time next to the published way's, which forms dW densely on every forward."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from smoa_kernels import SliceUpdate, StepPlan, smoa_delta
from smoa_kernels.backends.reference import smoa_delta_reference
from smoa_kernels.testing import Layer, random_blocks, random_layer, random_update
from torch import Tensor

from benchmarks.bars import Bar
from benchmarks.fleet import Load
from benchmarks.gates import assert_rounded
from benchmarks.random_models import Shape

SLOTS = 16
BAR = 10.0


def layer_shapes(shape: Shape) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Packed layer → (H_in, H_out of its slices)."""
    hidden, wide = shape.hidden_size, shape.intermediate_size
    kv = hidden // shape.num_attention_heads * shape.num_key_value_heads
    return {
        "qkv": (hidden, (hidden, kv, kv)),
        "o": (hidden, (hidden,)),
        "gate_up": (hidden, (wide, wide)),
        "down": (wide, (hidden,)),
    }


@dataclass(frozen=True, eq=False)
class Branch:
    """One block of one adapter as the published layer keeps it: factors and its part of W ("anchor") in float32."""

    a: Tensor
    b: Tensor
    anchor: Tensor
    rows: Tensor
    cols: Tensor

    def to(self, device: torch.device) -> "Branch":
        """The same on another device."""
        return Branch(*(tensor.to(device) for tensor in (self.a, self.b, self.anchor, self.rows, self.cols)))


@dataclass(frozen=True)
class DenseWay:
    """A layer's deltas as published: per adapter, every block of dW is formed and put into a dense matrix.

    Attributes:
        weights: per slice [H_out, H_in].
        branches: per slot, per slice.
    """

    weights: tuple[Tensor, ...]
    branches: list[list[list[Branch]]]

    def apply(self, y: Tensor, x: Tensor, slots: Tensor) -> None:
        """Add the deltas of all tokens.

        Args:
            y: [T, H_out], written in place.
            x: [T, H_in].
            slots: [T].
        """
        for slot in sorted(set(slots.tolist())):
            tokens = (slots == slot).nonzero()[:, 0]
            offset = 0
            for weight, branches in zip(self.weights, self.branches[slot], strict=True):
                delta = torch.zeros_like(weight)
                for branch in branches:
                    part = (branch.b @ branch.a) * branch.anchor
                    delta[branch.rows[:, None], branch.cols] = part.to(delta.dtype)
                y[tokens, offset : offset + weight.shape[0]] += x[tokens] @ delta.t()
                offset += weight.shape[0]


def delta_bar(shape: Shape, rank: int, num_blocks: int, load: Load, repeats: int) -> tuple[Bar, dict[str, object]]:
    """Time of all deltas of a load (one prefill of all prompts, then decode steps), both ways.

    Args:
        shape: the model; one decoder layer is measured and stands for all.
        rank: total rank r.
        num_blocks: K.
        load: 16 adapters share its streams.
        repeats: of each measurement.

    Returns:
        The bar (dense time / own time) and the figures behind it.
    """
    own = [0.0] * repeats
    dense = [0.0] * repeats
    for h_in, slices in layer_shapes(shape).values():
        layer, way = _random(h_in, slices, rank, num_blocks)
        for tokens, times in ((load.streams * load.input_tokens, 1), (load.streams, load.output_tokens - 1)):
            for i, (ours, theirs) in enumerate(_times(layer, way, h_in, tokens, repeats)):
                own[i] += ours * times * shape.num_hidden_layers
                dense[i] += theirs * times * shape.num_hidden_layers
    ratios = [theirs / ours for ours, theirs in zip(own, dense, strict=True)]
    name = f"delta's own time against the dense way's, 16 adapters (r={rank}, K={num_blocks})"
    figures = {
        "kind": "delta",
        "rank": rank,
        "num_blocks": num_blocks,
        "own_s": statistics.median(own),
        "dense_s": statistics.median(dense),
    }
    return Bar(name, statistics.median(ratios), BAR, (min(ratios), max(ratios))), figures


def _random(h_in: int, slices: tuple[int, ...], rank: int, num_blocks: int) -> tuple[Layer, DenseWay]:
    generator = torch.Generator().manual_seed(0)
    branch = rank // num_blocks
    layer = random_layer(h_in, slices, slots=SLOTS, max_rank=branch, dtype=torch.bfloat16, generator=generator)
    cols = random_blocks(h_in, num_blocks, generator)
    rows = [random_blocks(size, num_blocks, generator) for size in slices]
    published: list[list[list[Branch]]] = []
    for slot in range(SLOTS):
        updates = [random_update(row, cols, [branch] * num_blocks, generator) for row in rows]
        layer.bank.set(slot, updates)
        pairs = zip(updates, layer.weights, strict=True)
        published.append([published_branches(update, weight, num_blocks) for update, weight in pairs])
    return layer, DenseWay(layer.weights, published)


def published_branches(update: SliceUpdate, weight: Tensor, num_blocks: int) -> list[Branch]:
    """What the published layer keeps of one adapter.

    Args:
        update: of one slice.
        weight: [H_out, H_in] of it.
        num_blocks: K.
    """
    branches = []
    for k in range(num_blocks):
        rows = (update.row_block == k).nonzero()[:, 0]
        cols = (update.col_block == k).nonzero()[:, 0]
        anchor = weight[rows[:, None], cols].float()
        branches.append(Branch(update.a[:, cols].contiguous(), update.b[rows], anchor, rows, cols))
    return branches


def _times(layer: Layer, way: DenseWay, h_in: int, tokens: int, repeats: int) -> list[tuple[float, float]]:
    """(own, dense) seconds of one step, in turn; both have to be right before the clock runs."""
    slots = torch.arange(tokens) * SLOTS // tokens
    plan = StepPlan(tokens, SLOTS, "cpu")
    plan.update(slots.numpy())
    x = torch.randn(tokens, h_in, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, expected = (torch.zeros(tokens, layer.bank.h_out, dtype=torch.bfloat16) for _ in range(2))
    smoa_delta(found, x, layer.bank, plan)
    way.apply(expected, x, slots)
    exact = torch.zeros(tokens, layer.bank.h_out)
    smoa_delta_reference(exact, x, layer.bank, plan)
    assert_rounded("the delta", found, exact)
    assert_rounded("the dense way", expected, exact)
    return [
        (_seconds(lambda: smoa_delta(found, x, layer.bank, plan)), _seconds(lambda: way.apply(expected, x, slots)))
        for _ in range(repeats)
    ]


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
