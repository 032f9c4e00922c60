"""`training_report.json`: what was trained, on what, with what, and how it went."""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..adapters import open_adapter
from ..base.checkpoint import BaseCheckpoint
from .config import TrainConfig
from .tokens import TokenizedData

REPORT_NAME = "training_report.json"
PACKAGES = ("smoa-serve", "torch", "transformers", "peft", "accelerate")
CURVE_POINTS = 100


@dataclass(frozen=True)
class Outcome:
    """What the Trainer knows at the end.

    Attributes:
        steps: optimizer steps, those before a resumption too.
        epochs: passes over the data.
        log: the Trainer's log_history.
        tokens_seen: input tokens without padding, of all processes.
        seconds: of this run, loading left out.
        resumed_from_step: None where it started anew.
        processes: that trained together.
        device: what they trained on.
        trainable_parameters: numbers.
    """

    steps: int
    epochs: float
    log: Sequence[Mapping[str, float]]
    tokens_seen: int
    seconds: float
    resumed_from_step: int | None
    processes: int
    device: str
    trainable_parameters: int


def make_report(
    config: TrainConfig,
    outcome: Outcome,
    data: TokenizedData,
    adapter: Path,
    base: BaseCheckpoint,
    modules: Sequence[str],
) -> dict[str, Any]:
    """The report as JSON, after the adapter was read back as a server would read it.

    Raises:
        AdapterError: the adapter does not bind to the base.
    """
    summary = open_adapter(adapter).summary(base)
    return {
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "seed": config.seed,
        "steps": outcome.steps,
        "epochs": round(outcome.epochs, 3),
        "resumed_from_step": outcome.resumed_from_step,
        "seconds": round(outcome.seconds, 1),
        "device": outcome.device,
        "processes": outcome.processes,
        "loss": loss_summary(outcome.log),
        "tokens": {"seen": outcome.tokens_seen, "of_one_epoch": data.num_tokens},
        "examples": {"used": len(data), "cut": data.cut, "dropped": data.dropped},
        "data": file_digests([*config.data.train, *config.data.validation]),
        "adapter": {
            "kind": summary.kind.value,
            "digest": summary.digest,
            "trainable_parameters": outcome.trainable_parameters,
            "modules": len(modules),
        },
        "base": {"path": config.base, "fingerprint": base_fingerprint(base, modules)},
    }


def loss_summary(log: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """First, last and lowest loss, the mean of the last tenth, and at most 100 points of the curve."""
    points = [(int(entry["step"]), float(entry["loss"])) for entry in log if "loss" in entry]
    measured = [(int(entry["step"]), float(entry["eval_loss"])) for entry in log if "eval_loss" in entry]
    if not points:
        return {"validation": measured}
    values = [value for _, value in points]
    tail = values[-max(1, len(values) // 10) :]
    stride = -(-len(points) // CURVE_POINTS)
    return {
        "first": values[0],
        "last": values[-1],
        "lowest": min(values),
        "mean_of_last_tenth": sum(tail) / len(tail),
        "curve": points[::stride],
        "validation": measured,
    }


def base_fingerprint(base: BaseCheckpoint, modules: Iterable[str]) -> str:
    """sha256 (hex) over the fingerprints of the adapted weights, in the order of their names."""
    h = hashlib.sha256()
    for module in sorted(modules):
        mark = base.fingerprint(module)
        h.update(f"{module}\0{mark.dtype}\0{mark.shape}\0{mark.sha256}\n".encode())
    return h.hexdigest()


def file_digests(files: Iterable[Path]) -> dict[str, str]:
    """File → sha256 (hex)."""
    digests = {}
    for file in files:
        with file.open("rb") as opened:
            digests[str(file)] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


def versions() -> dict[str, str]:
    """What it was trained with."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that a file is there whole or not at all."""
    aside = file.with_name(f".{file.name}")
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    aside.replace(file)
