"""The demo's client: every prompt to the base and to every adapter at once, through the official openai package."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import SmoaError
from .prompts import ENTRIES, Style, answer

MAX_TOKENS = 96


class AskError(SmoaError):
    """A request to the demo's server failed."""


@dataclass(frozen=True)
class Answer:
    """One streamed answer.

    Attributes:
        prompt: what was asked.
        style: who was asked; PLAIN is the base.
        text: what came.
        tokens: generated.
        seconds: from the request to the last token.
    """

    prompt: str
    style: Style
    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Speed of this stream, with all the others beside it."""
        return self.tokens / self.seconds

    @property
    def expected(self) -> str:
        """What this style was trained to say."""
        entry = next(entry for entry in ENTRIES if entry.question == self.prompt)
        return answer(entry, self.style)


def ask_all(url: str, base_name: str, prompts: Sequence[str], styles: Sequence[Style]) -> list[Answer]:
    """Ask every prompt of every model, all requests at the same time.

    Args:
        url: of the server, without /v1.
        base_name: what the server calls the base; adapters are called like their style.
        prompts: questions of the corpus.
        styles: whom to ask.

    Returns:
        Answers, prompt by prompt, in the order of `styles`.

    Raises:
        AskError: a request failed.
    """
    return asyncio.run(_ask_all(url, base_name, prompts, styles))


async def _ask_all(url: str, base_name: str, prompts: Sequence[str], styles: Sequence[Style]) -> list[Answer]:
    try:
        from openai import AsyncOpenAI, OpenAIError
    except ImportError as error:
        raise AskError("the demo asks through the openai package; install it with: pip install openai") from error

    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        names = {style: base_name if style is Style.PLAIN else style.value for style in styles}
        waiting = [_ask(client, names[style], prompt, style) for prompt in prompts for style in styles]
        try:
            return list(await asyncio.gather(*waiting))
        except OpenAIError as error:
            raise AskError(f"a request to {url} failed: {type(error).__name__}: {error}") from error


async def _ask(client: Any, model: str, prompt: str, style: Style) -> Answer:
    begin = time.perf_counter()
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    parts: list[str] = []
    tokens = 0
    async for chunk in stream:
        parts += [choice.delta.content or "" for choice in chunk.choices]
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    return Answer(prompt, style, "".join(parts), tokens, time.perf_counter() - begin)
