"""A fine-tune from its configuration to the adapter folder; thin over transformers' Trainer."""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..base.checkpoint import BaseCheckpoint
from ..errors import BaseModelError
from .config import TrainConfig
from .data import read_examples
from .model import adapted_modules, load_model
from .progress import ProgressCallback
from .report import REPORT_NAME, Outcome, make_report, write_json
from .resume import CHECKPOINTS, is_first_process, open_output
from .tokens import TokenizedData, collate, tokenize

CONFIG_NAME = "adapter_config.json"


def train(config: TrainConfig, console: Console, *, resume: bool = False) -> dict[str, Any]:
    """Run a fine-tune and write its adapter.

    Every process of `accelerate launch` calls this; the first one writes.

    Args:
        config: what to train.
        console: for progress.
        resume: go on from the last checkpoint in the output folder.

    Returns:
        The report, as written to training_report.json.

    Raises:
        SmoaError: base, data, settings or output folder cannot be used, or the loss is no longer a number.
    """
    base = BaseCheckpoint.open(config.base)
    modules = adapted_modules(config, base)
    data, validation, pad = _read_data(config, base)
    checkpoint = open_output(config, resume=resume)
    _hide_progress_bars()
    console = console if is_first_process() else Console(quiet=True)
    _say(console, config, data, checkpoint)
    torch.manual_seed(config.seed)
    model = load_model(config, base, checkpoint)
    with ProgressCallback(console) as progress:
        trainer = _trainer(config, model, data, validation, pad)
        trainer.add_callback(progress)
        begin = time.monotonic()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if validation is not None and config.training.evaluate_every is None:
            trainer.evaluate()
        seconds = time.monotonic() - begin
    report: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        _write_adapter(model, config.output)
        outcome = _outcome(trainer, model, checkpoint, seconds)
        report = make_report(config, outcome, data, config.output, base, modules)
        write_json(config.output / REPORT_NAME, report)
    trainer.accelerator.wait_for_everyone()
    return report


def _read_data(config: TrainConfig, base: BaseCheckpoint) -> tuple[TokenizedData, TokenizedData | None, int]:
    """Training data, validation data, and the token to pad with."""
    from transformers import AutoTokenizer

    examples, measured = read_examples(config.data.train), read_examples(config.data.validation)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"base model {config.base!r}: its tokenizer cannot be read: {error}") from error
    encode = partial(tokenize, tokenizer=tokenizer, max_length=config.data.max_length, loss_on=config.data.loss_on)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    return encode(examples), encode(measured) if measured else None, pad


def _say(console: Console, config: TrainConfig, data: TokenizedData, checkpoint: Path | None) -> None:
    settings = config.adapter
    blocks = f", K={settings.num_blocks}" if settings.method == "smoa" else ""
    console.print(
        f"{settings.method} r={settings.r}{blocks} on {config.base}: {len(data)} examples, {data.num_tokens} tokens",
        highlight=False,
        soft_wrap=True,
    )
    if data.cut:
        console.print(
            f"[yellow]{data.cut} examples are longer than {config.data.max_length} tokens and were cut, "
            f"{data.dropped} of them had no answer left and were dropped[/]",
            soft_wrap=True,
        )
    if checkpoint is not None:
        console.print(f"going on from {checkpoint}", highlight=False, soft_wrap=True)


def _trainer(config: TrainConfig, model: Any, data: TokenizedData, validation: TokenizedData | None, pad: int) -> Any:
    from transformers import Trainer
    from transformers.trainer_callback import PrinterCallback

    trainer = Trainer(
        model=model,
        args=_arguments(config, has_validation=validation is not None),
        train_dataset=data,
        eval_dataset=validation,
        data_collator=partial(collate, pad=pad),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(config: TrainConfig, *, has_validation: bool) -> Any:
    from transformers import TrainingArguments

    training = config.training
    periodic = has_validation and training.evaluate_every is not None
    return TrainingArguments(
        output_dir=str(config.output / CHECKPOINTS),
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule if training.schedule != "constant" else "constant_with_warmup",
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        gradient_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        bf16=config.bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=config.seed,
        save_steps=training.save_every,
        save_total_limit=training.keep_checkpoints,
        logging_steps=training.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if periodic else "no",
        eval_steps=training.evaluate_every if periodic else None,
        include_num_input_tokens_seen="non_padding",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
    )


def _outcome(trainer: Any, model: Any, checkpoint: Path | None, seconds: float) -> Outcome:
    state = trainer.state
    return Outcome(
        steps=state.global_step,
        epochs=float(state.epoch or 0),
        log=state.log_history,
        tokens_seen=int(state.num_input_tokens_seen),
        seconds=seconds,
        resumed_from_step=int(checkpoint.name.rpartition("-")[2]) if checkpoint else None,
        processes=trainer.accelerator.num_processes,
        device=_device_name(trainer.accelerator.device),
        trainable_parameters=model.get_nb_trainable_parameters()[0],
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _write_adapter(model: Any, output: Path) -> None:
    """Weights first, the configuration last: a folder without it is no adapter to a server."""
    with tempfile.TemporaryDirectory(dir=output) as aside:
        model.save_pretrained(aside)
        written = [file for file in Path(aside).iterdir() if file.is_file() and file.name != "README.md"]
        for file in sorted(written, key=lambda file: file.name == CONFIG_NAME):
            file.chmod(0o644)
            file.replace(output / file.name)


def _hide_progress_bars() -> None:
    """One bar is enough."""
    from transformers.utils import logging

    logging.disable_progress_bar()
