"""Several processes train as one does: two on this CPU, started like `accelerate launch` starts them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from smoa_serve.train import train

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_learn_what_one_learns(make_config: Callable[..., Any], tmp_path: Path) -> None:
    sections = {"adapter": {"method": "smoa", "dropout": 0.0}}
    alone = train(make_config("alone", training={"batch_size": 4}, **sections), Console(quiet=True))
    together = make_config("together", training={"batch_size": 2}, **sections)
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(together.model_dump(mode="json", exclude_none=True)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "smoa_serve.cli.app", "train", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("digest") == 1, "only the first process reports"
    report = json.loads((together.output / "training_report.json").read_text())
    assert (report["processes"], report["steps"]) == (2, alone["steps"])
    assert report["tokens"] == alone["tokens"]
    losses = [loss for _, loss in report["loss"]["curve"]]
    assert losses == pytest.approx([loss for _, loss in alone["loss"]["curve"]], rel=1e-5)
