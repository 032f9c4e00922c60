"""PEFT LoRA files: verified before vLLM's own loader sees them, and rewritten so that it cannot read them otherwise.

What a LoRA file computes depends on its configuration. Here each module's scale is multiplied into its B, and the
private copy says `r = lora_alpha` without patterns: every release of vLLM then serves what was verified.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..base.checkpoint import OUTPUT_MODULES, BaseCheckpoint, is_embedding
from ..errors import AdapterError
from ..files.tensors import tensor_bytes
from .canonical import Factors
from .keys import (
    LORA_EMBEDDING_KEY,
    LORA_KEY,
    PREFIX,
    SMOA_KEY,
    Slot,
    bare_name,
    foreign_reasons,
    named_as_stored,
    pick_adapter,
    sort_tensors,
    tensor_reasons,
)
from .lora_config import EXPERT_PARAMETERS, LoraConfig, pattern_name, read_lora_config
from .model import Adapter, AdapterKind, Delta
from .source import CONFIG_NAME, WEIGHTS_NAME, AdapterFile, LoadOptions, Source
from .summary import Fit, LayerSummary


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A verified LoRA adapter with its scales multiplied into B.

    Attributes:
        pairs: module → (A [r, H_in], B [H_out, r]) of linear layers; fused experts stack theirs along r.
        embeddings: module → (A [r, vocabulary], B [H, r]).
        rank: largest rank of any module.
        base_model: as the configuration names it.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    embeddings: dict[str, tuple[Tensor, Tensor]]
    rank: int
    base_model: str | None
    order: ClassVar[None] = None

    @property
    def config(self) -> dict[str, object]:
        """adapter_config.json of the private copy: every module has the scale 1, with or without the patterns, which
        releases of vLLM up to 0.31 do not read."""
        ranks = {
            re.escape(module): int(a.shape[0])
            for module, (a, _) in sorted((self.pairs | self.embeddings).items())
            if a.shape[0] != self.rank and not _is_fused(module)
        }
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": self.base_model,
            "r": self.rank,
            "lora_alpha": self.rank,
            "target_modules": sorted(pattern_name(module) for module in (*self.pairs, *self.embeddings)),
            "bias": "none",
        }
        return config | ({"rank_pattern": ranks, "alpha_pattern": ranks} if ranks else {})

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module → (lora_A [r, H_in], lora_B [H_out, r]) of linear layers and embeddings."""
        return {**self.pairs, **self.embeddings}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name in the private copy → tensor."""
        found: dict[str, Tensor] = {}
        for module, (a, b) in self.pairs.items():
            found |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
        for module, (a, b) in self.embeddings.items():
            found |= {f"{PREFIX}{module}.lora_embedding_A": a, f"{PREFIX}{module}.lora_embedding_B": b}
        return found

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of what is computed: modules, factors and scales, whatever the container."""
        h = hashlib.sha256(b"lora\0scaled\0")
        for name, tensor in sorted(self.tensors.items()):
            h.update(f"{name}\0{tensor.dtype}{tuple(tensor.shape)}".encode())
            h.update(tensor_bytes(tensor))
        return h.hexdigest()


