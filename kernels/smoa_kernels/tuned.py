"""Cost constants measured on a machine (`python -m benchmarks tune`), kept per device in the user's config folder."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import platformdirs
import torch
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smoa_kernels.errors import KernelError

Rows = Annotated[float, Field(ge=0, allow_inf_nan=False)]
CPU_INFO = Path("/proc/cpuinfo")


class CostFileError(KernelError):
    """The stored constants cannot be read; the message says why and what to do."""


class TunedCost(BaseModel):
    """The constants of one implementation on one device.

    Attributes:
        device: its name, see `device_name`.
        implementation: "torch", "cpp", ...
        dtype: of the model, such as "bfloat16".
        threads: that torch computes with on a CPU; None on other devices.
        form, form_per_rank, resident: see `cost.CostModel`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    device: str
    implementation: str
    dtype: str
    threads: int | None
    form: Rows
    form_per_rank: Rows
    resident: Rows

    @property
    def key(self) -> tuple[str, str, str, int | None]:
        """What it was measured for."""
        return self.device, self.implementation, self.dtype, self.threads


class _CostFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1]
    entries: list[TunedCost]


def cost_file() -> Path:
    """Where the constants of this user's machines are kept."""
    return platformdirs.user_config_path("smoa-serve") / "kernels" / "cost.json"


def read_costs(file: Path) -> list[TunedCost]:
    """All stored constants; none when there is no file.

    Raises:
        CostFileError: it cannot be read or holds something else.
    """
    try:
        content = file.read_bytes()
        return list(_CostFile.model_validate_json(content).entries)
    except FileNotFoundError:
        return []
    except (OSError, ValidationError) as error:
        raise CostFileError(
            f"{file} holds no cost constants ({_first_line(error)}); delete it and run `python -m benchmarks tune`."
        ) from error


def store_costs(file: Path, costs: Sequence[TunedCost]) -> None:
    """Adds constants to a file, in place of those measured for the same device, implementation, dtype and threads.

    Raises:
        CostFileError: what is there cannot be read; it stays as it is.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        entries = {cost.key: cost for cost in [*read_costs(file), *costs]}
        partial = file.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(_CostFile(version=1, entries=list(entries.values())).model_dump_json(indent=1) + "\n")
        partial.replace(file)


def device_name(device: torch.device) -> str:
    """The accelerator's or the processor's name, the same on every machine of the kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        found = error.errors()[0]
        return f"{'.'.join(str(part) for part in found['loc']) or 'the file'}: {found['msg']}"
    return str(error).splitlines()[0]
