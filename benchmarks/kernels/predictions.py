"""What the GPU kernels should reach on an H200, from the floors alone: they have not run on one yet."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.kernels import floor
from benchmarks.kernels.bars import PREFILL
from benchmarks.kernels.cases import SHAPES, Case
from benchmarks.kernels.floor import Ceilings, Work
from benchmarks.tables import table

H200 = Ceilings(bytes_per_s=4.3e12, flops_per_s=790e12)
# Assumed, not measured: Triton kernels of this kind reach this share of a floor; launches cost this much in a graph.
ASSUMED_SHARE = 0.75
LAUNCH_S = 1.5e-6
# In a captured graph: prepare and expand, prepare, tile and add, whichever way the tokens go; gather, prepare, pass.
LAUNCHES, SINGLE_PASS_LAUNCHES = 5, 3


@dataclass(frozen=True)
class Prediction:
    """One kernel at one point.

    Attributes:
        kernel: its name.
        case: the point.
        work: its bytes and FLOPs.
        launches: kernels started for it.
        whole: whether it computes the base product too.
        at_most: the bar for base and delta over base, None where the issue has none.
    """

    kernel: str
    case: Case
    work: Work
    launches: int
    whole: bool = False
    at_most: float | None = None

    @property
    def floor_s(self) -> float:
        """The least time on an H200."""
        return H200.floor_s(self.work)

    @property
    def base_s(self) -> float:
        """The base GEMM's floor, likewise."""
        return H200.floor_s(floor.base_work(self.case))

    @property
    def predicted_s(self) -> float:
        """The floor at the assumed share, and the launches."""
        return self.floor_s / ASSUMED_SHARE + self.launches * LAUNCH_S

    def total(self, seconds: float) -> float:
        """Base and delta over the base, if the kernel takes this long and the base its floor at the same share."""
        base = self.base_s if seconds == self.floor_s else self.base_s / ASSUMED_SHARE + LAUNCH_S
        return seconds / base + (0.0 if self.whole else 1.0)

    def row(self) -> list[str]:
        """Of the table."""
        case = self.case
        bound = "memory" if self.work.intensity < H200.flops_per_s / H200.bytes_per_s else "arithmetic"
        least, likely = self.total(self.floor_s), self.total(self.predicted_s)
        return [
            self.kernel,
            case.layer.name,
            f"({case.rank}, {case.blocks})",
            f"{case.tokens:,}, {case.adapters}",
            bound,
            f"{self.floor_s * 1e6:.1f}",
            f"{self.predicted_s * 1e6:.1f}",
            f"{least:.2f}",
            f"{likely:.2f}",
            ""
            if self.at_most is None
            else f"≤ {self.at_most:.2f}" + ("" if least <= self.at_most else " (below the floor)"),
        ]


def predictions() -> Iterator[Prediction]:
    """The kernels at the points of the bars."""
    square, wide = SHAPES["4096x4096"], SHAPES["4096x14336"]
    for layer in (square, wide):
        for tokens in (1, 16):
            yield _of("single pass", Case(layer, 32, 2, tokens, tokens), floor.single_pass_work, bar=1.25)
    for rank, blocks in ((16, 4), (32, 8)):
        for tokens in (16, 64):
            case = Case(square, rank, blocks, tokens, tokens)
            yield _of("expand", case, floor.expand_work, bar=1.15)
            if tokens <= 16:
                yield _of("single pass", case, floor.single_pass_work, bar=1.15)
    yield _of("expand", Case(square, 32, 2, 64, 64), floor.expand_work)
    yield _of("modulate", Case(square, 32, 2, 256, 8), floor.modulate_work)
    for blocks, most in PREFILL.items():
        for layer in (square, wide):
            yield _of("modulate", Case(layer, 32, blocks, 4096, 1), floor.modulate_work, bar=most)
    yield _of("resident", Case(square, 32, 2, 64, 1), floor.resident_work)
    yield _of("resident", Case(square, 32, 8, 4096, 1), floor.resident_work)


def prediction_table() -> str:
    """All of them, in Markdown."""
    head = ["kernel", "layer", "(r, K)", "T, adapters", "bound by", "floor, us", "predicted, us"]
    head += ["with base / base, at the floor", "predicted", "bar"]
    return table(head, [prediction.row() for prediction in predictions()])


def _of(kernel: str, case: Case, work: Callable[[Case], Work], *, bar: float | None = None) -> Prediction:
    whole = kernel == "single pass"
    return Prediction(kernel, case, work(case), SINGLE_PASS_LAUNCHES if whole else LAUNCHES, whole, bar)
