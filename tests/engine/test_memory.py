"""What an adapter holds goes with it; what fails in its step fails alone. On an engine in this process."""

import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

PROMPT = [5, 17, 99, 3, 40]
LONG_PROMPT = [3 + (7 * place) % 100 for place in range(200)]
KINDS = {"smoa": (4, 4), "lora": (8,), "hira": (4,)}
SLOTS, HOST = 2, 3


@pytest.fixture(scope="module")
def base(vectors: Path) -> Path:
    return vectors / "e2e/tiny-llama/base"


@pytest.fixture(scope="module")
def engine(base: Path, in_process: Callable[..., Any]) -> Iterator[Any]:
    with in_process(base, enable_lora=True, max_loras=SLOTS, max_cpu_loras=HOST, max_logprobs=128) as engine:
        yield engine


@pytest.fixture
def make(base: Path, makers: Any, tmp_path: Path, engine: Any) -> Iterator[Callable[..., Any]]:
    """Writes an adapter and gives the request for it. The engine forgets all of them after the test."""
    from vllm.lora.request import LoRARequest

    numbers = set()

    def make_one(kind: str, number: int, *, path: str | None = None, seed: int | None = None) -> Any:
        folder = tmp_path / (path or f"{kind}-{number}")
        if not folder.exists():
            makers.make_adapter(base, folder, kind, KINDS[kind], seed=number if seed is None else seed)
        numbers.add(number)
        return LoRARequest(f"{kind}-{number}", number, str(folder))

    yield make_one
    for number in numbers:
        engine.llm_engine.remove_lora(number)


def ask(engine: Any, *requests: Any, prompt: list[int] = PROMPT, tokens: int = 12) -> list[Any]:
    """Greedy answers to one batch, a request for each adapter given (None is the base)."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0)
    prompts = [{"prompt_token_ids": prompt} for _ in requests]
    answers = engine.generate(prompts, sampling, lora_request=list(requests), use_tqdm=False)
    return [answer.outputs[0] for answer in answers]


def tokens_of(answer: Any) -> list[int]:
    assert answer.finish_reason == "length", (answer.finish_reason, answer.stop_reason)
    return list(answer.token_ids)


def held(engine: Any) -> dict[str, Any]:
    """What adapters hold: by the worker's account, and what is really in the slots."""

    def look(worker: Any) -> dict[str, Any]:
        workers_manager = worker.model_runner.lora_manager
        manager = workers_manager._adapter_manager
        stacked = [
            tensor[slot]
            for module in manager.modules.values()
            for stacks in (getattr(module, "lora_a_stacked", ()), getattr(module, "lora_b_stacked", ()))
            for tensor in (stacks if isinstance(stacks, tuple) else (stacks,))
            for slot in range(tensor.shape[0])
        ]
        return {
            "in slots": sum(int(tensor.count_nonzero()) for tensor in stacked),
            "copies": dict(workers_manager._copies),
            "counted": set(manager.traffic.tokens()) - {0},
        }

    (status,) = engine.collective_rpc("smoa_status")
    (found,) = engine.collective_rpc(look)
    return found | {key: status[key] for key in ("host_bytes", "contents", "partitions", "partition_bytes")}


EMPTY = {"in slots": 0, "copies": {}, "counted": set(), "host_bytes": {}, "partitions": 0, "partition_bytes": 0}


@pytest.mark.parametrize("kind", list(KINDS))
def test_unloading_gives_back_slot_blocks_and_host_memory(kind: str, engine: Any, make: Any) -> None:
    assert held(engine) == EMPTY | {"contents": [None] * SLOTS}
    request = make(kind, 21)
    ask(engine, request)
    full = held(engine)
    assert full["contents"] == [21, None]
    assert full["in slots"] > 0
    assert full["host_bytes"]["21"] > 0
    assert (full["partitions"] > 0) == (kind != "lora")
    model = weakref.ref(engine.collective_rpc(lambda worker: _manager(worker).get_adapter(21))[0])
    assert model() is not None
    engine.llm_engine.remove_lora(21)
    assert held(engine) == EMPTY | {"contents": [None] * SLOTS}
    gc.collect()
    assert model() is None, "something still refers to the adapter"


