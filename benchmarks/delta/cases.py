"""What is measured: layers, (r, K), and how many tokens of how many adapters meet in a step."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import ops
from smoa_serve.errors import ConfigError

EQUAL = "equal"  # every adapter has equally many tokens, which stand together
LONG_TOKENS = 4096  # of one prefill


@dataclass(frozen=True)
class LayerShape:
    """A (possibly packed) linear layer: H_in, and H_out of each slice."""

    name: str
    h_in: int
    slices: tuple[int, ...]

    @property
    def h_out(self) -> int:
        return sum(self.slices)

    @property
    def numel(self) -> int:
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


def shapes(names: Sequence[str]) -> list[LayerShape]:
    """Layers by name.

    Raises:
        ConfigError: there is no such layer.
    """
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise ConfigError(f"the layer {unknown[0]!r} is not known; allowed are {', '.join(SHAPES)}")
    return [SHAPES[name] for name in names]


@dataclass(frozen=True)
class Case:
    """One point: r in K `blocks`, T tokens of so many distinct adapters (or, unless EQUAL, of so many slots)."""

    layer: LayerShape
    rank: int
    blocks: int
    tokens: int
    adapters: int
    workload: str = EQUAL

    @property
    def branch_rank(self) -> int:
        return self.rank // self.blocks

    def slots(self) -> NDArray[np.int64]:
        if self.workload != EQUAL:
            return ops.workload(self.workload, self.tokens, self.adapters)
        if self.adapters == 0:
            return np.full(self.tokens, -1, np.int64)
        return np.arange(self.tokens) * self.adapters // self.tokens

    def group_sizes(self) -> list[int]:
        """Tokens of each adapter present."""
        slots = self.slots()
        return [int(count) for count in np.unique(slots[slots >= 0], return_counts=True)[1]]

    def row(self) -> dict[str, object]:
        layer = {"layer": self.layer.name, "h_in": self.layer.h_in, "slices": list(self.layer.slices)}
        return asdict(self) | layer


@dataclass(frozen=True)
class Grid:
    """The points of a run: every T with every number of distinct adapters, of which no more than `slots` meet.

    `long_adapters` are those of a prefill, on layers of at most `long_numel` weights; at `bare_tokens` there are none.
    """

    layers: tuple[str, ...]
    configurations: tuple[tuple[int, int], ...] = ((32, 2), (16, 4), (32, 8), (16, 8))
    tokens: tuple[int, ...] = (1, 8, 32, 64, 256)
    adapters: tuple[int, ...] = (1, 8, 64)
    long_adapters: tuple[int, ...] = (1, 64)
    long_numel: int = 1 << 40
    bare_tokens: tuple[int, ...] = ()
    workloads: bool = True
    slots: int = 256

    def cases(self, layer: LayerShape, rank: int, blocks: int) -> Iterator[Case]:
        for tokens in self.tokens:
            for adapters in sorted({min(count, tokens) for count in (*self.adapters, self.slots)}):
                yield Case(layer, rank, blocks, tokens, adapters)
        for adapters in self.long_adapters if layer.numel <= self.long_numel else ():
            yield Case(layer, rank, blocks, LONG_TOKENS, adapters)
        for tokens in self.bare_tokens:
            yield Case(layer, rank, blocks, tokens, 0)
        if self.workloads and layer.name == "4096x4096" and (rank, blocks) in ((16, 4), (32, 8)):
            for name in ops.WORKLOADS:
                for tokens in (1, 8, 64, 256):
                    yield Case(layer, rank, blocks, tokens, 64, name)


# By kind of device, and whether it shall be quick.
GRIDS = {
    ("cpu", False): Grid(("896x4864", "2048x2048", "4096x4096"), long_numel=2048 * 2048 + 1024 * 1024),
    ("cpu", True): Grid(
        ("896x4864", "2048x2048"), ((16, 4), (16, 8)), (8, 64), (1, 8), (), workloads=False, slots=64
    ),
    ("cuda", False): Grid(
        ("4096x4096", "4096x14336", "14336x4096", "896x4864"), tokens=(1, 8, 16, 32, 64, 256),
        long_adapters=(1, 8, 64), bare_tokens=(32, 256),
    ),
    ("cuda", True): Grid(
        ("4096x4096",), tokens=(16, 64), adapters=(1,), long_adapters=(1,), bare_tokens=(64,), workloads=False, slots=64
    ),
}  # fmt: skip
