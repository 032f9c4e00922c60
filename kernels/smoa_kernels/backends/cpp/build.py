"""Compiles the C++ kernel at first use and loads it: one library per element type and instruction set.

It uses no header of torch or Python, so one build serves all of their releases.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import platformdirs
import torch
from filelock import FileLock

from smoa_kernels.errors import ImplementationError

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
# The element types of csrc/vector.h.
ELEMENTS: Mapping[torch.dtype, str] = MappingProxyType(
    {torch.bfloat16: "Bf16", torch.float16: "Fp16", torch.float32: "float"}
)
# libgomp.so.1 is the one that torch has loaded: one pool of threads, of the size that torch was told.
COMPILER_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp")
BUILD_SECONDS = 300
# Names the best instruction set that may be used, one of INSTRUCTION_SETS.
LIMIT_VARIABLE = "SMOA_KERNELS_ISA"


@dataclass(frozen=True)
class InstructionSet:
    """What the CPU must have, as /proc/cpuinfo names it, and what the compiler is told."""

    cpu_flags: tuple[str, ...]
    compiler_flags: tuple[str, ...]


_AVX2 = InstructionSet(("avx2", "fma", "f16c"), ("-mavx2", "-mfma", "-mf16c"))
_AVX512 = InstructionSet(
    (*_AVX2.cpu_flags, "avx512f", "avx512bw", "avx512vl"),
    (*_AVX2.compiler_flags, "-mavx512f", "-mavx512bw", "-mavx512vl"),
)
_AVX512_BF16 = InstructionSet((*_AVX512.cpu_flags, "avx512_bf16"), (*_AVX512.compiler_flags, "-mavx512bf16"))
_AMX_BF16 = InstructionSet(
    (*_AVX512_BF16.cpu_flags, "amx_tile", "amx_bf16"), (*_AVX512_BF16.compiler_flags, "-mamx-tile", "-mamx-bf16")
)
_TILES = "amx_bf16"
# Best first.
INSTRUCTION_SETS: Mapping[str, InstructionSet] = MappingProxyType(
    {_TILES: _AMX_BF16, "avx512_bf16": _AVX512_BF16, "avx512": _AVX512, "avx2": _AVX2}
)


# Some systems keep the tile unit from processes.
_NOT_PERMITTED = f"the system does not let this process use {_TILES}"


class BuildError(ImplementationError):
    """The kernel cannot be built or loaded here; the message says why."""


def unavailable_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the C++ kernel cannot serve this device and dtype here, None when it can. Builds it at need.

    Raises:
        BuildError: SMOA_KERNELS_ISA asks for what does not exist here.
    """
    if device_type != "cpu":
        return "it serves the CPU only"
    if dtype not in ELEMENTS:
        return f"it takes {', '.join(str(known) for known in ELEMENTS)}, not {dtype}"
    return _load(dtype, None, _limit())[1]


def library(dtype: torch.dtype, instruction_set: str | None = None) -> ctypes.CDLL:
    """The loaded kernel for an element type.

    Args:
        dtype: one of ELEMENTS.
        instruction_set: one of INSTRUCTION_SETS; None = the best one that the CPU has, up to SMOA_KERNELS_ISA.

    Raises:
        BuildError: it cannot be built or loaded here.
    """
    loaded, reason = _load(dtype, instruction_set, _limit())
    if loaded is None:
        raise BuildError(f"the C++ kernel cannot run: {reason}.")
    return loaded


def uses_tiles(dtype: torch.dtype) -> bool:
    """Whether the kernel that `library` gives multiplies on the processor's tile unit (AMX).

    Raises:
        BuildError: it cannot be built or loaded here.
    """
    return bool(library(dtype).smoa_uses_tiles())


def supported_instruction_sets(dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the instruction sets that serve an element type here, best first, up to SMOA_KERNELS_ISA.

    Raises:
        BuildError: SMOA_KERNELS_ISA asks for what does not exist here.
    """
    names = _candidates(dtype, _limit())
    return tuple(name for name in names if name != _TILES or _load(dtype, name, None)[1] != _NOT_PERMITTED)


def _candidates(dtype: torch.dtype, limit: str | None) -> tuple[str, ...]:
    """Those that the CPU has, best first; the tile unit multiplies bf16 only."""
    names = list(INSTRUCTION_SETS)
    allowed = names[names.index(limit) :] if limit else names
    return tuple(name for name in allowed if not _missing_flags(name) and (name != _TILES or dtype is torch.bfloat16))


def _limit() -> str | None:
    """What SMOA_KERNELS_ISA says, None where it says nothing. It is no wish that something else may stand in for."""
    limit = os.environ.get(LIMIT_VARIABLE)
    if not limit:
        return None
    if limit not in INSTRUCTION_SETS:
        raise BuildError(f"{LIMIT_VARIABLE}={limit!r} is unknown; allowed: {', '.join(INSTRUCTION_SETS)}.")
    missing = _missing_flags(limit)
    if missing:
        present = [name for name in INSTRUCTION_SETS if not _missing_flags(name)]
        here = ", ".join(present) or "none, unset it"
        raise BuildError(f"{LIMIT_VARIABLE}={limit}: the CPU lacks {', '.join(missing)}; allowed here: {here}.")
    return limit


@cache
def _load(dtype: torch.dtype, instruction_set: str | None, limit: str | None) -> tuple[ctypes.CDLL | None, str | None]:
    """The kernel, or why there is none: tried once a process."""
    candidates = _candidates(dtype, limit)
    # Where there is no candidate the least demanding one is tried all the same: its reason names what is missing.
    chosen = instruction_set or (*candidates, list(INSTRUCTION_SETS)[-1])[0]
    try:
        loaded = ctypes.CDLL(str(_build(dtype, chosen)))
    except (BuildError, OSError) as error:
        logger.info("The C++ kernel for %s is not used, torch serves instead: %s", dtype, error)
        return None, str(error)
    if loaded.smoa_permitted():
        return loaded, None
    if instruction_set is None and candidates[1:]:  # the registers are everybody's
        return _load(dtype, candidates[1], limit)
    return None, _NOT_PERMITTED


def _missing_flags(instruction_set: str) -> list[str]:
    present = _cpu_flags()
    return [flag for flag in INSTRUCTION_SETS[instruction_set].cpu_flags if flag not in present]


def _build(dtype: torch.dtype, instruction_set: str) -> Path:
    if instruction_set not in INSTRUCTION_SETS:
        raise BuildError(f"instruction set {instruction_set!r} is unknown; allowed: {', '.join(INSTRUCTION_SETS)}")
    missing = _missing_flags(instruction_set)
    if missing:
        raise BuildError(f"the CPU lacks {', '.join(missing)}")
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise BuildError("there is no C++ compiler; install g++ 10 or newer, or name one in CXX")
    flags = (
        *COMPILER_FLAGS,
        *INSTRUCTION_SETS[instruction_set].compiler_flags,
        f"-DSMOA_ELEMENT={ELEMENTS[dtype]}",
    )
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp"))
    digest = hashlib.sha256("\0".join((_run([compiler, "--version"]), *flags)).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    folder = platformdirs.user_cache_path("smoa-serve") / "kernels" / digest.hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "smoa_delta.so"
    with FileLock(folder / "lock"):
        if not target.is_file():
            logger.info("Compiling the C++ kernel for %s into %s (a few seconds, once)", dtype, folder)
            partial = folder / "partial.so"
            units = [str(path) for path in sources if path.suffix == ".cpp"]
            _run([compiler, *flags, *units, "-o", str(partial)])
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
