"""The OpenAI API with adapters, through the official client, against transformers on merged weights."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

pytestmark = pytest.mark.engine

PROMPT = [13, 97, 88, 114, 5, 31, 64]
TEXT = " ".join(f"t{token}" for token in PROMPT)
BASE = "base-model"
MODELS = [BASE, "smoa-r8-k2", "smoa-r16-k4", "smoa-r7-k3", "smoa-r8-k1", "hira-r4", "lora-r4"]
TOLERANCE = 1e-3
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "age": {"type": "integer", "minimum": 1, "maximum": 2}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def adapter_of(model: str) -> str | None:
    return None if model == BASE else model


@pytest.fixture(scope="module")
def client(tiny: Any) -> Any:
    return tiny.client


def all_at_once(ask: Any, models: list[str] = MODELS * 2) -> list[Any]:
    """`ask(model)` for every model, in one batch."""
    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(ask, models))


def test_the_list_of_models_shows_each_adapter_with_its_parent_and_its_path(tiny: Any, client: Any) -> None:
    cards = {card.id: card for card in client.models.list()}
    assert sorted(cards) == sorted(MODELS) == sorted(tiny.models)
    assert cards[BASE].parent is None
    for name, adapter in tiny.adapters.items():
        assert cards[name].parent == BASE
        assert cards[name].root == str(adapter.path)


@pytest.mark.parametrize("model", MODELS)
def test_a_completion_is_that_of_the_merged_weights(tiny: Any, model: str) -> None:
    answer = tiny.ask(model, PROMPT, 16)
    tokens, logprobs = tiny.reference.greedy(adapter_of(model), PROMPT, 16)
    expected = [float(row[token]) for row, token in zip(logprobs, tokens, strict=True)]
    assert answer.tokens == tokens
    assert answer.logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_every_adapter_answers_differently(tiny: Any) -> None:
    answers = {tuple(tiny.solo(model, PROMPT, 8).tokens) for model in MODELS}
    assert len(answers) == len(MODELS)


def test_one_batch_with_every_adapter_gives_each_its_solo_answer(tiny: Any) -> None:
    solo = {model: tiny.solo(model, PROMPT, 32) for model in MODELS}
    for model, answer in zip(MODELS * 2, all_at_once(lambda model: tiny.ask(model, PROMPT, 32)), strict=True):
        assert answer.differs(solo[model]) is None


def test_a_chat_is_the_completion_of_its_rendered_messages(tiny: Any, client: Any) -> None:
    messages = [{"role": "user", "content": TEXT}]

    def ask(model: str) -> Any:
        return client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)

    for model, chat in zip(MODELS * 2, all_at_once(ask), strict=True):
        assert chat.model == model
        expected = client.completions.create(model=model, prompt=TEXT, max_tokens=8, temperature=0)
        assert expected.model == model
        assert chat.choices[0].message.content.split() == expected.choices[0].text.split()
        assert chat.usage == expected.usage


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_says_what_the_whole_answer_says(client: Any, model: str) -> None:
    settings = {"model": model, "max_tokens": 12, "temperature": 0}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    whole = client.completions.create(prompt=TEXT, logprobs=2, **settings)
    chunks = list(client.completions.create(prompt=TEXT, logprobs=2, **settings, **usage))
    assert {chunk.model for chunk in chunks} == {model}
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(part.text for part in parts) == whole.choices[0].text
    assert [lp for part in parts if part.logprobs for lp in part.logprobs.token_logprobs] == pytest.approx(
        whole.choices[0].logprobs.token_logprobs, abs=TOLERANCE
    )
    assert parts[-1].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage

    messages = [{"role": "user", "content": TEXT}]
    chat = client.chat.completions.create(messages=messages, **settings)
    chunks = list(client.chat.completions.create(messages=messages, **settings, **usage))
    assert {chunk.model for chunk in chunks} == {model}
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat.choices[0].message.content


@pytest.mark.parametrize("model", MODELS)
def test_logprobs_are_those_of_the_merged_weights(tiny: Any, client: Any, model: str) -> None:
    tokens, expected = tiny.reference.greedy(adapter_of(model), PROMPT, 6)
    extra = {"ignore_eos": True, "return_tokens_as_token_ids": True}
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=5, extra_body=extra
    )
    found = answer.choices[0].logprobs
    assert [f"token_id:{token}" for token in tokens] == found.tokens
    for top, row in zip(found.top_logprobs, expected, strict=True):
        best = row.topk(5)
        assert sorted(top.values(), reverse=True) == pytest.approx(best.values.tolist(), abs=TOLERANCE)
        assert all(value == pytest.approx(float(row[int(key[9:])]), abs=TOLERANCE) for key, value in top.items())


def test_prompt_logprobs_of_adapters_in_one_batch_are_those_of_the_merged_weights(tiny: Any, client: Any) -> None:
    def ask(model: str) -> Any:
        return client.completions.create(
            model=model, prompt=PROMPT, max_tokens=4, temperature=0, extra_body={"prompt_logprobs": 1}
        )

    for model, answer in zip(MODELS * 2, all_at_once(ask), strict=True):
        rows = tiny.reference.logprobs(adapter_of(model), PROMPT)
        expected = [float(rows[place, token]) for place, token in enumerate(PROMPT[1:])]
        given = answer.choices[0].prompt_logprobs
        assert given[0] is None
        found = [place[str(token)]["logprob"] for place, token in zip(given[1:], PROMPT[1:], strict=True)]
        assert found == pytest.approx(expected, abs=TOLERANCE)


def test_echo_repeats_the_prompt_with_the_logprobs_of_the_merged_weights(tiny: Any, client: Any) -> None:
    def ask(model: str) -> Any:
        extra = {"ignore_eos": True, "return_tokens_as_token_ids": True}
        return client.completions.create(
            model=model, prompt=PROMPT, max_tokens=4, temperature=0, echo=True, logprobs=1, extra_body=extra
        )

    for model, answer in zip(MODELS * 2, all_at_once(ask), strict=True):
        tokens = PROMPT + tiny.reference.greedy(adapter_of(model), PROMPT, 4)[0]
        rows = tiny.reference.logprobs(adapter_of(model), tokens)
        found = answer.choices[0].logprobs
        assert found.tokens == [f"token_id:{token}" for token in tokens]
        assert found.token_logprobs[0] is None
        expected = [float(rows[place, token]) for place, token in enumerate(tokens[1:])]
        assert found.token_logprobs[1:] == pytest.approx(expected, abs=TOLERANCE)


def test_n_answers_with_a_seed_come_again(client: Any) -> None:
    def ask(model: str) -> list[str]:
        answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, n=3, seed=7, temperature=2)
        assert answer.model == model
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    alone = {model: ask(model) for model in MODELS}
    assert all(len(set(texts)) == 3 for texts in alone.values())
    for model, texts in zip(MODELS * 2, all_at_once(ask), strict=True):
        assert texts == alone[model]


@pytest.mark.parametrize("model", MODELS)
def test_stop_ends_the_answer_before_the_word(client: Any, model: str) -> None:
    settings = {"model": model, "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
    text = client.completions.create(prompt=PROMPT, **settings).choices[0].text
    # The word that comes first as late as possible.
    stop = max((f" {word}" for word in text.split()), key=text.index)
    answer = client.completions.create(prompt=PROMPT, stop=[stop], **settings).choices[0]
    assert text.index(stop) > 0
    assert answer.finish_reason == "stop"
    assert answer.text == text[: text.index(stop)]


def test_a_json_schema_holds_for_every_adapter_of_a_batch(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}

    def ask(model: str) -> str:
        chat = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": TEXT}],
            max_tokens=40,
            temperature=0,
            response_format=form,
        )
        assert chat.choices[0].finish_reason == "stop"
        return str(chat.choices[0].message.content)

    alone = {model: ask(model) for model in MODELS}
    for text in alone.values():
        person = json.loads(text)
        assert set(person) == {"name", "age"}
        assert person["name"] in {"ann", "bob"}
        assert person["age"] in {1, 2}
    assert len(set(alone.values())) > 1
    for model, text in zip(MODELS * 2, all_at_once(ask), strict=True):
        assert text == alone[model]


def test_a_choice_is_the_likeliest_one_of_the_merged_weights(tiny: Any, client: Any) -> None:
    choices = ["t5", "t6", "t7", "t8", "t9"]

    def ask(model: str) -> str:
        answer = client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=4,
            temperature=0,
            extra_body={"structured_outputs": {"choice": choices}},
        )
        return str(answer.choices[0].text)

    for model, text in zip(MODELS * 2, all_at_once(ask), strict=True):
        row = tiny.reference.logprobs(adapter_of(model), PROMPT)[-1]
        assert text.strip() == max(choices, key=lambda word, row=row: float(row[int(word[1:])]))


@pytest.mark.parametrize("name", ["unknown", "smoa-r8-k2@0123456789abcdef", "Base-Model"])
def test_an_unknown_adapter_is_a_404_that_names_it(client: Any, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match=re.escape(name)):
        client.completions.create(model=name, prompt=PROMPT, max_tokens=1)
    with pytest.raises(openai.NotFoundError, match=re.escape(name)):
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": TEXT}], max_tokens=1)


def test_the_name_that_the_engine_uses_is_no_model(tiny: Any, client: Any) -> None:
    digest = tiny.server.adapters()["smoa-r8-k2"]["digest"]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=f"smoa-r8-k2@{digest[:16]}", prompt=PROMPT, max_tokens=1)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/smoa/adapters"])
@pytest.mark.parametrize("key", [None, "wrong"])
def test_without_the_api_key_nothing_is_told(tiny: Any, path: str, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    response = httpx.get(f"{tiny.server.url}{path}", headers=headers)
    assert response.status_code == 401
    assert "smoa-r8" not in response.text


def test_the_adapters_route_tells_what_was_loaded(tiny: Any) -> None:
    found = tiny.server.adapters()
    assert set(tiny.adapters) <= set(found)
    for name, adapter in tiny.adapters.items():
        entry = found[name]
        assert (entry["kind"], entry["rank"], entry["num_blocks"]) == (adapter.kind, adapter.rank, adapter.num_blocks)
        assert entry["path"] == str(adapter.path)
        assert re.fullmatch("[0-9a-f]{64}", entry["digest"])
        assert entry["order"] == {"smoa": "recorded", "hira": "not-needed", "lora": None}[adapter.kind]
        assert entry["order_error"] == 0
        assert entry["max_rank"] == -(-adapter.rank // adapter.num_blocks)
        assert entry["residence"] in {"slot", "host", "stored"}
        sides = sum(sum(delta.shape) for delta in adapter.deltas.values())
        assert entry["bytes"] == sides * (4 * entry["max_rank"] + (0 if adapter.kind == "lora" else 2))
        if adapter.num_blocks == 1:
            assert entry["parameters"] == adapter.rank * sides
    assert sum(entry["residence"] == "slot" for entry in found.values()) <= 4


def test_requests_are_counted_per_adapter(tiny: Any, client: Any) -> None:
    before = {name: entry["requests"] for name, entry in tiny.server.adapters().items()}
    for _ in range(3):
        tiny.ask("smoa-r7-k3", PROMPT, 1)
    client.completions.create(model="lora-r4", prompt=[PROMPT, PROMPT], max_tokens=1)
    tiny.ask(BASE, PROMPT, 1)
    after = {name: entry["requests"] for name, entry in tiny.server.adapters().items()}
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert grown == {"smoa-r7-k3": 3, "lora-r4": 2}
