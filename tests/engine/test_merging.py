"""An adapter in the base weights: everybody's answers stay their own, and the weights come back bit for bit."""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from smoa_kernels import CostModel
from smoa_kernels.backends.cpp import build as cpp_build
from smoa_kernels.backends.cpp.backend import CPP_COST, TILES_COST

from smoa_serve.errors import AdapterError

pytestmark = pytest.mark.engine

TOKENS = 24
ADAPTERS = {
    "smoa-8-2": ("smoa", (4, 4)),
    "smoa-6-4": ("smoa", (2, 2, 1, 1)),
    "hira-4": ("hira", (4,)),
    "lora-8": ("lora", (8,)),
}
MERGEABLE = ("smoa-8-2", "smoa-6-4", "hira-4")
PROMPTS = ([5, 9, 40], [17], [3, 60, 61, 90, 8, 12, 77, 31])
# Of a logit; merging adds in another order than the layer's sum.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def adapters(vectors: Path, makers: Any, tmp_path_factory: Any) -> dict[str, Path]:
    """Adapters on every linear layer, each with its own partition of the coordinates."""
    made: dict[str, Path] = makers.make_adapters(
        vectors / "e2e/tiny-llama/base", tmp_path_factory.mktemp("adapters"), ADAPTERS
    )
    return made


@pytest.fixture(scope="module", params=["packed", "plain", "compiled"])
def engine(vectors: Path, in_process: Callable[..., Any], adapters: dict[str, Path], request: Any) -> Iterator[Any]:
    """Three slots for four adapters. "plain": the weights lie in the open, as they do on a GPU, and
    torch computes the deltas, whose blocks may be views. "compiled": packed, and
    vLLM has compiled the model around the layers."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            from vllm import _custom_ops as ops

            patch.setattr(ops, "_supports_onednn", False)
            patch.setattr(cpp_build, "unavailable_reason", lambda device_type, dtype: "torch is tested")
        arguments = {"enable_lora": True, "max_loras": 3, "max_cpu_loras": 4, "enable_prefix_caching": False}
        eager = request.param != "compiled"
        with in_process(vectors / "e2e/tiny-llama/base", enforce_eager=eager, **arguments) as engine:
            yield engine


def number(name: str) -> int:
    """vLLM's number of an adapter."""
    return 1 + list(ADAPTERS).index(name)


def ask(engine: Any, batch: list[tuple[str | None, int]], adapters: dict[str, Path]) -> list[Any]:
    """Greedy continuations of a batch of (adapter, index of the prompt)."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    outputs = engine.generate(
        [{"prompt_token_ids": PROMPTS[index]} for _, index in batch],
        SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1),
        lora_request=[name and LoRARequest(name, number(name), str(adapters[name])) for name, _ in batch],
        use_tqdm=False,
    )
    return [output.outputs[0] for output in outputs]


def logprobs(answer: Any) -> list[float]:
    """Of the tokens that were chosen."""
    return [place[token].logprob for place, token in zip(answer.logprobs, answer.token_ids, strict=True)]


def stage(engine: Any, name: str, target: str = "merged", budget_s: float = 10.0) -> dict[str, Any]:
    """Work towards a rung of the ladder until it is ready; the last report."""
    for _ in range(10_000):
        (report,) = engine.collective_rpc("smoa_stage", args=(number(name), target, budget_s))
        assert report["refused"] == []
        if report["ready"]:
            return report
    raise AssertionError("it never got ready")


def commit(engine: Any, name: str, target: str = "merged", policy: str = "compensate") -> dict[str, Any]:
    """What the worker answers."""
    (report,) = engine.collective_rpc("smoa_commit", args=(number(name), target, policy))
    return dict(report)


def residence(engine: Any) -> dict[str, str]:
    (status,) = engine.collective_rpc("smoa_status")
    return status["residence"]


@pytest.fixture(scope="module")
def solo(engine: Any, adapters: dict[str, Path]) -> dict[tuple[str | None, int], Any]:
    """Every adapter's answers, asked alone with nothing merged."""
    keys = [(name, index) for name in (None, *ADAPTERS) for index in range(len(PROMPTS))]
    return {key: ask(engine, [key], adapters)[0] for key in keys}


def assert_own_answers(engine: Any, solo: Any, adapters: dict[str, Path], keys: list[tuple[str | None, int]]) -> None:
    for key, answer in zip(keys, ask(engine, keys, adapters), strict=True):
        assert list(answer.token_ids) == list(solo[key].token_ids), key
        assert logprobs(answer) == pytest.approx(logprobs(solo[key]), abs=CLOSE), key


