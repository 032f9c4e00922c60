"""An adapter that cannot be brought into a slot fails its own requests; everybody else's go on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

PROMPT = [
    5,
    9,
    40,
    3,
    17,
    88,
    2,
    61,
    33,
    9,
    10,
    4,
    7,
    21,
    90,
    12,
    44,
    6,
    71,
    80,
    5,
    3,
    2,
    1,
    8,
    6,
    4,
    100,
    20,
    30,
    40,
    50,
    60,
]
# A step must not need more than this many adapters; four for two slots.
ADAPTERS = {"a": ("smoa", (4, 4)), "b": ("smoa", (2, 2)), "c": ("hira", (4,)), "d": ("lora", (8,))}


@pytest.fixture(scope="module")
def adapters(vectors: Path, makers: Any, tmp_path_factory: Any) -> dict[str, Path]:
    made: dict[str, Path] = makers.make_adapters(
        vectors / "e2e/tiny-llama/base", tmp_path_factory.mktemp("adapters"), ADAPTERS
    )
    return made


@pytest.fixture(scope="module")
def packed_by_onednn() -> Any:
    """Called, vLLM packs small weights as it packs large ones, on every processor: others cannot be exchanged."""
    from vllm.model_executor.layers import utils

    with pytest.MonkeyPatch.context() as patch:
        yield lambda: patch.setattr(utils, "check_cpu_sgl_kernel", lambda *_: False)


in_float32 = pytest.mark.parametrize("engine", ["float32"], indirect=True)
in_bfloat16 = pytest.mark.parametrize("engine", ["bfloat16"], indirect=True)


def lora(name: str | None, adapters: dict[str, Path]) -> Any:
    from vllm.lora.request import LoRARequest

    return name and LoRARequest(name, 1 + list(ADAPTERS).index(name), str(adapters[name]))


def ask(engine: Any, adapters: dict[str, Path], names: list[str | None], prompt: list[int] = PROMPT) -> list[Any]:
    from vllm import SamplingParams

    outputs = engine.generate(
        [{"prompt_token_ids": prompt}] * len(names),
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1),
        lora_request=[lora(name, adapters) for name in names],
        use_tqdm=False,
    )
    return [output.outputs[0] for output in outputs]


def logprobs(answer: Any) -> list[float]:
    return [place[token].logprob for place, token in zip(answer.logprobs, answer.token_ids, strict=True)]


@pytest.fixture(scope="module")
def engine(
    vectors: Path, in_process: Callable[..., Any], adapters: dict[str, Path], request: Any, packed_by_onednn: Any
) -> Any:
    """Of a dtype, with two slots and prefix caching."""
    arguments = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 2, "dtype": request.param}
    if request.param == "bfloat16":
        packed_by_onednn()
    with in_process(vectors / "e2e/tiny-llama/base", **arguments) as engine:
        yield engine


@in_float32
def test_requests_of_an_adapter_that_cannot_come_in_end_with_the_reason(
    engine: Any, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from smoa_serve.engine.worker import SmoaWorkerManager

    names = [None, "a", "b", "c", "d", "a", "b", None]
    engine.reset_prefix_cache()
    expected = [ask(engine, adapters, [name])[0] for name in names]
    load = SmoaWorkerManager._load_adapter

    def damaged(self: Any, lora_request: Any) -> Any:
        if lora_request.lora_name == "b":
            raise OSError(5, "Input/output error")
        return load(self, lora_request)

    ask(engine, adapters, ["c", "d"])  # a and b are neither in slots nor in host memory now
    engine.reset_prefix_cache()
    monkeypatch.setattr(SmoaWorkerManager, "_load_adapter", damaged)
    answers = ask(engine, adapters, names)
    for name, answer, wanted in zip(names, answers, expected, strict=True):
        if name == "b":
            assert (answer.finish_reason, list(answer.token_ids)) == ("error", [])
            assert "OSError: [Errno 5] Input/output error" in answer.stop_reason
        else:
            assert logprobs(answer) == pytest.approx(logprobs(wanted), abs=1e-4), name
            assert answer.finish_reason == "length"
    assert not engine.llm_engine.has_unfinished_requests()
    monkeypatch.undo()
    engine.reset_prefix_cache()
    (again,) = ask(engine, adapters, ["b"])
    assert list(again.token_ids) == list(expected[2].token_ids)


@in_float32
def test_a_request_that_runs_ends_when_its_adapter_cannot_come_back(
    engine: Any, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another adapter took its slot between two steps: vLLM's `add_lora` may at any time."""
    from vllm import SamplingParams

    from smoa_serve.engine.worker import SmoaWorkerManager

    core, settings = engine.llm_engine, SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    for name in ("a", "b"):
        core.add_request(name, {"prompt_token_ids": PROMPT}, settings, lora_request=lora(name, adapters))
    for _ in range(4):
        core.step()
    core.add_lora(lora("c", adapters))
    core.add_lora(lora("d", adapters))
    load = SmoaWorkerManager._load_adapter

    def damaged(self: Any, lora_request: Any) -> Any:
        if lora_request.lora_name == "a":
            raise OSError(5, "Input/output error")
        return load(self, lora_request)

    monkeypatch.setattr(SmoaWorkerManager, "_load_adapter", damaged)
    ended: dict[str, Any] = {}
    while core.has_unfinished_requests():
        ended |= {out.request_id.partition("-")[0]: out.outputs[0] for out in core.step() if out.finished}
    assert {name: answer.finish_reason for name, answer in ended.items()} == {"a": "error", "b": "length"}
    assert len(ended["b"].token_ids) == 32


