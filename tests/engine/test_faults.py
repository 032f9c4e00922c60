"""A failure anywhere in what is done for an adapter leaves the server as it was.

Every operation runs once to count the places where something may raise; then again with an error at each of them. By
default a tenth of the places is tried. SMOA_FAULTS=all tries every one, SMOA_FAULTS=tenth as many as without it; both
add to benchmarks/results/faults.jsonl.
"""

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smoa_serve.residence.engine_client import bring_in
from smoa_serve.residence.ladder import Ladder
from smoa_serve.settings import OthersGet

pytestmark = pytest.mark.engine

ADAPTERS = {
    "kept": ("smoa", (4, 4)),
    "lora": ("lora", (8,)),
    "tried": ("smoa", (3, 2, 2)),
    "newer": ("smoa", (3, 2, 2)),
    "filler": ("hira", (4,)),
}
PROMPT, TOKENS, CLOSE = [5, 9, 40, 3], 5, 1e-4
STORED = os.environ.get("SMOA_FAULTS")
EVERYTHING = STORED == "all"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "faults.jsonl"


def number(name: str) -> int:
    return 1 + list(ADAPTERS).index(name)


class Bench:
    """An engine with the tests' adapters, as the API server would use it.

    Attributes:
        ranks: how many workers.
        ladder: moves adapters.
    """

    errored = False

    def __init__(self, llm: Any, adapters: dict[str, Path], faults: Any, ranks: int) -> None:
        self.llm, self.adapters, self.faults, self.ranks = llm, adapters, faults, ranks
        self._revisions = {name: self._make_revision(name) for name in ADAPTERS}
        self.ladder = Ladder(self, self._revisions, lambda revision: None)

    async def add_lora(self, request: Any) -> Any:
        return self.llm.llm_engine.add_lora(request)

    async def remove_lora(self, lora_id: int) -> Any:
        return self.llm.llm_engine.remove_lora(lora_id)

    async def collective_rpc(self, method: Any, args: tuple[Any, ...] = ()) -> list[Any]:
        return list(self.llm.collective_rpc(method, args=args))

    def revision(self, name: str) -> Any:
        return self._revisions[name]

    def _make_revision(self, name: str) -> Any:
        return SimpleNamespace(name=name, lora_int_id=number(name), request=lambda: self.request(name))

    def request(self, name: str, **more: Any) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(name, number(name), str(self.adapters[name]), **more)

    def ask(self, *names: str | None) -> dict[str | None, Any]:
        """Greedy answers of a batch: tokens and logprobs, or the reason why there is none."""
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": PROMPT}] * len(names),
            SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1),
            lora_request=[name and self.request(name) for name in names],
            use_tqdm=False,
        )
        return {name: _read(output.outputs[0]) for name, output in zip(names, outputs, strict=True)}

    def everywhere(self, function: Any, *arguments: Any) -> list[Any]:
        return list(self.llm.collective_rpc(function, args=arguments))

    def held(self) -> list[Any]:
        return self.everywhere(self.faults.held)

    def start_afresh(self) -> None:
        """Nothing is loaded but the two that others use."""
        for name in ("tried", "newer", "filler"):
            self.llm.llm_engine.remove_lora(number(name))
        self.ask("kept", "lora", None)
        self.everywhere(self.faults.forget_partitions)


def _read(answer: Any) -> Any:
    if answer.finish_reason == "error":
        return str(answer.stop_reason)
    chosen = zip(answer.logprobs, answer.token_ids, strict=True)
    return list(answer.token_ids), [place[token].logprob for place, token in chosen]


@dataclass(frozen=True)
class Operation:
    """One thing that is done for the adapter "tried".

    Attributes:
        ready: brings about where it begins.
        run: does it.
        done: whether it took effect, once it did not raise.
        answers: whether "tried" is answered afterwards.
    """

    ready: Callable[[Bench], None]
    run: Callable[[Bench], None]
    done: Callable[[Bench], bool]
    answers: bool = True


def _load(name: str) -> Callable[[Bench], None]:
    return lambda bench: asyncio.run(bring_in(bench, bench.request(name)))


def _loaded(bench: Bench) -> None:
    _load("tried")(bench)


def _evicted(bench: Bench) -> None:
    """Its slot and its place in host memory are taken by others."""
    _loaded(bench)
    bench.ask("kept", "lora", "filler")
    bench.ask("newer")
    bench.ask("kept", "lora", None)


def _reactivate(bench: Bench) -> None:
    answers = bench.ask("kept", "tried", None)
    if isinstance(answers["tried"], str):
        raise RuntimeError(answers["tried"])


def _replace(bench: Bench) -> None:
    _load("newer")(bench)
    asyncio.run(bench.remove_lora(number("tried")))


def _merged(bench: Bench) -> None:
    _loaded(bench)
    _merge(bench)


def _merge(bench: Bench) -> None:
    asyncio.run(bench.ladder.merge(bench.revision("tried"), OthersGet.COMPENSATE, 0.25))


def _resident(bench: Bench) -> None:
    asyncio.run(bench.ladder.make_resident(bench.revision("tried")))


def _made_resident(bench: Bench) -> None:
    _loaded(bench)
    _resident(bench)


def _to_slot(bench: Bench) -> None:
    asyncio.run(bench.ladder.to_slot(bench.revision("tried")))


def _unload(bench: Bench) -> None:
    asyncio.run(bench.remove_lora(number("tried")))


def _at(rung: str) -> Callable[[Bench], bool]:
    return lambda bench: asyncio.run(bench.ladder.residence(bench.revision("tried"))) == rung


def _is_gone(bench: Bench) -> bool:
    return all(number("tried") not in worker["registered"] for worker in bench.held())


