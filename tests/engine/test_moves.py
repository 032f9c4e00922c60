"""Moving adapters up and down the ladder of residence over HTTP, while others are served."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from typer.testing import CliRunner

from smoa_serve.cli.app import app

pytestmark = pytest.mark.engine

PROMPT, TOKENS = [11, 42, 7, 99], 12
HOT = "smoa-r8-k2"


def move(tiny: Any, name: str, target: str, **options: Any) -> Any:
    return tiny.server.post(f"/v1/smoa/adapters/{name}/{target}", options)


def moved(tiny: Any, name: str, target: str, **options: Any) -> dict[str, Any]:
    response = move(tiny, name, target, **options)
    assert response.status_code == 200, response.text
    report: dict[str, Any] = response.json()
    return report


@contextmanager
def at(tiny: Any, name: str, target: str, **options: Any) -> Iterator[dict[str, Any]]:
    """The adapter there for a block, and in its slot afterwards."""
    try:
        yield moved(tiny, name, target, **options)
    finally:
        moved(tiny, name, "slot")


def assert_all_answer_as_before(tiny: Any) -> None:
    """Everybody's answer, asked at the same time, is his own."""
    answers: dict[str, Any] = {}

    def ask(model: str) -> None:
        answers[model] = tiny.ask(model, PROMPT, TOKENS)

    for names in (tiny.models[:4], tiny.models[4:]):
        threads = [threading.Thread(target=ask, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for model in tiny.models:
        assert answers[model].differs(tiny.solo(model, PROMPT, TOKENS)) is None, model


@pytest.fixture(autouse=True)
def _solo(tiny: Any) -> None:
    """The answers with nothing moved are known before anything is."""
    for model in tiny.models:
        tiny.solo(model, PROMPT, TOKENS)


@pytest.mark.parametrize("policy", ["compensate", "exclusive"])
def test_a_merged_adapter_and_everybody_else_answer_as_before(tiny: Any, policy: str) -> None:
    with at(tiny, HOT, "merge", policy=policy) as report:
        assert report["step"] == "merged"
        assert 0 <= report["lost"] < 1e-5
        assert report["bytes"] > 0
        shown = tiny.server.adapters()[HOT]
        assert (shown["residence"], shown["resident_bytes"]) == ("merged", report["bytes"])
        assert {card.id: card.residence for card in tiny.client.models.list() if card.parent}[HOT] == "merged"
        assert tiny.metric("smoa_adapter_step") >= 4
        assert_all_answer_as_before(tiny)
    shown = tiny.server.adapters()[HOT]
    assert shown["residence"] in ("slot", "host")  # others may need its slot
    assert shown["resident_bytes"] == 0
    assert_all_answer_as_before(tiny)


def test_a_stream_that_runs_goes_on_through_merge_and_unmerge(tiny: Any) -> None:
    expected = {model: tiny.solo(model, PROMPT, 400) for model in (HOT, "base-model", "lora-r4")}
    streams = {model: tiny.client.completions.create(**tiny.stream_settings(model, PROMPT, 400)) for model in expected}
    found: dict[str, Any] = {}

    def read(model: str) -> None:
        parts = tiny.parts(model)
        for chunk in streams[model]:
            parts.add(chunk)
        found[model] = parts.answer

    threads = [threading.Thread(target=read, args=(model,)) for model in streams]
    for thread in threads:
        thread.start()
    cycles = 0
    while all(thread.is_alive() for thread in threads):
        with at(tiny, HOT, ("merge", "resident")[cycles % 2]):
            cycles += 1
    for thread in threads:
        thread.join()
    for model, answer in found.items():
        assert answer.differs(expected[model]) is None, model
    assert cycles >= 1


def test_resident_and_merged_in_turn(tiny: Any) -> None:
    with at(tiny, HOT, "resident") as report:
        assert report["step"] == "resident"
        assert tiny.server.adapters()[HOT]["resident_bytes"] == report["bytes"] > 0
        assert_all_answer_as_before(tiny)
    with at(tiny, HOT, "merge"):
        refused = move(tiny, HOT, "resident")
        assert refused.status_code == 409
        assert "it is merged; un-merge it first" in refused.json()["error"]["message"]
        refused = move(tiny, "hira-r4", "merge")
        assert refused.status_code == 409
        assert "another adapter is merged" in refused.json()["error"]["message"]
        assert_all_answer_as_before(tiny)


def test_the_check_compares_answers_before_and_after(tiny: Any) -> None:
    with at(tiny, "hira-r4", "merge", check=True) as report:
        assert report["tokens_agree"] is True
        assert 0 < report["largest_logprob_difference"] < 1e-3


def test_a_merge_that_would_lose_too_much_is_refused_with_the_numbers(tiny: Any) -> None:
    refused = move(tiny, HOT, "merge", max_lost=1e-12)
    assert refused.status_code == 409
    message = refused.json()["error"]["message"]
    assert "rounding to the weights' dtype would remove more than 0.0% of the update" in message
    assert "would lose" in message
    assert tiny.server.adapters()[HOT]["residence"] == "slot"
    assert_all_answer_as_before(tiny)


@pytest.mark.parametrize(
    ("name", "target", "options", "status", "says"),
    [
        ("nobody", "merge", {}, 404, "no adapter of this name is served; served are: hira-r4"),
        ("lora-r4", "merge", {}, 409, "only SMoA and HiRA adapters can be moved"),
        ("lora-r4", "resident", {}, 409, "only SMoA and HiRA adapters can be moved"),
        (HOT, "merge", {"policy": "sometimes"}, 400, "compensate"),
        (HOT, "merge", {"max_lost": 2}, 400, "less than or equal to 1"),
        (HOT, "melt", {}, 400, "merge"),
    ],
)
def test_what_cannot_be_done_says_why(
    tiny: Any, name: str, target: str, options: dict[str, Any], status: int, says: str
) -> None:
    response = move(tiny, name, target, **options)
    assert response.status_code == status, response.text
    assert says in response.text


def test_new_content_under_the_name_of_a_merged_adapter(tiny: Any) -> None:
    first, second = tiny.make("first", seed=31), tiny.make("second", seed=32)
    tiny.load("swapped", first.path).raise_for_status()
    answers = [tiny.ask("swapped", PROMPT, TOKENS)]
    moved(tiny, "swapped", "merge")
    assert tiny.ask("swapped", PROMPT, TOKENS).differs(answers[0]) is None
    tiny.load("swapped", second.path, load_inplace=True).raise_for_status()
    found = tiny.ask("swapped", PROMPT, TOKENS)
    tokens, _ = fresh(tiny, second)
    assert found.tokens == tokens
    assert found.tokens != answers[0].tokens
    tiny.unload("swapped").raise_for_status()
    assert_all_answer_as_before(tiny)


def fresh(tiny: Any, adapter: Any) -> tuple[list[int], Any]:
    """The answer of content that was never merged."""
    tiny.load("fresh", adapter.path).raise_for_status()
    answer = tiny.ask("fresh", PROMPT, TOKENS)
    tiny.unload("fresh").raise_for_status()
    return answer.tokens, answer


def test_the_command_line_moves_adapters(tiny: Any) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(
            app, ["adapters", *arguments, "--url", tiny.server.url, "--api-key", tiny.server.api_key]
        )
        assert done.exit_code == 0, done.output
        return done.output

    assert f"{HOT} resides at: resident" in run("resident", HOT)
    assert f"{HOT} resides at: slot" in run("slot", HOT)
    merged = run("merge", HOT, "--policy", "exclusive", "--check")
    assert f"{HOT} resides at: merged" in merged
    assert "greedy tokens before and after agree" in merged
    assert tiny.server.adapters()[HOT]["pinned"] is True  # what is moved by hand stays there
    run("unpin", HOT)
    assert "merged" in run("pin", HOT)
    assert tiny.server.adapters()[HOT]["pinned"] is True
    run("unpin", HOT)
    assert tiny.server.adapters()[HOT]["pinned"] is False
    assert f"{HOT} resides at: slot" in run("unmerge", HOT)
    assert_all_answer_as_before(tiny)
