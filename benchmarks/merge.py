"""A hot adapter in its slot, resident, merged, and moved by the automatic policy, beside base and vLLM's LoRA."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, best_choice_bar, ratio_bar
from benchmarks.fleet import Load, Repeat, Server, figures, on_gpu, one_repeat, running, speeds
from benchmarks.random_models import QWEN_05B_QUICK, QWEN_05B_THIRD, random_base, random_lora, random_smoa
from benchmarks.residence import Hot, Place, difference, scores
from benchmarks.stall import measure_stalls
from benchmarks.traffic import ALONE, HOT_20, HOT_50, HOT_90, ZIPF, Traffic
from smoa_serve.cli.load import make_jobs
from smoa_serve.demo.server import ServerProcess
from smoa_serve.errors import SmoaError

RANK, NUM_BLOCKS = 16, 4
LORA_RANK = RANK // NUM_BLOCKS  # equally many parameters
ADAPTERS = 64
SMOA, LORA = "vLLM with smoa-serve", "vLLM with LoRA"
BASE_ONLY, POLICY = "base only", "automatic policy"
HOT = "smoa-0"
# Nats. The tests compare in float32; in bfloat16 the two ways round differently, a wrong weight is off by far more.
CLOSE = 0.1
Results = dict[tuple[str, str], list[Repeat]]  # (traffic, variant)


class ParityError(SmoaError):
    """Answers with something merged are not those without."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        load: of one repeat of one variant; requests: in it.
        rounds: repeats.
        traffics: with which traffic.
        lora: traffics in which vLLM's LoRA takes part.
        run_in_s: the longest that the automatic policy gets to settle before its repeat.
        cycles: merges and un-merges whose stalls are measured.
        pairs: repeats of base and merged adapter back to back, for the bars that compare them.
    """

    load: Load
    requests: int
    rounds: int
    traffics: tuple[Traffic, ...]
    lora: tuple[Traffic, ...]
    run_in_s: float
    cycles: int
    pairs: int


FULL = Plan(Load(16, 64, 32), 20, 4, (ALONE, HOT_90, HOT_50, HOT_20, ZIPF), (HOT_90, ZIPF), 90.0, 4, 12)
QUICK = Plan(Load(16, 32, 16), 20, 2, (ALONE, HOT_90), (HOT_90,), 40.0, 2, 4)
PAIRED = {ALONE: 0.99, HOT_90: 0.93}  # bars, merged over base only
LOOK_S = 2  # how often the policy looks
# It moves an adapter up after two looks that speak for it, down after three: after four without a move it has settled.
SETTLED_S = 4.5 * LOOK_S
STREAM_TOKENS = 900  # of a stream whose stalls are measured: room for two merges
# vLLM's workers poll for a second after their last step, and would take a core from the next server.
POLLING_S = 1.1


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


def run(quick: bool) -> tuple[list[dict[str, object]], list[Bar]]:
    """Measure everything.

    Args:
        quick: fewer layers, shorter load, less traffic; the same bars.

    Returns:
        Rows for JSON, and the bars.

    Raises:
        ParityError: something answers differently when the hot adapter is merged.
    """
    console = Console() if sys.stdout.isatty() else Console(width=140)
    plan, shape = (QUICK, QWEN_05B_QUICK) if quick else (FULL, QWEN_05B_THIRD)
    base = random_base(shape)
    with running(base, _servers(base), console) as servers:
        url = servers[SMOA].url
        hot = Hot(url, HOT)
        rows = _parity(url, hot, console)
        stalls, bars = _stalls(url, hot, plan)
        rows += stalls
        pairs = _pairs(servers, hot, plan, console)
        results, settled = _measure(servers, hot, plan, console)
    console.print(_table(shape.name, plan, results))
    shared = {"load": asdict(plan.load), "requests_sent": plan.requests}
    rows += [
        {"kind": "merging", "traffic": traffic, "variant": variant, **shared, **figures(found)}
        for (traffic, variant), found in results.items()
    ]
    rows += [
        {"kind": "pairs", "traffic": traffic, "variant": variant, **figures(found)}
        for (traffic, variant), found in pairs.items()
    ]
    rows += [{"kind": "policy", **asdict(one)} for one in settled]
    return [{"model": shape.name, **row} for row in rows], _pair_bars(pairs) + _policy_bars(plan, results) + bars


def _servers(base: Path) -> list[Server]:
    smoa = {f"smoa-{i}": random_smoa(base, RANK, NUM_BLOCKS, i) for i in range(ADAPTERS)}
    lora = {f"lora-{i}": random_lora(base, LORA_RANK, i) for i in range(ADAPTERS)}
    automatic = {"SMOA_AUTO_MERGE": "1", "SMOA_AUTO_RESIDENT": "1", "SMOA_POLICY_INTERVAL_S": str(LOOK_S)}
    return [Server(SMOA, True, smoa, (), automatic), Server(LORA, False, lora)]


def _parity(url: str, hot: Hot, console: Console) -> list[dict[str, object]]:
    """The gate: everybody's answers at every place of the hot adapter against those with everything in its slot."""
    asked = ("base", HOT, "smoa-1")
    before = {model: scores(url, model) for model in asked}
    rows: list[dict[str, object]] = []
    for place in (Place.RESIDENT, Place.COMPENSATE, Place.EXCLUSIVE, Place.SLOT):
        report = hot.bring(place, **({"check": True} if place is Place.COMPENSATE else {})) or {}
        wanted = ("lost", "largest_logprob_difference", "tokens_agree")
        checked: dict[str, object] = {key: report[key] for key in wanted if key in report}
        for model in asked:
            found = difference(before[model], scores(url, model))
            rows.append({"kind": "parity", "place": place, "asked": model, **asdict(found), **checked})
            words = f"largest {found.largest:.4f}, mean {found.mean:.5f} nats, best tokens agree {found.best_agree:.1%}"
            console.print(f"{place}: {model}: {words}", highlight=False)
            if found.largest > CLOSE:
                raise ParityError(f"with {HOT} {place}, logprobs of {model} differ by {found.largest:.3f} nats")
        if hot.shown != place.partition(",")[0]:
            raise ParityError(f"{HOT} should be {place}, and the server says that it is {hot.shown}")
    return rows