OPERATIONS = {
    "load": Operation(lambda bench: None, _loaded, _at("slot")),
    "replace": Operation(_loaded, _replace, _is_gone, answers=False),
    "evicted and asked again": Operation(_evicted, _reactivate, _at("slot")),
    "resident": Operation(_loaded, _resident, _at("resident")),
    "resident to slot": Operation(_made_resident, _to_slot, _at("slot")),
    "merge": Operation(_loaded, _merge, _at("merged")),
    "un-merge": Operation(_merged, _to_slot, _at("slot")),
    "unload": Operation(_loaded, _unload, _is_gone, answers=False),
    "unload while merged": Operation(_merged, _unload, _is_gone, answers=False),
}


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def bench(
    request: Any, vectors: Path, makers: Any, in_process: Callable[..., Any], tmp_path_factory: Any
) -> Iterator[Bench]:
    """Three slots, host memory for four adapters."""
    import cloudpickle

    base = vectors / "e2e/tiny-llama/base"
    adapters = makers.make_adapters(base, tmp_path_factory.mktemp("adapters"), ADAPTERS)
    faults = request.getfixturevalue("faults")
    cloudpickle.register_pickle_by_value(faults)
    arguments = {"enable_lora": True, "max_loras": 3, "max_cpu_loras": 4, "enable_prefix_caching": False}
    if request.param > 1:
        arguments |= {"tensor_parallel_size": request.param, "distributed_executor_backend": "mp"}
    with in_process(base, **arguments) as engine:
        yield Bench(engine, adapters, faults, request.param)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_failure_anywhere_leaves_the_server_as_it_was(bench: Bench, operation: str) -> None:
    wanted = OPERATIONS[operation]
    bench.start_afresh()
    expected = bench.ask("kept", "lora", None)
    others = tuple(expected)
    _loaded(bench)
    own = bench.ask("tried")["tried"]
    tried: Counter[str] = Counter()
    count = 0
    for rank in range(bench.ranks):
        places = _places(bench, wanted, rank)
        count += len(places)
        for place in _chosen(len(places), rank):
            kind = bench.faults.KINDS[place % len(bench.faults.KINDS)]
            bench.start_afresh()
            wanted.ready(bench)
            before = bench.held()
            bench.everywhere(bench.faults.arm, rank, place, kind)
            error = None
            try:
                wanted.run(bench)
            except Exception as raised:
                error = raised
            passed = bench.everywhere(bench.faults.disarm)[rank]
            where = f"{operation}, rank {rank}, place {place} of {len(places)}: {kind} {passed[place]}: {error}"
            tried[places[place]] += 1
            _check(bench, wanted, before, error, where)
            answers = bench.ask(*others)
            for name in others:
                assert answers[name][0] == expected[name][0], where
                assert answers[name][1] == (
                    expected[name][1] if not _is_merged(bench) else pytest.approx(expected[name][1], abs=CLOSE)
                ), where
            wanted.run(bench)
            assert wanted.done(bench), where
            if wanted.answers:
                found = bench.ask("tried")["tried"]
                assert found[0] == own[0], where
                assert found[1] == pytest.approx(own[1], abs=CLOSE), where
            assert_whole(bench, where)
            assert len({number("tried") in worker["registered"] for worker in bench.held()}) == 1, where
            asyncio.run(bench.ladder.to_slot(bench.revision("tried")))
            assert bench.ask(*others) == expected, where
    _store(operation, bench.ranks, tried, count)


def _check(bench: Bench, wanted: Operation, before: list[Any], error: Exception | None, where: str) -> None:
    """What failed has left nothing: what is held is what was held, or less of what was tried."""
    assert_whole(bench, where)
    if error is None:
        return  # a step that fails to switch weights goes on with those in place; giving back is tried again
    for worker, earlier in zip(bench.held(), before, strict=True):
        assert set(worker["registered"]) <= {*earlier["registered"], number("newer")}, where
        assert worker["resident bytes"] <= earlier["resident bytes"], where
        assert worker["merge bytes"] <= earlier["merge bytes"], where


def assert_whole(bench: Bench, where: str) -> None:
    """No rank has a slot, a block or a count that belongs to nobody."""
    workers = bench.held()
    for worker in workers:
        assert worker["left"] == [], where
        assert worker["partitions counted wrong"] == [], where
        assert worker["active"] == worker["slots"], where
        assert set(worker["active"]) <= set(worker["registered"]), where
        assert worker["in progress"] == ["idle", None], where
        assert worker["recovered"] == 0, where
        if worker["merged"] is None:
            assert worker["merge bytes"] == 0, where


def _is_merged(bench: Bench) -> bool:
    return any(worker["merged"] is not None for worker in bench.held())


def _places(bench: Bench, wanted: Operation, rank: int) -> list[str]:
    """What the operation passes when nothing fails, and is not done for the first time."""
    passed: list[str] = []
    for _ in range(2):
        bench.start_afresh()
        wanted.ready(bench)
        bench.everywhere(bench.faults.arm, rank, None, "")
        wanted.run(bench)
        passed = bench.everywhere(bench.faults.disarm)[rank]
        _to_slot(bench)
    return passed


def _chosen(count: int, rank: int) -> list[int]:
    """All of them, or a tenth: the first, the last and others spread between."""
    if EVERYTHING:
        return list(range(count))
    step = max(1, count // 10)
    return sorted({0, count - 1, *range(rank, count, step)})


def _store(operation: str, ranks: int, tried: Counter[str], count: int) -> None:
    """How many places were tried of how many there are, printed and, where it is asked for, kept."""
    sys.stdout.write(f"faults: {operation}, TP={ranks}: {tried.total()} of {count} places tried\n")
    if STORED:
        line = {"operation": operation, "ranks": ranks, "tried": tried.total(), "of": count}
        line["places"] = dict(sorted(tried.items()))
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
