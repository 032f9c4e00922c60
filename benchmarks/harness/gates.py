"""No number without a right result: what every computation that is timed must hold before the clock runs.

Each result is judged by itself, against float32. Two results that were rounded apart are compared by rows, never by
`numbers`: of ten million, one is off by more than either may be.
"""

from torch import Tensor

from benchmarks.harness.ops import TOLERANCES


def assert_rounded(name: str, found: Tensor, exact: Tensor, *, numbers: bool = True) -> None:
    """Raises AssertionError, which says where, unless `found` [T, H] is `exact` in float32 but for rounding on the way.

    A term of a delta is rounded up to eight times (factors, their product, that with the weight or with x, partial
    sums, the sum with y), each time by at most u = 2^-8 of itself in bfloat16. Errors of many terms are as often up as
    down: a row is off by about sqrt(8 / 3) u of its length. Allowed are 8 u for a row, and for a single number 16 u of
    itself and of its row's root mean square, about ten standard deviations. `TOLERANCES` holds 8 u for each dtype.
    """
    tolerance, error = TOLERANCES[found.dtype], (found.float() - exact).abs()
    length = exact.norm(dim=1, keepdim=True)
    rows = error.norm(dim=1, keepdim=True) / length.clamp(min=1e-30)
    each = error / (exact.abs() + length / exact.shape[1] ** 0.5).clamp(min=1e-30)
    for what, off, allowed in (("row", rows, tolerance), ("number", each, 2 * tolerance))[: 1 + numbers]:
        wrong = ~(off <= allowed)  # NaN too
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            raise AssertionError(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} {what}s are off from float32 by more than {allowed}, "
                f"the first at {place} by {float(off[tuple(place)]):.3f}"
            )