class LoraFile(AdapterFile[LoraAdapter]):
    """A PEFT LoRA adapter: what is taken from it computes what PEFT's loading would. With a base, every tensor is bound
    against it, and modules get the names that it stores them under. Of the options, `allow_pickle`, `adapter_name` and
    `max_rank` apply.
    """

    kind = AdapterKind.LORA
    format = "lora"

    def slot_rank(self) -> int:
        """See AdapterFile."""
        pattern = self.source.config.get("rank_pattern")
        ranks = [self.source.config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
        return max((rank for rank in ranks if isinstance(rank, int)), default=0)

    def _read(self, base: BaseCheckpoint | None) -> LoraAdapter:
        source = self.source
        config, reasons = read_lora_config(source)
        linear, embeddings, others = _sorted_out(source)
        pairs = linear | embeddings
        reasons += _other_reasons(source, others, base)
        if not pairs:
            reasons.append("the file holds no LoRA factors, nothing would be bound")
        reasons += [
            f"{m}.lora_{side} is missing" for m, pair in pairs.items() for side in "AB" if (side, 0) not in pair
        ]
        if config is None:
            raise AdapterError(source.name, reasons)
        try:
            facts, idle = config.ranks_and_scalings(list(pairs))
            reasons += idle + _target_reasons(config, list(pairs), base)
        except re.error as error:
            reasons.append(f"adapter_config.json: no regular expression: {error}")
            raise AdapterError(source.name, reasons) from error
        pairs = {module: pair for module, pair in pairs.items() if len(pair) == 2}
        for module, pair in pairs.items():
            reasons += (_embedding_reasons if module in embeddings else _linear_reasons)(module, pair, base)
        scaled = {module: _scaled(pair, facts[module][1]) for module, pair in pairs.items()}
        reasons += _rank_reasons(pairs, facts, source.options) + _scale_reasons(pairs, scaled, facts)
        if config.fan_in_fan_out and base is not None and not any(base.is_transposed(module) for module in linear):
            reasons.append(
                "adapter_config.json: fan_in_fan_out is true, but this base stores its linear layers as [H_out, H_in]"
            )
        self._refuse(reasons)
        return LoraAdapter(
            pairs=named_as_stored(source, {module: scaled[module] for module in linear}, base),
            embeddings=named_as_stored(source, {module: scaled[module] for module in embeddings}, base),
            rank=max(rank for rank, _ in facts.values()),
            base_model=config.base_model_name_or_path,
        )

    def layers(self, base: BaseCheckpoint | None = None) -> list[LayerSummary]:
        """See AdapterFile. Fused experts have the rank of one of them."""
        lora, layers = self.read(base), []
        for name, (a, b) in lora.factors().items():
            rank = lora.rank if _is_fused(name) else a.shape[0]
            size, nbytes = a.numel() + b.numel(), a.nbytes + b.nbytes
            layers.append(LayerSummary(name, (b.shape[0], a.shape[1]), (rank,), 0.0, size, nbytes))
        return layers

    def check(self, base: BaseCheckpoint, dtype: str | None = None) -> Fit:
        """See AdapterFile. Names and shapes are all that its file tells of a base."""
        return Fit(len(self.read(base).factors()), exact=False, order_error=0.0)

    def adapter(self, base: BaseCheckpoint | None = None) -> Adapter:
        """See AdapterFile."""
        raise AdapterError(self.source.name, "it is a LoRA adapter: vLLM reads those itself")

    def deltas(self, base: BaseCheckpoint) -> dict[str, Delta]:
        """See AdapterFile."""
        lora = self.read(base)
        if lora.embeddings:
            names = ", ".join(lora.embeddings)
            raise AdapterError(self.source.name, f"embeddings ({names}) cannot be merged here; use peft")
        return {name: _product(a, b) for name, (a, b) in lora.pairs.items()}

    def write_private(self, folder: Path, base: BaseCheckpoint) -> None:
        """See AdapterFile: as PEFT writes it, the scales multiplied in."""
        lora = self.read(base)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in lora.tensors.items()}, folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_text(json.dumps(lora.config, indent=2) + "\n", encoding="utf-8")


def _product(a: Tensor, b: Tensor) -> Delta:
    return lambda weight: b.float() @ a.float()


def _sorted_out(
    source: Source,
) -> tuple[dict[str, dict[Slot, Tensor]], dict[str, dict[Slot, Tensor]], dict[str, Tensor]]:
    """Factors of linear layers, factors of embeddings, and what else the file holds by its names there."""
    tensors = source.tensors()
    # A block number looks like an adapter's name.
    blocks = {name for name in tensors if SMOA_KEY.fullmatch(bare_name(name))}
    found = sort_tensors({name: t for name, t in tensors.items() if name not in blocks}, LORA_KEY)
    rest = sort_tensors(found.others, LORA_EMBEDDING_KEY)
    linear = pick_adapter(source, found)
    embeddings = pick_adapter(source, rest)
    others = rest.others | {bare_name(name): tensors[name] for name in blocks}
    return linear, embeddings, others


def _other_reasons(source: Source, others: Mapping[str, Tensor], base: BaseCheckpoint | None) -> list[str]:
    """PEFT puts embeddings beside an adapter on them, and a Trainer the whole base: copies of this base only."""
    foreign, reasons = [], []
    for name, tensor in others.items():
        plain = name.replace(".base_layer.", ".")
        stored = None if base is None else base.stored_copy(plain)
        if stored is not None:
            if stored.shape != tuple(tensor.shape) or not torch.equal(stored.read().to(tensor.dtype), tensor):
                reasons.append(f"{name} is not the base's: the adapter was trained on another, or changed it")
        elif ".lora_" in name and not SMOA_KEY.fullmatch(name):
            reasons.append(f"{name} is no factor of a LORA adapter")
        elif base is not None or not is_embedding(plain.removesuffix(".weight")):
            foreign.append(name)
    return reasons + foreign_reasons(source, foreign)


def _target_reasons(config: LoraConfig, modules: list[str], base: BaseCheckpoint | None) -> list[str]:
    """PEFT drops factors of a module that is no target. A target without factors means that the file is not whole."""
    reasons = [
        f"the file has factors for {module}, which target_modules does not name"
        for module in modules
        if not config.is_target(pattern_name(module))
    ]
    if base is None or config.takes_all:
        return reasons
    bound = {base.find(module): module for module in modules}
    # A base may store more than is trained (towers, layers for speculation): only lists of layers that the file knows.
    lists = {_in_list(name)[0]: _in_list(module)[0] for name, module in bound.items() if name is not None}
    for name in base.linear_modules:
        layers, index, rest = _in_list(name)
        if index is None or layers not in lists or index >= base.num_layers or _is_expert(name) or _is_router(name):
            continue
        if name not in bound and config.is_target(f"{lists[layers]}{index}.{rest}"):
            reasons.append(f"{name} is a target, but the file has no factors for it")
    return reasons


