"""Faults of stock vLLM that must not be reachable with this project installed."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

PROMPT = [5, 17, 99, 3, 40]
KINDS = {"smoa": (4, 4), "lora": (8,), "hira": (4,)}


@pytest.fixture(scope="module")
def base(vectors: Path) -> Path:
    """The recorded tiny base."""
    return vectors / "e2e/tiny-llama/base"


@pytest.fixture(scope="module")
def engine(base: Path, in_process: Callable[..., Any]) -> Iterator[Any]:
    """Two slots, host memory for two adapters."""
    with in_process(base, enable_lora=True, max_loras=2, max_cpu_loras=2, max_logprobs=128) as engine:
        yield engine


@pytest.fixture
def make(base: Path, makers: Any, tmp_path: Path) -> Callable[[str, str, int], Any]:
    """Writes an adapter and gives the request for it."""

    def make_one(name: str, kind: str, number: int) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(
            name, number, str(makers.make_adapter(base, tmp_path / name, kind, KINDS[kind], seed=number))
        )

    return make_one


def ask(engine: Any, *requests: Any, tokens: int = 24, **parameters: Any) -> list[Any]:
    """Greedy answers to one batch, a request for each adapter given (None is the base)."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **parameters)
    prompts = [{"prompt_token_ids": PROMPT} for _ in requests]
    return list(engine.generate(prompts, sampling, lora_request=list(requests), use_tqdm=False))


def tokens_of(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


@pytest.mark.parametrize("kind", ["lora", "smoa"])
def test_base_tokens_never_get_the_adapter_of_the_last_slot(kind: str, engine: Any, make: Any) -> None:
    """vLLM's CPU kernels index the slots with -1 for base tokens: the last slot, once all are in use."""
    alone = tokens_of(ask(engine, None)[0])
    first, last = make(f"{kind}-first", "lora", 11), make(f"{kind}-last", kind, 12)
    for requests in ((None, first, last), (first, None, last), (last, first, None)):
        answers = ask(engine, *requests)
        assert tokens_of(answers[requests.index(None)]) == alone
        assert tokens_of(answers[requests.index(last)]) != alone


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_load_that_evicts_a_running_adapter_does_not_change_its_answer(kind: str, engine: Any, make: Any) -> None:
    """vLLM issue 47724: a run-time load takes the slot of a request in flight."""
    from vllm import SamplingParams

    running = make("running", kind, 21)
    expected = tokens_of(ask(engine, running, tokens=40)[0])
    others = [make("other-smoa", "smoa", 22), make("other-lora", "lora", 23), make("other-hira", "hira", 24)]
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    core = engine.llm_engine
    core.add_request("running", {"prompt_token_ids": PROMPT}, sampling, lora_request=running)
    outputs, step = [], 0
    while core.has_unfinished_requests():
        outputs = core.step()
        step += 1
        if step % 5 == 0:
            assert core.add_lora(others[step // 5 % len(others)])
    assert step > 30
    assert tokens_of(outputs[-1]) == expected


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_evicted_adapter_whose_files_are_gone_still_answers(kind: str, engine: Any, make: Any) -> None:
    """Stock vLLM reads the files again in the middle of a step, and the engine ends."""
    adapter = make("leaves", kind, 31)
    expected = tokens_of(ask(engine, adapter)[0])
    shutil.rmtree(adapter.lora_path)
    for number, other in enumerate(("smoa", "lora", "hira"), start=32):
        ask(engine, make(f"pushes-{other}", other, number), tokens=2)
    assert 31 not in engine.llm_engine.list_loras()
    assert tokens_of(ask(engine, adapter)[0]) == expected


def test_another_adapter_under_a_known_number_is_loaded(engine: Any, make: Any) -> None:
    """Stock vLLM goes by the number alone and answers with what was loaded first."""
    from vllm.lora.request import LoRARequest

    first, second = make("known-a", "smoa", 61), make("known-b", "hira", 61)
    alone = tokens_of(ask(engine, LoRARequest("alone", 62, second.lora_path))[0])
    assert tokens_of(ask(engine, first)[0]) != alone
    assert tokens_of(ask(engine, second)[0]) == alone


@pytest.mark.parametrize("kind", [None, "lora", "smoa"])
def test_prompt_logprobs_in_a_mixed_batch_do_not_end_the_engine(kind: str | None, engine: Any, make: Any) -> None:
    """Stock vLLM applies the adapter indices of the sampled rows to a whole prompt's logits."""
    adapter = make("asked", kind, 41) if kind else None
    alone = ask(engine, adapter, tokens=1, prompt_logprobs=3)[0].prompt_logprobs
    mixed = ask(engine, adapter, make("beside", "lora", 42), tokens=1, prompt_logprobs=3)[0].prompt_logprobs
    assert len(alone) == len(PROMPT)
    for a, b in zip(alone[1:], mixed[1:], strict=True):
        assert a.keys() == b.keys()
        assert all(abs(a[token].logprob - b[token].logprob) < 1e-4 for token in a)


def test_an_adapter_on_the_output_head_is_refused(engine: Any, base: Path, makers: Any, tmp_path: Path) -> None:
    """Its prompt logprobs could not be right, see engine/host/logits.py."""
    from vllm.lora.request import LoRARequest

    path = makers.make_adapter(base, tmp_path / "head", "lora", (4,), seed=5, targets=("lm_head",))
    with pytest.raises(Exception, match=r"output head|lm_head"):
        engine.llm_engine.add_lora(LoRARequest("head", 51, str(path)))
    assert len(tokens_of(ask(engine, None)[0])) == 24
