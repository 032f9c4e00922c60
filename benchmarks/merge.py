"""A hot adapter in its slot, resident, merged, and moved by the automatic policy, beside base and vLLM's LoRA."""

import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, ratio_bar
from benchmarks.fleet import Load, Repeat, Server, figures, on_gpu, one_repeat, running, speeds
from benchmarks.policy_pairs import LOOK_S, POLICY, Pairs, policy_pairs
from benchmarks.random_models import QWEN_05B_QUICK, QWEN_05B_THIRD, random_base, random_lora, random_smoa
from benchmarks.residence import Hot, Place, difference, scores
from benchmarks.stall import measure_stalls
from benchmarks.traffic import ALONE, HOT_20, HOT_50, HOT_90, ZIPF, Traffic
from smoa_serve.cli.loadgen import Job, make_jobs
from smoa_serve.errors import SmoaError
from smoa_serve.testing import ServerProcess

RANK, NUM_BLOCKS = 16, 4
LORA_RANK = RANK // NUM_BLOCKS  # equally many parameters
ADAPTERS = 64
SMOA, SECOND, LORA = "vLLM with smoa-serve", "another with smoa-serve", "vLLM with LoRA"
BASE_ONLY = "base only"
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
        run_in_s: the longest that the automatic policy gets to settle.
        cycles: merges and un-merges whose stalls are measured.
        pairs: repeats back to back, of base and merged adapter, and of policy and best fixed choice; an even number.
    """

    load: Load
    requests: int
    rounds: int
    traffics: tuple[Traffic, ...]
    lora: tuple[Traffic, ...]
    run_in_s: float
    cycles: int
    pairs: int


FULL = Plan(Load(16, 64, 32), 20, 4, (ALONE, HOT_90, HOT_50, HOT_20, ZIPF), (HOT_90, ZIPF), 90.0, 4, 20)
QUICK = Plan(Load(16, 32, 16), 20, 2, (ALONE, HOT_90), (HOT_90,), 40.0, 2, 4)
PAIRED = {ALONE: 0.99, HOT_90: 0.93}  # bars, merged over base only
POLICY_AT_LEAST = 0.97
STREAM_TOKENS = 900  # of a stream whose stalls are measured: room for two merges
# vLLM's workers poll for a second after their last step, and would take a core from the next server.
POLLING_S = 1.1


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
        results = _measure(servers, hot, plan, console)
        hots = (hot, Hot(servers[SECOND].url, HOT))
        best = {traffic: _best(results, traffic) for traffic in plan.traffics}
        ask = partial(_ask_policy, servers, plan)
        policy, settled = policy_pairs(hots, best, ask, plan.pairs, plan.run_in_s, console)
    console.print(_table(shape.name, plan, results))
    shared = {"load": asdict(plan.load), "requests_sent": plan.requests}
    rows += [
        {"kind": "merging", "traffic": traffic, "variant": variant, **shared, **figures(found)}
        for (traffic, variant), found in results.items()
    ]
    rows += [
        {"kind": "pairs", "traffic": traffic, "variant": variant, "beside": beside, **shared, **figures(found)}
        for traffic, variant, beside, found in _paired(pairs, policy)
    ]
    rows += [{"kind": "policy", **asdict(one)} for one in settled]
    return [{"model": shape.name, **row} for row in rows], _pair_bars(pairs) + _policy_bars(policy) + bars


def _paired(pairs: Results, policy: Mapping[Traffic, Pairs]) -> Iterator[tuple[str, str, str, list[Repeat]]]:
    """(traffic, variant, beside which, repeats)"""
    merged = str(Place.COMPENSATE)
    for (traffic, variant), found in pairs.items():
        yield traffic, variant, BASE_ONLY if variant == merged else merged, found
    for kind, mine in policy.items():
        yield kind.name, POLICY, str(mine.fixed), mine.policy
        yield kind.name, str(mine.fixed), POLICY, mine.other


def _servers(base: Path) -> list[Server]:
    smoa = {f"smoa-{i}": random_smoa(base, RANK, NUM_BLOCKS, i) for i in range(ADAPTERS)}
    lora = {f"lora-{i}": random_lora(base, LORA_RANK, i) for i in range(ADAPTERS)}
    automatic = {"SMOA_AUTO_MERGE": "1", "SMOA_AUTO_RESIDENT": "1", "SMOA_POLICY_INTERVAL_S": str(LOOK_S)}
    alike = [Server(name, True, smoa, (), automatic) for name in (SMOA, SECOND)]
    return [*alike, Server(LORA, False, lora)]


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


def _measure(servers: Mapping[str, ServerProcess], hot: Hot, plan: Plan, console: Console) -> Results:
    results: Results = {}
    for index in range(plan.rounds):
        for traffic, variant in _cases(plan) if index % 2 == 0 else reversed(_cases(plan)):
            one = _one(servers, hot, plan, traffic, variant, index + 1)
            results.setdefault((traffic.name, variant), []).append(one)
            words = f"{traffic.name}: {variant}: {one.words}"
            console.print(f"round {index + 1} of {plan.rounds}: {words}", highlight=False)
    return {(traffic.name, variant): results[traffic.name, variant] for traffic, variant in _cases(plan)}


def _best(results: Results, traffic: Traffic) -> Place:
    """The fixed choice that was the fastest."""
    return max(Place, key=lambda place: statistics.median(speeds(results[traffic.name, str(place)])))


def _cases(plan: Plan) -> list[tuple[Traffic, str]]:
    return [
        (traffic, str(variant))
        for traffic in plan.traffics
        for variant in (BASE_ONLY, *Place, *([LORA] if traffic in plan.lora else []))
    ]


def _one(
    servers: Mapping[str, ServerProcess], hot: Hot, plan: Plan, traffic: Traffic, variant: str, seed: int
) -> Repeat:
    """One repeat of one variant, the hot adapter where it belongs."""
    if variant == LORA:
        time.sleep(POLLING_S)
        found = _ask(servers, plan, traffic, variant, seed)
        time.sleep(POLLING_S)
        return found
    hot.bring(Place.SLOT if variant == BASE_ONLY else Place(variant))
    return _ask(servers, plan, traffic, variant, seed)


def _ask_policy(servers: Mapping[str, ServerProcess], plan: Plan, index: int, traffic: Traffic, seed: int) -> Repeat:
    """One repeat on one of the two servers that the policy and the fixed choice take turns with."""
    return one_repeat(servers[(SMOA, SECOND)[index]], _jobs(plan, traffic, POLICY, seed), plan.load.streams)


def _ask(servers: Mapping[str, ServerProcess], plan: Plan, traffic: Traffic, variant: str, seed: int) -> Repeat:
    jobs = _jobs(plan, traffic, variant, seed)
    return one_repeat(servers[LORA if variant == LORA else SMOA], jobs, plan.load.streams)


def _jobs(plan: Plan, traffic: Traffic, variant: str, seed: int) -> list[Job]:
    """Of one repeat; every variant gets the same prompts in the same order."""
    name = {BASE_ONLY: "base", LORA: "lora-{}"}.get(variant, "smoa-{}")
    models = [name.format(adapter) for adapter in traffic.adapters(plan.requests, ADAPTERS, seed)]
    return make_jobs(models, plan.requests, plan.load.input_tokens, plan.load.output_tokens, seed)


def _pair_bars(pairs: Results) -> list[Bar]:
    bars = []
    for traffic, at_least in PAIRED.items():
        base, merged = (speeds(pairs[traffic.name, variant]) for variant in (BASE_ONLY, str(Place.COMPENSATE)))
        bars.append(ratio_bar(f"{traffic.name}, {Place.COMPENSATE} / {BASE_ONLY}", merged, base, at_least))
    return bars


def _policy_bars(policy: Mapping[Traffic, Pairs]) -> list[Bar]:
    return [
        ratio_bar(
            f"{traffic.name}, {POLICY} / best fixed choice ({mine.fixed})",
            speeds(mine.policy),
            speeds(mine.other),
            POLICY_AT_LEAST,
        )
        for traffic, mine in policy.items()
    ]


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