def test_unloading_a_resident_adapter_gives_its_blocks_back(engine: Any, make: Any) -> None:
    ask(engine, make("smoa", 22))
    ready = False
    while not ready:
        (report,) = engine.collective_rpc("smoa_stage", args=(22, "resident", 1.0))
        assert not report["refused"]
        ready = report["ready"]
    engine.collective_rpc("smoa_commit", args=(22, "resident", "compensate"))
    (status,) = engine.collective_rpc("smoa_status")
    assert status["resident_bytes"]["22"] > 0
    engine.llm_engine.remove_lora(22)
    assert held(engine) == EMPTY | {"contents": [None] * SLOTS}


def test_unloading_an_evicted_adapter_drops_what_was_kept_for_it_alone(engine: Any, make: Any) -> None:
    first, *others = (make("smoa", number) for number in (23, 24, 25))
    (alone,) = ask(engine, first)
    one = held(engine)["partitions"]
    for other in others:
        ask(engine, other)
    assert 23 not in held(engine)["contents"]
    assert held(engine)["partitions"] == 3 * one, "it is in no slot, and its blocks are kept for it to come back"
    engine.llm_engine.remove_lora(23)
    left = held(engine)
    assert left["partitions"] == 2 * one
    assert set(left["host_bytes"]) == {"24", "25"}
    assert tokens_of(ask(engine, first)[0]) == tokens_of(alone)
    for number in (23, 24, 25):
        engine.llm_engine.remove_lora(number)
    assert held(engine) == EMPTY | {"contents": [None] * SLOTS}


def test_blocks_that_another_adapter_uses_stay_until_both_are_unloaded(engine: Any, make: Any, tmp_path: Path) -> None:
    first, second = make("smoa", 26, path="shared"), make("smoa", 27, path="shared")
    ask(engine, first, second)
    shared = held(engine)["partitions"]
    engine.llm_engine.remove_lora(26)
    assert held(engine)["partitions"] == shared
    engine.llm_engine.remove_lora(27)
    assert held(engine)["partitions"] == 0


def _manager(worker: Any) -> Any:
    return worker.model_runner.lora_manager._adapter_manager


def test_another_path_under_a_known_number_is_its_content_or_an_error_each_time(engine: Any, make: Any) -> None:
    """Offline, where users choose the numbers: never the old content under the new path."""
    old, new, bad = make("smoa", 31), make("smoa", 31, path="new", seed=99), make("smoa", 31, path="bad", seed=98)
    (Path(bad.lora_path) / "adapter_model.safetensors").write_bytes(b"no tensors")
    (first,) = ask(engine, old)
    for _ in range(3):
        (refused,) = ask(engine, bad)
        assert refused.finish_reason == "error"
        assert "adapter_model.safetensors" in refused.stop_reason
        assert not refused.token_ids
    assert tokens_of(ask(engine, old)[0]) == tokens_of(first), "what was loaded is not lost by it"
    (other,) = ask(engine, new)
    assert tokens_of(other) != tokens_of(first)
    for _ in range(2):
        assert tokens_of(ask(engine, old)[0]) == tokens_of(first)
        assert tokens_of(ask(engine, new)[0]) == tokens_of(other)
        (refused,) = ask(engine, bad)
        assert refused.finish_reason == "error"


