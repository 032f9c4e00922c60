import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from smoa_kernels import ImplementationError, available_implementations, smoa_delta
from smoa_kernels.backends.cpp import build as cpp_build
from smoa_kernels.plan import StepPlan
from smoa_kernels.testing import random_layer, random_update

# Nothing is collected where the CPU has none of the instruction sets.
where_it_runs = pytest.mark.parametrize(
    "instruction_set", cpp_build.supported_instruction_sets(torch.bfloat16)[:1], indirect=True
)
ALL_FLAGS = frozenset(cpp_build.INSTRUCTION_SETS["amx_bf16"].cpu_flags)


@pytest.fixture
def fresh(monkeypatch, tmp_path) -> Path:
    """A process that has not tried to build yet, with an empty cache folder and no limit."""
    cpp_build._load.cache_clear()
    monkeypatch.delenv(cpp_build.LIMIT_VARIABLE, raising=False)
    monkeypatch.setattr(cpp_build.platformdirs, "user_cache_path", lambda _: tmp_path)
    yield tmp_path
    cpp_build._load.cache_clear()


@pytest.fixture
def capable(fresh, monkeypatch) -> Path:
    """The same, pretending that the CPU has every feature: for what is chosen; nothing that was built may run."""
    monkeypatch.setattr(cpp_build, "_cpu_flags", lambda: ALL_FLAGS)
    return fresh


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cuda", torch.bfloat16, "CPU only"),
        ("cpu", torch.float64, "takes torch.bfloat16, torch.float16, torch.float32"),
    ],
)
def test_what_it_cannot_serve(device, dtype, reason):
    assert reason in cpp_build.unavailable_reason(device, dtype)
    assert "cpp" not in available_implementations(device, dtype)


def test_without_a_compiler_torch_serves_and_the_reason_is_logged_once(capable, monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cpp_build.shutil, "which", lambda _: None)
    with caplog.at_level(logging.INFO, "smoa_kernels"):
        assert available_implementations("cpu", torch.bfloat16)[0] == "torch"
        assert available_implementations("cpu", torch.bfloat16)[0] == "torch"
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "no C++ compiler" in caplog.text


def test_an_explicit_wish_is_refused_with_the_reason(fresh, monkeypatch, generator):
    monkeypatch.setattr(cpp_build, "_cpu_flags", lambda: frozenset({"avx2", "f16c"}))
    layer = random_layer(8, (8,), slots=1, max_rank=1, dtype=torch.bfloat16, generator=generator)
    plan = StepPlan(1, 1, "cpu")
    x, y = torch.zeros(1, 8).bfloat16(), torch.zeros(1, 8).bfloat16()
    with pytest.raises(
        ImplementationError, match=r"available: torch, reference\.\n(.*\n)*  - not cpp: the CPU lacks fma"
    ):
        smoa_delta(y, x, layer.bank, plan, implementation="cpp")
    with pytest.raises(ImplementationError, match="the CPU lacks fma"):
        random_layer(8, (8,), slots=1, max_rank=1, dtype=torch.bfloat16, generator=generator, implementation="cpp")
    with pytest.raises(ImplementationError, match="the CPU lacks fma"):
        cpp_build.library(torch.bfloat16)


@pytest.mark.parametrize(
    ("present", "dtype", "chosen"),
    [
        (ALL_FLAGS, torch.bfloat16, "amx_bf16"),
        (ALL_FLAGS, torch.float32, "avx512_bf16"),
        (ALL_FLAGS - {"amx_tile"}, torch.bfloat16, "avx512_bf16"),
        (ALL_FLAGS - {"avx512_bf16"}, torch.bfloat16, "avx512"),
        (ALL_FLAGS - {"avx512vl"}, torch.bfloat16, "avx2"),
        (frozenset({"avx2", "fma", "f16c", "sse4_2"}), torch.bfloat16, "avx2"),
    ],
    ids=["all", "all, float32", "no tile unit", "no bf16", "AVX-512 in part", "AVX2"],
)
def test_it_is_built_for_the_best_instruction_set_of_the_cpu(capable, monkeypatch, present, dtype, chosen):
    built = []
    monkeypatch.setattr(cpp_build, "_cpu_flags", lambda: present)
    monkeypatch.setattr(cpp_build, "_build", lambda dtype, name: built.append((dtype, name)) or "/nowhere.so")
    assert "/nowhere.so" in cpp_build.unavailable_reason("cpu", dtype)
    assert built == [(dtype, chosen)]


def test_where_the_system_keeps_the_tile_unit_to_itself_registers_serve(capable, monkeypatch, tmp_path):
    permitted = {"amx_bf16": 0, "avx512_bf16": 1}
    monkeypatch.setattr(cpp_build, "_build", lambda dtype, name: name)
    monkeypatch.setattr(
        cpp_build.ctypes, "CDLL", lambda name: SimpleNamespace(name=name, smoa_permitted=lambda: permitted[name])
    )
    assert cpp_build.library(torch.bfloat16).name == "avx512_bf16"
    with pytest.raises(ImplementationError, match="the system does not let this process use amx_bf16"):
        cpp_build.library(torch.bfloat16, "amx_bf16")


