"""What is measured: layers, (r, K), and how many tokens of how many adapters meet in a step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from smoa_kernels.testing import WORKLOADS, workload

from smoa_serve.errors import ConfigError

EQUAL = "equal"  # every adapter has equally many tokens, which stand together


@dataclass(frozen=True)
class LayerShape:
    """A (possibly packed) linear layer: H_in, and H_out of each slice."""

    name: str
    h_in: int
    slices: tuple[int, ...]

    @property
    def h_out(self) -> int:
        """Width of the whole output."""
        return sum(self.slices)

    @property
    def numel(self) -> int:
        """|W|."""
        return self.h_in * self.h_out


# Single layers are named H_in x H_out; then the packed ones of Qwen2.5-0.5B and Llama-3.1-8B.
SHAPES = {
    shape.name: shape
    for shape in (
        *(LayerShape(f"{h_in}x{h_out}", h_in, (h_out,)) for h_in, h_out in (
            (896, 896), (896, 4864), (4864, 896), (2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096),
        )),
        LayerShape("qwen0.5b-qkv", 896, (896, 128, 128)),
        LayerShape("qwen0.5b-gate_up", 896, (4864, 4864)),
        LayerShape("llama8b-qkv", 4096, (4096, 1024, 1024)),
        LayerShape("llama8b-gate_up", 4096, (14336, 14336)),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One point of the table.

    Attributes:
        layer: its shape.
        rank: total rank r, in `blocks` blocks of rank r/K.
        blocks: K.
        tokens: T.
        adapters: distinct ones; 0 = every token has slot -1. For workloads other than EQUAL the number of slots.
        workload: EQUAL or a name of `smoa_kernels.testing.workload`.
    """

    layer: LayerShape
    rank: int
    blocks: int
    tokens: int
    adapters: int
    workload: str = EQUAL

    @property
    def branch_rank(self) -> int:
        """r_k."""
        return self.rank // self.blocks

    def slots(self) -> NDArray[np.int64]:
        """Slot of each token."""
        if self.workload != EQUAL:
            return workload(self.workload, self.tokens, self.adapters)
        if self.adapters == 0:
            return np.full(self.tokens, -1, np.int64)
        return np.arange(self.tokens) * self.adapters // self.tokens

    def group_sizes(self) -> list[int]:
        """Tokens of each adapter present."""
        slots = self.slots()
        return [int(count) for count in np.unique(slots[slots >= 0], return_counts=True)[1]]

    def row(self) -> dict[str, object]:
        """For JSON."""
        return {
            "layer": self.layer.name,
            "h_in": self.layer.h_in,
            "slices": list(self.layer.slices),
            "rank": self.rank,
            "blocks": self.blocks,
            "tokens": self.tokens,
            "adapters": self.adapters,
            "workload": self.workload,
        }


@dataclass(frozen=True)
class Grid:
    """The points of a run.

    Attributes:
        layers: names out of SHAPES.
        configurations: (r, K).
        tokens: T of each point.
        adapters: distinct ones; of those above T only "all different" is left.
        long_tokens: T of one prefill, measured on layers of at most `long_numel` weights.
        long_adapters: distinct ones in it.
        workload_layer: where the workloads are measured.
        workload_tokens: T at which they are, and workload_configurations: (r, K).
        slots: of every bank; no more adapters meet.
        bare_tokens: T at which a batch without adapters is measured.
    """

    layers: tuple[str, ...]
    configurations: tuple[tuple[int, int], ...] = ((32, 2), (16, 4), (32, 8), (16, 8))
    tokens: tuple[int, ...] = (1, 8, 32, 64, 256)
    adapters: tuple[int, ...] = (1, 8, 64)
    long_tokens: int | None = 4096
    long_numel: int = 1 << 40
    long_adapters: tuple[int, ...] = (1, 64)
    workload_layer: str = "4096x4096"
    workload_tokens: tuple[int, ...] = (1, 8, 64, 256)
    workload_configurations: tuple[tuple[int, int], ...] = ((16, 4), (32, 8))
    slots: int = 256
    bare_tokens: tuple[int, ...] = ()

    def cases(self, layer: LayerShape, rank: int, blocks: int) -> Iterator[Case]:
        """The points of one layer and (r, K)."""
        for tokens in self.tokens:
            for adapters in sorted({min(count, tokens) for count in (*self.adapters, self.slots)}):
                yield Case(layer, rank, blocks, tokens, adapters)
        if self.long_tokens is not None and layer.numel <= self.long_numel:
            for adapters in self.long_adapters:
                yield Case(layer, rank, blocks, self.long_tokens, adapters)
        for tokens in self.bare_tokens:
            yield Case(layer, rank, blocks, tokens, 0)
        if layer.name == self.workload_layer and (rank, blocks) in self.workload_configurations:
            for name in WORKLOADS:
                for tokens in self.workload_tokens:
                    yield Case(layer, rank, blocks, tokens, min(64, self.slots), name)

    def shapes(self, names: Sequence[str] | None) -> list[LayerShape]:
        """The layers asked for, else the grid's own.

        Raises:
            ConfigError: there is no such layer.
        """
        unknown = [name for name in names or () if name not in SHAPES]
        if unknown:
            raise ConfigError(f"the layer {unknown[0]!r} is not known; allowed are {', '.join(SHAPES)}")
        return [SHAPES[name] for name in names or self.layers]


CPU_GRID = Grid(layers=("896x4864", "2048x2048", "4096x4096"), long_numel=2048 * 2048 + 1024 * 1024)
CPU_QUICK = Grid(
    layers=("896x4864", "2048x2048"),
    configurations=((16, 4), (16, 8)),
    tokens=(8, 64),
    adapters=(1, 8),
    long_tokens=None,
    workload_tokens=(),
    slots=64,
)
GPU_GRID = Grid(
    layers=("4096x4096", "4096x14336", "14336x4096", "896x4864"),
    tokens=(1, 8, 16, 32, 64, 256),
    long_adapters=(1, 8, 64),
    bare_tokens=(32, 256),
)
GPU_QUICK = Grid(
    layers=("4096x4096",),
    tokens=(16, 64),
    adapters=(1,),
    long_adapters=(1,),
    workload_tokens=(),
    slots=64,
    bare_tokens=(64,),
)


def grid(device_type: str, *, quick: bool) -> Grid:
    """The points for a kind of device."""
    if device_type == "cpu":
        return CPU_QUICK if quick else CPU_GRID
    return GPU_QUICK if quick else GPU_GRID
