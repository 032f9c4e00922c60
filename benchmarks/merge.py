"""What does merging a hot adapter gain? In its slot, resident, merged, moved by the policy; beside base and LoRA."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks import hot
from benchmarks.harness import LOAD, Bar, Options, Row, median_bar, models, of_kind, ratio_bar, table
from benchmarks.harness.load import Load, Repeat, figures, take_turns
from benchmarks.harness.markdown import load_words
from benchmarks.harness.servers import Server, ServerProcess, on_gpu, running
from benchmarks.hot import ALONE, HOT_20, HOT_50, HOT_90, ZIPF, Hot, Place, Traffic
from smoa_serve.errors import SmoaError

RANK, NUM_BLOCKS = 16, 4
LORA_RANK = RANK // NUM_BLOCKS  # equally many parameters
ADAPTERS = 64
SMOA, SECOND, LORA = "vLLM with smoa-serve", "another with smoa-serve", "vLLM with LoRA"
BASE_ONLY, POLICY, MERGED = "base only", "automatic policy", str(Place.COMPENSATE)
HOT = "smoa-0"
# Nats. The tests compare in float32; in bfloat16 the two ways round differently, a wrong weight is off by far more.
CLOSE = 0.1
PAIRED = {ALONE: 0.99, HOT_90: 0.93}  # bars, merged over base only
STREAM_TOKENS = 900  # of a stream whose stalls are measured: room for two merges
# vLLM's workers poll for a second after their last step, and would take a core from the next server.
POLLING_S = 1.1
Ask = Callable[[Traffic, str, int], Repeat]  # (traffic, variant, seed) → one repeat


class ParityError(SmoaError):
    """Answers with something merged are not those without."""


@dataclass(frozen=True)
class Plan:
    shape: models.Shape
    load: Load
    requests: int  # of one repeat
    rounds: int
    traffics: tuple[Traffic, ...]
    lora: tuple[Traffic, ...]  # those in which vLLM's LoRA takes part
    run_in_s: float  # the longest that the automatic policy gets to settle
    cycles: int  # merges and un-merges whose stalls are measured
    pairs: int  # back to back, of base and merged adapter, and of policy and best fixed choice; an even number

    def ask(self, server: ServerProcess, traffic: Traffic, variant: str, seed: int) -> Repeat:
        """One repeat; every variant gets the same prompts in the same order."""
        name = {BASE_ONLY: "base", LORA: "lora-{}"}.get(variant, "smoa-{}")
        asked = [name.format(adapter) for adapter in traffic.adapters(self.requests, ADAPTERS, seed)]
        return self.load.send(server, asked, self.requests, seed)


QUICK = Plan(models.QWEN_05B_QUICK, Load(16, 32, 16), 20, 2, (ALONE, HOT_90), (HOT_90,), 40.0, 2, 4)
ALL_TRAFFICS = (ALONE, HOT_90, HOT_50, HOT_20, ZIPF)
FULL = Plan(models.QWEN_05B_THIRD, Load(16, 64, 32), 20, 4, ALL_TRAFFICS, (HOT_90, ZIPF), 90.0, 4, 20)


def cases(options: Options) -> Plan:
    return QUICK if options.quick else FULL


def measure(plan: Plan, options: Options) -> list[Row]:
    """The gate, stalls, pairs of base and merged, rounds of all variants, pairs of policy and best fixed choice."""
    base = models.random_base(plan.shape)
    with running(base, _servers(base)) as servers:
        hots = [Hot(servers[name], HOT) for name in (SMOA, SECOND)]
        rows = list(_parity(hots[0]))
        for asked in (("base",), ("base", HOT, "smoa-1", "smoa-2")):
            row = {"kind": "stall", "streams": len(asked)}
            rows.append(row | hot.stalls(hots[0], asked, STREAM_TOKENS, plan.cycles))
        asks = [partial(plan.ask, servers[name]) for name in (SMOA, SECOND)]
        rows += pairs(hots[0], plan.pairs, asks[0])

        def ask(variant: tuple[Traffic, str], seed: int) -> Repeat:
            if variant[1] == LORA:
                time.sleep(POLLING_S)
                found = plan.ask(servers[LORA], *variant, seed)
                time.sleep(POLLING_S)
                return found
            hots[0].bring(Place.SLOT if variant[1] == BASE_ONLY else Place(variant[1]))
            return asks[0](*variant, seed)

        names = (BASE_ONLY, *map(str, Place), LORA)
        variants = [(of, name) for of in plan.traffics for name in names if name != LORA or of in plan.lora]
        rounds = take_turns(variants, plan.rounds, ask)
        rows += [_load_row("merging", traffic, variant, found) for (traffic, variant), found in rounds.items()]
        best = {traffic: best_place(rounds, traffic) for traffic in plan.traffics}
        rows += policy_pairs(hots, best, asks, plan.pairs, plan.run_in_s)
    shared = {"model": plan.shape.name, "load": asdict(plan.load), "requests_sent": plan.requests}
    return [shared | row for row in rows]


def _load_row(kind: str, traffic: Traffic, variant: str, found: Sequence[Repeat], **more: str) -> Row:
    return {"kind": kind, "traffic": traffic.name, "variant": variant, **more, **figures(found)}


def _servers(base: Path) -> list[Server]:
    smoa = {f"smoa-{i}": models.random_smoa(base, RANK, NUM_BLOCKS, i) for i in range(ADAPTERS)}
    lora = {f"lora-{i}": models.random_lora(base, LORA_RANK, i) for i in range(ADAPTERS)}
    automatic = {"SMOA_AUTO_MERGE": "1", "SMOA_AUTO_RESIDENT": "1", "SMOA_POLICY_INTERVAL_S": str(hot.LOOK_S)}
    alike = [Server(name, True, smoa, environment=automatic) for name in (SMOA, SECOND)]
    return [*alike, Server(LORA, False, lora)]


def _parity(mine: Hot) -> Iterator[Row]:
    """The gate: everybody's answers at every place of the hot adapter against those with everything in its slot."""
    asked = ("base", HOT, "smoa-1")
    before = {model: hot.scores(mine.openai, model) for model in asked}
    for place in (Place.RESIDENT, Place.COMPENSATE, Place.EXCLUSIVE, Place.SLOT):
        report = mine.bring(place, **({"check": True} if place is Place.COMPENSATE else {}))
        wanted = ("lost", "largest_logprob_difference", "tokens_agree")
        checked = {key: report[key] for key in wanted if key in report}
        for model in asked:
            found = hot.difference(before[model], hot.scores(mine.openai, model))
            print(f"{place}: {model}: {found}")
            if found["largest"] > CLOSE:
                raise ParityError(f"with {HOT} {place}, logprobs of {model} differ by {found['largest']:.3f} nats")
            yield {"kind": "parity", "place": place, "asked": model, **found, **checked}
        if mine.shown != place.partition(",")[0]:
            raise ParityError(f"{HOT} should be {place}, and the server says that it is {mine.shown}")


