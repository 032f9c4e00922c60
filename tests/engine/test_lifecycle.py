"""Adapters loaded, unloaded and replaced on a server that is being used."""

import asyncio
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

pytestmark = pytest.mark.engine

BASE = "base-model"
PROMPT = [13, 97, 88, 114, 5, 31, 64]
LONG_PROMPT = [3 + (7 * place) % 100 for place in range(200)]
LONG = 16000  # no stream is over before its test is, however busy the machine
DRAIN_LIMIT_S = 120


class Stream:
    """A greedy completion that runs in a thread of its own until `end` is called. It has begun when this is made."""

    def __init__(self, tiny: Any, model: str) -> None:
        self._client = tiny.client
        self._settings = tiny.stream_settings(model, PROMPT, LONG)
        self._parts = tiny.parts(model)
        self._begun = threading.Event()
        self._enough = LONG
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._begun.wait(60)

    def end(self, more: int = 20) -> Any:
        """Read `more` tokens that are made from now on, hang up, and return the answer up to there."""
        assert self._thread.is_alive() or self._failure, "the stream was over before it could show anything"
        self._enough = len(self._parts.answer.tokens) + more
        self._thread.join(120)
        if self._failure is not None:
            raise self._failure
        return self._parts.answer

    def _run(self) -> None:
        try:
            with self._client.completions.create(**self._settings) as chunks:
                for chunk in chunks:
                    self._parts.add(chunk)
                    self._begun.set()
                    if len(self._parts.answer.tokens) >= self._enough:
                        break
        except Exception as error:
            self._failure = error
        finally:
            self._begun.set()


@contextmanager
def loaded(tiny: Any, **names: Any) -> Iterator[None]:
    """Adapters for the length of a block."""
    try:
        for name, adapter in names.items():
            tiny.load(name, adapter.path).raise_for_status()
        yield
    finally:
        for name in names:
            tiny.unload(name)


@pytest.fixture(scope="module")
def contents(tiny: Any) -> list[Any]:
    """Two adapters of one shape, for one name."""
    return [tiny.make("content-0", seed=100), tiny.make("content-1", seed=101)]


class Expected:
    """What each of the two contents answers alone, under a name of its own, as many tokens as are asked for."""

    def __init__(self, tiny: Any, contents: list[Any]) -> None:
        self._tiny, self._contents = tiny, contents
        self._known: dict[tuple[int, tuple[int, ...]], Any] = {}

    def __call__(self, index: int, count: int, prompt: Sequence[int] = PROMPT) -> Any:
        key = (index, tuple(prompt))
        if key not in self._known or len(self._known[key].tokens) < count:
            with loaded(self._tiny, **{f"fresh-{index}": self._contents[index]}):
                self._known[key] = self._tiny.ask(f"fresh-{index}", prompt, count)
        return self._known[key].first(count)


@pytest.fixture(scope="module")
def expected(tiny: Any, contents: list[Any]) -> Expected:
    expected = Expected(tiny, contents)
    assert expected(0, 64).tokens[:8] != expected(1, 64).tokens[:8]
    return expected


def use_others(tiny: Any, rounds: int = 1) -> None:
    """Ask for every adapter that was loaded at start-up: more than there are slots, as many as host memory holds."""
    for _ in range(rounds):
        for model in tiny.adapters:
            assert tiny.ask(model, PROMPT, 8).differs(tiny.solo(model, PROMPT, 8)) is None


def wait_until(condition: Any) -> bool:
    deadline = time.monotonic() + DRAIN_LIMIT_S
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_new_content_under_an_old_name_answers_at_once_and_meets_no_stale_cache(
    tiny: Any, contents: list[Any], expected: Expected
) -> None:
    with loaded(tiny, changing=contents[0]):
        for current in (0, 1, 0, 1):
            tiny.load("changing", contents[current].path, load_inplace=True).raise_for_status()
            first = tiny.ask("changing", LONG_PROMPT, 8)
            hits = tiny.metric("vllm:prefix_cache_hits_total")
            again = tiny.ask("changing", LONG_PROMPT, 8)
            assert tiny.metric("vllm:prefix_cache_hits_total") > hits, "the cache was not even in play"
            assert first.differs(expected(current, 8, LONG_PROMPT)) is None
            assert again.differs(expected(current, 8, LONG_PROMPT)) is None
            assert tiny.ask("changing", PROMPT, 8).differs(expected(current, 8)) is None


