"""Between PEFT's checkpoints and the portable format: same tensors, other names, and a configuration with a digest.

PEFT writes `base_model.model.<module>.smoa_a`, the portable format `<module>.smoa_a`: the layer's parameters and
buffers bear the portable names, so nothing but the prefix changes.
"""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters import write_portable
from ..adapters.config import ModuleEntry
from ..adapters.keys import PREFIX
from ..adapters.model import Adapter, AdapterKind, OrderStatus
from ..adapters.portable import FIELDS, module_update
from ..adapters.source import ADAPTER_FILES, CONFIG_NAME, WEIGHTS_NAME, read_tensors
from ..errors import AdapterError
from ..files.opened import OpenedFile

Facts = dict[str, Any]
"""A `ModuleEntry` as JSON: branch ranks, scaling, fingerprint of the base weight."""

SETTINGS = "peft"  # where the trainer's settings stand in the metadata of a portable configuration
OTHER_ADAPTER = re.compile(r".+\.smoa_(a|b|row_block|col_block)\.[^.]+")  # PEFT 0.19 saves all adapters into each file
NOT_SETTINGS = {"modules", "base_model_name_or_path", "peft_type", "inference_mode"}


def rewrite_portable(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Turn the tensors that PEFT has just written into a portable checkpoint.

    Args:
        folder: of the adapter.
        settings: fields of a SMoAConfig, JSON-able.

    Returns:
        False when there are no such tensors; then nothing is written.

    Raises:
        AdapterError: tensors are missing, or there are others, which no server would apply.
    """
    written = _written_by_peft(folder)
    if written is None:
        return False
    file, tensors = written
    adapter = _adapter(folder, settings, tensors)
    # Beside the old file first: its tensors may still be mapped, and a torn write must not be taken for an adapter.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        write_portable(adapter, temporary)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            new = Path(temporary) / name
            new.chmod(0o644)
            new.replace(folder / name)
    if file.name != WEIGHTS_NAME:
        file.unlink()
    return True


def settings_in(portable: Mapping[str, Any], modules: Mapping[str, Facts], num_blocks: int) -> dict[str, Any]:
    """Fields of a SMoAConfig for a portable configuration; one that was converted names its modules one by one."""
    metadata = portable.get("metadata") or {}
    if isinstance(metadata.get(SETTINGS), dict):
        return dict(metadata[SETTINGS])
    uniform = {tuple(facts["branch_ranks"]) for facts in modules.values()}
    ranks = list(next(iter(uniform))) if len(uniform) == 1 else None
    rank = sum(ranks) if ranks is not None else portable.get("rank", 0)
    return {
        "r": rank,
        "num_blocks": len(ranks) if ranks is not None else num_blocks,
        "branch_ranks": ranks,
        "lora_alpha": portable.get("alpha", rank),
        "target_modules": list(modules),
        "order": "gram",
    }


def with_peft_names(tensors: Mapping[str, Tensor], modules: Mapping[str, Facts], source: object) -> dict[str, Tensor]:
    """Tensors of a portable file under the names that PEFT looks for; others are left as they are.

    Raises:
        AdapterError: not the tensors of a SMoA adapter for these modules.
    """
    named = {name if name.startswith(PREFIX) else f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    expected = {f"{PREFIX}{module}.{part}" for module in modules for part in FIELDS}
    _refuse_difference(source, set(named), expected)
    return named


def _written_by_peft(folder: Path) -> tuple[Path, dict[str, Tensor]] | None:
    files = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        tensors = read_tensors(folder, OpenedFile(file), allow_pickle=True)
        if tensors and all(name.startswith(PREFIX) for name in tensors):
            own = {name: tensor for name, tensor in tensors.items() if not OTHER_ADAPTER.fullmatch(name)}
            return file, {name.removeprefix(PREFIX): tensor for name, tensor in own.items()}
    return None


def _adapter(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    modules: dict[str, Facts] = settings["modules"]
    _refuse_difference(folder, set(tensors), {f"{module}.{part}" for module in modules for part in FIELDS})
    return Adapter(
        kind=AdapterKind.SMOA,
        modules={m: module_update(m, ModuleEntry.model_validate(f), tensors) for m, f in modules.items()},
        rank=settings["r"],
        num_blocks=settings["num_blocks"],
        alpha=settings["lora_alpha"],
        order=OrderStatus.RECORDED,
        base_model=settings["base_model_name_or_path"],
        metadata={SETTINGS: {key: value for key, value in settings.items() if key not in NOT_SETTINGS}},
    )


def _refuse_difference(source: object, found: set[str], expected: set[str]) -> None:
    reasons = [f"{name} is missing" for name in sorted(expected - found)]
    reasons += [f"{name} is no tensor of a SMoA adapter and would not be served" for name in sorted(found - expected)]
    if reasons:
        raise AdapterError(source, reasons)
