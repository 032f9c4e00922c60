"""Output folders: a new one is made, an old one is gone on with only by the same fine-tune."""

import json
import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .config import TrainConfig
from .report import file_digests, write_json

CHECKPOINTS = "checkpoints"
STATE_NAME = "training_config.json"
# The rest decides what the optimizer's and the data's stored state mean.
MAY_CHANGE = {"epochs", "max_steps", "save_every", "keep_checkpoints", "log_every", "evaluate_every",
              "gradient_checkpointing"}  # fmt: skip


def is_first_process() -> bool:
    """Whether this process writes; accelerate and torchrun number the others from 1."""
    return int(os.environ.get("RANK", "0")) == 0


def open_output(config: TrainConfig, *, resume: bool) -> Path | None:
    """Prepare the output folder.

    Args:
        config: the fine-tune.
        resume: go on with what is there.

    Returns:
        The checkpoint to go on from; None for a new fine-tune.

    Raises:
        ConfigError: the folder is in use, there is nothing to resume, or it was another fine-tune.
    """
    digests = file_digests([*config.data.train, *config.data.validation])
    described = {"config": config.model_dump(mode="json"), "data": digests}
    if resume:
        return _checkpoint_of(config, described)
    if not is_first_process():
        return None
    output = config.output
    if output.exists() and not _is_unused(output):
        raise ConfigError(
            f"output {output}: it exists and is not an empty folder; go on with it (--resume), choose another or "
            "remove it"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / STATE_NAME, described)
    return None


def _is_unused(output: Path) -> bool:
    """Empty, or left behind by a run that ended before its first checkpoint."""
    if not output.is_dir():
        return False
    names = {entry.name for entry in output.iterdir()}
    return names <= {STATE_NAME, CHECKPOINTS} and not any((output / CHECKPOINTS).glob("checkpoint-*"))


def _checkpoint_of(config: TrainConfig, described: dict[str, Any]) -> Path:
    from transformers.trainer_utils import get_last_checkpoint

    folder = config.output / CHECKPOINTS
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    state = config.output / STATE_NAME
    if found is None or not state.is_file():
        raise ConfigError(f"--resume: there is no checkpoint below {folder} yet; start without --resume")
    before = json.loads(state.read_text(encoding="utf-8"))
    changed = sorted(_differences(before, described))
    if changed:
        raise ConfigError(
            f"--resume: {config.output} was begun with other settings: {'; '.join(changed)}. Only "
            f"{', '.join(sorted(f'training.{key}' for key in MAY_CHANGE))} may change"
        )
    return Path(found)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    old, new = _flat(before["config"]), _flat(now["config"])
    free = {"output", *(f"training.{key}" for key in MAY_CHANGE)}
    reasons = [
        f"{key} was {old.get(key)!r}, now {new.get(key)!r}"
        for key in old.keys() | new.keys()
        if key not in free and old.get(key) != new.get(key)
    ]
    return reasons + [
        f"the content of {file} has changed"
        for file, digest in now["data"].items()
        if before["data"].get(file) != digest
    ]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
