"""Which quantized layers are read, and what is read: with layers that look like vLLM's."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from smoa_serve.engine import quantized
from smoa_serve.engine.weights import ServedWeight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
H_OUT, H_IN = 96, 256
FP8 = torch.float8_e4m3fn


def per_token(x: Tensor, largest: float, cast: Callable[[Tensor], Tensor]) -> Tensor:
    """Activations scaled by their largest in each row, rounded and scaled back."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / largest
    return cast(x.float() / scale) * scale


def to_fp8(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(FP8).float()


def per_group(x: Tensor) -> Tensor:
    return per_token(x.view(x.shape[0], -1, 128), 448, to_fp8).view(x.shape)


def per_tensor(x: Tensor) -> Tensor:
    return per_token(x.reshape(1, -1), 127, torch.round).view(x.shape)


def static(x: Tensor, scale: float) -> Tensor:
    return (x.float() / scale).round().clamp(-128, 127) * scale


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8 per token": lambda x: per_token(x, 127, torch.round),
    "int8 per tensor": per_tensor,
    "int4 per token": lambda x: per_token(x, 7, torch.round),
    "fp8 per token": lambda x: per_token(x, 448, to_fp8),
    "fp8 per group of 128": per_group,
    "int8 static, narrow": lambda x: static(x, 0.001),
    "int8 static, fitting": lambda x: static(x, 1 / 127),
    "int8 static, wide": lambda x: static(x, 1.0),
}


