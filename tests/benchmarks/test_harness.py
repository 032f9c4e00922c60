"""What all questions share: bars, machines, random models, servers, stored results and the pages made of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import serving
from benchmarks.harness import publish
from benchmarks.harness.bars import Bar, ratio_bar
from benchmarks.harness.machine import device_class, facts
from benchmarks.harness.markdown import limit_words, setup_line, with_section
from benchmarks.harness.models import Shape, random_base, random_lora, random_smoa
from benchmarks.harness.question import QUESTIONS, question
from benchmarks.harness.results import ROOT, newest
from benchmarks.harness.servers import Server
from smoa_serve.adapters import load_adapter, open_adapter
from smoa_serve.base.checkpoint import BaseCheckpoint

TINY = Shape("tiny", 64, 2, 2, 1, 96, 128)


def test_a_bar_is_the_median_of_paired_ratios() -> None:
    bar = ratio_bar("x", [1.0, 4.0, 9.0], [1.0, 2.0, 3.0], 2.0)
    assert (bar.figure, bar.spread, bar.reached) == (2.0, (1.0, 3.0), True)
    assert not ratio_bar("x", [1.0], [2.0], 0.51).reached
    assert bar.row()["reached"] is True
    assert limit_words(Bar("x", 0.61, None, (0.5, 0.7), 0.6).row()) == "≤ 0.60"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"hardware": "Intel(R) Xeon(R) Processor (amx_bf16, avx512_bf16)"}, "AMX"),
        ({"hardware": "AMD EPYC (avx512_bf16)"}, "AVX512-BF16"),
        ({"hardware": "AMD EPYC"}, "AVX2"),
        ({"hardware": "NVIDIA H200", "device_class": "GPU"}, "GPU"),
        ({"hardware": "Intel", "device_class": "AMX", "limited_to": "avx512"}, "AVX-512"),
        ({"hardware": "Intel", "device_class": "AMX", "limited_to": "avx2"}, "AVX2"),
    ],
)
def test_a_result_belongs_to_a_class_of_devices(row: dict[str, object], name: str) -> None:
    assert device_class(row) == name


def test_a_forced_instruction_set_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOA_KERNELS_ISA", "avx2")
    row = {**facts(), "time": "2026-01-02", "busy_before": 0.0}
    assert device_class(row) == "AVX2"
    assert "limited to avx2" in setup_line(row)


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
    assert open_adapter(random_lora(base, 2, 0)).kind == "lora"


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


def test_stock_servers_know_nothing_of_the_plugin(tmp_path: Path) -> None:
    stock = Server("a", False, {"x": tmp_path}).process(tmp_path, tmp_path / "log").command
    assert "smoa_serve.cli.app" not in stock
    assert f"x={tmp_path}" in stock
    assert "--enable-lora" not in Server("b", False).process(tmp_path, tmp_path / "log").command
    ours = Server("c", True, {"x": tmp_path}).process(tmp_path, tmp_path / "log").command
    assert ours[1:4] == ["-m", "smoa_serve.cli.app", "serve"]


@pytest.mark.parametrize(("figure", "code"), [(1.0, 0), (0.4, 1)])
def test_the_exit_code_says_whether_a_bar_was_missed(
    figure: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "measure", lambda cases, options: [{"kind": "serving", "tokens_per_s": 1.0}])
    monkeypatch.setattr(serving, "bars", lambda rows: [Bar("thing", figure, 0.5, (figure, figure))])
    monkeypatch.setattr(serving, "section", lambda rows: "")
    monkeypatch.setattr(program, "RESULTS", tmp_path / "results")
    file = tmp_path / "out.jsonl"
    assert program.main(["serving", "--quick", "--json", str(file)]) == code
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["serving", "bar"]
    assert all(line["quick"] is True and set(facts()) <= set(line) for line in lines)
    assert len(list((tmp_path / "results").iterdir())) == 1
    shown = capsys.readouterr().out
    words = f"| {figure:.2f} to {figure:.2f} | {'**no**' if code else 'yes'} | {device_class(facts())} |"
    assert f"| thing | ≥ 0.50 | {figure:.2f} {words}" in shown


def test_every_question_answers_to_the_same_names() -> None:
    for what in QUESTIONS:
        assert all(callable(getattr(question(what), name)) for name in ("cases", "measure", "section"))


def stored(folder: Path, what: str, day: int, *rows: dict[str, Any], hardware: str = "AMD EPYC (avx512_bf16)") -> None:
    shared = {"what": what, "time": f"2026-01-{day:02}T03:04:05", "busy_before": 0.5, **facts()}
    shared |= {"hardware": hardware, "device_class": device_class({"hardware": hardware})}
    lines = "".join(json.dumps(shared | row) + "\n" for row in rows)
    (folder / f"{what}-202601{day:02}-030405.jsonl").write_text(lines)


def test_the_newest_result_of_a_device_class_counts_and_a_layer_replaces_that_layer(tmp_path: Path) -> None:
    def points(*layers: str, us: float) -> list[dict[str, Any]]:
        bars = [Bar(f"x, worst of 2: {name}, (r, K) = (1, 1)", us, 1.0, (us, us)).row() for name in layers]
        return [*({"kind": "kernels", "layer": name, "us": us} for name in layers), *bars]

    stored(tmp_path, "kernels", 1, *points("a", "b", us=1.0))
    stored(tmp_path, "kernels", 2, *points("b", us=2.0))
    stored(tmp_path, "kernels", 3, *points("c", us=3.0), hardware="Xeon (amx_bf16)")
    (tmp_path / "kernels-quick-20260104-000000.jsonl").write_text("not read")
    found = newest("kernels", tmp_path)
    assert set(found) == {"AVX512-BF16", "AMX"}
    figures = [(row["kind"], row.get("us", row.get("figure"))) for row in found["AVX512-BF16"]]
    assert figures == [("kernels", 1.0), ("bar", 1.0), ("kernels", 2.0), ("bar", 2.0)]


def stale(root: Path) -> list[Path]:
    """Pages that say something else than the stored results."""
    return [file for file, text in publish.pages(root).items() if not file.is_file() or file.read_text() != text]


def test_results_are_published_between_markers_and_in_pages_of_their_own(tmp_path: Path) -> None:
    load = {"load": {"streams": 1, "input_tokens": 2, "output_tokens": 3}, "spread": [9.0, 11.0], "cpu_s": [1.0, 2.0]}
    speed = {"tokens_per_s": 10.0, **dict.fromkeys(("ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99"), 1.0)}
    rows: list[dict[str, Any]] = [{"kind": "serving", "model": "m", "variant": "base, vLLM alone", **load, **speed}]
    rows += [{"kind": "delta", "rank": 16, "num_blocks": 4, "own_s": 1.0, "dense_s": 20.0}]
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    stored(results, "serving", 1, *rows, Bar("thing, worst of 3: 8x8, (r, K)", 0.4, 0.5, (0.3, 0.6)).row())
    stored(results, "serving", 2, *rows, Bar("thing: 8x8", 0.6, 0.5, (0.3, 0.6)).row(), hardware="Xeon (amx_bf16)")
    (tmp_path / "docs" / "results").mkdir(parents=True)
    for name, file in (("bars", tmp_path / "docs" / "performance.md"), ("results", tmp_path / "README.md")):
        file.write_text(f"before\n<!-- {name}:begin -->\nold\n<!-- {name}:end -->\nafter\n")
    assert stale(tmp_path)
    for _ in range(2):
        publish.publish(tmp_path)
        assert stale(tmp_path) == []
    text = (tmp_path / "docs" / "performance.md").read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| thing: 8x8 | ≥ 0.50 | 0.60 | **0.40** missed |  |  |  |" in text
    page = (tmp_path / "docs" / "results" / "serving.md").read_text()
    assert "others used 50% of the cores before the start" in page
    assert "| thing, worst of 3: 8x8, (r, K) | ≥ 0.50 | 0.40 | 0.30 to 0.60 | **no** | AVX512-BF16 |" in page
    assert "| r=16, K=4 | 1.00 s | 20.0 s |" in page
    assert "| base, vLLM alone | 10.0 | 9.0 to 11.0 |" in page
    assert "](docs/serving.png)\n\nm with random weights, 1 concurrent" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "docs" / "serving.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="no markers"):
        with_section(tmp_path / "README.md", "results", "x")


def test_what_is_published_is_what_was_stored() -> None:
    assert stale(ROOT) == [], "run `python -m benchmarks publish`"


@pytest.mark.parametrize("what", ["merge", "churn"])
def test_bars_follow_from_the_stored_rows(what: str) -> None:
    rows = newest(what)["AMX"]
    again = {bar.name: bar for bar in question(what).bars([row for row in rows if row["kind"] != "bar"])}
    for row in rows:
        if row["kind"] == "bar":
            assert again[row["name"]].figure == pytest.approx(row["figure"], abs=2e-4)
            assert again[row["name"]].reached == row["reached"]
