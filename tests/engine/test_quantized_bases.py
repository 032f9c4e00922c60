"""Quantized checkpoints, served: adapters on them do what they do on the float checkpoint of the same numbers."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.errors import AdapterError

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

WEIGHT_ONLY = ("gptq", "awq", "w4a16")
ADAPTERS = {"smoa": (4, 2, 2, 2), "hira": (4,), "lora": (4,)}
PROMPTS = [[(first + 7 * i) % 128 for i in range(size)] for first, size in enumerate((1, 2, 3, 5, 8, 13, 40, 70), 3)]
TOKENS = 24
# Logprobs of float16 models that round at different places, and how far an adapter moves them at least.
ROUNDING, EFFECT = 1e-2, 1.0
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Answers:
    """What one engine said.

    Attributes:
        tokens: greedy, per adapter ("base" is none) and prompt.
        margins: distance between the best two logprobs at each place.
        logprobs: of the prompts' own tokens, one row for all prompts of an adapter.
    """

    tokens: dict[str, list[list[int]]]
    margins: dict[str, list[list[float]]]
    logprobs: dict[str, Tensor]

    def same_tokens(self, expected: "Answers", name: str) -> int:
        """How many greedy tokens are equal, each prompt up to its first near tie. Fails where they differ before."""
        compared = 0
        for found, wanted, margins in zip(
            self.tokens[name], expected.tokens[name], expected.margins[name], strict=True
        ):
            clear = next((place for place, margin in enumerate(margins) if margin < 2 * ROUNDING), len(margins))
            assert found[:clear] == wanted[:clear], name
            compared += clear
        return compared


def ask(engine: Any, requests: dict[str, Any]) -> Answers:
    """Every prompt with every adapter, in one batch."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=2, prompt_logprobs=0, detokenize=False
    )
    names = [name for name in requests for _ in PROMPTS]
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for _ in requests for prompt in PROMPTS],
        sampling,
        lora_request=[requests[name] for name in names],
        use_tqdm=False,
    )
    tokens: dict[str, list[list[int]]] = {name: [] for name in requests}
    margins: dict[str, list[list[float]]] = {name: [] for name in requests}
    logprobs: dict[str, list[float]] = {name: [] for name in requests}
    for name, output in zip(names, outputs, strict=True):
        answer = output.outputs[0]
        tokens[name].append(list(answer.token_ids))
        tops = [sorted((entry.logprob for entry in top.values()), reverse=True) for top in answer.logprobs]
        margins[name].append([top[0] - top[1] for top in tops])
        logprobs[name] += [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
    return Answers(tokens, margins, {name: torch.tensor(row) for name, row in logprobs.items()})


def expected_logprobs(folder: Path) -> Tensor:
    """Logprobs of the prompts by transformers, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    with torch.no_grad():
        for prompt in PROMPTS:
            logits = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
            rows.append(logits.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0])
    return torch.cat(rows)


def read_weights(engine: Any) -> dict[str, Tensor]:
    """The whole weight of every wrapped layer, as blocks for adapters are read."""

    def read(model: Any) -> dict[str, Tensor]:
        found = {}
        for name, layer in model.named_modules():
            if not hasattr(layer, "smoa_weight"):
                continue
            stem, _, last = name.rpartition(".")
            for index, part in enumerate(PACKED.get(last, (last,))):
                rows = torch.arange(layer.smoa_bank.slices[index])
                # One row less: a block, not the weight itself.
                block = layer.smoa_weight.block(index, rows[1:], torch.arange(layer.smoa_bank.h_in))
                found[f"{stem}.{part}"] = block.clone()
            layer.smoa_weight.close()
        return found

    weights: dict[str, Tensor] = engine.apply_model(read)[0]
    return weights


@dataclass(frozen=True)
class Pair:
    """A quantized checkpoint and its float counterpart, both served with the same adapters."""

    plain_path: Path
    quantized: Answers
    plain: Answers
    weights: dict[str, Tensor]
    log: str


Start = Callable[..., Any]


@pytest.fixture(scope="module")
def start(in_process: Start) -> Start:
    """Engines on checkpoints without a tokenizer."""
    defaults = {"enable_lora": True, "max_loras": 3, "skip_tokenizer_init": True}
    return lambda base, **arguments: in_process(base, **(defaults | arguments))


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The messages of the two modules that know of quantization."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(f"smoa_serve.{name}") for name in ("engine.quantized", "adapters.fits")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)


def make_requests(makers: Any, base: Path, folder: Path) -> dict[str, Any]:
    """The base and one adapter of each kind on every linear layer, fingerprinted against `base`."""
    from vllm.lora.request import LoRARequest

    paths = makers.make_adapters(base, folder, {kind: (kind, ranks) for kind, ranks in ADAPTERS.items()})
    return {"base": None} | {
        kind: LoRARequest(kind, number, str(path)) for number, (kind, path) in enumerate(paths.items(), 1)
    }


def serve_both(start: Start, makers: Any, quantizing: Any, folder: Path, kind: str, dtype: torch.dtype) -> Pair:
    source = quantizing.make_float(folder / "source", dtype)
    quantized, plain = quantizing.quantize(source, folder / kind, kind)
    requests = make_requests(makers, plain, folder / "adapters")
    name = str(dtype).removeprefix("torch.")

    def serve(path: Path) -> tuple[Answers, dict[str, Tensor]]:
        with start(path, dtype=name) as engine:
            return ask(engine, requests), read_weights(engine)

    with recorded() as messages:
        found, weights = serve(quantized)
    # An engine that ends after the next one has started takes vLLM's process groups along.
    gc.collect()
    expected, _ = serve(plain)
    gc.collect()
    return Pair(plain, found, expected, weights, "\n".join(messages))


@pytest.fixture(scope="module", params=WEIGHT_ONLY)
def pair(request: Any, start: Start, makers: Any, quantizing: Any, tmp_path_factory: Any) -> Pair:
    return serve_both(start, makers, quantizing, tmp_path_factory.mktemp(request.param), request.param, torch.float16)


def test_the_checkpoint_is_packed_as_vllm_reads_it(pair: Pair) -> None:
    expected = expected_logprobs(pair.plain_path)
    torch.testing.assert_close(pair.quantized.logprobs["base"], expected, atol=ROUNDING, rtol=0)


def test_blocks_are_the_dequantized_weights_bit_for_bit(pair: Pair) -> None:
    base = BaseCheckpoint.open(pair.plain_path)
    assert len(pair.weights) == 14
    for module, weight in pair.weights.items():
        assert torch.equal(weight, base.weight(module)[1:]), module


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_answer_as_on_the_dequantized_base(pair: Pair, name: str) -> None:
    found, expected = pair.quantized.logprobs[name], pair.plain.logprobs[name]
    torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)
    assert (found - pair.quantized.logprobs["base"]).abs().max() > EFFECT
    assert pair.quantized.same_tokens(pair.plain, name) > TOKENS


def test_the_log_states_the_memory_and_what_cannot_be_checked(pair: Pair) -> None:
    base = BaseCheckpoint.open(pair.plain_path)
    whole = sum(base.weight(module).nbytes for module in pair.weights) / 2**20
    assert "8 base layers are quantized by" in pair.log
    assert f"keep dequantized blocks (float16) beside them: up to {whole:.2f} MiB / K" in pair.log
    assert "14 of its 14 layers are quantized in this base" in pair.log


def test_fp8_weights_are_read_where_activations_are_quantized(
    start: Start, makers: Any, quantizing: Any, tmp_path: Path
) -> None:
    """Base and dequantized base differ by the rounding of activations; adapters add to that what they add anyway."""
    pair = serve_both(start, makers, quantizing, tmp_path, "fp8-channel", torch.bfloat16)
    base = BaseCheckpoint.open(pair.plain_path)
    for module, weight in pair.weights.items():
        assert torch.equal(weight, base.weight(module)[1:]), module
    rounding = (pair.quantized.logprobs["base"] - pair.plain.logprobs["base"]).abs().mean()
    for name in ADAPTERS:
        off = (pair.quantized.logprobs[name] - pair.plain.logprobs[name]).abs().mean()
        effect = (pair.plain.logprobs[name] - pair.plain.logprobs["base"]).abs().mean()
        assert off < 2 * rounding < effect / 2, name


def test_a_base_with_8_bit_activations_refuses_updates_and_serves_lora(
    start: Start, makers: Any, quantizing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vLLM 0.32 cannot start this base with adapters on CPUs without AMX: it asks the weight that it dropped for its
    # device.
    monkeypatch.setattr("vllm.lora.layers.base_linear._get_lora_device", lambda layer: torch.device("cpu"))
    source = quantizing.make_float(tmp_path / "source", torch.bfloat16)
    quantized, plain = quantizing.quantize(source, tmp_path / "w8a8", "w8a8")
    requests = make_requests(makers, plain, tmp_path / "adapters")
    with recorded() as messages, start(quantized, dtype="bfloat16") as engine:
        for kind in ("smoa", "hira"):
            with pytest.raises(AdapterError) as caught:
                engine.llm_engine.add_lora(requests[kind])
            assert "quantized by CompressedTensorsW8A8Int8, which rounds activations too" in caught.value.reasons[0]
        answers = ask(engine, {name: requests[name] for name in ("base", "lora")})
    assert "8 base layers take no SMoA and HiRA adapters" in messages[0]
    assert (answers.logprobs["lora"] - answers.logprobs["base"]).abs().max() > EFFECT