@pytest.mark.parametrize(
    ("limit", "dtype", "chosen"),
    [
        ("amx_bf16", torch.bfloat16, "amx_bf16"),
        ("amx_bf16", torch.float16, "avx512_bf16"),
        ("avx512", torch.bfloat16, "avx512"),
        ("avx2", torch.float32, "avx2"),
        ("", torch.bfloat16, "amx_bf16"),
    ],
)
def test_the_environment_limits_the_instruction_set(capable, monkeypatch, limit, dtype, chosen):
    built = []
    monkeypatch.setenv("SMOA_KERNELS_ISA", limit)
    monkeypatch.setattr(cpp_build, "_build", lambda dtype, name: built.append(name) or "/nowhere.so")
    assert "/nowhere.so" in cpp_build.unavailable_reason("cpu", dtype)
    assert built == [chosen]
    assert cpp_build.supported_instruction_sets(dtype)[0] == chosen


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("neon", "SMOA_KERNELS_ISA='neon' is unknown; allowed: amx_bf16, avx512_bf16, avx512, avx2"),
        ("amx_bf16", "SMOA_KERNELS_ISA=amx_bf16: the CPU lacks amx_tile; allowed here: avx512_bf16, avx512, avx2"),
    ],
)
def test_a_limit_that_cannot_be_met_is_an_error_and_not_a_slower_kernel(capable, monkeypatch, limit, message):
    monkeypatch.setattr(cpp_build, "_cpu_flags", lambda: ALL_FLAGS - {"amx_tile"})
    monkeypatch.setenv("SMOA_KERNELS_ISA", limit)
    for asked in (
        lambda: available_implementations("cpu", torch.bfloat16),
        lambda: cpp_build.library(torch.bfloat16),
        lambda: cpp_build.supported_instruction_sets(torch.bfloat16),
    ):
        with pytest.raises(ImplementationError, match=message):
            asked()


def test_an_instruction_set_that_is_missing_or_unknown_is_refused(fresh, monkeypatch):
    monkeypatch.setattr(cpp_build, "_cpu_flags", lambda: ALL_FLAGS - {"avx512_bf16"})
    with pytest.raises(ImplementationError, match="the CPU lacks avx512_bf16"):
        cpp_build.library(torch.bfloat16, "avx512_bf16")
    with pytest.raises(ImplementationError, match="'neon' is unknown; allowed: amx_bf16, avx512_bf16, avx512, avx2"):
        cpp_build.library(torch.bfloat16, "neon")


def test_what_the_compiler_says_is_the_reason(capable, monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit 0\necho "no such header" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "no such header" in cpp_build.unavailable_reason("cpu", torch.bfloat16)
    assert not list(tmp_path.rglob("*.so"))


def test_a_compiler_that_does_not_exist_is_the_reason(capable, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert "/nowhere/c++ could not be run" in cpp_build.unavailable_reason("cpu", torch.bfloat16)


@where_it_runs
def test_it_is_built_once_for_all_processes(fresh, monkeypatch, instruction_set):
    cpp_build.library(torch.bfloat16, instruction_set)
    assert len(list(fresh.rglob("*.so"))) == 1
    cpp_build._load.cache_clear()
    real, commands = subprocess.run, []

    def run(command, **options):
        commands.append(command)
        return real(command, **options)

    monkeypatch.setattr(cpp_build.subprocess, "run", run)
    cpp_build.library(torch.bfloat16, instruction_set)
    assert [command[1:] for command in commands] == [["--version"]]


@where_it_runs
def test_it_runs_with_the_threads_that_torch_was_told():
    """In a process of its own: where a CPU engine of vLLM has run, the number of threads can no longer be set."""
    script = """
import torch
from smoa_kernels.backends.cpp import build as cpp_build
threads = cpp_build.library(torch.bfloat16).smoa_threads
for count in (1, 2, 3, 1):
    torch.set_num_threads(count)
    print(threads())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "2", "3", "1"]


@where_it_runs
def test_a_bank_made_for_torch_is_refused(generator):
    layer = random_layer(
        8, (8,), slots=1, max_rank=1, dtype=torch.bfloat16, generator=generator, implementation="torch"
    )
    ids = torch.zeros(8, dtype=torch.int16)

    layer.bank.set(0, [random_update(ids, ids, (1,), generator)])
    plan = StepPlan(1, 1, "cpu")
    plan.update([0])
    x, y = torch.zeros(1, 8).bfloat16(), torch.zeros(1, 8).bfloat16()
    with pytest.raises(ImplementationError, match="make the bank with implementation='cpp'"):
        smoa_delta(y, x, layer.bank, plan, implementation="cpp")
