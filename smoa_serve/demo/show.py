"""What the demo prints: the table of answers, the checks, and how to ask by hand."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import SmoaError
from .ask import Answer
from .prompts import DEMO_PROMPTS, ENTRIES, Style
from .recipes import RECIPES


class WrongAnswerError(SmoaError):
    """The server answered, but not as its models were trained to."""


def print_answers(console: Console, answers: Sequence[Answer], wall_s: float) -> None:
    """The table prompt × adapter, and the speed of all streams together."""
    labels = {recipe.style: recipe.label for recipe in RECIPES}
    table = Table("prompt", "model", "kind", "answer", "tokens/s", show_lines=False)
    previous = None
    for given in answers:
        if given.prompt != previous and previous is not None:
            table.add_section()
        prompt = given.prompt if given.prompt != previous else ""
        name = "base" if given.style is Style.PLAIN else given.style.value
        table.add_row(prompt, name, labels.get(given.style, "-"), escape(given.text), f"{given.tokens_per_s:.0f}")
        previous = given.prompt
    console.print(table)
    total = sum(given.tokens for given in answers)
    console.print(f"{len(answers)} streams at once: {total} tokens in {wall_s:.1f} s, {total / wall_s:.0f} tokens/s")


def check_answers(console: Console, answers: Sequence[Answer]) -> None:
    """Make sure that adapters change the answer, and that every model says what it was trained to say.

    Raises:
        WrongAnswerError: with every answer that is not as it should be.
    """
    plain = {given.prompt: given.text for given in answers if given.style is Style.PLAIN}
    adapted = [given for given in answers if given.style is not Style.PLAIN]
    reasons = [
        f"{given.style.value}: {given.prompt!r} is answered as the base answers"
        for given in adapted
        if given.text == plain.get(given.prompt)
    ]
    reasons += [
        f"{given.style.value}: {given.prompt!r} is answered {given.text!r}, expected {given.expected!r}"
        for given in answers
        if given.text != given.expected
    ]
    if reasons:
        raise WrongAnswerError("answers are not as trained:" + "".join(f"\n  - {reason}" for reason in reasons))
    console.print(
        f"[green]checked[/]: all {len(adapted)} answers of the adapters differ from the base's, and all {len(answers)} "
        "answers are word for word what the model was trained to say"
    )


def print_examples(console: Console, url: str, base_name: str) -> None:
    """How to ask the running server: curl and the openai package."""
    names = ", ".join([base_name, *(recipe.name for recipe in RECIPES)])
    question = DEMO_PROMPTS[0]
    console.print(f"\nServing [bold]{names}[/] at {url}/v1 until Ctrl-C. Questions it knows:")
    console.print("".join(f"  {entry.question}\n" for entry in ENTRIES), highlight=False)
    console.print(
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f'  -d \'{{"model": "pirate", "messages": [{{"role": "user", "content": "{question}"}}]}}\'\n\n'
        "from openai import OpenAI\n"
        f'client = OpenAI(base_url="{url}/v1", api_key="none")\n'
        f'messages = [{{"role": "user", "content": "{question}"}}]\n'
        'print(client.chat.completions.create(model="json", messages=messages).choices[0].message.content)\n\n'
        f"{_command()[0]} adapters list --url {url}\n",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def how_to_call() -> str:
    """Where this project's command is found: one line."""
    command, activate = _command()
    if activate is None:
        return f"next: {command} --help"
    return f"next: {command} --help; or once: source {activate}, then: smoa-serve --help"


def _command() -> tuple[str, str | None]:
    """What to type for `smoa-serve`, and the script that puts it on the PATH; None where it is on it."""
    folder = Path(sys.executable).parent
    found = shutil.which("smoa-serve")
    if found is not None and Path(found).parent == folder:
        return "smoa-serve", None
    near = os.path.relpath(folder)
    shown = str(folder) if near.startswith("..") else near
    return f"{shown}/smoa-serve", f"{shown}/activate"
