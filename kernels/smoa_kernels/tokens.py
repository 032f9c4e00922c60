"""Which tokens belong together in a step."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenGroup:
    """The tokens of one slot: positions [start, end) of the plan's token order."""

    slot: int
    start: int
    end: int

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.end - self.start


@dataclass(frozen=True)
class TokenSet:
    """Rows of x and y: a range where they are consecutive, else an index. Exactly one of the two is given."""

    rows: slice | None
    index: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """Those rows of x: a view for a range, a copy otherwise."""
        return x[self.rows] if self.index is None else x.index_select(0, self.index)
