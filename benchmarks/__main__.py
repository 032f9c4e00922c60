"""`python -m benchmarks QUESTION [--quick] [--json FILE]`: exit 1 when a bar is missed. `publish` writes the pages."""

import argparse
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from benchmarks.harness.machine import busy, facts
from benchmarks.harness.publish import page, publish
from benchmarks.harness.question import IN_THIS_PROCESS, QUESTIONS, Options, question
from benchmarks.harness.results import RESULTS, write
from smoa_serve.errors import SmoaError


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark, or publish what was stored.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", choices=(*QUESTIONS, "publish"))
    parser.add_argument("--quick", action="store_true", help="about a minute or two, at a smaller size, same bars")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too, one JSON object a line")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="kernels, tune")
    parser.add_argument("--layers", metavar="NAME,NAME", help="kernels, tune: such as 4096x4096 (H_in x H_out)")
    given = parser.parse_args(arguments)
    # Read when torch is first imported: threads that wait must not take the cores from those that work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if given.what == "publish":
        publish()
        return 0
    errors, load_before, begin = Console(stderr=True), busy(), time.monotonic()
    if load_before > 0.5:
        errors.print(f"[yellow]this machine is busy ({load_before:.0%} of its cores): figures will spread[/]")
    options = Options(given.quick, given.device, tuple(given.layers.split(",")) if given.layers else None)
    asked = question(given.what)
    try:
        rows = asked.measure(asked.cases(options), options)
    except SmoaError as error:
        errors.print(f"[bold red]error[/]: {escape(str(error))}", soft_wrap=True, highlight=False)
        return 2
    machine = facts(on_cpu=given.what in IN_THIS_PROCESS and given.device == "cpu")
    shared = {"what": given.what, "quick": given.quick, "busy_before": round(load_before, 2), **machine}
    bars = asked.bars(rows) if hasattr(asked, "bars") else []
    stored = write(shared, [*rows, *(bar.row() for bar in bars)], given.json, RESULTS)
    print(page(given.what, stored))
    print(f"{given.what}: {time.monotonic() - begin:.0f} s")
    return 0 if all(bar.reached for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
