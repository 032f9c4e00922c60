"""vLLM's own benchmark client against the server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

PROMPTS = 24


def test_vllm_bench_serve_with_several_adapters_has_no_failure(tiny: Any, tmp_path: Path) -> None:
    before = {name: entry["requests"] for name, entry in tiny.server.adapters().items()}
    line = [
        *(str(Path(sys.executable).parent / "vllm"), "bench", "serve", "--backend", "openai"),
        *("--base-url", tiny.server.url, "--endpoint", "/v1/completions"),
        *("--model", "base-model", "--tokenizer", str(tiny.base)),
        *("--dataset-name", "random", "--random-input-len", "24", "--random-output-len", "12", "--ignore-eos"),
        *("--num-prompts", str(PROMPTS), "--max-concurrency", "8", "--seed", "1"),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
        *("--lora-assignment", "round-robin", "--lora-modules", *tiny.adapters),
    ]
    environment = os.environ | {"OPENAI_API_KEY": tiny.server.api_key, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=800, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (PROMPTS, 0)
    assert result["total_output_tokens"] == PROMPTS * 12
    after = {name: entry["requests"] for name, entry in tiny.server.adapters().items()}
    # Each adapter got its share; the client asks once more to see that the server is there.
    served = {name: after[name] - before[name] for name in tiny.adapters}
    assert all(count >= PROMPTS // len(tiny.adapters) for count in served.values())