def _stalls(url: str, hot: Hot, plan: Plan) -> tuple[list[dict[str, object]], list[Bar]]:
    rows: list[dict[str, object]] = []
    bars = []
    for models in (("base",), ("base", HOT, "smoa-1", "smoa-2")):
        found = measure_stalls(hot, url, models, STREAM_TOKENS, plan.cycles)
        rows.append({"kind": "stall", "streams": len(models), **asdict(found)})
        streams = f"{len(models)} running stream{'s' if len(models) > 1 else ''}"
        for move, longest in (("a merge", found.merge_ms), ("an un-merge", found.unmerge_ms)):
            steps = found.steps(longest)
            name = f"stall of {streams} by {move}, decode steps"
            bars.append(Bar(name, statistics.median(steps), None, (min(steps), max(steps)), 2.0))
    return rows, bars


def _pairs(servers: Mapping[str, ServerProcess], hot: Hot, plan: Plan, console: Console) -> Results:
    """Base and merged adapter back to back: repeats minutes apart differ more than the bars allow."""
    results: Results = {}
    for traffic in PAIRED:
        hot.bring(Place.COMPENSATE)
        for index in range(plan.pairs):
            for variant in (BASE_ONLY, str(Place.COMPENSATE))[:: 1 if index % 2 == 0 else -1]:
                if on_gpu():  # on a CPU steps of the base run on the original weights whatever is merged
                    hot.bring(Place.SLOT if variant == BASE_ONLY else Place.COMPENSATE)
                one = _ask(servers, plan, traffic, variant, index + 1)
                results.setdefault((traffic.name, variant), []).append(one)
                console.print(f"pair {index + 1}: {traffic.name}: {variant}: {one.words}", highlight=False)
    return results


def _measure(
    servers: Mapping[str, ServerProcess], hot: Hot, plan: Plan, console: Console
) -> tuple[Results, list[Settled]]:
    results: Results = {}
    settled: list[Settled] = []
    for index in range(plan.rounds):
        for traffic, variant in _cases(plan) if index % 2 == 0 else reversed(_cases(plan)):
            one = _one(servers, hot, plan, traffic, variant, index, settled)
            results.setdefault((traffic.name, variant), []).append(one)
            words = f"{traffic.name}: {variant}: {one.words}"
            console.print(f"round {index + 1} of {plan.rounds}: {words}", highlight=False)
            if variant == POLICY:
                console.print(settled[-1].words, highlight=False)
    return {(traffic.name, variant): results[traffic.name, variant] for traffic, variant in _cases(plan)}, settled


