"""Tensors in safetensors files, by their headers: nothing is read until it is asked for."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file
from torch import Tensor

from ..errors import BaseModelError
from .opened import OpenedFile

FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies and what its header says.

    Attributes:
        name: key in the file.
        file: the safetensors file.
        shape: as stored.
        dtype: safetensors name, e.g. "BF16".
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        """The tensor as stored, on the CPU.

        Raises:
            BaseModelError: the file cannot be read any more.
        """
        try:
            with safe_open(self.file, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(self.name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise BaseModelError(f"{self.file} cannot be read: {error}") from error

    @property
    def is_float(self) -> bool:
        """True for float64, float32, float16 and bfloat16."""
        return self.dtype in FLOAT_DTYPES

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        bits = re.search(r"\d+", self.dtype)  # "BF16", "F8_E4M3", "I64"; only "BOOL" has no number
        return self.numel * (int(bits.group()) if bits else 8) // 8


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, row-major, without a copy where it is contiguous."""
    if tensor.numel() == 0:
        return memoryview(b"")
    array: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the safetensors files in a folder, one file or sharded, in file order.

    Raises:
        BaseModelError: there is none, or files and index do not agree.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BaseModelError(f"base model {folder}: {index.name} cannot be read: {error}") from error
        files = sorted({folder / name for name in weight_map.values()})
    else:
        weight_map = {}
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = f"files named by the index are missing: {', '.join(missing)}" if missing else "no *.safetensors file"
        raise BaseModelError(f"base model {folder}: {what}; only safetensors checkpoints are read")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                    view = handle.get_slice(name)
                    tensors[name] = StoredTensor(name, file, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise BaseModelError(f"base model {folder}: {file.name} cannot be read: {error}") from error
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise BaseModelError(f"base model {folder}: tensors named by the index are missing: {', '.join(absent[:5])}")
    return tensors


def all_tensors(file: OpenedFile) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by name in order. Those of a large file are mapped: they change with it.

    Raises:
        SafetensorError, OSError: it cannot be read.
    """
    if file.is_large:
        return load_file(file.path_by_number)
    # `load_file` keeps two numbers of each tensor for ever (safetensors 0.8), and servers go on reading adapters.
    with file.reading() as handle:
        data = handle.read()
    return dict(sorted(load(data).items()))
