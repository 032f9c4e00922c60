"""Decides where adapters should reside, from their traffic and the kernels' cost model. Asks nobody, moves nothing."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from smoa_kernels import CostModel

from smoa_serve.engine.messages import Residence

Action = Literal["merge", "unmerge", "resident", "slot"]
# Weight of the newest interval in a token rate.
NEWEST = 0.5
# Tokens per step below which an adapter that has left is forgotten.
LEAST = 1e-3
# Where merging costs nobody anything, it ends when it saves less than this share of what it is begun for.
KEPT = 0.25
# Largest share of an update that rounding may remove in a merge. In bfloat16 an update of a hundredth of the weight
# loses about a tenth.
MAX_LOST = 0.25


@dataclass(frozen=True)
class PolicySettings:
    """What the policy may do.

    Attributes:
        merge, resident: whether it may move adapters there.
        budget_bytes: for resident blocks and merged weights, all workers.
        gain: least share of a step's cost that a move up has to save.
        up_after, down_after: intervals in a row that have to speak for a move up, or down.
    """

    merge: bool
    resident: bool
    budget_bytes: int
    gain: float = 0.03
    up_after: int = 2
    down_after: int = 3


@dataclass(frozen=True)
class Load:
    """One adapter as it is used now.

    Attributes:
        name: of the adapter.
        residence: where it is.
        tokens: of it in a step, on average; alone: of these, those in steps without others; alone_steps: share of such
            steps among all.
        rank: widest branch; num_blocks: K.
        resident_bytes, merged_bytes: what each of the two rungs takes or would take.
        movable: the policy may move it; others count for what they hold.
        refused: actions that were refused and would be again.
    """

    name: str
    residence: Residence
    tokens: float
    alone: float
    alone_steps: float
    rank: int
    num_blocks: int
    resident_bytes: int
    merged_bytes: int
    movable: bool = True
    refused: frozenset[Action] = frozenset()

    def may(self, action: Action) -> bool:
        """Whether the policy may try it."""
        return self.movable and action not in self.refused


@dataclass(frozen=True)
class Others:
    """What is held for revisions that still end their requests.

    Attributes:
        bytes: resident blocks and merged weights, all workers.
        merged: one of them is merged, or is being merged.
    """

    bytes: int = 0
    merged: bool = False


NO_OTHERS = Others()


@dataclass(frozen=True)
class Decision:
    """A move and why."""

    name: str
    action: Action
    reason: str


@dataclass
class Rates:
    """Exponentially weighted tokens per step, from counters that only grow.

    Attributes:
        tokens: lora_int_id -> tokens per step; all: of everything.
    """

    tokens: dict[int, float] = field(default_factory=dict)
    _steps: int = 0
    _seen: Counter[int] = field(default_factory=Counter)

    @property
    def all(self) -> float:
        """Tokens per step, base included."""
        return sum(self.tokens.values())

    def observe(self, steps: int, counters: dict[int, int]) -> bool:
        """Takes the counters of now; whether there was any step since the last time."""
        passed = steps - self._steps
        new = Counter(counters)
        if passed > 0:
            for key in {*self.tokens, *new}:
                rate = max(new[key] - self._seen[key], 0) / passed
                self.tokens[key] = NEWEST * rate + (1 - NEWEST) * self.tokens.get(key, rate)
            # Adapters that have left fade away.
            self.tokens = {key: rate for key, rate in self.tokens.items() if key in new or rate >= LEAST}
        self._steps, self._seen = steps, new
        return passed > 0


class Policy:
    """Turns loads into moves, with hysteresis: a wish has to stand for some intervals before it is acted on.

    Args:
        settings: what it may do.
        cost: the kernels' cost model on this server.
        switches_freely: every step runs on the weights that suit it: merging then saves time in steps without others,
            and takes none from anybody.
    """

    def __init__(self, settings: PolicySettings, cost: CostModel, *, switches_freely: bool) -> None:
        self.settings, self._cost, self._switches_freely = settings, cost, switches_freely
        self._wishes: Counter[tuple[str, Action]] = Counter()

    def decide(self, loads: Sequence[Load], all_tokens: float, others: Others = NO_OTHERS) -> list[Decision]:
        """The moves to make now, those that free memory first.

        Args:
            loads: of every adapter that can be asked for.
            all_tokens: tokens of a step, base included.
            others: what is held for revisions that cannot be asked for any more.
        """
        wishes = [*self._down(loads, all_tokens), *self._up(loads, all_tokens, others)]
        standing = {(wish.name, wish.action) for wish in wishes}
        self._wishes = Counter({key: self._wishes[key] + 1 for key in standing})
        due = [wish for wish in wishes if self._wishes[wish.name, wish.action] >= self._patience(wish.action)]
        for wish in due:
            del self._wishes[wish.name, wish.action]
        return due

    def _patience(self, action: Action) -> int:
        return self.settings.down_after if action in ("unmerge", "slot") else self.settings.up_after

    def _down(self, loads: Sequence[Load], all_tokens: float) -> list[Decision]:
        found = []
        best = max((self.merge_gain(load, all_tokens) for load in loads if load.may("merge")), default=0.0)
        # Merged is one at a time: it makes room for another that would save clearly more.
        least = max(KEPT * self.settings.gain, best - self.settings.gain) if self._switches_freely else 0.0
        for load in loads:
            merged, resident = (load.residence is where for where in (Residence.MERGED, Residence.RESIDENT))
            if merged and load.may("unmerge") and (saved := self.merge_gain(load, all_tokens)) < least:
                found.append(Decision(load.name, "unmerge", _says(load, all_tokens, saved, "merged saves")))
            elif resident and load.may("slot") and (saved := self.resident_gain(load, all_tokens)) <= 0:
                found.append(Decision(load.name, "slot", _says(load, all_tokens, saved, "resident saves")))
        return found

    def _up(self, loads: Sequence[Load], all_tokens: float, others: Others) -> list[Decision]:
        free = self.settings.budget_bytes - others.bytes - sum(_held(load) for load in loads)
        found = []
        merged = None if others.merged else self._best_merge(loads, all_tokens, free)
        if merged is not None:
            free -= merged.merged_bytes - _held(merged)
            saved = self.merge_gain(merged, all_tokens)
            found.append(Decision(merged.name, "merge", _says(merged, all_tokens, saved, "merged saves")))
        if not self.settings.resident:
            return found
        for load in sorted(loads, key=lambda load: -self.resident_gain(load, all_tokens)):
            saved = self.resident_gain(load, all_tokens)
            may = load.residence is Residence.SLOT and load.may("resident")
            wanted = may and load is not merged and saved >= self.settings.gain
            if wanted and load.resident_bytes <= free:
                free -= load.resident_bytes
                found.append(Decision(load.name, "resident", _says(load, all_tokens, saved, "resident saves")))
        return found

    def _best_merge(self, loads: Iterable[Load], all_tokens: float, free: int) -> Load | None:
        if not self.settings.merge or any(load.residence is Residence.MERGED for load in loads):
            return None
        loads = [load for load in loads if load.may("merge")]
        best = max(loads, key=lambda load: self.merge_gain(load, all_tokens), default=None)
        if best is None or self.merge_gain(best, all_tokens) < self.settings.gain:
            return None
        return best if best.merged_bytes - _held(best) <= free else None

    def resident_gain(self, load: Load, all_tokens: float) -> float:
        """Share of a step's cost that the adapter saves by being resident instead of in its slot."""
        if load.tokens == 0:
            return 0.0
        return self._share(self._cost.rows(load.tokens, load.rank) - self._resident_rows(load.tokens), load, all_tokens)

    def merge_gain(self, load: Load, all_tokens: float) -> float:
        """Share of a step's cost that merging saves against the best other place: its own delta costs nothing, and
        every other token takes the difference back, unless such steps run on the original weights."""
        if self._switches_freely:
            tokens = load.alone / load.alone_steps if load.alone_steps else 0.0
            own = min(self._cost.rows(tokens, load.rank), self._resident_rows(tokens))
            return self._share(own * load.alone_steps, load, all_tokens)
        own = min(self._cost.rows(load.tokens, load.rank), self._resident_rows(load.tokens))
        others = all_tokens - load.tokens
        # Steps without others pay nothing; a part of a token means a part of the steps.
        back = others + min(others, 1.0) * self._cost.resident
        return self._share(own - back, load, all_tokens)

    def _share(self, rows: float, load: Load, all_tokens: float) -> float:
        """Of a step's cost: rows through the blocks against rows through the whole weight, and its reading, which takes
        as long as so many rows as the reading of blocks takes of rows through them."""
        return rows / load.num_blocks / (all_tokens + self._cost.resident)

    def _resident_rows(self, tokens: float) -> float:
        return tokens + min(tokens, 1.0) * self._cost.resident


def _held(load: Load) -> int:
    held = {Residence.RESIDENT: load.resident_bytes, Residence.MERGED: load.merged_bytes}
    return held.get(load.residence, 0)


def _says(load: Load, all_tokens: float, saved: float, what: str) -> str:
    share = load.tokens / all_tokens if all_tokens else 0.0
    return f"{share:.0%} of {all_tokens:.1f} tokens a step: {what} {saved:.1%} of a step"
