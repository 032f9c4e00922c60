"""Quantized base layers: whose weights can be read, and what the dequantized blocks cost.

An update multiplies the weight that the base computes with. A layer that quantizes its weight only is linear in its
input, so unit vectors give that weight. One that quantizes activations too is not, and what unit vectors give there
says nothing about other inputs: its weight has to be read where it lies (fp8), or the adapter is refused.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from smoa_kernels import dequantized, picked
from torch import Tensor

logger = logging.getLogger(__name__)

# vLLM's methods (0.26 to 0.32) and compressed-tensors schemes that are known to multiply with one weight. Names, as
# most of the classes exist in some releases only. Which of them round activations depends on the kernel that vLLM
# chose, so each layer is tested.
INT4_METHODS = frozenset(
    {
        *("GPTQLinearMethod", "GPTQMarlinLinearMethod", "AutoGPTQLinearMethod", "CPUGPTQLinearMethod"),
        *("AWQLinearMethod", "AWQMarlinLinearMethod", "AutoAWQLinearMethod", "AutoAWQMarlinLinearMethod"),
        *("CPUAWQLinearMethod", "CompressedTensorsWNA16"),
    }
)
KNOWN_METHODS = INT4_METHODS | {"Fp8LinearMethod", "CompressedTensorsW8A8Fp8", "CompressedTensorsW8A16Fp8"}
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
# Neighbouring columns, so that they share a group of any scheme that scales activations by groups.
PROBE_COLUMNS = 32
# Beyond the range of 8-bit integers: with it in a row, the others vanish where a row has one scale.
OUTLIER = 256.0
# An fp8 activation is off by up to 1 / 16; a weight read in the wrong layout has nothing in common with the right one.
FP8_TOLERANCE = 0.15


def method_name(layer: Any) -> str:
    """How a layer is quantized, as vLLM names it: the class of its scheme, where it has one, or of its method."""
    scheme = getattr(layer, "scheme", None)
    return type(layer.quant_method if scheme is None else scheme).__name__


def is_quantized(layer: Any) -> bool:
    """Whether a layer computes with something else than a weight in model dtype."""
    return "Unquantized" not in type(layer.quant_method).__name__


def quantized_weight(layer: Any) -> tuple[Tensor, Tensor] | None:
    """The fp8 weight of a layer and its scales, where they lie in the open.

    vLLM keeps such a weight as [H_in, H_out], a transposed view in most cases, with one scale for all of it or one for
    each output.

    Args:
        layer: vLLM's linear layer, its weights loaded and processed.

    Returns:
        weight [H_out, H_in] in fp8, a view of the layer's own; scale [H_out] fp32, contiguous: W = weight *
        scale[:, None]. None when the layer has no such weight: another dtype, scales of blocks, or packed.
    """
    weight, scale = getattr(layer, "weight", None), getattr(layer, "weight_scale", None)
    if not isinstance(weight, Tensor) or weight.dtype not in FP8_DTYPES or weight.ndim != 2:
        return None
    if not isinstance(scale, Tensor) or getattr(layer, "weight_block_size", None) is not None:
        return None
    h_out = weight.shape[1]
    if tuple(scale.shape) not in {(), (1,), (1, 1), (h_out,), (h_out, 1), (1, h_out)}:
        return None
    return weight.detach().t(), scale.detach().float().reshape(-1).expand(h_out).contiguous()


@torch.inference_mode()
def is_readable_fp8(layer: Any, columns: int, dtype: torch.dtype) -> bool:
    """Whether `quantized_weight` gives the weight that a layer computes with: kernels may repack it in its place.

    Args:
        layer: vLLM's linear layer.
        columns: H_in on this rank.
        dtype: model dtype.
    """
    stored = quantized_weight(layer)
    if stored is None or stored[0].shape[1] != columns:
        return False
    return _fp8_error(layer, *stored, dtype) <= FP8_TOLERANCE


@torch.inference_mode()
def why_not_recoverable(layer: Any, columns: int, dtype: torch.dtype) -> str | None:
    """Why the products of unit vectors do not give the weight of a quantized layer; None when they do.

    Args:
        layer: vLLM's linear layer.
        columns: H_in on this rank.
        dtype: model dtype.
    """
    name = method_name(layer)
    linear = _deviation(layer, columns, dtype) <= _tolerance(dtype)
    if linear and name in KNOWN_METHODS:
        return None
    if linear:
        why, remedy = "a method that smoa-serve does not know", "serve a base of a known one"
    else:
        why, remedy = "which rounds activations too: its weight cannot be read exactly", "serve another base"
        if name in INT4_METHODS and _device(layer).type == "cpu":
            remedy = "start the server with VLLM_CPU_INT4_W4A8=0"
    return (
        f"the base weight is quantized by {name}, {why}; {remedy}. SMoA and HiRA adapters work on GPTQ, AWQ, "
        "compressed-tensors with 16-bit activations, fp8 with a scale per tensor or output, and unquantized bases"
    )


def _deviation(layer: Any, columns: int, dtype: torch.dtype) -> float:
    """How far a layer is from being linear: its worst relative error against its own answers to unit vectors."""
    first, count = _probe_range(columns)
    unit = torch.eye(count, columns, dtype=dtype, device=_device(layer)).roll(first, 1)
    weight = layer.quant_method.apply(layer, unit, None).t()  # [H_out, count]
    values = _probe_values(count)
    # Where it weighs least, the others weigh most.
    values[1, int(weight.float().norm(dim=0).argmin())] = OUTLIER
    return _worst_error(layer, values, first, columns, weight)


def _fp8_error(layer: Any, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> float:
    """The worst relative error of a layer against the weight as it was read: that of fp8 activations, or huge."""
    h_out, columns = weight.shape
    first, count = _probe_range(columns)
    rows, cols = torch.arange(h_out, device=weight.device), torch.arange(first, first + count, device=weight.device)
    input_scale = getattr(layer, "input_scale", None)
    # A recorded activation scale fixes the range: stay inside it.
    amplitude = float(input_scale.max()) * 64 if isinstance(input_scale, Tensor) else 1.0
    read = dequantized(picked(weight, rows, cols), scale, dtype)
    return _worst_error(layer, _probe_values(count) * amplitude, first, columns, read)


def _probe_range(columns: int) -> tuple[int, int]:
    count = min(PROBE_COLUMNS, columns)
    return (columns - count) // 2 // PROBE_COLUMNS * PROBE_COLUMNS, count


def _probe_values(count: int) -> Tensor:
    """Two rows of input, [2, count], with the full precision of their mantissas."""
    return torch.rand(2, count, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _worst_error(layer: Any, values: Tensor, first: int, columns: int, weight: Tensor) -> float:
    """A layer's answers to rows of `values` [n, count] at columns from `first` on, against weight [H_out, count]."""
    probed = slice(first, first + values.shape[1])
    rows = torch.zeros(values.shape[0], columns, dtype=weight.dtype, device=weight.device)
    rows[:, probed] = values.to(weight.device, weight.dtype)
    found = layer.quant_method.apply(layer, rows, None).double()
    expected = rows[:, probed].double() @ weight.double().t()
    error = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    return float(error.nan_to_num(nan=float("inf")).max())