def test_a_stream_finishes_on_the_content_it_began_with(tiny: Any, contents: list[Any], expected: Expected) -> None:
    with loaded(tiny, changing=contents[0]):
        stream = Stream(tiny, "changing")
        tiny.load("changing", contents[1].path, load_inplace=True).raise_for_status()
        assert tiny.ask("changing", PROMPT, 8).differs(expected(1, 8)) is None
        use_others(tiny)
        answer = stream.end()
    assert answer.differs(expected(0, len(answer.tokens))) is None


def test_content_that_comes_back_while_its_first_requests_still_run(
    tiny: Any, contents: list[Any], expected: Expected
) -> None:
    with loaded(tiny, changing=contents[0]):
        streams = [Stream(tiny, "changing")]
        tiny.load("changing", contents[1].path, load_inplace=True).raise_for_status()
        tiny.load("changing", contents[0].path, load_inplace=True).raise_for_status()
        streams.append(Stream(tiny, "changing"))
        tiny.unload("changing").raise_for_status()
        tiny.load("changing", contents[0].path).raise_for_status()
        streams.append(Stream(tiny, "changing"))
        use_others(tiny, rounds=2)
        answers = [stream.end() for stream in streams]
    for answer in answers:
        assert answer.differs(expected(0, len(answer.tokens))) is None


def test_unloading_answers_404_at_once_and_frees_the_engine_when_running_requests_are_done(
    tiny: Any, contents: list[Any], expected: Expected
) -> None:
    before = set(tiny.residence())
    tiny.load("gone", contents[0].path).raise_for_status()
    (number,) = set(tiny.residence()) - before
    stream = Stream(tiny, "gone")
    tiny.unload("gone").raise_for_status()
    with pytest.raises(openai.NotFoundError):
        tiny.ask("gone", PROMPT, 1)
    assert "gone" not in tiny.server.adapters()
    assert "gone" not in [card.id for card in tiny.client.models.list()]
    assert tiny.residence()[number] == "slot"
    answer = stream.end()
    assert wait_until(lambda: number not in tiny.residence())
    assert answer.differs(expected(0, len(answer.tokens))) is None
    assert tiny.unload("gone").status_code == 404


def test_replaced_content_leaves_the_engine(tiny: Any, contents: list[Any]) -> None:
    before = set(tiny.residence())
    with loaded(tiny, changing=contents[0]):
        (first,) = set(tiny.residence()) - before
        tiny.load("changing", contents[1].path, load_inplace=True).raise_for_status()
        assert wait_until(lambda: first not in tiny.residence())
    assert wait_until(lambda: set(tiny.residence()) <= before)


def test_loading_the_same_content_again_changes_nothing(tiny: Any, contents: list[Any]) -> None:
    copy = tiny.root / "copy-of-content-0"
    shutil.copytree(contents[0].path, copy)
    with loaded(tiny, same=contents[0]):
        tiny.ask("same", PROMPT, 1)
        entry, engine = tiny.server.adapters()["same"], tiny.residence()
        for path in (contents[0].path, copy):
            tiny.load("same", path, load_inplace=True).raise_for_status()
        assert set(tiny.residence()) == set(engine)
        again = tiny.server.adapters()["same"]
        assert (again["digest"], again["requests"]) == (entry["digest"], 1)
        refused = tiny.load("same", contents[1].path)
        assert refused.status_code == 400
        assert "load_inplace" in refused.text
        assert tiny.server.adapters()["same"]["digest"] == entry["digest"]


