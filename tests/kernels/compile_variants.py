"""Compiles every variant of the Triton kernels: `python tests/kernels/compile_variants.py` prints what each takes as
JSON; with `--write` it becomes the ceiling that later builds are held to.

A process of its own: tests interpret the same kernels, and Triton decides at import which of the two a process does.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

CEILINGS = Path(__file__).with_name("triton_ceilings.json")
CAPABILITIES = (80, 90)
SLACK = 1.1  # of registers, which differ a little between releases of the assembler


def main() -> None:
    """Compile, print, write at wish."""
    os.environ.pop("TRITON_INTERPRET", None)
    from triton_variants import compile_variant, variants

    taken = {
        f"sm_{capability}/{variant.name}": asdict(compile_variant(variant, capability))
        for variant in variants()
        for capability in CAPABILITIES
        if variant.least_capability <= capability
    }
    if "--write" in sys.argv[1:]:
        ceilings = {
            name: {"registers": min(255, int(one["registers"] * SLACK)), "shared_bytes": one["shared_bytes"]}
            for name, one in taken.items()
        }
        CEILINGS.write_text(json.dumps(ceilings, indent=1) + "\n")
    sys.stdout.write(json.dumps(taken) + "\n")


if __name__ == "__main__":
    main()
