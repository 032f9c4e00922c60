"""An adapter whose numbers are finite in float32 and not in the dtype of the engine."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.engine


def test_what_overflows_in_the_engines_dtype_is_refused_and_nothing_is_lost(
    vectors: Path, in_process: Callable[..., Any], makers: Any, tmp_path: Path
) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from smoa_serve.adapters import load_adapter, write_portable

    base = vectors / "e2e/tiny-llama/base"
    good = makers.make_adapter(base, tmp_path / "good", "smoa", (3, 3), seed=1)
    adapter = load_adapter(good, None)
    name, update = next(iter(adapter.modules.items()))
    a, b = update.a.clone(), update.b.clone()
    a[0, 0] = a[0, 0].sign() * 1e-30
    b[0, 0] = 3.4e38  # bfloat16 ends before
    a[0] *= 1e-30  # so that the product is finite
    bad = write_portable(
        replace(adapter, modules=dict(adapter.modules) | {name: replace(update, a=a, b=b)}), tmp_path / "bad"
    )
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with in_process(base, dtype="bfloat16", enable_lora=True, max_loras=1, max_cpu_loras=2) as engine:

        def ask(request: Any) -> list[int]:
            (answer,) = engine.generate(
                [{"prompt_token_ids": [3, 14, 15]}], greedy, lora_request=request, use_tqdm=False
            )
            return list(answer.outputs[0].token_ids)

        first = LoRARequest("good", 1, str(good))
        before = ask(first)
        assert before != ask(None)
        with pytest.raises(Exception, match="it is not finite in bfloat16"):
            engine.llm_engine.add_lora(LoRARequest("bad", 2, str(bad)))
        assert engine.llm_engine.list_loras() == {1}
        assert ask(first) == before
    assert torch.isfinite(b).all()