def _tolerance(dtype: torch.dtype) -> float:
    """Above what rounding weights and outputs to `dtype` makes, and below what 8-bit integers lose in the probe."""
    return max(0.75 * torch.finfo(dtype).eps, 2.0**-10)


def _device(layer: Any) -> torch.device:
    return next((p.device for p in layer.parameters()), torch.device("cpu"))


def report(layers: Iterable[Any], dtype: torch.dtype) -> None:
    """Say at start-up what updates cost beside a quantized base, or that it takes none.

    Args:
        layers: wrapped layers with a `smoa_weight`, in any order.
        dtype: model dtype.
    """
    kinds: dict[str, list[Any]] = {}
    for layer in layers:
        if is_quantized(layer.base_layer):
            kinds.setdefault(method_name(layer.base_layer), []).append(layer)
    for name, alike in kinds.items():
        # One of a kind: testing a layer takes time, and each is tested when an adapter targets it.
        refusal = alike[0].smoa_weight.refusal()
        if refusal is not None:
            logger.warning("%d base layers take no SMoA and HiRA adapters: %s", len(alike), refusal)
            continue
        held = sum(p.nbytes for layer in alike for p in layer.base_layer.parameters())
        whole = sum(layer.smoa_weight.dequantized_bytes for layer in alike)
        logger.info(
            "%d base layers are quantized by %s and hold %s. SMoA and HiRA adapters keep dequantized blocks (%s) beside"
            " them: up to %s / K for each set of block ids in use (HiRA: K = 1)",
            len(alike),
            name,
            _size(held),
            str(dtype).removeprefix("torch."),
            _size(whole),
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.2f} MiB"
