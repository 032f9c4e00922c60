"""Which modules of a checkpoint are stored quantized, and the shapes of the weights that they stand for."""

from collections.abc import Mapping
from typing import Any

from ..files.tensors import StoredTensor

WORD_BITS = 32


def quantized_shapes(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Every quantized linear module of a checkpoint.

    Args:
        tensors: stored tensors by name.
        config: parsed config.json, whose `quantization_config` names the bits of a number.

    Returns:
        Module -> (H_out, H_in) of its weight, in file order. Layouts: GPTQ and AWQ (`qweight`), compressed-tensors
        (`weight_packed`), and integers or fp8 under the plain name `weight`.
    """
    settings = config.get("quantization_config") or {}
    found: dict[str, tuple[int, int]] = {}
    for name, stored in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            found[module] = _words_shape(module, tensors, int(settings.get("bits") or settings.get("w_bit") or 4))
        elif part == "weight_packed":
            found[module] = _packed_shape(module, tensors)
        elif part == "weight" and len(stored.shape) == 2 and not stored.is_float:
            found[module] = (stored.shape[0], stored.shape[1])
    return found


def _words_shape(module: str, tensors: Mapping[str, StoredTensor], bits: int) -> tuple[int, int]:
    """GPTQ packs the rows of W transposed, [H_in / n, H_out]; AWQ its columns, [H_in, H_out / n]."""
    rows, cols = tensors[f"{module}.qweight"].shape
    scales, group_index = tensors.get(f"{module}.scales"), tensors.get(f"{module}.g_idx")
    if scales is not None and scales.shape[-1] != cols:
        return scales.shape[-1], rows
    return cols, group_index.shape[0] if group_index is not None else rows * WORD_BITS // bits


def _packed_shape(module: str, tensors: Mapping[str, StoredTensor]) -> tuple[int, int]:
    shape = tensors.get(f"{module}.weight_shape")
    if shape is None:
        rows, cols = tensors[f"{module}.weight_packed"].shape
        return rows, cols * WORD_BITS // 4
    rows, cols = (int(size) for size in shape.read().tolist())
    return rows, cols