def _cases(plan: Plan) -> list[tuple[Traffic, str]]:
    return [
        (traffic, str(variant))
        for traffic in plan.traffics
        for variant in (BASE_ONLY, *Place, POLICY, *([LORA] if traffic in plan.lora else []))
    ]


def _one(
    servers: Mapping[str, ServerProcess],
    hot: Hot,
    plan: Plan,
    traffic: Traffic,
    variant: str,
    index: int,
    settled: list[Settled],
) -> Repeat:
    """One repeat of one variant, the hot adapter where it belongs."""
    if variant == POLICY:
        hot.bring(Place.COMPENSATE)  # a merge under load takes longer than the repeat; un-merging takes no time
        with hot.left_to_the_policy():
            run_in = partial(_ask, servers, plan, traffic, variant)
            settled.append(_settle(hot, traffic, run_in, plan.run_in_s, 1000 * (index + 1)))
            return _ask(servers, plan, traffic, variant, index + 1)
    if variant == LORA:
        time.sleep(POLLING_S)
        found = _ask(servers, plan, traffic, variant, index + 1)
        time.sleep(POLLING_S)
        return found
    hot.bring(Place.SLOT if variant == BASE_ONLY else Place(variant))
    return _ask(servers, plan, traffic, variant, index + 1)


def _ask(servers: Mapping[str, ServerProcess], plan: Plan, traffic: Traffic, variant: str, seed: int) -> Repeat:
    """One repeat; every variant gets the same prompts in the same order."""
    name = {BASE_ONLY: "base", LORA: "lora-{}"}.get(variant, "smoa-{}")
    models = [name.format(adapter) for adapter in traffic.adapters(plan.requests, ADAPTERS, seed)]
    jobs = make_jobs(models, plan.requests, plan.load.input_tokens, plan.load.output_tokens, seed)
    return one_repeat(servers[LORA if variant == LORA else SMOA], jobs, plan.load.streams)


def _settle(hot: Hot, traffic: Traffic, once: Callable[[int], object], limit_s: float, seed: int) -> Settled:
    """Traffic until the policy has stopped moving adapters."""
    known = {str(decision) for decision in hot.policy()["decisions"]}
    moves: list[str] = []
    begin = last = time.monotonic()
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


def _pair_bars(pairs: Results) -> list[Bar]:
    bars = []
    for traffic, at_least in PAIRED.items():
        base, merged = (speeds(pairs[traffic.name, variant]) for variant in (BASE_ONLY, str(Place.COMPENSATE)))
        bars.append(ratio_bar(f"{traffic.name}, {Place.COMPENSATE} / {BASE_ONLY}", merged, base, at_least))
    return bars


def _policy_bars(plan: Plan, results: Results) -> list[Bar]:
    bars = []
    for traffic in plan.traffics:
        fixed = {str(place): speeds(results[traffic.name, place]) for place in Place}
        policy = speeds(results[traffic.name, POLICY])
        bars.append(best_choice_bar(f"{traffic.name}, {POLICY}", policy, fixed, 0.97))
    return bars


def _table(model: str, plan: Plan, results: Results) -> Table:
    load = plan.load
    title = f"{model}: {load.streams} streams, {load.input_tokens} tokens in, {load.output_tokens} out"
    table = Table("traffic", "variant", "tokens/s", "repeats", "TTFT p50 ms", "TPOT p50 ms", "of base", title=title)
    for (traffic, variant), repeats in results.items():
        facts, reached = figures(repeats), speeds(repeats)
        share = statistics.median(a / b for a, b in zip(reached, speeds(results[traffic, BASE_ONLY]), strict=True))
        spread = f"{min(reached):.1f} to {max(reached):.1f}"
        times = (f"{facts['ttft_ms_p50']:.0f}", f"{facts['tpot_ms_p50']:.1f}")
        table.add_row(traffic, variant, f"{facts['tokens_per_s']:.1f}", spread, *times, f"{share:.2f}")
    return table
