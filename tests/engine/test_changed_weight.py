"""A base weight that is not what it was: nothing is served from it. In a file of its own, as its engines end."""

import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from smoa_kernels.backends.cpp import build as cpp_build

from smoa_serve.engine.exchange import PlainExchange

pytestmark = pytest.mark.engine


@pytest.fixture(params=["packed", "plain"])
def engine(vectors: Path, in_process: Callable[..., Any], request: Any) -> Iterator[Any]:
    """With the weights packed by oneDNN, and with weights that lie in the open as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            from vllm import _custom_ops as ops

            patch.setattr(ops, "_supports_onednn", False)
            patch.setattr(cpp_build, "unavailable_reason", lambda device_type, dtype: "torch is tested")
        with in_process(vectors / "e2e/tiny-llama/base", enable_lora=True, enable_prefix_caching=False) as engine:
            yield engine


def test_a_bit_that_changed_in_memory_ends_the_engine(engine: Any, vectors: Path, makers: Any, tmp_path: Path) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    path = makers.make_adapter(vectors / "e2e/tiny-llama/base", tmp_path / "smoa", "smoa", (4, 4), seed=0)

    def ask(request: Any) -> list[int]:
        settings = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        (output,) = engine.generate([{"prompt_token_ids": [5, 9]}], settings, lora_request=request, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    ask(LoRARequest("smoa", 1, str(path)))
    report = {"ready": False}
    while not report["ready"]:
        (report,) = engine.collective_rpc("smoa_stage", args=(1, "merged", 10.0))
        assert report["refused"] == []
    engine.collective_rpc("smoa_commit", args=(1, "merged", "compensate"))
    assert len(ask(None)) == 4
    engine.collective_rpc(_flip_a_bit)
    (report,) = engine.collective_rpc("smoa_undo", args=(1,))
    assert re.search(r"1 base weights are not what they were.*restart the server", report["raised"])
    with pytest.raises(Exception, match="not what they were"):
        ask(None)


@torch.inference_mode()
def _flip_a_bit(worker: Any) -> None:
    """What a stray write would do: one bit of one original weight changes in memory, the highest of its mantissa."""
    merger = worker.model_runner.lora_manager._adapter_manager.mover.merger
    exchange = next(iter(merger._exchanges.values()))
    if isinstance(exchange, PlainExchange):
        merged = {(int(row), int(col)) for rows, cols, *_ in exchange._blocks for row in rows for col in cols}
        row, col = next(place for place in itertools.product(range(9), range(9)) if place not in merged)
        exchange._served.view(torch.int32)[row, col] ^= 1 << 22
        return
    weight = next(iter(merger._layers.values())).smoa_weight
    with weight.original():
        before = weight.whole().clone()
        weight.close()
        # Packed, some outputs' numbers of one input still stand side by side.
        _flip_in_memory(before[:4, 0].contiguous().numpy().tobytes())
        after = weight.whole().clone()
        weight.close()
    assert int((before != after).sum()) == 1


def _flip_in_memory(pattern: bytes) -> None:
    """Changes the first float32 wherever these bytes stand in this process."""
    piece, seam = 1 << 24, len(pattern) - 1
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, rights, *_ = line.split()
            start, end = (int(address, 16) for address in addresses.split("-"))
            if not rights.startswith("rw"):
                continue
            for offset in range(start, end, piece):
                try:
                    content = os.pread(memory.fileno(), min(piece + seam, end - offset), offset)
                except OSError:
                    continue  # gone since, or of a device
                place = content.find(pattern)
                while place >= 0:
                    os.pwrite(memory.fileno(), bytes([pattern[2] ^ 0x40]), offset + place + 2)
                    place = content.find(pattern, place + 1)
