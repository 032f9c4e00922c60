"""Kernel results in the documents: tables, pictures and predictions from stored lines."""

import json
from pathlib import Path

import pytest
from smoa_kernels.testing import WORKLOADS

from benchmarks.bars import Bar
from benchmarks.kernels import publish
from benchmarks.kernels.cases import SHAPES, Case
from benchmarks.kernels.floor import Ceilings
from benchmarks.kernels.point import Point
from benchmarks.kernels.predictions import H200, Prediction, predictions
from benchmarks.kernels.timing import Times
from benchmarks.setup_facts import facts

CEILINGS = Ceilings(30e9, 0.4e12)
SHARED = {
    "what": "kernels",
    "quick": False,
    "busy_before": 0.0,
    "time": "2026-01-02T03:04:05",
    "device": "cpu",
    "dtype": "bfloat16",
    "threads": 2,
    "ceilings": {"bytes_per_s": 30e9, "flops_per_s": 0.4e12},
}


def rows() -> list[dict[str, object]]:
    names = {"base": 100.0, "cpp": 25.0, "torch": 90.0, "bmm expand": 80.0, "lora (vllm)": 70.0}
    names |= {"dense": 4000.0, "cpp beside dense": 20.0}
    times = {name: Times({0: us * 1e-6, 1: us * 1.5e-6, 2: us * 0.5e-6}) for name, us in names.items()}
    shape = SHAPES["896x4864"]
    cases = [Case(shape, 16, 4, 8, 8)] + [Case(shape, 16, 4, t, 8, name) for name in WORKLOADS for t in (8, 32)]
    found = [{"kind": "kernels", **Point(c, times, {}, ("cpp", "torch"), CEILINGS).row()} for c in cases]
    bars = [Bar("fast enough", 0.7, None, (0.6, 0.8), 0.6), Bar("dense", 30.0, 20.0, (25.0, 40.0))]
    return [{**facts(), **SHARED, **row} for row in [*found, *(bar.row() for bar in bars)]]


TUNED = {
    "what": "tune",
    "kind": "tuned",
    "implementation": "cpp",
    "constants": {"form": 3.0, "form_per_rank": 0.5, "resident": 2.0},
    "constants_before": {"form": 5.5, "form_per_rank": 1.25, "resident": 1.0},
    "points": 168,
    "regret_before": 0.05,
    "regret_after": 0.02,
    "regret_resident_before": 0.1,
    "regret_resident_after": 0.04,
}


def test_results_are_published_with_their_pictures(tmp_path: Path) -> None:
    result, tuned = tmp_path / "kernels.jsonl", tmp_path / "tune.jsonl"
    result.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    tuned.write_text(json.dumps(TUNED) + "\n")
    document = tmp_path / "docs" / "performance.md"
    document.parent.mkdir()
    markers = "".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in ("kernels", "kernels-gpu"))
    document.write_text(f"before\n{markers}after\n")
    for _ in range(2):
        assert publish.main([str(result), str(tuned), "--root", str(tmp_path)]) == 0
    text = document.read_text()
    assert "old" not in text
    assert "2 threads: 30 GB/s, 0.40 TFLOP/s" in text
    assert "| (16, 4) | 8, 8 | 100 | 25.0 | 90.0 | 12.5 to 37.5 |" in text
    assert "| **0.25** | - | 80.0 | - | - | 70.0 |" in text
    assert "| 896x4864 | (16, 4) | 8, 8 | 20.0 | 4,000 | 200 |" in text
    assert "| fast enough | ≤ 0.60 | 0.70 | 0.60 to 0.80 | **no** |" in text
    assert "| dense | ≥ 20.00 | 30.00 | 25.00 to 40.00 | yes |" in text
    assert "| cpp | 5.5, 1.25, 1 | 3, 0.5, 2 | 5.0% → 2.0% | 10.0% → 4.0% | 168 |" in text
    assert "| single pass | 4096x4096 | (32, 2) |" in text
    for name in ("kernels-ratio.png", "kernels-roofline.png"):
        assert (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG")


def test_the_document_has_the_markers() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "performance.md").read_text()
    assert "<!-- kernels:end -->" in text
    assert "<!-- kernels-gpu:end -->" in text


def by_kernel(kernel: str, rank: int, blocks: int, tokens: int) -> Prediction:
    case = Case(SHAPES["4096x4096"], rank, blocks, tokens, tokens)
    (found,) = (p for p in predictions() if (p.kernel, p.case) == (kernel, case))
    return found


def test_predictions_follow_from_the_floors() -> None:
    # One token at K = 2: W and the factors once, 33.8 MB at 4.3 TB/s.
    one = by_kernel("single pass", 32, 2, 1)
    assert one.floor_s == pytest.approx(2 * (4096 * 4096 + 2 * 4096 + 16 * 8192) / H200.bytes_per_s)
    assert 1.0 < one.total(one.floor_s) < 1.02
    assert one.predicted_s > one.floor_s
    # A kernel beside the base reads the blocks again: a quarter of W at K = 4 is more than the bar allows.
    apart = by_kernel("expand", 16, 4, 16)
    assert apart.at_most is not None
    assert apart.total(apart.floor_s) > 1.25 > apart.at_most
    assert apart.row()[-1].endswith("(below the floor)")
