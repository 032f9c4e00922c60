"""Stored results: one JSON object a line, each with the setup, so that a line means something alone."""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import device_class

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]
_FULL_RUN = re.compile(r"(?P<what>[a-z]+)-\d{8}-\d{6}\.jsonl")


def write(shared: Row, rows: Sequence[Row], extra: Path | None, folder: Path) -> list[Row]:
    """One file of a run in the folder of results, and the same where else it is wanted; returns its lines."""
    shared = shared | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    lines = [shared | row for row in rows]
    name = f"{shared['what']}{'-quick' if shared['quick'] else ''}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    folder.mkdir(exist_ok=True)
    for file in (folder / name, extra):
        if file is not None:
            file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return lines


def newest(what: str, folder: Path = RESULTS) -> dict[str, list[Row]]:
    """The newest full runs of a question, by device class.

    A run of some layers only (`--layers`) replaces older figures of those layers; the others stay.
    """
    found: dict[str, list[Row]] = {}
    covered: dict[str, set[str | None]] = {}
    for file in sorted(folder.glob(f"{what}-*.jsonl"), reverse=True):
        match = _FULL_RUN.fullmatch(file.name)
        if match is None or match["what"] != what:
            continue
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        name = device_class(rows[0])
        layers = {row["layer"] for row in rows if "layer" in row} or {None}
        if layers - covered.setdefault(name, set()):
            covered[name] |= layers
            found[name] = rows + found.get(name, [])
    return found


def of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    """The lines of one kind."""
    return [row for row in rows if row["kind"] == kind]
