"""Tensor names of published SMoA and of PEFT HiRA files → module, side, block; and which adapter of a file is meant."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from ..base.checkpoint import BaseCheckpoint
from ..errors import AdapterError
from .source import Source

PREFIX = "base_model.model."
# "…lora_A.0.weight" is the adapter the file was saved for, "…lora_A.other.0.weight" another one in the same file.
SMOA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.(?:(?P<name>[^.]+)\.)?(?P<block>[0-9]{1,5})\.weight")
HIRA_KEY = re.compile(r"(?P<module>.+)\.hira_(?P<side>[AB])(?:\.(?P<name>[^.]+))?")
LORA_EMBEDDING_KEY = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.(?P<name>[^.]+))?")
LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<name>[^.]+))?\.weight")
FACTOR_KEYS = {"SMoA": SMOA_KEY, "LoRA": LORA_KEY, "HiRA": HIRA_KEY}  # in this order: a number may be a name

Slot = tuple[str, int]
"""(side, block): side "A" or "B"; block 0 for HiRA."""


T = TypeVar("T")


@dataclass
class FactorSet:
    """The tensors of one weight file, sorted out.

    Attributes:
        adapters: adapter name (None: the one the file was saved for) → module → slot → tensor.
        others: tensors that are no factors, by their name without the model prefix.
        twice: names that several tensors have without prefixes.
    """

    adapters: dict[str | None, dict[str, dict[Slot, Tensor]]] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)


def bare_name(key: str) -> str:
    """A tensor's name without PEFT's prefix and without what `torch.compile` puts before a module."""
    return key.replace("_orig_mod.", "").removeprefix(PREFIX)


def sort_tensors(tensors: Mapping[str, Tensor], pattern: re.Pattern[str]) -> FactorSet:
    """Tell factors from other tensors by `pattern` (one of the keys above)."""
    names = Counter(map(bare_name, tensors))
    found = FactorSet(twice=[name for name, times in names.items() if times > 1])
    for key, tensor in tensors.items():
        name = bare_name(key)
        match = pattern.fullmatch(name)
        if match is None:
            found.others[name] = tensor
            continue
        parts = match.groupdict()
        modules = found.adapters.setdefault(parts["name"], {})
        modules.setdefault(parts["module"], {})[parts["side"], int(parts.get("block") or 0)] = tensor
    return found


def pick_adapter(source: Source, found: FactorSet) -> dict[str, dict[Slot, Tensor]]:
    """The tensors of the adapter that is meant.

    Args:
        source: for messages, for the folder's name and for `LoadOptions.adapter_name`.
        found: what the file holds.

    Returns:
        module → slot → tensor; empty when the file holds no factors.

    Raises:
        AdapterError: the file holds several adapters and none was chosen, or not the one that was; or a factor twice.
    """
    if found.twice:
        raise AdapterError(source.name, [f"the file holds {name} twice, under several names" for name in found.twice])
    if not found.adapters:
        return {}
    name = source.options.adapter_name
    if name is not None and name in found.adapters:
        return found.adapters[name]
    if None in found.adapters and name in {None, "default", source.folder.name}:
        return found.adapters[None]
    names = sorted(str(n) for n in found.adapters if n is not None)
    if name is not None:
        raise AdapterError(source.name, f"there is no adapter {name!r}; this file holds {', '.join(names) or 'one'}")
    if len(names) > 1:
        raise AdapterError(source.name, f"this file holds {', '.join(names)}: choose one with --adapter-name")
    return found.adapters[names[0]]


def named_as_stored(source: Source, modules: Mapping[str, T], base: BaseCheckpoint | None) -> dict[str, T]:
    """The same under the names that the base stores its modules under: releases of transformers wrap a language model
    in different ways. A module that the base lacks keeps its name.

    Raises:
        AdapterError: two modules of the file are one module of the base.
    """
    if base is None:
        return dict(modules)
    names = {module: base.find(module) or module for module in modules}
    twice = [name for name, times in Counter(names.values()).items() if times > 1]
    if twice:
        raise AdapterError(source.name, [f"the file holds {name} twice, under several names" for name in twice])
    return {names[module]: factors for module, factors in modules.items()}


def foreign_reasons(source: Source, names: Iterable[str]) -> list[str]:
    """Why tensors that are no factors of the kind named by `peft_type` make a file unusable."""
    kind = source.config.get("peft_type")
    reasons = []
    for name in sorted(names):
        other = next((what for what, key in FACTOR_KEYS.items() if key.fullmatch(name)), None)
        if other is not None:
            reasons.append(f"{name} is a {other} tensor, but peft_type says {kind}")
        elif not source.is_full_state:
            reasons.append(f"{name} is no factor of a {kind} adapter")
    return reasons


def tensor_reasons(label: str, tensor: Tensor, shape: tuple[int, ...]) -> list[str]:
    """What is wrong with one factor: its shape, its dtype, its numbers."""
    if tuple(tensor.shape) != shape:
        return [f"{label} has shape {list(tensor.shape)}, expected {list(shape)}"]
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        return [f"{label} is {str(tensor.dtype).removeprefix('torch.')}, expected float32, float16 or bfloat16"]
    bad = int((~tensor.isfinite()).sum())
    if bad:
        return [f"{label}: {bad} of {tensor.numel()} numbers are not finite (NaN or Inf)"]
    # Only float64 holds more than float32, in which every factor is served.
    bad = int((~tensor.float().isfinite()).sum()) if tensor.dtype.itemsize > 4 else 0
    return [f"{label}: {bad} of {tensor.numel()} numbers are too large for float32"] if bad else []
