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
    """The newest full runs of a question, by device class; of some layers only (`--layers`) they replace these."""
    found: dict[str, list[Row]] = {}
    for file in sorted(folder.glob(f"{what}-[0-9]*.jsonl"), reverse=True):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        newer = found.setdefault(device_class(rows[0]), [])
        known = {row.get("layer") for row in newer if row["kind"] != "bar"}
        if {row.get("layer") for row in rows if row["kind"] != "bar"} - known:
            newer[:0] = [row for row in rows if not any(layer in (row.get("layer"), _layer(row)) for layer in known)]
    return found


def _layer(row: Row) -> str | None:
    match = re.search(r", worst of \d+: ([^,]+),", row.get("name", ""))
    return match[1] if match else None


def grouped(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    return {value: [row for row in rows if row[key] == value] for value in dict.fromkeys(row[key] for row in rows)}


def of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]
