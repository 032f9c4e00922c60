"""The benchmarks' own arithmetic, their random models, and that a missed bar is seen."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as program
from benchmarks import dense, merge, plot, policy_pairs, publish, serving, stall, traffic
from benchmarks.bars import Bar, ratio_bar
from benchmarks.fleet import Load, Repeat, Server, figures
from benchmarks.random_models import Shape, random_base, random_lora, random_smoa
from benchmarks.residence import Place
from benchmarks.setup_facts import facts
from smoa_serve.adapters import detect_kind, load_adapter
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.cli.loadgen import LoadResult, Sample

TINY = Shape("tiny", 64, 2, 2, 1, 96, 128)


def test_a_bar_is_the_median_of_paired_ratios() -> None:
    bar = ratio_bar("x", [1.0, 4.0, 9.0], [1.0, 2.0, 3.0], 2.0)
    assert (bar.figure, bar.spread, bar.reached) == (2.0, (1.0, 3.0), True)
    assert not ratio_bar("x", [1.0], [2.0], 0.51).reached
    assert bar.row()["reached"] is True
    assert "reached" in bar.line()
    assert "MISSED" in ratio_bar("x", [1.0], [2.0], 0.51).line()


def test_random_models_bind_and_are_built_once() -> None:
    base = random_base(TINY)
    written = (base / "model.safetensors").stat().st_mtime_ns
    assert random_base(TINY) == base
    assert (base / "model.safetensors").stat().st_mtime_ns == written
    checkpoint = BaseCheckpoint.open(base)
    first, second = (load_adapter(random_smoa(base, 8, 4, index), checkpoint) for index in (0, 1))
    assert len(first.modules) == 14
    assert first.max_rank == 2
    assert first.digest != second.digest
    for name, update in first.modules.items():
        assert torch.equal(update.row_block, second.modules[name].row_block)
    assert detect_kind(random_lora(base, 2, 0)) == "lora"


def test_adapters_never_lie_beside_the_base_of_the_demo(tmp_path: Path) -> None:
    demo = tmp_path / ".demo" / "base"
    shutil.copytree(random_base(TINY), demo)
    lora = random_lora(demo, 2, 0)
    assert tmp_path not in lora.parents
    assert lora.parts[-3:] == ("demo", "adapters", "lora-r2-0")


def test_the_base_loads_in_transformers() -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(random_base(TINY))
    assert model.config.num_hidden_layers == 2
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_smoa_and_lora_have_equally_many_parameters() -> None:
    base = random_base(TINY)
    checkpoint = BaseCheckpoint.open(base)
    from safetensors.torch import load_file

    lora = load_file(random_lora(base, serving.LORA_RANK, 0) / "adapter_model.safetensors")
    for rank, num_blocks in serving.CONFIGURATIONS:
        smoa = load_adapter(random_smoa(base, rank, num_blocks, 0), checkpoint)
        assert smoa.num_parameters == sum(tensor.numel() for tensor in lora.values())


def test_the_dense_way_computes_the_same_delta() -> None:
    # It compares both results before it takes a time.
    bar, figures = dense.delta_bar(TINY, 8, 4, Load(16, 2, 3), repeats=1)
    assert bar.figure > 0
    assert figures["own_s"] == pytest.approx(float(str(figures["dense_s"])) / bar.figure)


def results(speed: float) -> list[Repeat]:
    return [Repeat(LoadResult((Sample("m", 64, 0.1, 1.0), Sample("m", 64, 0.2, 1.0)), 128 / speed), 1.0)] * 2


def test_serving_bars_compare_what_they_name() -> None:
    speeds = {"base, vLLM alone": 100.0, "base, vLLM with LoRA": 98.0, "base, vLLM with smoa-serve": 97.5}
    speeds |= {"16 LoRA r=4": 60.0, "16 SMoA r=16 K=4": 61.0, "16 SMoA r=32 K=8": 49.0}
    bars = {bar.name: bar for bar in serving._bars({name: results(speed) for name, speed in speeds.items()})}
    assert bars["base with the plugin / vLLM alone"].figure == pytest.approx(0.975)
    assert {name for name, bar in bars.items() if not bar.reached} == {
        "16 SMoA r=32 K=8 / 16 LoRA r=4",
        "16 SMoA r=32 K=8 / base, vLLM alone",
    }


def test_stock_servers_know_nothing_of_the_plugin(tmp_path: Path) -> None:
    stock = Server("a", False, {"x": tmp_path}).process(tmp_path, tmp_path / "log", {}).command
    assert "smoa_serve.cli.app" not in stock
    assert f"x={tmp_path}" in stock
    assert "--enable-lora" not in Server("b", False, {}).process(tmp_path, tmp_path / "log", {}).command
    ours = Server("c", True, {"x": tmp_path}).process(tmp_path, tmp_path / "log", {}).command
    assert ours[1:4] == ["-m", "smoa_serve.cli.app", "serve"]


@pytest.mark.parametrize(("figure", "code"), [(1.0, 0), (0.4, 1)])
def test_the_exit_code_says_whether_a_bar_was_missed(
    figure: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bars = [Bar("thing", figure, 0.5, (figure, figure))]
    monkeypatch.setattr(serving, "run", lambda quick: ([{"kind": "serving", "tokens_per_s": 1.0}], bars))
    monkeypatch.setattr(program, "RESULTS", tmp_path / "results")
    file = tmp_path / "out.jsonl"
    assert program.main(["serving", "--quick", "--json", str(file)]) == code
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["serving", "bar"]
    assert all(line["quick"] is True and set(facts()) <= set(line) for line in lines)
    assert len(list((tmp_path / "results").iterdir())) == 1
    assert "thing" in capsys.readouterr().out


def test_rows_and_table_hold_every_variant(tmp_path: Path) -> None:
    found = {"base, vLLM alone": results(10.0), "16 LoRA r=4": results(5.0)}
    rows = serving._rows("tiny", serving.QUICK, found)
    assert [(row["variant"], row["tokens_per_s"], row["cpu_s"]) for row in rows] == [
        ("base, vLLM alone", 10.0, [1.0, 1.0]),
        ("16 LoRA r=4", 5.0, [1.0, 1.0]),
    ]
    assert serving._table("tiny", serving.QUICK, found).row_count == 2
    plot.draw([{**row, **facts()} for row in rows], tmp_path / "x" / "plot.png")
    assert (tmp_path / "x" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_result_is_published_between_the_markers(tmp_path: Path) -> None:
    found = {"base, vLLM alone": results(10.0), "16 LoRA r=4": results(5.0)}
    rows = serving._rows("tiny", serving.QUICK, found)
    rows += [{"kind": "delta", "rank": 16, "num_blocks": 4, "own_s": 1.0, "dense_s": 20.0}]
    rows += [Bar("thing", 0.4, 0.5, (0.3, 0.6)).row()]
    result = tmp_path / "result.jsonl"
    result.write_text(
        "".join(
            json.dumps({"what": "serving", "time": "2026-01-02T03:04:05", "busy_before": 0.5, **facts(), **row}) + "\n"
            for row in rows
        )
    )
    (tmp_path / "docs").mkdir()
    for name, file in (("serving", tmp_path / "docs" / "performance.md"), ("results", tmp_path / "README.md")):
        file.write_text(f"before\n<!-- {name}:begin -->\nold\n<!-- {name}:end -->\nafter\n")
    for _ in range(2):
        assert publish.main([str(result), "--root", str(tmp_path)]) == 0
    text = (tmp_path / "docs" / "performance.md").read_text()
    assert "old" not in text
    assert "others used 50% of the cores before the start" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| thing | 0.50 | 0.40 | 0.30 to 0.60 | **no** |" in text
    assert "| base, vLLM alone | 10.0 |" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="no markers"):
        publish.replace_section(tmp_path / "README.md", "results", "x")


def test_traffic_has_the_shares_it_names() -> None:
    asked = traffic.HOT_90.adapters(30, 64, seed=3)
    assert asked.count(0) == 27
    assert len(set(asked)) == 4  # the others in turn
    assert asked == traffic.HOT_90.adapters(30, 64, seed=3) != sorted(asked)
    assert set(traffic.ALONE.adapters(5, 64, seed=1)) == {0}
    drawn = traffic.ZIPF.adapters(20_000, 64, seed=1)
    assert drawn.count(0) == pytest.approx(2 * drawn.count(1), rel=0.1)
    assert set(drawn) == set(range(64))


def test_merge_bars_compare_what_they_name() -> None:
    speed = {merge.BASE_ONLY: 100.0, "slot": 60.0, "resident": 80.0, "merged, compensate": 93.5}
    speed |= {"merged, exclusive": 70.0, merge.LORA: 30.0}
    found = {(traffic.name, variant): results(speed[variant]) for traffic, variant in merge._cases(merge.QUICK)}
    alone, hot = merge._pair_bars(found)
    assert (alone.name, alone.reached) == ("hot adapter alone, merged, compensate / base only", False)
    assert (hot.name, hot.reached) == ("90% hot, merged, compensate / base only", True)
    assert merge._best(found, traffic.HOT_90) == "merged, compensate"


def test_pairs_are_back_to_back_in_both_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def ask(servers: object, plan: object, traffic: object, variant: str, seed: int) -> Repeat:
        asked.append((variant, seed))
        return results(1.0)[0]

    monkeypatch.setattr(merge, "_ask", ask)
    monkeypatch.setattr(merge, "on_gpu", lambda: False)
    moves: list[str] = []
    pairs = merge._pairs({}, SimpleNamespace(bring=moves.append), merge.QUICK, Console(quiet=True))  # type: ignore[arg-type]
    base, merged = merge.BASE_ONLY, "merged, compensate"
    assert asked[:5] == [(base, 1), (merged, 1), (merged, 2), (base, 2), (base, 3)]
    assert moves == ["merged, compensate"] * 2
    assert {len(found) for found in pairs.values()} == {merge.QUICK.pairs}


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

    def ask(server: int, _: object, seed: int) -> Repeat:
        happened.append(f"{'ab'[server]}{seed}")
        return results(90.0 if happened[-1] in ("a1", "a2", "b3", "b4") else 100.0)[0]

    rest = policy_pairs.Settled("Zipf(1.0)", 9.0, True, [], "slot")
    monkeypatch.setattr(policy_pairs, "settle", lambda *_: rest)
    hots: Any = [Adapter("a"), Adapter("b")]
    best = {traffic.ZIPF: Place.RESIDENT}
    found, settled = policy_pairs.policy_pairs(hots, best, ask, 4, 90.0, Console(quiet=True))
    assert happened[:4] == ["b resident", "a merged, compensate", "a begins", "a1"]
    assert happened[3:8] == ["a1", "b1", "b2", "a2", "a ends"]
    assert happened[8:] == ["a resident", "b merged, compensate", "b begins", "b3", "a3", "a4", "b4", "b ends"]
    assert settled == [rest, rest]
    (bar,) = merge._policy_bars(found)
    assert (bar.name, bar.figure, bar.reached) == (
        "Zipf(1.0), automatic policy / best fixed choice (resident)", 0.9, False,
    )  # fmt: skip
    assert len(found[traffic.ZIPF].policy) == len(found[traffic.ZIPF].other) == 4


class Answers:
    """A policy's answers, one after the other."""

    def __init__(self, answers: list[dict[str, object]]) -> None:
        self._answers, self.shown = answers, "slot"

    def policy(self) -> dict[str, object]:
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def test_the_policy_has_settled_when_it_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(policy_pairs.time, "monotonic", lambda: next(clock))
    old, new = ({"action": "merge", "name": name, "result": "merged"} for name in ("old", "new"))
    answers = [
        {"decisions": [old], "moving": None},
        {"decisions": [old], "moving": "new to merged"},
        {"decisions": [new, old], "moving": None},
    ]
    sent: list[int] = []
    found = policy_pairs.settle(Answers(answers), traffic.ZIPF, sent.append, 90.0)  # type: ignore[arg-type]
    assert (found.settled, found.moves, found.hot) == (True, ["merge new: merged"], "slot")
    assert (found.seconds, sent) == (20, [1000, 1001, 1002, 1003, 1004])
    restless = [{"decisions": [], "moving": "x to merged"}]
    assert not policy_pairs.settle(Answers(restless), traffic.ZIPF, sent.append, 90.0).settled  # type: ignore[arg-type]


