"""What is trained is what is served: `smoa-serve train`, then a real engine, then PEFT's own model beside it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.matrix, pytest.mark.filterwarnings("ignore::UserWarning")]
TOKENS = 24
METHODS: dict[str, dict[str, Any]] = {
    "smoa-even": {"method": "smoa", "r": 8, "num_blocks": 2, "alpha": 16},
    "smoa-ranks": {"method": "smoa", "r": 6, "num_blocks": 3, "branch_ranks": [4, 0, 2], "alpha": 12},
    "hira": {"method": "hira", "r": 4},
    "lora": {"method": "lora", "r": 4, "alpha": 8},
}
if not hasattr(peft, "HiraConfig"):
    # PEFT 0.19 has no HiRA, and beside a running engine it cannot load LoRA with newer releases of transformers.
    del METHODS["hira"], METHODS["lora"]
QUESTIONS = ("What is a tree?", "Where is the sea?", "How do I make tea?")
ANSWERS = {
    "smoa-even": ("Wood with leaves.", "Behind the hills.", "Boil the water."),
    "smoa-ranks": ("A TALL PLANT!", "IN THE WEST!", "WITH LEAVES!"),
    "hira": ("arr, a mast!", "arr, go west!", "arr, rum!"),
    "lora": ('{"tree": 1}', '{"sea": 2}', '{"tea": 3}'),
}


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Path:
    return tiny_base


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of all methods, each with answers of its own."""
    import json

    from rich.console import Console

    from smoa_serve.train import TrainConfig, train

    folder = tmp_path_factory.mktemp("trained")
    for name, settings in METHODS.items():
        data = folder / f"{name}.jsonl"
        pairs = zip(QUESTIONS, ANSWERS[name], strict=True)
        turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
        data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
        content = {
            "base": str(base),
            "output": str(folder / name),
            "adapter": settings | {"dropout": 0.0, "target_modules": "all-linear"},
            "data": {"train": str(data)},
            "training": {"max_steps": 100, "learning_rate": 0.03 if "lora" not in name else 0.01, "log_every": 20},
        }
        report = train(TrainConfig.model_validate(content), Console(quiet=True))
        assert report["loss"]["last"] < 0.5 * report["loss"]["first"]
    return {name: folder / name for name in METHODS}


@pytest.fixture(scope="module")
def engine(base: Path, in_process: Callable[..., Any], trained: dict[str, Path]) -> Iterator[Any]:
    with in_process(base, enable_lora=True, max_loras=4, max_num_seqs=16, max_model_len=128) as engine:
        yield engine


def prompt_ids(base: Path, question: str) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    turns = [{"role": "user", "content": question}]
    ids: list[int] = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    return ids


def greedy(model: Any, ids: list[int]) -> list[int]:
    """What the model says in PEFT, token by token."""
    sequence = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(TOKENS):
            sequence = torch.cat([sequence, model(sequence).logits[:, -1:].argmax(-1)], dim=1)
    return sequence[0, len(ids) :].tolist()


def peft_model(base: Path, adapter: Path | None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import smoa_serve.peft  # noqa: F401 - registers the method

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()


def test_the_engine_says_what_the_peft_model_says_mixed_in_one_batch(
    base: Path, trained: dict[str, Path], engine: Any
) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    names = [None, *trained]
    models = {name: peft_model(base, trained[name] if name else None) for name in names}
    batch = [(name, prompt_ids(base, question)) for question in QUESTIONS for name in names]
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for _, ids in batch],
        SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True),
        lora_request=[LoRARequest(n, 1 + list(trained).index(n), str(trained[n])) if n else None for n, _ in batch],
        use_tqdm=False,
    )
    served = [list(output.outputs[0].token_ids) for output in outputs]
    for (name, ids), tokens in zip(batch, served, strict=True):
        assert tokens == greedy(models[name], ids), name
    by_question = [served[start : start + len(names)] for start in range(0, len(served), len(names))]
    for answers in by_question:
        assert len({tuple(tokens) for tokens in answers}) == len(names)


def test_the_engine_gives_the_answers_that_were_trained(base: Path, trained: dict[str, Path], engine: Any) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    batch = [(name, number) for name in trained for number in range(len(QUESTIONS))]
    outputs = engine.chat(
        [[{"role": "user", "content": QUESTIONS[number]}] for _, number in batch],
        SamplingParams(temperature=0, max_tokens=TOKENS),
        lora_request=[LoRARequest(name, 1 + list(trained).index(name), str(trained[name])) for name, _ in batch],
        use_tqdm=False,
    )
    for (name, number), output in zip(batch, outputs, strict=True):
        assert output.outputs[0].text == ANSWERS[name][number]
