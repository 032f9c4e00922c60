"""Serving and merging: bars compare what they name, pairs are back to back, the policy has settled when it says so."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file

from benchmarks import hot, merge, serving
from benchmarks.harness.load import Load, Repeat, figures
from benchmarks.harness.machine import facts
from benchmarks.harness.models import Shape, random_base, random_lora, random_smoa
from benchmarks.harness.publish import page
from benchmarks.hot import Place
from smoa_serve.adapters import open_adapter
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.cli.loadgen import LoadResult, Sample
from smoa_serve.testing import ServerProcess

TINY = Shape("tiny", 64, 2, 2, 1, 96, 128)


def repeat(speed: float) -> Repeat:
    return Repeat(LoadResult((Sample("m", 64, 0.1, 1.0), Sample("m", 64, 0.2, 1.0)), 128 / speed), 1.0)


def rows_of(kind: str, speeds: dict[str, float], **more: Any) -> list[dict[str, Any]]:
    return [{"kind": kind, "variant": name, **more, **figures([repeat(speed)] * 2)} for name, speed in speeds.items()]


def test_smoa_and_lora_have_equally_many_parameters() -> None:
    base = random_base(TINY)
    checkpoint = BaseCheckpoint.open(base)
    lora = load_file(random_lora(base, serving.LORA_RANK, 0) / "adapter_model.safetensors")
    for rank, num_blocks in serving.CONFIGURATIONS:
        smoa = open_adapter(random_smoa(base, rank, num_blocks, 0)).summary(checkpoint)
        assert smoa.parameters == sum(tensor.numel() for tensor in lora.values())


def test_the_dense_way_computes_the_same_delta() -> None:
    # It passes the gate before it is timed.
    row = serving.delta_row(TINY, 8, 4, serving.Plan(TINY, Load(16, 2, 3), 1, (1,), 2, False))
    assert len(row["ratios"]) == 2
    assert min(row["ratios"]) <= row["dense_s"] / row["own_s"] * 1.5
    assert row["own_s"] > 0


def test_serving_bars_compare_what_they_name() -> None:
    speeds = {"base, vLLM alone": 100.0, "base, vLLM with LoRA": 98.0, "base, vLLM with smoa-serve": 97.5}
    speeds |= {"16 LoRA r=4": 60.0, "16 SMoA r=16 K=4": 61.0, "16 SMoA r=32 K=8": 49.0}
    rows = rows_of("serving", speeds, model="first") + rows_of("serving", dict.fromkeys(speeds, 1.0), model="second")
    rows.append({"kind": "delta", "rank": 16, "num_blocks": 4, "ratios": [9.0, 11.0, 12.0]})
    bars = {bar.name: bar for bar in serving.bars(rows)}
    assert bars["base with the plugin / vLLM alone"].figure == pytest.approx(0.975)
    assert bars["delta's own time against the dense way's, 16 adapters (r=16, K=4)"].figure == 11.0
    assert {name for name, bar in bars.items() if not bar.reached} == {
        "16 SMoA r=32 K=8 / 16 LoRA r=4",
        "16 SMoA r=32 K=8 / base, vLLM alone",
    }


def test_rows_hold_throughput_and_processor_time() -> None:
    assert figures([repeat(10.0)] * 2)["tokens_per_s"] == 10.0
    assert figures([repeat(10.0)] * 2)["cpu_s"] == [1.0, 1.0]


def test_traffic_has_the_shares_it_names() -> None:
    asked = hot.HOT_90.adapters(30, 64, seed=3)
    assert asked.count(0) == 27
    assert len(set(asked)) == 4  # the others in turn
    assert asked == hot.HOT_90.adapters(30, 64, seed=3) != sorted(asked)
    assert set(hot.ALONE.adapters(5, 64, seed=1)) == {0}
    drawn = hot.ZIPF.adapters(20_000, 64, seed=1)
    assert drawn.count(0) == pytest.approx(2 * drawn.count(1), rel=0.1)
    assert set(drawn) == set(range(64))


def test_merge_bars_compare_what_they_name() -> None:
    merged, base = "merged, compensate", merge.BASE_ONLY
    rows = rows_of("pairs", {merged: 93.5}, traffic="hot adapter alone", beside=base)
    rows += rows_of("pairs", {base: 100.0}, traffic="hot adapter alone", beside=merged)
    rows += rows_of("pairs", {merged: 93.5}, traffic="90% hot", beside=base)
    rows += rows_of("pairs", {base: 100.0}, traffic="90% hot", beside=merged)
    alone, hot_90 = merge.bars(rows)
    assert (alone.name, alone.reached) == ("hot adapter alone, merged, compensate / base only", False)
    assert (hot_90.name, hot_90.reached) == ("90% hot, merged, compensate / base only", True)


def test_the_best_fixed_choice_is_the_fastest() -> None:
    speed = {"slot": 60.0, "resident": 80.0, "merged, compensate": 93.5, "merged, exclusive": 70.0}
    found = {(hot.HOT_90, variant): [repeat(speed[variant])] for variant in speed}
    assert merge.best_place(found, hot.HOT_90) == "merged, compensate"


def test_pairs_are_back_to_back_in_both_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def ask(traffic: object, variant: str, seed: int) -> Repeat:
        asked.append((variant, seed))
        return repeat(1.0)

    monkeypatch.setattr(merge, "on_gpu", lambda: False)
    moves: list[str] = []
    pairs = list(merge.pairs(SimpleNamespace(bring=moves.append), merge.QUICK.pairs, ask))  # type: ignore[arg-type]
    base, merged = merge.BASE_ONLY, "merged, compensate"
    assert asked[:5] == [(base, 1), (merged, 1), (merged, 2), (base, 2), (base, 3)]
    assert set(moves) == {"merged, compensate"}
    assert {len(row["values"]) for row in pairs} == {merge.QUICK.pairs}


def test_policy_and_best_choice_take_turns_on_both_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Adapter:
        def __init__(self, server: str) -> None:
            self._server = server

        def bring(self, place: str) -> None:
            happened.append(f"{self._server} {place}")

        @contextmanager
        def left_to_the_policy(self) -> Iterator[None]:
            happened.append(f"{self._server} begins")
            yield
            happened.append(f"{self._server} ends")

    def server(name: str) -> merge.Ask:
        def ask(traffic: object, variant: str, seed: int) -> Repeat:
            happened.append(f"{name}{seed}")
            return repeat(90.0 if happened[-1] in ("a1", "a2", "b3", "b4") else 100.0)

        return ask

    rest = {"seconds": 9.0, "settled": True, "moves": [], "hot": "slot"}
    monkeypatch.setattr(hot, "settle", lambda *_: rest)
    hots: Any = [Adapter("a"), Adapter("b")]
    rows = list(merge.policy_pairs(hots, {hot.ZIPF: Place.RESIDENT}, [server("a"), server("b")], 4, 90.0))
    assert happened[:4] == ["b resident", "a merged, compensate", "a begins", "a1"]
    assert happened[3:8] == ["a1", "b1", "b2", "a2", "a ends"]
    assert happened[8:] == ["a resident", "b merged, compensate", "b begins", "b3", "a3", "a4", "b4", "b ends"]
    assert [row for row in rows if row["kind"] == "policy"] == [{"kind": "policy", "traffic": "Zipf(1.0)", **rest}] * 2
    policy, other = (row for row in rows if row["kind"] == "pairs")
    assert (policy["values"], other["values"]) == ([90.0] * 4, [100.0] * 4)
    monkeypatch.setattr(merge, "PAIRED", {})
    (bar,) = merge.bars(rows)
    assert (bar.name, bar.figure, bar.reached) == (
        "Zipf(1.0), automatic policy / best fixed choice (resident)", 0.9, False,
    )  # fmt: skip


def test_what_servers_answer_is_read() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        if asked.get("stream"):
            assert asked["ignore_eos"]
            lines = [{"choices": [{"index": 0, "text": "a"}]}] * 3 + [{"choices": []}]
            return httpx.Response(200, text="".join(f"data: {json.dumps(line)}\n\n" for line in lines))
        places = [
            {str(token): {"logprob": -2.0, "rank": 2}, "7": {"logprob": -1.0, "rank": 1}} for token in asked["prompt"]
        ]
        return httpx.Response(200, json={"choices": [{"index": 0, "text": "", "prompt_logprobs": [None, *places[1:]]}]})

    server = ServerProcess("base", port=1)
    client = server.client(http_client=httpx.Client(transport=httpx.MockTransport(answer)))
    assert hot.scores(client, "m") == [(-2.0, "7")] * hot.PROMPTS * (hot.PROMPT_TOKENS - 1)
    times: list[float] = []
    hot._stream(client, "m", times, 3)
    assert len(times) == 3


class Answers:
    """A policy's answers, one after the other."""

    def __init__(self, answers: list[dict[str, object]]) -> None:
        self._answers, self.shown = answers, "slot"

    def policy(self) -> dict[str, object]:
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def test_the_policy_has_settled_when_it_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(hot.time, "monotonic", lambda: next(clock))
    old, new = ({"action": "merge", "name": name, "result": "merged"} for name in ("old", "new"))
    answers = [
        {"decisions": [old], "moving": None},
        {"decisions": [old], "moving": "new to merged"},
        {"decisions": [new, old], "moving": None},
    ]
    sent: list[int] = []
    found = hot.settle(Answers(answers), sent.append, 90.0)  # type: ignore[arg-type]
    assert found == {"seconds": 20, "settled": True, "moves": ["merge new: merged"], "hot": "slot"}
    assert sent == [1000, 1001, 1002, 1003, 1004]
    restless: Any = Answers([{"decisions": [], "moving": "x to merged"}])
    assert not hot.settle(restless, sent.append, 90.0)["settled"]