def test_stalls_are_counted_in_usual_steps() -> None:
    gaps = [(0.0, 0.02), (0.02, 0.04), (0.04, 0.1), (0.1, 0.12)]
    assert stall._longest(gaps, (0.05, 0.06)) == pytest.approx(60)
    assert stall._longest(gaps, (0.03, 0.035)) == pytest.approx(20)
    assert stall.Stalls(20.0, 21.0, [60.0], [20.0], [1.0]).steps([60.0]) == [2.0]


def test_a_merge_result_is_published(tmp_path: Path) -> None:
    shared = {"what": "merge", "time": "2026-01-02T03:04:05", "busy_before": 0.0, "model": "m", **facts()}
    load = {"load": {"streams": 1, "input_tokens": 2, "output_tokens": 3}, "requests_sent": 4}
    parity = {"place": "slot", "asked": "base", "largest": 0.5, "mean": 0.25, "best_agree": 0.5}
    lines: list[dict[str, object]] = [
        {"kind": "merging", "traffic": "90% hot", "variant": "slot", **load, **figures(results(10.0))},
        {"kind": "pairs", "traffic": "90% hot", "variant": "automatic policy", "beside": "slot", **load,
         **figures(results(11.0))},
        {"kind": "stall", "streams": 1, "usual_ms": 9.0, "usual_longest_ms": 12.0, "merge_ms": [20.0, 30.0, 25.0],
         "unmerge_ms": [11.0], "seconds": [1.5]},
        {"kind": "parity", **parity, "lost": 0.01, "largest_logprob_difference": 0.02, "tokens_agree": True},
        {"kind": "policy", "traffic": "90% hot", "seconds": 12.3, "settled": True, "moves": ["a", "b"], "hot": "slot"},
        {"kind": "policy", "traffic": "90% hot", "seconds": 90.0, "settled": False, "moves": [], "hot": "merged"},
        Bar("stall", 1.5, None, (1.0, 2.0), 2.0).row(),
    ]  # fmt: skip
    result = tmp_path / "result.jsonl"
    result.write_text("".join(json.dumps(shared | line) + "\n" for line in lines))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "performance.md").write_text("<!-- merging:begin -->\nold\n<!-- merging:end -->\n")
    assert publish.main([str(result), "--root", str(tmp_path)]) == 0
    text = (tmp_path / "docs" / "performance.md").read_text()
    assert "| 90% hot | slot | 10.0 |" in text
    assert "| 90% hot | automatic policy | slot | 11.0 |" in text
    assert "| 1 | 9.0 | 12.0 | 25.0 (20.0 to 30.0) | 11.0 (11.0 to 11.0) | 1.5 s |" in text
    assert "removes 1.0% of the update" in text
    assert "| 90% hot | 12 s, 90 s (not) | slot, merged | 2, 0 |" in text
    assert "| stall | at most 2.00 | 1.50 |" in text


def test_a_result_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.jsonl"
    result.write_text('{"what": "kernels"}\n')
    with pytest.raises(SystemExit):
        publish.main([str(result), "--root", str(tmp_path)])
    assert "is a result of 'kernels'; allowed are serving and merge" in capsys.readouterr().err


def test_the_documents_have_the_markers() -> None:
    root = Path(__file__).resolve().parents[2]
    assert {"<!-- serving:end -->", "<!-- merging:end -->"} <= set(
        (root / "docs" / "performance.md").read_text().split("\n")
    )
    assert "<!-- results:end -->" in (root / "README.md").read_text()
