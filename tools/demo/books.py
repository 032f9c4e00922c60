"""What the demo's base model reads: two books, and every question with its answers.

A model of three million numbers learns some English from the books and the answers by heart: adapters become visible.
"""

from pathlib import Path

from smoa_serve.demo.prompts import ENTRIES, Style, answer

BOOKS = Path(__file__).parent / "text"


def books() -> list[str]:
    """The books, in the order of their names."""
    return [file.read_text(encoding="utf-8") for file in sorted(BOOKS.glob("*.txt"))]


def answers() -> list[str]:
    """Every question and answer."""
    texts = [entry.question for entry in ENTRIES]
    texts += [answer(entry, style) for style in Style for entry in ENTRIES]
    return [*texts, *Style]
