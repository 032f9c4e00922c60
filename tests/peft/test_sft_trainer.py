"""TRL's SFTTrainer trains SMoA like any other PEFT method."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny llama in float32 with the demo's tokenizer and chat template."""
    from smoa_serve.testing import random_base

    return random_base(tmp_path / "base", hidden_size=32, intermediate_size=48)


def test_sft_trainer_trains_and_saves_what_the_server_reads(base: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from smoa_serve.adapters import load_adapter
    from smoa_serve.base.checkpoint import BaseCheckpoint
    from smoa_serve.peft import SMoAConfig

    turns = [{"role": "user", "content": "What is a tree?"}, {"role": "assistant", "content": "A tall plant."}]
    arguments = SFTConfig(
        str(tmp_path / "run"),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        logging_steps=1,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        dataset_num_proc=None,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = SFTTrainer(
        model=str(base),
        args=arguments,
        train_dataset=Dataset.from_list([{"messages": turns}] * 4),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=SMoAConfig(r=4, num_blocks=2, lora_dropout=0.0, task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    adapter = load_adapter(tmp_path / "adapter", BaseCheckpoint.open(base))
    assert len(adapter.modules) == 10
    assert all(bool(update.b.any()) for update in adapter.modules.values())
