"""Tiny Llama checkpoints, quantized by rounding to nearest, beside the float checkpoint of what they hold.

Each format is packed here as its own tools write it: AutoGPTQ, AutoAWQ, compressed-tensors, and fp8 as vLLM's `fp8`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smoa_serve.testing import random_base

GROUP = 32
# vLLM's 4-bit CPU kernel takes sizes that are multiples of 32.
HIDDEN, INTERMEDIATE, VOCABULARY = 128, 192, 128
# AutoAWQ puts columns 0, 2, 4, 6, 1, 3, 5, 7 of eight into one word, lowest bits first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLAIN_ORDER = tuple(range(8))
Packed = tuple[dict[str, Tensor], Tensor]
"""Tensors of a module by the end of their name, and the weight [H_out, H_in] float32 they stand for."""


@dataclass(frozen=True)
class Format:
    """How a quantized checkpoint is written.

    Attributes:
        config: `quantization_config` of config.json.
        pack: weight [H_out, H_in] and scale dtype -> its tensors and what they stand for.
    """

    config: Mapping[str, Any]
    pack: Callable[[Tensor, torch.dtype], Packed]


def make_float(folder: Path, dtype: torch.dtype, seed: int = 0) -> Path:
    """A random tiny Llama whose answers depend on every layer."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return random_base(folder, seed=seed, dtype=dtype, tokenizer=False, **sizes, **heads)


def quantize(source: Path, folder: Path, kind: str) -> tuple[Path, Path]:
    """Write `source` in a quantized format.

    Args:
        source: from `make_float`.
        folder: where to; made.
        kind: a key of `FORMATS`.

    Returns:
        The quantized checkpoint, and the float checkpoint of the same numbers.
    """
    layout = FORMATS[kind]
    tensors = load_file(source / "model.safetensors")
    packed, plain = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight"):
            continue
        parts, stands_for = layout.pack(weight.float(), weight.dtype)
        plain[name] = stands_for.to(weight.dtype)
        module = name.removesuffix(".weight")
        del packed[name]
        packed |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    config = json.loads((source / "config.json").read_text())
    written = {"quantized": (packed, config | {"quantization_config": dict(layout.config)}), "float": (plain, config)}
    for part, (contents, settings) in written.items():
        (folder / part).mkdir(parents=True)
        save_file(contents, folder / part / "model.safetensors", metadata={"format": "pt"})
        (folder / part / "config.json").write_text(json.dumps(settings))
    return folder / "quantized", folder / "float"


def _grouped(weight: Tensor) -> Tensor:
    """[H_out, H_in] -> [H_out, groups, GROUP]."""
    return weight.view(weight.shape[0], -1, GROUP)


def _symmetric(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned 4-bit numbers [H_out, H_in] around 8, scales [H_out, groups], and the weight they stand for."""
    grouped = _grouped(weight)
    scale = (grouped.abs().amax(-1, keepdim=True) / 7).to(dtype)
    signed = (grouped / scale.float()).round().clamp(-8, 7)
    return (signed + 8).int().view_as(weight), scale.squeeze(-1), (signed * scale.float()).view_as(weight)


def _asymmetric(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unsigned 4-bit numbers, zero points [H_out, groups], scales, and the weight they stand for."""
    grouped = _grouped(weight)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = ((high - low) / 15).to(dtype)
    zero = (-low / scale.float()).round().clamp(0, 15)
    number = (grouped / scale.float() + zero).round().clamp(0, 15)
    stands_for = ((number - zero) * scale.float()).view_as(weight)
    return number.int().view_as(weight), zero.squeeze(-1).int(), scale.squeeze(-1), stands_for


def _words(numbers: Tensor, order: tuple[int, ...] = PLAIN_ORDER) -> Tensor:
    """[..., 8 n] 4-bit numbers -> [..., n] int32, `order` from the lowest bits up."""
    eights = numbers.view(*numbers.shape[:-1], -1, 8).long()
    words = sum(eights[..., place] << (4 * shift) for shift, place in enumerate(order))
    assert isinstance(words, Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()


def _gptq(weight: Tensor, dtype: torch.dtype) -> Packed:
    numbers, scale, stands_for = _symmetric(weight, dtype)
    zeros = torch.full((scale.shape[1], scale.shape[0]), 8 - 1)  # the format stores zero points less one
    parts = {
        "qweight": _words(numbers).t().contiguous(),
        "qzeros": _words(zeros),
        "scales": scale.t().contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }
    return parts, stands_for


def _awq(weight: Tensor, dtype: torch.dtype) -> Packed:
    numbers, zero, scale, stands_for = _asymmetric(weight, dtype)
    parts = {
        "qweight": _words(numbers.t().contiguous(), AWQ_ORDER),
        "qzeros": _words(zero.t().contiguous(), AWQ_ORDER),
        "scales": scale.t().contiguous(),
    }
    return parts, stands_for


def _pack_quantized(weight: Tensor, dtype: torch.dtype) -> Packed:
    numbers, scale, stands_for = _symmetric(weight, dtype)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": _words(numbers), "weight_scale": scale, "weight_shape": shape}, stands_for


def _int8(weight: Tensor, dtype: torch.dtype) -> Packed:
    scale = weight.abs().amax(1, keepdim=True) / 127
    numbers = (weight / scale).round()
    return {"weight": numbers.to(torch.int8), "weight_scale": scale}, numbers * scale


def _fp8(weight: Tensor, scale: Tensor) -> Packed:
    numbers = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale


def _fp8_tensor(weight: Tensor, dtype: torch.dtype) -> Packed:
    # One scale for all layers: vLLM quantizes packed layers again where their scales differ.
    return _fp8(weight, torch.tensor(0.01))


def _fp8_static(weight: Tensor, dtype: torch.dtype) -> Packed:
    parts, stands_for = _fp8_tensor(weight, dtype)
    return parts | {"input_scale": torch.tensor(0.05)}, stands_for


def _fp8_channel(weight: Tensor, dtype: torch.dtype) -> Packed:
    return _fp8(weight, weight.abs().amax(1, keepdim=True) / 448)


def _fp8_blocks(weight: Tensor, dtype: torch.dtype) -> Packed:
    parts, stands_for = _fp8(weight, torch.tensor(0.01))
    blocks = torch.full([-(-size // 128) for size in weight.shape], 0.01)
    return {"weight": parts["weight"], "weight_scale_inv": blocks}, stands_for


def _compressed(form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights}}
    if inputs is not None:
        group["input_activations"] = {"symmetric": True, "dynamic": True, **inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
_INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
_FP8_CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel"}
_FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}

FORMATS = {
    "gptq": Format(_GPTQ, _gptq),
    "awq": Format({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, _awq),
    "w4a16": Format(_compressed("pack-quantized", _INT4), _pack_quantized),
    "w8a8": Format(_compressed("int-quantized", _INT8, {"num_bits": 8, "type": "int", "strategy": "token"}), _int8),
    "fp8": Format(_FP8, _fp8_tensor),
    "fp8-static": Format(_FP8 | {"activation_scheme": "static"}, _fp8_static),
    "fp8-channel": Format(
        _compressed("float-quantized", _FP8_CHANNEL, {"num_bits": 8, "type": "float", "strategy": "token"}),
        _fp8_channel,
    ),
    "fp8-w8a16": Format(_compressed("float-quantized", _FP8_CHANNEL), _fp8_channel),
    "fp8-blocks": Format(_FP8 | {"weight_block_size": [128, 128]}, _fp8_blocks),
}
