"""`python -m benchmarks WHAT [--quick] [--json FILE]`, see WHAT below: exit 1 when a bar is missed."""

import argparse
import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from benchmarks.bars import Bar
from benchmarks.setup_facts import busy, facts
from smoa_serve.errors import SmoaError

RESULTS = Path(__file__).parent / "results"
WHAT = ("serving", "merge", "kernels", "tune", "training", "method", "churn")


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--quick", action="store_true", help="about a minute or two, at a smaller size, same bars")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too, one JSON object a line")
    parser.add_argument("--device", default="cpu", help="kernels, tune: cpu or cuda")
    parser.add_argument("--layers", metavar="NAME,NAME", help="kernels, tune: such as 4096x4096 (H_in x H_out)")
    options = parser.parse_args(arguments)
    errors = Console(stderr=True)
    load_before = busy()
    if load_before > 0.5:
        errors.print(f"[yellow]this machine is busy ({load_before:.0%} of its cores): figures will spread[/]")
    # Read when torch is first imported: threads that wait must not take the cores from those that work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    begin = time.monotonic()
    try:
        rows, bars = _run(options)
    except SmoaError as error:
        errors.print(f"[bold red]error[/]: {escape(str(error))}", soft_wrap=True, highlight=False)
        return 2
    shared = {"what": options.what, "quick": options.quick, "busy_before": round(load_before, 2), **facts()}
    _write(shared, options.json, [*rows, *(bar.row() for bar in bars)])
    for bar in bars:
        print(bar.line())
    print(f"{options.what}: {time.monotonic() - begin:.0f} s")
    return 0 if all(bar.reached for bar in bars) else 1


def _run(options: argparse.Namespace) -> tuple[list[dict[str, object]], list[Bar]]:
    if options.what in ("serving", "merge", "training", "method", "churn"):
        rows, bars = import_module(f"benchmarks.{options.what}").run(options.quick)
        return rows, bars
    from benchmarks.kernels import run, tune

    layers = options.layers.split(",") if options.layers else None
    measure = run.run if options.what == "kernels" else tune.run
    return measure(options.quick, options.device, layers)


def _write(shared: dict[str, object], extra: Path | None, rows: list[dict[str, object]]) -> None:
    """One JSON object a line, each with the setup, so that a line means something alone."""
    shared = shared | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    text = "".join(json.dumps(shared | row) + "\n" for row in rows)
    RESULTS.mkdir(exist_ok=True)
    name = f"{shared['what']}{'-quick' if shared['quick'] else ''}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    for file in (RESULTS / name, extra):
        if file is not None:
            file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