@in_float32
def test_a_load_that_fails_on_a_worker_says_why(
    engine: Any, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smoa_serve.engine import manager as model_manager

    engine.llm_engine.remove_lora(1)
    monkeypatch.setattr(model_manager, "bind_modules", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(Exception, match=r"adapter 'a' was refused:\n  - MemoryError: no room"):
        engine.llm_engine.add_lora(lora("a", adapters))
    assert 1 not in engine.llm_engine.list_loras()


@in_bfloat16
@pytest.mark.parametrize("policy", ["compensate", "exclusive"])
def test_after_unmerging_nothing_comes_from_the_cache_that_merged_weights_left(
    engine: Any, adapters: dict[str, Path], policy: str
) -> None:
    """In bfloat16 the merged weights are rounded: keys and values of that time are not the adapter's own."""
    names = ["a", None]
    engine.reset_prefix_cache()
    expected = {name: logprobs(ask(engine, adapters, [name])[0]) for name in names}
    for name in names:  # the cache serves the same
        assert logprobs(ask(engine, adapters, [name])[0]) == pytest.approx(expected[name], abs=0.05)
    engine.reset_prefix_cache()
    while True:
        (report,) = engine.collective_rpc("smoa_stage", args=(1, "merged", 10.0))
        assert not report["refused"], report
        if report["ready"]:
            break
    assert "raised" not in engine.collective_rpc("smoa_commit", args=(1, "merged", policy))[0]
    merged = {name: logprobs(ask(engine, adapters, [name])[0]) for name in names}
    assert merged["a"] != expected["a"], "rounding shows, or this test proves nothing"
    running = start(engine, adapters, "a")
    assert engine.collective_rpc("smoa_undo", args=(1,)) == [{}]
    finish(engine, running)
    found = {name: logprobs(ask(engine, adapters, [name])[0]) for name in names}
    assert found == expected
    # What a request that began on merged weights added later is not found either.
    found = logprobs(ask(engine, adapters, ["a"], [*PROMPT, *running["tokens"]])[0])
    engine.reset_prefix_cache()
    assert found == logprobs(ask(engine, adapters, ["a"], [*PROMPT, *running["tokens"]])[0])


def start(engine: Any, adapters: dict[str, Path], name: str) -> dict[str, Any]:
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=160, ignore_eos=True)
    core = engine.llm_engine
    core.add_request("running", {"prompt_token_ids": PROMPT}, settings, lora_request=lora(name, adapters))
    for _ in range(20):
        core.step()
    return {"tokens": []}


def finish(engine: Any, running: dict[str, Any]) -> None:
    core = engine.llm_engine
    while core.has_unfinished_requests():
        for output in core.step():
            running["tokens"] = list(output.outputs[0].token_ids)


def test_over_http_such_a_request_gets_503_and_a_stream_its_error(tiny: Any) -> None:
    """The private copy is taken away while the adapter is neither in a slot nor in host memory."""
    made = tiny.make("taken-away", seed=91)
    tiny.load("taken-away", made.path).raise_for_status()
    before = tiny.ask("taken-away", PROMPT[:4])
    for name in tiny.adapters:  # six others: host memory holds six
        tiny.ask(name, PROMPT[:4])
    (copy,) = (folder for folder in store_of(tiny).iterdir() if holds(folder, made.path))
    aside = copy.with_name(f"aside-{copy.name}")
    copy.rename(aside)
    made.path.rename(made.path.with_name("aside"))
    try:
        response = tiny.server.post(
            "/v1/completions", {"model": "taken-away", "prompt": PROMPT[:4], "max_tokens": 8, "temperature": 0}
        )
        assert response.status_code in (404, 409, 503), response.text
        assert "taken-away" in response.text or "could not be brought into a slot" in response.text
        for name in tiny.models:
            assert tiny.ask(name, [3, 1, 4]).differs(tiny.solo(name, [3, 1, 4])) is None, name
    finally:
        aside.rename(copy)
        made.path.with_name("aside").rename(made.path)
    assert tiny.ask("taken-away", PROMPT[:4]).differs(before) is None
    tiny.unload("taken-away").raise_for_status()


def store_of(tiny: Any) -> Path:
    return Path(tiny.server.log).parent / "store"


def holds(folder: Path, source: Path) -> bool:
    manifest = folder / "manifest.json"
    return manifest.is_file() and json.loads(manifest.read_text())["adapter"].get("source", "") == str(source)
