"""How many tokens each adapter takes: what decides where it should reside."""

from collections import Counter


class Traffic:
    """Counts the tokens of every step. Decoding sends the same map again and again, so a map is counted when it ends.

    Attributes:
        steps: how many steps there were.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._total: Counter[int] = Counter()
        self._alone: Counter[int] = Counter()
        self._alone_steps: Counter[int] = Counter()
        self._map: tuple[int, ...] = ()
        self._times = 0

    def begin(self, token_lora_ids: tuple[int, ...]) -> None:
        """The steps from now on have these adapters, one number per token, 0 for the base."""
        self._settle()
        self._map = token_lora_ids

    def step(self) -> None:
        """One step with the adapters of the last `begin`."""
        self.steps += 1
        self._times += 1

    def forget(self, lora_id: int) -> None:
        """Drop what was counted for an adapter that has left."""
        self._settle()
        for counter in (self._total, self._alone, self._alone_steps):
            del counter[lora_id]  # a Counter minds no key that it does not have

    def tokens(self) -> dict[int, int]:
        """lora_int_id -> tokens so far."""
        self._settle()
        return dict(self._total)

    def alone(self) -> dict[int, int]:
        """lora_int_id -> tokens so far in steps that had no others."""
        self._settle()
        return dict(self._alone)

    def alone_steps(self) -> dict[int, int]:
        """lora_int_id -> steps so far that had no others."""
        self._settle()
        return dict(self._alone_steps)

    def _settle(self) -> None:
        if not self._times:
            return
        counts = Counter(self._map)
        for lora_id, count in counts.items():
            self._total[lora_id] += count * self._times
        if len(counts) == 1:
            ((lora_id, count),) = counts.items()
            self._alone[lora_id] += count * self._times
            self._alone_steps[lora_id] += self._times
        self._times = 0
