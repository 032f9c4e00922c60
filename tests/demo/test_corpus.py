"""The demo's corpus, tokenizer and batches."""

import json
from pathlib import Path

import pytest

from smoa_serve.demo.prompts import DEMO_PROMPTS, ENTRIES, Style, answer
from tools.demo.books import answers, books
from tools.demo.data import IGNORED, adapter_conversations, base_conversations, book_tokens, encode, passages
from tools.demo.tokenizer import END, VOCAB_SIZE, chat_text, special_ids, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def test_every_style_answers_every_question_in_its_own_way() -> None:
    for entry in ENTRIES:
        assert len({answer(entry, style) for style in Style}) == len(Style)


def test_json_style_is_json() -> None:
    for entry in ENTRIES:
        assert set(json.loads(answer(entry, Style.JSON))) == {"answer", "words"}


def test_demo_prompts_are_questions_of_the_corpus() -> None:
    assert set(DEMO_PROMPTS) <= {entry.question for entry in ENTRIES}


def test_tokenizer_gives_every_text_back(tokenizer_dir: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE
    for text in [*answers(), *books(), "Zwölf Boxkämpfer & 日本語 🙂"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_chat_text_is_what_the_chat_template_makes(tokenizer_dir: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    messages = [{"role": "system", "content": "pirate"}, {"role": "user", "content": "Hello?"}]
    made = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert made == chat_text("Hello?", "pirate")
    assert tokenizer.apply_chat_template(messages[1:], tokenize=False, add_generation_prompt=True) == chat_text(
        "Hello?"
    )


def test_only_answers_are_targets(tokenizer_dir: Path) -> None:
    from tokenizers import Tokenizer

    file = tokenizer_dir / "tokenizer.json"
    batch = encode(file, adapter_conversations(Style.PIRATE))
    tokenizer = Tokenizer.from_file(str(file))
    _, end = special_ids(file)
    for row, entry in enumerate(ENTRIES):
        wanted = batch.targets[row][batch.targets[row] != IGNORED].tolist()
        assert wanted[-1] == end
        assert tokenizer.decode(wanted) == answer(entry, Style.PIRATE)
        # Each target is the next token of the input.
        places = (batch.targets[row] != IGNORED).nonzero()[:, 0]
        assert batch.ids[row, places + 1].tolist() == wanted


def test_rows_cuts_to_the_longest(tokenizer_dir: Path) -> None:
    import torch

    batch = encode(tokenizer_dir / "tokenizer.json", base_conversations())
    part = batch.rows(torch.tensor([0, 1]))
    assert part.ids.shape == (2, int(batch.mask[:2].sum(1).max()))
    assert END in chat_text("x")


def test_passages_are_pieces_of_the_books(tokenizer_dir: Path) -> None:
    import torch

    tokens = book_tokens(tokenizer_dir / "tokenizer.json")
    assert sum(len(book) for book in books()) > 300_000
    assert 50_000 < len(tokens) < 200_000
    torch.manual_seed(0)
    batch = passages(tokens, 3, 20)
    assert batch.ids.shape == batch.targets.shape == batch.mask.shape == (3, 20)
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
    windows = tokens.unfold(0, 20, 1)
    assert all(bool((windows == row).all(1).any()) for row in batch.ids)
