"""The checksums by which un-merging proves that a weight is the original."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from smoa_serve.engine import exchange
from smoa_serve.engine.exchange import HandlerExchange, PlainExchange

pytestmark = [pytest.mark.engine, pytest.mark.cpu]

H_OUT, H_IN, FLIPS = 192, 448, 200
ADDRESS_BYTES = 8
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
# With AVX2 only, oneDNN packs no bfloat16, and vLLM leaves such weights in the open.
PACKED = [dtype for dtype in BITS if dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()]


def random_weight(dtype: torch.dtype) -> Tensor:
    return torch.randn(H_OUT, H_IN, generator=torch.Generator().manual_seed(0)).mul(0.02).to(dtype)


def flipped(weight: Tensor, generator: torch.Generator) -> Tensor:
    """The same weight but for one bit."""
    row, col, bit = (
        int(torch.randint(0, most, (1,), generator=generator)) for most in (*weight.shape, 8 * weight.itemsize)
    )
    changed = weight.clone()
    bits = changed.view(BITS[weight.dtype])
    bits[row, col] ^= 1 << bit if bit < 8 * weight.itemsize - 1 else -(1 << bit)
    assert int((bits != weight.view(bits.dtype)).sum()) == 1
    return changed


def packed(weight: Tensor) -> HandlerExchange:
    """The exchange of a weight that oneDNN has packed."""
    from vllm import _custom_ops as ops

    handler = ops.create_onednn_mm(weight.t(), 32)
    method = SimpleNamespace(apply=lambda layer, x, bias: ops.onednn_mm(handler, x, bias))
    served: Any = SimpleNamespace(columns=weight.shape[1], dtype=weight.dtype)
    return HandlerExchange(SimpleNamespace(quant_method=method), handler, served)


@pytest.mark.parametrize("dtype", list(BITS), ids=str)
def test_a_checksum_of_an_open_weight_sees_every_flipped_bit(dtype: torch.dtype) -> None:
    weight, generator = random_weight(dtype), torch.Generator().manual_seed(1)
    before = PlainExchange(weight).checksum()
    assert PlainExchange(weight.clone()).checksum() == before
    assert all(PlainExchange(flipped(weight, generator)).checksum() != before for _ in range(FLIPS))


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_a_checksum_of_a_packed_weight_knows_the_handler_and_nearly_every_flipped_bit(
    dtype: torch.dtype,
) -> None:
    weight, generator = random_weight(dtype), torch.Generator().manual_seed(1)
    original, twin = packed(weight), packed(weight.clone())
    before = original.checksum()
    assert original.checksum() == before
    assert twin.checksum() != before, "another handler"
    assert twin.checksum()[ADDRESS_BYTES:] == before[ADDRESS_BYTES:]
    seen = sum(
        packed(flipped(weight, generator)).checksum()[ADDRESS_BYTES:] != before[ADDRESS_BYTES:] for _ in range(FLIPS)
    )
    assert seen >= 0.9 * FLIPS


def test_a_checksum_on_a_device_sums_in_pieces_and_sees_every_flipped_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def checksum(weight: Tensor) -> bytes:
        return exchange._sums_of_bits(weight)

    weight, generator = random_weight(torch.bfloat16), torch.Generator().manual_seed(1)
    at_once = checksum(weight)
    largest: list[int] = []
    real = Tensor.long
    monkeypatch.setattr(Tensor, "long", lambda part: largest.append(part.numel()) or real(part))
    monkeypatch.setattr(exchange, "SUMMED_AT_ONCE", 1000)
    assert checksum(weight) == at_once
    assert len(largest) == -(-weight.numel() // 1000)
    assert max(largest) == 1000
    assert all(checksum(flipped(weight, generator)) != at_once for _ in range(FLIPS))
    swapped = weight.clone()
    swapped[0, 0], swapped[5, 7] = weight[5, 7], weight[0, 0]
    assert checksum(swapped) != at_once