def pairs(mine: Hot, count: int, ask: Ask) -> Iterator[Row]:
    """Base and merged adapter back to back: repeats minutes apart differ more than the bars allow."""
    for traffic in PAIRED:

        def one(variant: str, seed: int, traffic: Traffic = traffic) -> Repeat:
            # On a CPU steps of the base run on the original weights whatever is merged.
            mine.bring(Place.SLOT if variant == BASE_ONLY and on_gpu() else Place.COMPENSATE)
            return ask(traffic, variant, seed)

        found = take_turns((BASE_ONLY, MERGED), count, one)
        yield _load_row("pairs", traffic, BASE_ONLY, found[BASE_ONLY], beside=MERGED)
        yield _load_row("pairs", traffic, MERGED, found[MERGED], beside=BASE_ONLY)


def best_place(results: Mapping[tuple[Traffic, str], Sequence[Repeat]], traffic: Traffic) -> Place:
    """The fixed choice that was the fastest."""
    return max(Place, key=lambda place: figures(results[traffic, place])["tokens_per_s"])


def policy_pairs(
    hots: Sequence[Hot], best: Mapping[Traffic, Place], asks: Sequence[Ask], count: int, run_in_s: float
) -> Iterator[Row]:
    """The policy at rest beside the best fixed choice, back to back on two servers that are alike.

    Each traffic twice, the two servers with their roles changed: nothing of a server itself stays in the ratio.
    The best choice was found by other repeats: the highest of several noisy figures is too high by that alone.
    """
    both: dict[Traffic, tuple[list[Repeat], list[Repeat]]] = {traffic: ([], []) for traffic in best}
    for automatic, fixed in ((0, 1), (1, 0)):
        for traffic, place in best.items():
            hots[fixed].bring(place)
            hots[automatic].bring(Place.COMPENSATE)  # a merge under load takes long, un-merging takes no time
            half = [partial(asks[automatic], traffic, POLICY), partial(asks[fixed], traffic, str(place))]
            first = automatic * (count // 2)
            with hots[automatic].left_to_the_policy():
                did = hot.settle(hots[automatic], half[0], run_in_s)
                print(f"{traffic.name}: {did}")
                yield {"kind": "policy", "traffic": traffic.name, **did}
                found = take_turns(half, count // 2, lambda ask, seed, first=first: ask(first + seed))
            for kept, ask in zip(both[traffic], half, strict=True):
                kept.extend(found[ask])
    for traffic, (policy, other) in both.items():
        yield _load_row("pairs", traffic, POLICY, policy, beside=str(best[traffic]))
        yield _load_row("pairs", traffic, str(best[traffic]), other, beside=POLICY)


def bars(rows: Sequence[Row]) -> list[Bar]:
    found = {(row["traffic"], row["variant"], row["beside"]): row["values"] for row in of_kind(rows, "pairs")}
    bars = []
    for traffic, at_least in PAIRED.items():
        merged, base = found[traffic.name, MERGED, BASE_ONLY], found[traffic.name, BASE_ONLY, MERGED]
        bars.append(ratio_bar(f"{traffic.name}, {MERGED} / {BASE_ONLY}", merged, base, at_least))
    for (name, variant, beside), values in found.items():
        if variant == POLICY:
            what = f"{name}, {POLICY} / best fixed choice ({beside})"
            bars.append(ratio_bar(what, values, found[name, beside, POLICY], 0.97))
    for row in of_kind(rows, "stall"):
        streams = f"{row['streams']} running stream{'s' if row['streams'] > 1 else ''}"
        for move, key in (("a merge", "merge_ms"), ("an un-merge", "unmerge_ms")):
            steps = [(longest - row["usual_ms"]) / row["usual_ms"] for longest in row[key]]
            bars.append(median_bar(f"stall of {streams} by {move}, decode steps", steps, at_most=2.0))
    return bars


def section(rows: Sequence[Row]) -> str:
    measured, paired, parity = (of_kind(rows, kind) for kind in ("merging", "pairs", "parity"))
    first, what = measured[0], {"traffic": "{traffic}", "hot adapter": "{variant}"}
    rounds = max(len(row["values"]) for row in measured)
    words = f"**{first['model']}**, {load_words(first)}, {first['requests_sent']} requests a repeat, rounds: {rounds}."
    parts = [words, table(what | LOAD, measured)]
    if paired:
        parts.append(f"Back to back, {len(paired[0]['values'])} pairs each:")
        parts.append(table({**what, "beside": "{beside}", **LOAD}, paired))
    stall = {
        "running streams": "{streams}",
        "usual ms between tokens": "{usual_ms:.1f}",
        "longest without moves": "{usual_longest_ms:.1f}",
        "merge": lambda row: _spread(row["merge_ms"]),
        "un-merge": lambda row: _spread(row["unmerge_ms"]),
        "a merge takes": lambda row: f"{statistics.median(row['seconds']):.1f} s",
    }
    changed = {"hot adapter is": "{place}", "asked": "{asked}", "largest difference": "{largest:.4f}"}
    changed |= {"mean": "{mean:.4f}", "same best token": "{best_agree:.1%}"}
    checked = next(row for row in parity if row.get("largest_logprob_difference") is not None)
    parts += [table(stall, of_kind(rows, "stall")), table(changed, parity)]
    parts.append(
        f"Rounding removes {checked['lost']:.1%} of the update in the worst layer. The `check` of the merge: largest "
        f"difference {checked['largest_logprob_difference']:.4f} nats, greedy tokens "
        f"{'agree' if checked['tokens_agree'] else 'differ'}."
    )
    settled = [row for row in of_kind(rows, "policy") if "traffic" in row]
    if settled:
        did = {"traffic": "{traffic}", "settled after": "{seconds:.0f} s{not}", "hot adapter then": "{hot}"}
        did["moves"] = lambda row: len(row["moves"])
        parts.append(table(did, [row | {"not": "" if row["settled"] else " (not)"} for row in settled]))
    return "\n\n".join(parts)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
