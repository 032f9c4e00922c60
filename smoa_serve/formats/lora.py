"""PEFT LoRA files: read, checked and merged here, but served by vLLM's own loader."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..base_checkpoint import BaseCheckpoint
from ..errors import AdapterError
from ..stored_tensors import tensor_bytes
from ..targets import key_reasons
from .config import HARMLESS
from .factor_keys import HIRA_KEY, LORA_KEY, PREFIX, SMOA_KEY, tensor_reasons
from .options import LoadOptions
from .source import Source

SMOA_ONLY_KEYS = ("num_blocks", "branch_ranks")


@dataclass(frozen=True, eq=False)
class LoraFiles:
    """A LoRA adapter as stored.

    Attributes:
        config: parsed adapter_config.json.
        tensors: name in the file → tensor.
    """

    config: Mapping[str, object]
    tensors: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        """Largest rank of any module."""
        return max(t.shape[0] for name, t in self.tensors.items() if ".lora_A." in name)

    @property
    def digest(self) -> str:
        """sha256 (hex) of what changes the maths: configuration and tensors, whatever the container."""
        config = {key: value for key, value in self.config.items() if key not in HARMLESS and value is not None}
        h = hashlib.sha256(b"lora\0" + json.dumps(config, sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            h.update(f"{name}\0{tensor.dtype}{tuple(tensor.shape)}".encode())
            h.update(tensor_bytes(tensor))
        return h.hexdigest()

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module → (lora_A [r, H_in], lora_B [H_out, r])."""
        a = {m["module"]: t for m, t in self.matches() if m["side"] == "A"}
        b = {m["module"]: t for m, t in self.matches() if m["side"] == "B"}
        return {module: (a[module], b[module]) for module in a}

    def matches(self) -> list[tuple[dict[str, str], Tensor]]:
        """(module, side and adapter name; tensor) of every factor."""
        found = ((LORA_KEY.fullmatch(name.removeprefix(PREFIX)), t) for name, t in self.tensors.items())
        return [(match.groupdict(), t) for match, t in found if match]


def load_lora(source: Source, base: BaseCheckpoint | None, options: LoadOptions) -> LoraFiles:
    """Read a PEFT LoRA adapter and check what would make vLLM serve something else than was trained.

    Args:
        source: where it lies.
        base: when given, every tensor of a plain linear layer is bound against it.
        options: `allow_pickle` and `max_rank` apply.

    Raises:
        AdapterError: with every reason found.
    """
    files = LoraFiles(source.config, source.read(options))
    reasons = [
        f"adapter_config.json has {key!r}: this is a SMoA adapter, but peft_type says LORA"
        for key in SMOA_ONLY_KEYS
        if source.config.get(key) is not None
    ]
    reasons += _name_reasons(files.tensors)
    if not any(".lora_A." in name for name in files.tensors):
        reasons.append("the file holds no LoRA factors, nothing would be bound")
    if reasons:
        raise AdapterError(source.name, reasons)
    reasons = _pair_reasons(files)
    complete = not reasons
    reasons += _number_reasons(files) + _pattern_reasons(files)
    if complete and base is not None:
        reasons += [reason for reason in _binding_reasons(files, base) if reason not in reasons]
    if complete and options.max_rank is not None and files.rank > options.max_rank:
        reasons.append(f"it has rank {files.rank}, the limit is {options.max_rank} (--max-lora-rank)")
    if reasons:
        raise AdapterError(source.name, reasons)
    return files


def _name_reasons(names: Mapping[str, Tensor]) -> list[str]:
    bare = sorted(name.removeprefix(PREFIX) for name in names)
    foreign = [n for n in bare if SMOA_KEY.fullmatch(n)]
    reasons = [f"{name} is a SMoA tensor, but peft_type says LORA" for name in foreign]
    return reasons + [f"{name} is a HiRA tensor, but peft_type says LORA" for name in bare if HIRA_KEY.fullmatch(name)]


def _pair_reasons(files: LoraFiles) -> list[str]:
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in files.tensors.items():
        match = LORA_KEY.fullmatch(name.removeprefix(PREFIX))
        if match:
            sides.setdefault(match["module"], {})[match["side"]] = tensor
    reasons = []
    for module, pair in sides.items():
        reasons += [f"{module}.lora_{side} is missing" for side in "AB" if side not in pair]
        for side, tensor in pair.items():
            if tensor.dim() != 2:
                reasons.append(f"{module}.lora_{side} has shape {list(tensor.shape)}, expected a matrix")
    return reasons


def _pattern_reasons(files: LoraFiles) -> list[str]:
    """Expressions that vLLM, which has no time limit, could not match against this adapter's modules."""
    patterns = {key: files.config.get(key) for key in ("rank_pattern", "alpha_pattern")}
    keys = {key: value for key, value in patterns.items() if isinstance(value, dict)}
    return key_reasons(keys, {match["module"] for match, _ in files.matches()}) if any(keys.values()) else []


def _number_reasons(files: LoraFiles) -> list[str]:
    reasons = []
    for match, tensor in files.matches():
        reasons += tensor_reasons(f"{match['module']}.lora_{match['side']}", tensor, tuple(tensor.shape))
    return reasons


def _binding_reasons(files: LoraFiles, base: BaseCheckpoint) -> list[str]:
    reasons = []
    for module, (a, b) in files.factors().items():
        # Fused experts and the output layer are vLLM's to judge: their names in memory and on disk differ.
        if ".experts." in f".{module}." or module.rpartition(".")[2] in {"lm_head", "embed_out"}:
            continue
        if module not in base.linear_modules:
            reasons.append(base.why_not_linear(module))
            continue
        rows, cols = base.shape(module)
        reasons += tensor_reasons(f"{module}.lora_A", a, (a.shape[0], cols))
        reasons += tensor_reasons(f"{module}.lora_B", b, (rows, a.shape[0]))
    return reasons
