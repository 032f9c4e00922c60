"""What `smoa-serve merge` does: base + adapter → an ordinary Hugging Face checkpoint, one tensor at a time."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from ..adapters import LoadOptions, open_adapter
from ..adapters.model import Delta
from ..adapters.rounding import Lost, too_much_lost
from ..base.checkpoint import BaseCheckpoint
from ..base.orders import Progress
from ..errors import AdapterError, BaseModelError, MergeLossError
from ..files.folder import new_folder
from ..files.tensors import StoredTensor
from .record import MergedAdapter, repeat_reasons, write_record

DEFAULT = LoadOptions()
SHARD_BYTES = 512 * 2**20  # what is held in memory at once, unless a single tensor is larger
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt"}


class Deltas(dict[str, Delta]):
    """Module -> its update, and which adapter they are of.

    Attributes:
        adapter: for the record in the merged checkpoint; None = nothing is recorded.
    """

    def __init__(self, deltas: Mapping[str, Delta], adapter: MergedAdapter | None = None) -> None:
        super().__init__(deltas)
        self.adapter = adapter


@dataclass(frozen=True)
class Merged:
    """A written checkpoint.

    Attributes:
        path: its folder.
        lost: module -> share of its update that rounding to the weight's dtype removed.
    """

    path: Path
    lost: dict[str, float]


def load_deltas(
    path: str | Path, base: BaseCheckpoint, options: LoadOptions = DEFAULT, *, progress: Progress | None = None
) -> Deltas:
    """The dense update of every module of an adapter, as functions of the weight.

    Args:
        path: SMoA, HiRA or plain LoRA adapter.
        base: base model it was trained on.
        options: see LoadOptions.
        progress: called while spectral orders are computed.

    Raises:
        AdapterError: it cannot be read, does not fit, or is a LoRA variant with another formula.
    """
    file = open_adapter(path, options, progress=progress)
    return Deltas(file.deltas(base), MergedAdapter.of(file.source, file.summary(base)))


def merge(
    base: BaseCheckpoint,
    deltas: Mapping[str, Delta],
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    max_lost: float | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Write base + update as a checkpoint of its own. Memory is bounded by one shard and one layer's update.

    Args:
        base: base model.
        deltas: from `load_deltas`.
        out: new or empty folder.
        dtype: "float32", "bfloat16" or "float16" for every float tensor; as stored by default. The sum is formed in
            float32 and rounded once.
        shard_bytes: size of the files written.
        max_lost: largest share of a layer's update that rounding may remove; None = any.
        force: merge also what the base says it holds, or what was trained on another base.
        progress: called as (tensor, bytes done, bytes in all).

    Raises:
        BaseModelError: the base is quantized.
        AdapterError: the base is a merged checkpoint, and the adapter is in it or was trained on another base.
        MergeLossError: rounding removes more than `max_lost`, or a weight is not finite then; nothing is written.
        ConfigError: `out` is in use.
    """
    if base.is_quantized:
        raise BaseModelError(f"base model {base.path.name!r} is quantized: merge into the original weights")
    record = deltas.adapter if isinstance(deltas, Deltas) else None
    repeated = [] if record is None or force else repeat_reasons(base, record)
    if repeated:
        raise AdapterError(record.name if record else out, [*repeated, "with --force it is merged all the same"])
    updates = {base.stored(name).name: (name, delta) for name, delta in deltas.items()}
    with new_folder(out) as folder:
        lost = _write_tensors(base, updates, folder, dtype, shard_bytes, progress)
        reasons = too_much_lost(lost, max_lost, "choose a wider --dtype")
        if reasons:
            raise MergeLossError("; ".join(reasons))
        _copy_companions(base.path, folder)
        _write_config(base, folder, dtype)
        if record is not None:
            write_record(base, record, folder)
    return Merged(Path(out), lost)


def _write_tensors(
    base: BaseCheckpoint,
    updates: Mapping[str, tuple[str, Delta]],
    folder: Path,
    dtype: str | None,
    shard_bytes: int,
    progress: Progress | None,
) -> dict[str, float]:
    """Returns module -> share of its update that was lost."""

    def size(stored: StoredTensor) -> int:
        converted = dtype is not None and stored.is_float
        return stored.numel * getattr(torch, str(dtype)).itemsize if converted else stored.nbytes

    plan = split_state_dict_into_shards_factory(
        dict(base.tensors),
        get_storage_size=size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    total = sum(size(stored) for stored in base.tensors.values())
    done = 0
    lost: dict[str, float] = {}
    for file, names in plan.filename_to_tensors.items():
        tensors = {}
        for name in names:
            if progress:
                progress(name, done, total)
            tensors[name] = _merged(base, base.tensors[name], updates.get(name), dtype, lost)
            done += size(base.tensors[name])
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if progress:
        progress("", total, total)
    if plan.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return lost


def _merged(
    base: BaseCheckpoint,
    stored: StoredTensor,
    update: tuple[str, Delta] | None,
    dtype: str | None,
    lost: dict[str, float],
) -> Tensor:
    tensor = stored.read()
    target = getattr(torch, dtype) if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if update is None:
        return tensor.to(target)
    module, delta_of = update
    transposed = base.is_transposed(module)
    weight = tensor.t() if transposed else tensor
    delta = delta_of(weight)
    merged = (delta + weight).to(target)
    measured = Lost()
    measured.add(delta, merged.float() - weight.float())
    if not bool(merged.isfinite().all()):
        measured.removed_square = math.inf
    lost[module] = measured.share
    return (merged.t() if transposed else merged).contiguous()


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, generation and code files: everything at the top level that is no weight and no config.json."""
    for file in source.iterdir():
        weight = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not weight and not file.name.startswith(".") and file.name != "config.json":
            shutil.copy(file, folder / file.name)


def _write_config(base: BaseCheckpoint, folder: Path, dtype: str | None) -> None:
    config = dict(base.config)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        for key, value in config.items():
            if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
                config[key] = {k: v for k, v in value.items() if k != "torch_dtype"} | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
