"""The automatic policy at rest beside the best fixed choice, back to back on two servers."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from benchmarks.fleet import Repeat
from benchmarks.residence import Hot, Place
from benchmarks.traffic import Traffic

POLICY = "automatic policy"
LOOK_S = 2  # how often the policy looks
# It moves an adapter up after two looks that speak for it, down after three: after four without a move it has settled.
SETTLED_S = 4.5 * LOOK_S


@dataclass(frozen=True)
class Settled:
    """What the automatic policy did before it was measured.

    Attributes:
        traffic: it met; it began with the hot adapter merged.
        seconds: it got.
        settled: it made no move for some looks in the end.
        moves: it made, and what came of them.
        hot: where the hot adapter was in the end.
    """

    traffic: str
    seconds: float
    settled: bool
    moves: list[str]
    hot: str

    @property
    def words(self) -> str:
        """For people."""
        state = "settled" if self.settled else "NOT settled"
        moves = "; ".join(self.moves) or "no moves"
        return f"  {state} after {self.seconds:.0f} s, hot adapter {self.hot}: {moves}"


@dataclass(frozen=True)
class Pairs:
    """Repeats of the policy and of a fixed choice, back to back.

    Attributes:
        fixed: the choice.
        policy, other: repeats, in the same order.
    """

    fixed: Place
    policy: list[Repeat]
    other: list[Repeat]


def policy_pairs(
    hots: Sequence[Hot],
    best: Mapping[Traffic, Place],
    ask: Callable[[int, Traffic, int], Repeat],
    pairs: int,
    run_in_s: float,
    console: Console,
) -> tuple[dict[Traffic, Pairs], list[Settled]]:
    """Each traffic twice, the two servers with their roles changed: nothing of a server itself stays in the ratio.

    Args:
        hots: the hot adapter on the two servers, which are alike.
        best: traffic → the fixed choice to compare with, found by other repeats than these: the highest of several
            noisy figures is too high by that alone.
        ask: (index of the server, traffic, seed) → one repeat.
        pairs: in each traffic, both halves together; an even number.
        run_in_s: the longest that the policy gets to settle.
        console: for progress.

    Returns:
        The pairs of each traffic, and what the policy did before.
    """
    found = {traffic: Pairs(place, [], []) for traffic, place in best.items()}
    settled: list[Settled] = []
    for automatic in (0, 1):
        for traffic, mine in found.items():
            hots[1 - automatic].bring(mine.fixed)
            hots[automatic].bring(Place.COMPENSATE)  # a merge under load takes long, un-merging takes no time
            with hots[automatic].left_to_the_policy():
                settled.append(settle(hots[automatic], traffic, partial(ask, automatic, traffic), run_in_s))
                console.print(f"{traffic.name}: {settled[-1].words}", highlight=False)
                for index in range(pairs // 2):
                    for server in (automatic, 1 - automatic)[:: 1 if index % 2 == 0 else -1]:
                        one = ask(server, traffic, 1 + index + automatic * (pairs // 2))
                        (mine.policy if server == automatic else mine.other).append(one)
                        words = POLICY if server == automatic else str(mine.fixed)
                        console.print(f"pair {index + 1}: {traffic.name}: {words}: {one.words}", highlight=False)
    return found, settled


def settle(hot: Hot, traffic: Traffic, once: Callable[[int], object], limit_s: float) -> Settled:
    """Traffic until the policy has stopped moving adapters.

    Args:
        hot: the hot adapter of a server that is left to the policy.
        traffic: its name is noted.
        once: sends one repeat of a seed.
        limit_s: the longest this may take.
    """
    known = {str(decision) for decision in hot.policy()["decisions"]}
    moves: list[str] = []
    begin = last = time.monotonic()
    seed = 1000  # of no repeat that counts
    while True:
        once(seed)
        seed += 1
        now, policy = time.monotonic(), hot.policy()
        new = [one for one in reversed(policy["decisions"]) if str(one) not in known]
        known |= {str(one) for one in new}
        moves += [f"{one['action']} {one['name']}: {one['result']}" for one in new]
        if new or policy["moving"]:
            last = now
        if now - last > SETTLED_S or now - begin > limit_s:
            return Settled(traffic.name, now - begin, now - last > SETTLED_S, moves, hot.shown)