def test_two_paths_under_one_number_do_not_meet_in_a_batch(engine: Any, make: Any) -> None:
    old, new = make("smoa", 32), make("smoa", 32, path="other", seed=97)
    alone = {id(request): tokens_of(ask(engine, request)[0]) for request in (old, new)}
    for pair in ((old, new), (new, old)):
        first, second = ask(engine, *pair)
        assert tokens_of(first) == alone[id(pair[0])]
        assert second.finish_reason == "error"
        assert "its number 32 is in use" in second.stop_reason


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_adapter_that_cannot_be_read_in_its_step_fails_alone(kind: str, engine: Any, make: Any) -> None:
    good, lost = make("smoa", 33), make(kind, 34)
    alone = {id(request): tokens_of(ask(engine, request)[0]) for request in (None, good)}
    shutil.rmtree(lost.lora_path)
    base, failed, other = ask(engine, None, lost, good)
    assert failed.finish_reason == "error"
    assert not failed.token_ids
    assert "no such file or folder" in failed.stop_reason
    assert (tokens_of(base), tokens_of(other)) == (alone[id(None)], alone[id(good)])
    assert tokens_of(ask(engine, good)[0]) == alone[id(good)]
    found = held(engine)
    assert 34 not in found["contents"]
    assert 34 not in found["copies"]


def test_an_adapter_that_cannot_be_put_into_a_layer_fails_alone(
    engine: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smoa_kernels import LayerBank

    good, lost = make("smoa", 35), make("smoa", 36)
    alone = tokens_of(ask(engine, good)[0])
    calls = []

    def fail_once(bank: Any, slot: int, updates: Any, put: Any = LayerBank.set) -> None:
        calls.append(slot)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory, says the test")
        put(bank, slot, updates)

    monkeypatch.setattr(LayerBank, "set", fail_once)
    failed, other = ask(engine, lost, good)
    assert failed.finish_reason == "error"
    assert "out of memory, says the test" in failed.stop_reason
    assert tokens_of(other) == alone


def test_blocks_that_a_failed_request_left_are_found_by_nobody(engine: Any, make: Any, tmp_path: Path) -> None:
    """The failed step ran without the adapter: its KV blocks would be wrong for every later request of it."""
    lost, twin = make("smoa", 37), make("smoa", 38, path="smoa-37")
    aside = tmp_path / "aside"
    Path(lost.lora_path).rename(aside)
    for _ in range(2):
        (failed,) = ask(engine, lost, prompt=LONG_PROMPT)
        assert failed.finish_reason == "error"
    aside.rename(lost.lora_path)
    (found,) = ask(engine, lost, prompt=LONG_PROMPT)
    (expected,) = ask(engine, twin, prompt=LONG_PROMPT)
    assert tokens_of(found) == tokens_of(expected)
    assert found.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-4)
    assert tokens_of(ask(engine, None, prompt=LONG_PROMPT)[0]) != tokens_of(found)


def copy_of(request: Any, engine: Any) -> Path:
    (copies,) = engine.collective_rpc(lambda worker: dict(worker.model_runner.lora_manager._copies))
    path: Path = copies[request.lora_int_id].staged.path
    return path


@pytest.mark.parametrize("harm", ["deleted", "damaged"])
def test_a_private_copy_that_was_harmed_is_made_again_from_the_same_content_only(
    harm: str, engine: Any, make: Any, makers: Any, base: Path
) -> None:
    request, others = make("smoa", 41), [make("lora", number) for number in (42, 43, 44)]
    alone = tokens_of(ask(engine, request)[0])

    def hurt() -> None:
        copy = copy_of(request, engine)
        if harm == "deleted":
            shutil.rmtree(copy)
        else:
            file = copy / "adapter_model.safetensors"
            file.write_bytes(file.read_bytes()[:-3] + b"???")
        for other in others:  # host memory holds three: it is evicted
            ask(engine, other)

    hurt()
    assert tokens_of(ask(engine, request)[0]) == alone
    hurt()
    shutil.rmtree(request.lora_path)
    makers.make_adapter(base, Path(request.lora_path), "smoa", KINDS["smoa"], seed=96)
    for _ in range(2):
        (refused,) = ask(engine, request)
        assert refused.finish_reason == "error"
        assert "other content" in refused.stop_reason
