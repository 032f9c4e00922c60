"""The demo's tokenizer: byte-level BPE, so that any text can be asked, with a chat template."""

import json
from pathlib import Path

from .books import answers, books

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
VOCAB_SIZE = 1024

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_text(question: str, system: str | None = None) -> str:
    """The prompt that `CHAT_TEMPLATE` makes of one question."""
    start = f"{SYSTEM}{system}{END}" if system else ""
    return f"{start}{USER}{question}{END}{ASSISTANT}"


def write_tokenizer(out_dir: Path) -> None:
    """Train the tokenizer on the demo's books and answers and write it in the Hugging Face layout."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*books(), *answers()], trainer)
    tokenizer.save(str(out_dir / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "pad_token": PAD,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def special_ids(tokenizer_file: Path) -> tuple[int, int]:
    """(PAD, END) as token ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    pad, end = tokenizer.token_to_id(PAD), tokenizer.token_to_id(END)
    assert pad is not None, "write_tokenizer puts it into every tokenizer"
    assert end is not None, "write_tokenizer puts it into every tokenizer"
    return pad, end