class Method:
    """A quantization method that multiplies by `weight` [H_out, H_in], activations rounded first."""

    def __init__(self, weight: Tensor, rounding: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self.weight, self.rounding = weight, rounding

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        return (self.rounding(x).float() @ self.weight.float().t()).to(x.dtype)


class AutoGPTQLinearMethod(Method):
    pass


class Fp8LinearMethod(Method):
    pass


class CompressedTensorsLinearMethod(Method):
    pass


class UnheardOfLinearMethod(Method):
    pass


class UnquantizedLinearMethod(Method):
    pass


def fake_layer(method: Method, **attributes: Any) -> Any:
    return SimpleNamespace(quant_method=method, parameters=lambda: iter(()), **attributes)


def random_weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(H_OUT, H_IN, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype)


def served(layer: Any, dtype: torch.dtype, sizes: tuple[int, ...] = (H_OUT,), columns: int = H_IN) -> ServedWeight:
    return ServedWeight(layer, sizes, columns, dtype)


def fp8_parts(per_output: bool, shape: tuple[int, int] = (H_OUT, H_IN)) -> tuple[Tensor, Tensor, Tensor]:
    """An fp8 weight [H_out, H_in], its scales and the weight it stands for."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.05
    scale = weight.abs().amax(1, keepdim=True) / 448 if per_output else weight.abs().max() / 448
    stored = to_fp8(weight / scale).to(FP8)
    return stored, scale, stored.float() * scale


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_only_layer_is_recovered_exactly(dtype: torch.dtype) -> None:
    weight = served(fake_layer(AutoGPTQLinearMethod(random_weight(dtype))), dtype, (64, 32))
    assert weight.refusal() is None
    rows, cols = torch.tensor([31, 2, 7]), torch.tensor([255, 0, 100, 9])
    assert torch.equal(weight.block(1, rows, cols), random_weight(dtype)[64:][rows][:, cols])


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_finer_than_the_models_dtype_do_not_look_like_rounded_activations(dtype: torch.dtype) -> None:
    assert served(fake_layer(AutoGPTQLinearMethod(random_weight())), dtype).refusal() is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("method", [AutoGPTQLinearMethod, UnheardOfLinearMethod])
def test_a_layer_that_rounds_activations_is_refused(dtype: torch.dtype, rounding: str, method: type[Method]) -> None:
    layer = fake_layer(method(random_weight(), ROUNDINGS[rounding]))
    reason = served(layer, dtype).refusal()
    assert reason is not None
    assert method.__name__ in reason
    assert "rounds activations" in reason
    # vLLM's 4-bit CPU kernel does so where the processor has AMX, and can be told not to.
    assert ("VLLM_CPU_INT4_W4A8=0" in reason) == (method is AutoGPTQLinearMethod)


def test_a_method_that_is_not_known_is_refused_by_its_name() -> None:
    reason = served(fake_layer(UnheardOfLinearMethod(random_weight())), torch.float32).refusal()
    assert reason is not None
    assert "UnheardOfLinearMethod, a method that smoa-serve does not know" in reason
    assert "GPTQ" in reason


def test_a_compressed_tensors_layer_goes_by_the_name_of_its_scheme() -> None:
    class CompressedTensorsWNA16:
        pass

    class CompressedTensorsNovelty:
        pass

    method = CompressedTensorsLinearMethod(random_weight())
    assert served(fake_layer(method, scheme=CompressedTensorsWNA16()), torch.float32).refusal() is None
    reason = served(fake_layer(method, scheme=CompressedTensorsNovelty()), torch.float32).refusal()
    assert reason is not None
    assert "CompressedTensorsNovelty" in reason


@pytest.mark.parametrize("zeros", [(slice(None), slice(None)), (slice(None), slice(96, 160)), (slice(1, None), 3)])
def test_weights_with_many_zeros_are_no_obstacle(zeros: Any) -> None:
    weight = random_weight()
    weight[zeros] = 0
    assert served(fake_layer(AutoGPTQLinearMethod(weight)), torch.float32).refusal() is None


@pytest.mark.parametrize(
    "shape", [(), (1,), (1, 1), (H_OUT,), (H_OUT, 1), (1, H_OUT)], ids=lambda shape: f"scale {shape}"
)
def test_fp8_weights_are_read_with_the_scale_of_each_output(shape: tuple[int, ...]) -> None:
    stored, scale, stands_for = fp8_parts(H_OUT in shape)
    layer = fake_layer(Fp8LinearMethod(stands_for), weight=stored.t(), weight_scale=scale.reshape(shape))
    found = quantized.quantized_weight(layer)
    assert found is not None
    weight, scales = found
    assert weight.dtype == FP8
    assert weight.data_ptr() == stored.data_ptr()
    assert (tuple(scales.shape), scales.stride(), scales.dtype) == ((H_OUT,), (1,), torch.float32)
    torch.testing.assert_close(weight.float() * scales[:, None], stands_for, rtol=0, atol=0)


@pytest.mark.parametrize(
    "attributes",
    [
        {"weight": torch.zeros(H_IN, H_OUT, dtype=torch.int8)},
        {"weight": torch.zeros(H_IN, H_OUT).to(FP8), "weight_scale": torch.ones(2, 1)},
        {"weight": torch.zeros(H_IN, H_OUT).to(FP8), "weight_scale": torch.ones(()), "weight_block_size": [128, 128]},
        {"weight": torch.zeros(H_IN, H_OUT).to(FP8), "weight_scale": None, "weight_scale_inv": torch.ones(2, 1)},
        {"weight": None},
        {},
    ],
    ids=["int8", "scales of groups", "scales of blocks", "inverse scales of blocks", "dropped", "absent"],
)
def test_other_layers_have_no_fp8_weight_to_read(attributes: dict[str, Any]) -> None:
    layer = fake_layer(Fp8LinearMethod(random_weight()), **{"weight_scale": torch.ones(()), **attributes})
    assert quantized.quantized_weight(layer) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_output", [False, True], ids=["per tensor", "per output"])
def test_fp8_blocks_are_dequantized_in_fp32_whatever_the_activations(dtype: torch.dtype, per_output: bool) -> None:
    stored, scale, stands_for = fp8_parts(per_output)
    method = Fp8LinearMethod(stands_for, ROUNDINGS["fp8 per token"])
    weight = served(fake_layer(method, weight=stored.t(), weight_scale=scale), dtype, (32, 64))
    assert weight.refusal() is None
    rows, cols = torch.tensor([63, 0, 5]), torch.tensor([255, 1, 77, 3])
    block = weight.block(1, rows, cols)
    assert torch.equal(block, stands_for[32:][rows][:, cols].to(dtype))
    everything = weight.block(0, torch.arange(32), torch.arange(H_IN))
    assert torch.equal(everything, stands_for[:32].to(dtype))
    # What GPUs that know fp8 keep instead.
    raw, scales = weight.fp8_block(1, rows, cols), weight.row_scale(1, rows)
    assert weight.is_kernel_fp8
    assert raw.dtype is torch.float8_e4m3fn
    assert torch.equal((raw.float() * scales[:, None]).to(dtype), block)


@pytest.mark.parametrize("input_scale", [1e-4, 1.0, 300.0])
def test_fp8_layers_with_a_recorded_activation_scale_are_probed_inside_its_range(input_scale: float) -> None:
    stored, scale, stands_for = fp8_parts(False)
    method = Fp8LinearMethod(stands_for, lambda x: to_fp8(x.float() / input_scale) * input_scale)
    layer = fake_layer(method, weight=stored.t(), weight_scale=scale, input_scale=torch.tensor(input_scale))
    assert served(layer, torch.bfloat16).refusal() is None


def test_an_fp8_weight_in_another_layout_is_not_taken_for_the_plain_one() -> None:
    """Square, so that shapes tell nothing: the kernel keeps [H_out, H_in] where most keep [H_in, H_out]."""
    stored, scale, stands_for = fp8_parts(False, (H_IN, H_IN))
    dynamic = fake_layer(Fp8LinearMethod(stands_for, ROUNDINGS["fp8 per token"]), weight=stored, weight_scale=scale)
    reason = served(dynamic, torch.bfloat16, (H_IN,)).refusal()
    assert reason is not None
    assert "rounds activations" in reason


def test_a_repacked_fp8_weight_is_recovered_where_activations_are_kept() -> None:
    stored, scale, stands_for = fp8_parts(False, (H_IN, H_IN))
    weight = served(fake_layer(Fp8LinearMethod(stands_for), weight=stored, weight_scale=scale), torch.bfloat16, (H_IN,))
    assert weight.refusal() is None
    assert torch.equal(weight.block(0, torch.arange(9), torch.arange(5)), stands_for[:9, :5].bfloat16())


def test_an_unquantized_layer_is_not_tested() -> None:
    def fail(x: Tensor) -> Tensor:
        raise AssertionError("it was asked")

    assert served(fake_layer(UnquantizedLinearMethod(random_weight(), fail)), torch.float32).refusal() is None


def wrapped(layer: Any, dtype: torch.dtype) -> Any:
    return SimpleNamespace(base_layer=layer, smoa_weight=served(layer, dtype))


def test_the_start_says_what_dequantized_blocks_cost(caplog: pytest.LogCaptureFixture) -> None:
    words = torch.zeros(H_OUT * H_IN // 8, dtype=torch.int32)
    four_bit = fake_layer(AutoGPTQLinearMethod(random_weight()))
    four_bit.parameters = lambda: iter((words,))
    rounding = fake_layer(UnheardOfLinearMethod(random_weight(), ROUNDINGS["int8 per token"]))
    plain = fake_layer(UnquantizedLinearMethod(random_weight()))
    with caplog.at_level(logging.INFO, "smoa_serve"):
        quantized.report(
            [wrapped(layer, torch.bfloat16) for layer in (four_bit, plain, four_bit, rounding)], torch.bfloat16
        )
    cost, refusal = caplog.records
    assert cost.levelno == logging.INFO
    held, whole = 2 * H_OUT * H_IN / 2 / 2**20, 2 * H_OUT * H_IN * 2 / 2**20
    assert f"2 base layers are quantized by AutoGPTQLinearMethod and hold {held:.2f} MiB" in cost.message
    assert f"(bfloat16) beside them: up to {whole:.2f} MiB / K" in cost.message
    assert refusal.levelno == logging.WARNING
    assert "1 base layers take no SMoA and HiRA adapters" in refusal.message


def test_nothing_is_said_of_an_unquantized_base(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "smoa_serve"):
        quantized.report([wrapped(fake_layer(UnquantizedLinearMethod(random_weight())), torch.float32)], torch.float32)
    assert not caplog.records
