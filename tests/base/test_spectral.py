"""The spectral order against recorded orders and scores, its float64 check, and its cache."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.base.orders import OrderCache
from smoa_serve.base.spectral import (
    SpectralOrder,
    block_pieces,
    even_ranks,
    scores_float32,
    scores_float64,
    spectral_order,
)


def _weight(case: dict[str, Any], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors["W"].t() if case["fan_in_fan_out"] else tensors["W"]


def test_well_determined_orders_are_reproduced_exactly(vectors: Path, vector_index: dict[str, Any]) -> None:
    checked = 0
    for case in vector_index["layers"]:
        if not case["order_well_determined"]:
            continue
        tensors = load_file(vectors / case["file"])
        order = spectral_order(_weight(case, tensors))
        assert torch.equal(order.rows, tensors["row_order"]), case["name"]
        assert torch.equal(order.cols, tensors["col_order"]), case["name"]
        assert order.order_error == 0.0, case["name"]
        checked += 1
    assert checked > 15


def test_scores_agree_with_the_recorded_ones(vectors: Path, vector_index: dict[str, Any]) -> None:
    for case in vector_index["layers"]:
        tensors = load_file(vectors / case["file"])
        weight = _weight(case, tensors)
        if {"order_is_noise", "degenerate"} & set(case["tags"]):
            continue
        for scores, suffix, tolerance in ((scores_float32, "score", 1e-3), (scores_float64, "score64", 1e-6)):
            rows, cols = scores(weight)
            torch.testing.assert_close(rows, tensors[f"row_{suffix}"], rtol=0, atol=tolerance)
            torch.testing.assert_close(cols, tensors[f"col_{suffix}"], rtol=0, atol=tolerance)


def test_e2e_orders_are_reproduced_exactly(vectors: Path, vector_index: dict[str, Any]) -> None:
    for model in vector_index["e2e"]:
        base = BaseCheckpoint.open(vectors / model["base"])
        for adapter in model["adapters"]:
            recorded = load_file(vectors / adapter["order_file"])
            for module in {name.rpartition(".")[0] for name in recorded}:
                order = spectral_order(base.weight(module))
                assert torch.equal(order.rows, recorded[f"{module}.rows"].long()), module
                assert torch.equal(order.cols, recorded[f"{module}.cols"].long()), module


def test_an_order_that_is_noise_is_reported_as_such(vectors: Path) -> None:
    order = spectral_order(load_file(vectors / "layers" / "orthogonal_k2.safetensors")["W"])
    assert order.order_error > 1.0


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32), (1, 7), (7, 1)])
def test_gram_scores_equal_those_of_a_float64_svd(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    u, sigma, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    index = torch.arange(sigma.numel(), dtype=torch.float64)
    rows, cols = scores_float64(weight)
    for found, vectors_ in ((rows, u), (cols, vh.t())):
        energy = (vectors_ * sigma).pow(2)
        torch.testing.assert_close(found, (energy @ index) / energy.sum(1), rtol=1e-9, atol=1e-9)


def test_order_error_counts_misplaced_positions() -> None:
    straight = torch.arange(10)
    swapped = straight.clone()
    swapped[[2, 3]] = swapped[[3, 2]]
    order = SpectralOrder(rows=swapped, cols=straight, rows64=straight, cols64=straight)
    assert (order.misplaced_rows, order.misplaced_cols) == (0.2, 0.0)
    assert order.order_error == pytest.approx(math.sqrt(0.4))


def test_pieces_and_ranks_give_the_remainder_to_the_first() -> None:
    assert [p.numel() for p in block_pieces(torch.arange(11), 4)] == [3, 3, 3, 2]
    assert even_ranks(6, 4) == (2, 2, 1, 1)
    assert even_ranks(3, 8) == (1, 1, 1, 0, 0, 0, 0, 0)
    assert even_ranks(0, 2) == (0, 0)


def test_cache_computes_once_and_reads_afterwards(tmp_path: Path) -> None:
    cache = OrderCache(tmp_path)
    calls: list[int] = []

    def weight() -> torch.Tensor:
        calls.append(1)
        return torch.randn(12, 9, generator=torch.Generator().manual_seed(0))

    first = cache.get_by_key("k", weight)
    second = OrderCache(tmp_path).get_by_key("k", weight)
    assert calls == [1]
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.cols64, second.cols64)


@pytest.mark.parametrize("damage", [b"", b"not a tensor file"])
def test_a_damaged_cache_file_is_computed_again(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache = OrderCache(tmp_path)
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    good = cache.get_by_key("k", lambda: weight)
    (cache.root / "k.safetensors").write_bytes(damage)
    assert torch.equal(cache.get_by_key("k", lambda: weight).rows, good.rows)
    assert "damaged" in caplog.text
    assert torch.equal(load_file(cache.root / "k.safetensors")["rows"].long(), good.rows)


def test_cache_keeps_conv1d_and_linear_orders_of_equal_bytes_apart(make_base: Any, tmp_path: Path) -> None:
    square = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    linear = BaseCheckpoint.open(make_base({"model.layers.0.q_proj.weight": square}, name="a"))
    conv = BaseCheckpoint.open(make_base({"transformer.h.0.attn.c_attn.weight": square}, name="b", model_type="gpt2"))
    cache = OrderCache(tmp_path / "cache")
    one = cache.get(linear, "model.layers.0.q_proj")
    other = cache.get(conv, "transformer.h.0.attn.c_attn")
    assert torch.equal(one.rows, other.cols)
    assert torch.equal(one.cols, other.rows)
    assert not torch.equal(one.rows, other.rows)