@pytest.mark.parametrize("policy", ["compensate", "exclusive"])
@pytest.mark.parametrize("merged", MERGEABLE)
def test_beside_a_merged_adapter_everyone_gets_his_own_answer(engine, solo, adapters, merged, policy):
    report = stage(engine, merged)
    assert report["finished"] == report["layers"] > 0
    assert max(report["lost"].values()) < 1e-5  # of float32
    assert "raised" not in engine.collective_rpc("smoa_commit", args=(number(merged), "merged", policy))[0]
    assert residence(engine)[str(number(merged))] == "merged"
    rng = random.Random(3)
    try:
        assert_own_answers(engine, solo, adapters, [(merged, index) for index in range(len(PROMPTS))])
        for others in (["lora-8", None], [name for name in MERGEABLE if name != merged], [None]):
            keys = [(name, rng.randrange(len(PROMPTS))) for name in (merged, *others, None)]
            rng.shuffle(keys)
            assert_own_answers(engine, solo, adapters, keys)
            assert_own_answers(engine, solo, adapters, [key for key in keys if key[0] != merged])
    finally:
        assert engine.collective_rpc("smoa_undo", args=(number(merged),)) == [{}]
    for key in solo:
        (answer,) = ask(engine, [key], adapters)
        assert logprobs(answer) == logprobs(solo[key]), f"{key}: the base is not what it was"


def test_staging_in_pieces_goes_on_where_it_was_and_may_be_given_up(engine, solo, adapters, monkeypatch):
    # The clock ticks when it is read: each call does one piece of work, however fast the machine is.
    ticks = itertools.count()
    monkeypatch.setattr("smoa_serve.engine.mover.monotonic", lambda: next(ticks))
    reports = []
    while not reports or not reports[-1]["ready"]:
        (report,) = engine.collective_rpc("smoa_stage", args=(number("smoa-8-2"), "merged", 1.5))
        reports.append(report)
        if len(reports) == 3:  # other adapters need its slot meanwhile
            assert_own_answers(engine, solo, adapters, [(name, 0) for name in ("smoa-6-4", "hira-4", "lora-8")])
    finished = [report["finished"] for report in reports[4:]]
    assert finished == sorted(finished)
    assert set(finished) == set(range(reports[-1]["layers"] + 1))
    assert engine.collective_rpc("smoa_undo", args=(number("smoa-8-2"),)) == [{}]
    assert_own_answers(engine, solo, adapters, [("smoa-8-2", 0), (None, 0)])


def test_an_adapter_read_while_another_is_merged_gets_the_original_blocks(engine, solo, adapters):
    """Its blocks of W are read at that time, and the layer serves another weight."""
    stage(engine, "smoa-8-2")
    assert "raised" not in commit(engine, "smoa-8-2")
    try:
        for name in ("hira-4", "smoa-6-4"):
            engine.collective_rpc(_forget_partitions)
            assert_own_answers(engine, solo, adapters, [(name, 1), (None, 0), ("smoa-8-2", 2)])
    finally:
        assert engine.collective_rpc("smoa_undo", args=(number("smoa-8-2"),)) == [{}]


def _forget_partitions(worker: Any) -> None:
    """Empty every slot and drop every block that no slot uses."""
    manager = worker.model_runner.lora_manager._adapter_manager
    for layer in manager.mover.layers.values():
        for slot in range(manager.lora_slots):
            layer.reset_lora(slot)
        for cache in layer.smoa_bank._source._caches:
            for digest in [digest for digest, held in cache._held.items() if held.users == 0]:
                del cache._held[digest]
    for lora_id in list(manager._active_adapters.cache):
        manager.deactivate_adapter(lora_id)


def test_resident_blocks_serve_and_go_with_the_slot(engine, solo, adapters):
    stage(engine, "smoa-6-4", "resident", 0.001)
    assert commit(engine, "smoa-6-4", "resident")["bytes"] > 0
    (status,) = engine.collective_rpc("smoa_status")
    assert status["residence"][str(number("smoa-6-4"))] == "resident"
    assert status["resident_bytes"][str(number("smoa-6-4"))] > 0
    assert_own_answers(engine, solo, adapters, [("smoa-6-4", 0), ("smoa-6-4", 2), (None, 1), ("hira-4", 1)])
    assert engine.collective_rpc("smoa_undo", args=(number("smoa-6-4"),)) == [{}]
    assert residence(engine)[str(number("smoa-6-4"))] == "slot"
    stage(engine, "smoa-6-4", "resident")
    assert "raised" not in commit(engine, "smoa-6-4", "resident")
    assert_own_answers(engine, solo, adapters, [("smoa-8-2", 0), ("hira-4", 1), ("lora-8", 1)])  # take all three slots
    assert residence(engine)[str(number("smoa-6-4"))] == "host"
    assert_own_answers(engine, solo, adapters, [("smoa-6-4", 0)])


def test_what_cannot_be_merged_is_refused(engine, solo, adapters):
    def refused(name_or_number: Any, target: str = "merged") -> list[str]:
        lora_id = number(name_or_number) if isinstance(name_or_number, str) else name_or_number
        (report,) = engine.collective_rpc("smoa_stage", args=(lora_id, target, 1.0))
        reasons: list[str] = report["refused"]
        return reasons

    for target in ("merged", "resident"):
        assert refused("lora-8", target) == ["only SMoA and HiRA adapters can be moved"]
        assert refused(99, target) == ["it is not in the engine"]
    assert "the adapter is not staged yet" in commit(engine, "smoa-8-2")["raised"]
    stage(engine, "smoa-8-2")
    assert "raised" not in commit(engine, "smoa-8-2")
    assert refused("hira-4") == ["another adapter is merged; un-merge it first"]
    assert engine.collective_rpc("smoa_undo", args=(number("smoa-8-2"),)) == [{}]
    assert_own_answers(engine, solo, adapters, [("smoa-8-2", 0)])