def test_two_names_may_mean_the_same_content(tiny: Any, contents: list[Any], expected: Expected) -> None:
    with loaded(tiny, twin=contents[0]):
        with loaded(tiny, other=contents[0]), ThreadPoolExecutor(8) as pool:
            asked = ["twin", "other"] * 4
            for answer in pool.map(lambda name: tiny.ask(name, PROMPT, 16), asked):
                assert answer.differs(expected(0, 16)) is None
            found = tiny.server.adapters()
            assert found["twin"]["digest"] == found["other"]["digest"]
            assert (found["twin"]["requests"], found["other"]["requests"]) == (4, 4)
        assert tiny.ask("twin", PROMPT, 8).differs(expected(0, 8)) is None


def test_an_adapter_whose_files_are_gone_comes_back_from_eviction(tiny: Any) -> None:
    orphan = tiny.make("orphan", seed=102)
    lora = tiny.root / "orphan-lora"
    shutil.copytree(tiny.adapters["lora-r4"].path, lora)
    tiny.load("orphan", orphan.path).raise_for_status()
    tiny.load("orphan-lora", lora).raise_for_status()
    try:
        alone = tiny.ask("orphan", PROMPT, 8)
        shutil.rmtree(orphan.path)
        shutil.rmtree(lora)
        use_others(tiny)
        found = tiny.server.adapters()
        assert (found["orphan"]["residence"], found["orphan-lora"]["residence"]) == ("stored", "stored")
        assert tiny.ask("orphan", PROMPT, 8).differs(alone) is None
        assert tiny.ask("orphan-lora", PROMPT, 8).differs(tiny.solo("lora-r4", PROMPT, 8)) is None
    finally:
        tiny.unload("orphan")
        tiny.unload("orphan-lora")


def test_a_load_takes_no_slot_from_a_running_request(tiny: Any, contents: list[Any]) -> None:
    streams = {model: Stream(tiny, model) for model in list(tiny.adapters)[:4]}
    with loaded(tiny, **{f"extra-{index}": contents[index % 2] for index in range(4)}):
        answers = {model: stream.end() for model, stream in streams.items()}
    for model, answer in answers.items():
        assert answer.differs(tiny.solo(model, PROMPT, len(answer.tokens))) is None


def test_requests_are_counted_per_content(tiny: Any, contents: list[Any]) -> None:
    with loaded(tiny, counted=contents[0]):
        for _ in range(3):
            tiny.ask("counted", PROMPT, 1)
        assert tiny.server.adapters()["counted"]["requests"] == 3
        tiny.load("counted", contents[1].path, load_inplace=True).raise_for_status()
        assert tiny.server.adapters()["counted"]["requests"] == 0
        tiny.ask("counted", PROMPT, 1)
        assert tiny.server.adapters()["counted"]["requests"] == 1


def test_of_two_loads_of_one_name_at_once_one_wins(tiny: Any, contents: list[Any]) -> None:
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda adapter: tiny.load("raced", adapter.path), contents))
    tiny.unload("raced").raise_for_status()
    assert sorted(answer.status_code for answer in answers) == [200, 400]


REQUESTS, CHANGES, WORKERS, TOKENS = 500, 10, 16, (2, 8, 20)  # at least so many requests and changes
PROMPTS = [[10 * line + place for place in range(3, 3 + length)] for line, length in enumerate((4, 9, 17, 40))]