def _in_list(module: str) -> tuple[str, int | None, str]:
    """("model.layers.", 3, "mlp.up_proj") of "model.layers.3.mlp.up_proj"."""
    match = re.fullmatch(r"((?:[^.]+\.)*?)(\d+)\.(.+)", module)
    return (match[1], int(match[2]), match[3]) if match else ("", None, module)


def _is_fused(module: str) -> bool:
    return module.endswith(tuple(EXPERT_PARAMETERS))


def _is_expert(module: str) -> bool:
    """Part of a mixture of experts, whose names and shapes in memory and on disk differ: the engine's to bind."""
    return ".experts." in f".{module}."


def _is_router(module: str) -> bool:
    """No linear layer for PEFT, though its weight is a matrix."""
    return module.rpartition(".")[2] in {"gate", "router"}


def _linear_reasons(module: str, pair: Factors, base: BaseCheckpoint | None) -> list[str]:
    a, b = pair["A", 0], pair["B", 0]
    last = module.rpartition(".")[2]
    if last in OUTPUT_MODULES and _in_list(module)[1] is None:
        return [f"{module} is the output head; adapters on it are not supported"]
    shape = None
    if base is not None and not _is_expert(module):
        name = base.find(module)
        if name is None or name not in base.linear_modules:
            return [base.why_not_linear(name or module)]
        shape = base.shape(name)
    return _factor_reasons(module, a, b, shape)


def _embedding_reasons(module: str, pair: Factors, base: BaseCheckpoint | None) -> list[str]:
    shape = None
    if base is not None:
        name = base.find(module)
        if name is None or not is_embedding(name):
            return [f"there is no embedding {module!r} in the base"]
        rows, cols = base.tensors[f"{name}.weight"].shape
        shape = (cols, rows)
    return _factor_reasons(module, pair["A", 0], pair["B", 0], shape)


def _factor_reasons(module: str, a: Tensor, b: Tensor, shape: tuple[int, int] | None) -> list[str]:
    """Shapes up to the rank, dtypes and numbers."""
    flat = [(side, t) for side, t in (("A", a), ("B", b)) if t.dim() != 2]
    if flat:
        return [f"{module}.lora_{side} has shape {list(t.shape)}, expected a matrix" for side, t in flat]
    rows, cols = shape or (b.shape[0], a.shape[1])
    reasons = tensor_reasons(f"{module}.lora_A", a, (a.shape[0], cols))
    return reasons + tensor_reasons(f"{module}.lora_B", b, (rows, a.shape[0]))


def _rank_reasons(
    pairs: Mapping[str, Factors], facts: Mapping[str, tuple[int, float]], options: LoadOptions
) -> list[str]:
    wrong: dict[tuple[int, int], list[str]] = {}
    for module, pair in pairs.items():
        rank, found = facts[module][0], pair["A", 0].shape[0] if pair["A", 0].dim() == 2 else None
        if found is not None and found != rank and not (_is_fused(module) and found and found % rank == 0):
            wrong.setdefault((rank, found), []).append(module)
    reasons = []
    for (rank, found), modules in wrong.items():
        others = f" and {len(modules) - 1} more modules" if len(modules) > 1 else ""
        reasons.append(f"{modules[0]}{others}: the factors have rank {found}, r or rank_pattern says {rank}")
    largest = max((rank for rank, _ in facts.values()), default=0)
    if any(_is_fused(module) and facts[module][0] != largest for module in pairs):
        reasons.append("fused experts of another rank than the other modules are not supported")
    if options.max_rank is not None and largest > options.max_rank:
        reasons.append(f"it has rank {largest}, the limit is {options.max_rank} (--max-lora-rank)")
    return reasons


def _scale_reasons(
    pairs: Mapping[str, Factors],
    scaled: Mapping[str, tuple[Tensor, Tensor]],
    facts: Mapping[str, tuple[int, float]],
) -> list[str]:
    """Numbers that are finite in the file and not in float32 with their scale."""
    return [
        f"{module}: with its scale of {facts[module][1]:.3g} the factors are not finite in float32"
        for module, factors in scaled.items()
        if not all(t.isfinite().all() for t in factors) and all(t.isfinite().all() for t in pairs[module].values())
    ]


def _scaled(pair: Factors, scaling: float) -> tuple[Tensor, Tensor]:
    """A, and B with the scale multiplied in: in its own dtype where that is exact, in float32 otherwise."""
    a, b = (t.float() if t.dtype == torch.float64 else t for t in (pair["A", 0], pair["B", 0]))
    if scaling == 1 or not b.is_floating_point():
        return a, b
    exact = b.double() * scaling
    narrow = exact.to(b.dtype)
    return a, narrow if torch.equal(narrow.double(), exact) else exact.float()
