"""The variants of the Triton kernels that launches ask for, compiled ahead of time: no GPU is needed."""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from smoa_kernels.backends.triton.expand import expand_kernel
from smoa_kernels.backends.triton.launch import (
    COPY_TILE,
    expand_launch,
    rows_per_token,
    single_pass_launch,
    tile_launch,
)
from smoa_kernels.backends.triton.rows import add_rows_kernel, prepare_kernel
from smoa_kernels.backends.triton.single_pass import gather_kernel, single_pass_kernel
from smoa_kernels.backends.triton.tile import tile_kernel
from smoa_kernels.blocks.tables import MAX_BLOCKS
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Arguments by name. Pointers and strides are multiples of 16, as those of the launchers are for such layers.
MODEL_DTYPE = ("y", "x", "bias", "rows", "delta", "expanded")
INT64_TABLES = ("slices", "slots", "sorted_rows")
INT32_TABLES = ("order", "token_to_slot", "number", "tiles")
STRIDES = ("y_stride", "x_stride", "row_stride", "slice_stride", "delta_stride", "expanded_stride",
           "expanded_slice_stride", "h_in")  # fmt: skip
COUNTS = ("base", "tokens", "first_tile", "max_rank", "num_slots")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Variant:
    """One specialisation of one kernel.

    Attributes:
        name: unique, for people.
        kernel: the jitted function.
        dtype: "bf16", "fp16" or "fp32".
        constants: its constexpr arguments.
        num_warps, num_stages: of the launch.
        least_capability: of the GPU, times ten.
    """

    name: str
    kernel: Any
    dtype: str
    constants: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 3
    least_capability: int = 80


@dataclass(frozen=True)
class Resources:
    """What the assembler gave a variant: registers per thread, bytes of stack and of spills, and of shared memory."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int


def variants() -> Iterator[Variant]:
    """The variants that are checked: every dtype, packed layers, fp8 weights, small and large ranks."""
    for dtype, max_rank, slices, fp8 in (
        *(("bf16", rank, 1, False) for rank in (1, 2, 4, 8, 16, 32)),
        ("bf16", 8, 3, False),
        ("fp16", 8, 1, False),
        ("fp32", 8, 2, False),
        ("bf16", 8, 1, True),
    ):
        yield from _delta_variants(dtype, max_rank, slices, fp8)
        if max_rank <= 16 and not fp8:
            yield _single_pass_variant(dtype, max_rank, slices)
    yield Variant("add_rows-bf16", add_rows_kernel, "bf16", {"BI": COPY_TILE})
    yield Variant("gather-bf16", gather_kernel, "bf16", {"BJ": COPY_TILE})
    yield Variant("prepare-bf16-plain", prepare_kernel, "bf16", {"RANKS": 0, "BJ": COPY_TILE})
    yield Variant("prepare-bf16-rank8", prepare_kernel, "bf16", {"RANKS": 8, "BJ": COPY_TILE})


def _delta_variants(dtype: str, max_rank: int, slices: int, fp8: bool) -> Iterator[Variant]:
    what = f"{dtype}-rank{max_rank}-slices{slices}{'-fp8' if fp8 else ''}"
    shared = {"SLICES": slices, "MAX_BLOCKS": MAX_BLOCKS, "FP8": fp8}
    capability = 89 if fp8 else 80
    launch = expand_launch(max_rank, dtype == "fp32")
    constants = {**shared, "RANKS": rows_per_token(max_rank), **launch.tile}
    yield Variant(f"expand-{what}", expand_kernel, dtype, constants, launch.num_warps, launch.num_stages, capability)
    launch = tile_launch(max_rank, dtype == "fp32")
    constants = {**shared, **launch.tile}
    yield Variant(f"tile-{what}", tile_kernel, dtype, constants, launch.num_warps, launch.num_stages, capability)


def _single_pass_variant(dtype: str, max_rank: int, slices: int) -> Variant:
    ranks = triton.next_power_of_2(max_rank)
    launch = single_pass_launch(ranks, dtype == "fp32")
    constants = {"SLICES": slices, "MAX_BLOCKS": MAX_BLOCKS + 1, "BIAS": True, "RANKS": ranks, **launch.tile}
    name = f"single_pass-{dtype}-rank{max_rank}-slices{slices}"
    return Variant(name, single_pass_kernel, dtype, constants, launch.num_warps, launch.num_stages)


def compile_variant(variant: Variant, capability: int) -> Resources:
    """Compiles a variant to machine code and reads what it takes.

    Args:
        variant: what to compile.
        capability: compute capability times ten, e.g. 90.
    """
    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else _type(name, variant.dtype) for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in variant.constants and name not in COUNTS
    }
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=dict(variant.constants), attrs=aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack, _, local = _usage(compiled.asm["cubin"])
    return Resources(registers, stack, local, int(compiled.metadata.shared))


def _type(name: str, dtype: str) -> str:
    if name in MODEL_DTYPE:
        return f"*{dtype}"
    if name in INT64_TABLES:
        return "*i64"
    if name in INT32_TABLES:
        return "*i32"
    assert name in (*STRIDES, *COUNTS), f"argument {name} has no type here"
    return "i32"


def _usage(cubin: bytes) -> tuple[int, ...]:
    """(registers, stack, shared, local) as the toolkit's cuobjdump, which comes with Triton, reports them."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = RESOURCES.search(done.stdout)
    assert found is not None, done.stdout
    return tuple(int(number) for number in found.groups())