class Traffic:
    """Streams for every name that is loaded, while a second task loads, unloads and replaces adapters.

    Args:
        tiny: the server.
        contents: what the name "changing" means in turn.
        answers: (name or index into contents, index into PROMPTS) -> the solo answer.
    """

    def __init__(self, tiny: Any, contents: list[Any], answers: dict[tuple[Any, int], Any]) -> None:
        self._tiny, self._contents, self._answers = tiny, contents, answers
        self._askable = {BASE, *tiny.adapters, "changing"}
        self._possible = {0}  # what "changing" may mean to a request sent now
        self._unbegun: Counter[str] = Counter()  # name -> requests sent that may not have been looked up yet
        self._sent = 0
        self._random = random.Random(0)
        self.wrong: list[str] = []
        self.answered: Counter[str] = Counter()
        self.changes = 0

    async def run(self) -> None:
        client = openai.AsyncOpenAI(base_url=f"{self._tiny.server.url}/v1", api_key="sesame", max_retries=0)
        async with client, httpx.AsyncClient(headers=self._tiny.server.headers, timeout=60) as http:
            changing = asyncio.create_task(self._change(http))
            await asyncio.gather(*(self._work(client) for _ in range(WORKERS)))
            await changing

    def _going(self) -> bool:
        return self._sent < REQUESTS or self.changes < CHANGES

    async def _work(self, client: Any) -> None:
        while self._going():
            self._sent += 1
            model = self._random.choice(sorted(self._askable))
            prompt, count = self._random.randrange(len(PROMPTS)), self._random.choice(TOKENS)
            meanings: set[Any] = set(self._possible) if model == "changing" else {model}
            self._unbegun[model] += 1
            pending = True

            def begun(model: str = model, meanings: set[Any] = meanings) -> None:
                nonlocal pending
                pending = False
                self._unbegun[model] -= 1
                if model == "changing":
                    meanings |= self._possible

            try:
                parts = self._tiny.parts(model)
                settings = self._tiny.stream_settings(model, PROMPTS[prompt], count)
                async for chunk in await client.completions.create(**settings):
                    parts.add(chunk)
                    if pending:
                        begun()
            except Exception as error:
                self.wrong.append(f"{model}: {error!r}")
                if pending:
                    begun()
                continue
            self.answered[model] += 1
            found = [parts.answer.differs(self._answers[meaning, prompt].first(count)) for meaning in meanings]
            if None not in found:
                self.wrong.append(f"{model}: {found}")

    async def _change(self, http: httpx.AsyncClient) -> None:
        current = 0
        while self._going():
            name = self._random.choice(sorted(self._tiny.adapters))
            self._askable.discard(name)
            while self._unbegun[name]:
                await asyncio.sleep(0.01)
            await self._post(http, "unload", {"lora_name": name})
            await self._post(http, "load", {"lora_name": name, "lora_path": str(self._tiny.adapters[name].path)})
            self._askable.add(name)

            current = 1 - current
            self._possible = {0, 1}
            new = {"lora_name": "changing", "lora_path": str(self._contents[current].path), "load_inplace": True}
            await self._post(http, "load", new)
            self._possible = {current}
            self.changes += 1
            await asyncio.sleep(0.05)

    async def _post(self, http: httpx.AsyncClient, what: str, body: dict[str, Any]) -> None:
        response = await http.post(f"{self._tiny.server.url}/v1/{what}_lora_adapter", json=body)
        if response.status_code != 200:
            self.wrong.append(f"{what} {body}: {response.status_code} {response.text}")


def test_traffic_while_adapters_come_and_go_has_no_failure_and_no_wrong_answer(tiny: Any, contents: list[Any]) -> None:
    answers: dict[tuple[Any, int], Any] = {}
    for index, prompt in enumerate(PROMPTS):
        for model in tiny.models:
            answers[model, index] = tiny.solo(model, prompt, max(TOKENS))
    for meaning, adapter in enumerate(contents):
        with loaded(tiny, **{f"fresh-{meaning}": adapter}):
            for index, prompt in enumerate(PROMPTS):
                answers[meaning, index] = tiny.ask(f"fresh-{meaning}", prompt, max(TOKENS))
    with loaded(tiny, changing=contents[0]):
        traffic = Traffic(tiny, contents, answers)
        asyncio.run(traffic.run())
        assert traffic.wrong == []
        assert traffic.answered.total() >= REQUESTS
        assert set(traffic.answered) == {BASE, "changing", *tiny.adapters}
        for model in tiny.models:
            assert tiny.ask(model, PROMPTS[0], 20).differs(answers[model, 0]) is None
    assert wait_until(lambda: len(tiny.residence()) <= len(tiny.adapters))
