"""Compiles the C++ kernel at first use and loads it. It uses no header of torch or Python, so one build serves all."""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock

from smoa_kernels.errors import ImplementationError

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
CPU_FLAGS = ("avx512f", "avx512bw", "avx512vl", "avx512_bf16")
# libgomp.so.1 is the one that torch has loaded: one pool of threads, of the size that torch was told.
COMPILER_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16",
    "-mfma",
)  # fmt: skip
BUILD_SECONDS = 300


class BuildError(ImplementationError):
    """The kernel cannot be built or loaded here; the message says why."""


def unavailable_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the C++ kernel cannot serve this device and dtype here, None when it can. Builds it at need."""
    if device_type != "cpu":
        return "it serves the CPU only"
    if dtype is not torch.bfloat16:
        return f"it takes bfloat16, not {dtype}"
    return _load()[1]


def library() -> ctypes.CDLL:
    """The loaded kernel.

    Raises:
        BuildError: it cannot be built or loaded here.
    """
    loaded, reason = _load()
    if loaded is None:
        raise BuildError(f"the C++ kernel cannot run: {reason}.")
    return loaded


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The kernel, or why there is none: tried once a process."""
    try:
        loaded = ctypes.CDLL(str(_build()))
    except (BuildError, OSError) as error:
        logger.info("The C++ kernel is not used, torch serves instead: %s", error)
        return None, str(error)
    return loaded, None


def _build() -> Path:
    missing = [flag for flag in CPU_FLAGS if flag not in _cpu_flags()]
    if missing:
        raise BuildError(f"the CPU lacks {', '.join(missing)}")
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise BuildError("there is no C++ compiler; install g++ 10 or newer, or name one in CXX")
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp"))
    digest = hashlib.sha256("\0".join((_run([compiler, "--version"]), *COMPILER_FLAGS)).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    folder = platformdirs.user_cache_path("smoa-serve") / "kernels" / digest.hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "smoa_delta.so"
    with FileLock(folder / "lock"):
        if not target.is_file():
            logger.info("Compiling the C++ kernel into %s (a few seconds, once)", folder)
            partial = folder / "partial.so"
            units = [str(path) for path in sources if path.suffix == ".cpp"]
            _run([compiler, *COMPILER_FLAGS, *units, "-o", str(partial)])
            partial.replace(target)
    return target


def _cpu_flags() -> frozenset[str]:
    # Linux only: elsewhere there is no such file, and no flag is known.
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return frozenset()
    lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")]
    return frozenset(lines[0].split(":", 1)[1].split()) if lines else frozenset()


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout
