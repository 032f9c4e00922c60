"""Every Triton kernel compiles for the GPUs it is meant for, without spills and within its ceilings; no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(1500)
HERE = Path(__file__).parent
CEILINGS: dict[str, dict[str, int]] = json.loads((HERE / "triton_ceilings.json").read_text())
# Shared memory of one program: 163 KiB on sm_80, 227 KiB on sm_90.
MOST_SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "compile_variants.py")],
        capture_output=True, text=True, env=environment, timeout=1400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    taken: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return taken


def test_every_variant_has_a_ceiling(compiled: dict[str, dict[str, int]]) -> None:
    assert set(compiled) == set(CEILINGS), "run python tests/kernels/compile_variants.py --write"


@pytest.mark.parametrize("name", sorted(CEILINGS))
def test_a_variant_neither_spills_nor_exceeds_its_ceiling(compiled: dict[str, Any], name: str) -> None:
    taken, ceiling = compiled[name], CEILINGS[name]
    assert taken["local_bytes"] == 0, "registers spill to local memory"
    assert taken["stack_bytes"] == 0, "registers spill to the stack"
    assert taken["registers"] <= ceiling["registers"]
    assert taken["shared_bytes"] <= ceiling["shared_bytes"] <= MOST_SHARED[name.split("/", maxsplit=1)[0]]