def test_stalls_are_counted_in_usual_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = [(0.0, 0.02), (0.02, 0.04), (0.04, 0.1), (0.1, 0.12)]
    assert hot.longest_ms(gaps, (0.05, 0.06)) == pytest.approx(60)
    assert hot.longest_ms(gaps, (0.03, 0.035)) == pytest.approx(20)
    monkeypatch.setattr(merge, "PAIRED", {})
    row = {"kind": "stall", "streams": 1, "usual_ms": 20.0, "merge_ms": [60.0], "unmerge_ms": [20.0]}
    assert [bar.figure for bar in merge.bars([row])] == [2.0, 0.0]


def test_a_merge_result_has_its_tables() -> None:
    shared = {"what": "merge", "time": "2026-01-02T03:04:05", "busy_before": 0.0, "model": "m", **facts()}
    load = {"load": {"streams": 1, "input_tokens": 2, "output_tokens": 3}, "requests_sent": 4, "traffic": "90% hot"}
    parity = {"place": "slot", "asked": "base", "largest": 0.5, "mean": 0.25, "best_agree": 0.5}
    lines = rows_of("merging", {"slot": 10.0}, **load)
    lines += rows_of("pairs", {"automatic policy": 11.0}, beside="slot", **load)
    lines += [
        {"kind": "stall", "streams": 1, "usual_ms": 9.0, "usual_longest_ms": 12.0, "merge_ms": [20.0, 30.0, 25.0],
         "unmerge_ms": [11.0], "seconds": [1.5]},
        {"kind": "parity", **parity, "lost": 0.01, "largest_logprob_difference": 0.02, "tokens_agree": True},
        {"kind": "policy", "traffic": "90% hot", "seconds": 12.3, "settled": True, "moves": ["a", "b"], "hot": "slot"},
        {"kind": "policy", "traffic": "90% hot", "seconds": 90.0, "settled": False, "moves": [], "hot": "merged"},
    ]  # fmt: skip
    text = page("merge", [json.loads(json.dumps(shared | line)) for line in lines])
    assert "| 90% hot | slot | 10.0 |" in text
    assert "| 90% hot | automatic policy | slot | 11.0 |" in text
    assert "| 1 | 9.0 | 12.0 | 25.0 (20.0 to 30.0) | 11.0 (11.0 to 11.0) | 1.5 s |" in text
    assert "removes 1.0% of the update" in text
    assert "| 90% hot | 12 s | slot | 2 |" in text
    assert "| 90% hot | 90 s (not) | merged | 0 |" in text