def test_tokens_are_counted_by_adapter(engine, solo, adapters):
    (before,) = engine.collective_rpc("smoa_status")
    ask(engine, [("smoa-8-2", 0), (None, 1), ("smoa-8-2", 2), ("lora-8", 1)], adapters)
    (after,) = engine.collective_rpc("smoa_status")
    # A prompt's tokens and all but the last generated one pass through the model.
    passed = {"smoa-8-2": (0, 2), "lora-8": (1,)}
    for name, asked in passed.items():
        expected = sum(len(PROMPTS[index]) + TOKENS - 1 for index in asked)
        assert after["tokens"][str(number(name))] - before["tokens"][str(number(name))] == expected
    assert after["tokens"]["0"] - before["tokens"]["0"] >= len(PROMPTS[1]) + TOKENS - 1
    assert after["steps"] - before["steps"] >= TOKENS


def test_a_thousand_cycles_leave_the_weights_as_they_were(engine, solo, adapters, request):
    """Requests run all the time; after each un-merge the worker compares every weight's checksum with the first one."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    cycles_wanted = 1000 if request.node.callspec.params["engine"] == "packed" else 100
    core, rng = engine.llm_engine, random.Random(5)
    running: dict[str, tuple[str | None, int]] = {}
    answered = cycles = 0
    merged: str | None = None
    settings = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    names = [None, *ADAPTERS]
    while cycles < cycles_wanted or running:
        while len(running) < 4 and cycles < cycles_wanted:
            key = (rng.choice(names), rng.randrange(len(PROMPTS)))
            request_id = f"cycle-{answered}-{len(running)}-{rng.random()}"
            lora = key[0] and LoRARequest(key[0], number(key[0]), str(adapters[key[0]]))
            core.add_request(request_id, {"prompt_token_ids": PROMPTS[key[1]]}, settings, lora_request=lora)
            running[request_id] = key
        if cycles < cycles_wanted:
            if merged is None:
                merged = rng.choice(MERGEABLE)
                stage(engine, merged)
                assert "raised" not in commit(engine, merged, policy=rng.choice(["compensate", "exclusive"]))
            else:
                assert engine.collective_rpc("smoa_undo", args=(number(merged),)) == [{}]
                merged, cycles = None, cycles + 1
        for output in core.step():
            if output.finished:
                key = running.pop(next(name for name in running if output.request_id.startswith(name)))
                assert list(output.outputs[0].token_ids) == list(solo[key].token_ids)[:8], (cycles, merged, key)
                answered += 1
    assert answered > cycles_wanted / 2


def test_layers_that_cannot_be_merged_are_named_once_per_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from smoa_serve.engine import merging

    reasons = iter(["it is packed", "it is quantized", "it is packed", "it is packed"])
    monkeypatch.setattr(merging, "exchange_of", lambda layer, weight: next(reasons))
    monkeypatch.setattr(merging, "_live", lambda layer, slot: [True])
    layer: Any = SimpleNamespace(base_layer=None, smoa_weight=None)
    merger = merging.Merger({f"layer-{index}": layer for index in range(4)})
    with pytest.raises(AdapterError) as refused:
        merger.stage(1, 0)
    words = str(refused.value)
    assert "layer-0 and 2 more layers cannot be merged: it is packed" in words
    assert "layer-1 cannot be merged: it is quantized" in words
    assert merger.lora_id is None


# With a tile unit: as measured at rank 4, K = 4 on two cores.
@pytest.mark.parametrize(
    ("cost", "own", "others", "merged"),
    [
        (TILES_COST, 1022, 2, True),
        (TILES_COST, 896, 128, False),
        (TILES_COST, 768, 256, False),
        (TILES_COST, 192, 64, False),
        (TILES_COST, 78, 2, False),
        (TILES_COST, 14, 2, False),
        (CPP_COST, 896, 128, True),
        (CPP_COST, 14, 2, True),
        (CPP_COST, 0, 16, False),
    ],
)
def test_a_step_beside_one_pass_runs_on_the_weights_that_take_less_time(
    cost: CostModel, own: int, others: int, merged: bool
) -> None:
    from smoa_serve.engine.merging import merged_is_cheaper

    assert merged_is_cheaper(cost, 4, own, others, adapters=True, one_pass=True) is merged


def test_a_few_tokens_stay_on_the_original_weights_where_those_of_others_are_more() -> None:
    from smoa_serve.engine.merging import merged_is_cheaper

    assert not merged_is_cheaper(CPP_COST, 4, own=2, others=14, adapters=True, one_pass=False)
    assert merged_is_cheaper(CPP_COST, 4, own=14, others=2, adapters=False, one_pass=False)
