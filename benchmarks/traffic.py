"""Traffic over many adapters, one of them hot."""

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Traffic:
    """Who is asked, request by request.

    Attributes:
        name: for people and results.
        hot: share of requests of adapter 0, the rest goes to the others in turn; None = Zipf(1.0) over all adapters.
    """

    name: str
    hot: float | None

    def adapters(self, requests: int, adapters: int, seed: int) -> list[int]:
        """Index of the adapter of each request, in random order; the same for the same seed.

        Args:
            requests: how many.
            adapters: how many there are.
            seed: of the order, and of Zipf's draw.
        """
        rng = Random(seed)
        if self.hot is None:
            return rng.choices(range(adapters), [1 / rank for rank in range(1, adapters + 1)], k=requests)
        own = round(self.hot * requests)
        others = [1 + (seed * requests + i) % (adapters - 1) for i in range(requests - own)]
        order = [0] * own + others
        rng.shuffle(order)
        return order


ALONE = Traffic("hot adapter alone", 1.0)
HOT_90, HOT_50, HOT_20 = (Traffic(f"{share:.0%} hot", share) for share in (0.9, 0.5, 0.2))
ZIPF = Traffic("Zipf(1.0)", None)
