"""Asks an adapter the same before and after it is merged."""

import asyncio
import random
import uuid
from dataclasses import dataclass
from typing import Any

from smoa_serve.registry.revisions import Revision

PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 4, 12, 16


@dataclass(frozen=True)
class Parity:
    """How two rounds of answers compare.

    Attributes:
        largest_logprob_difference: of a chosen token, as far as the answers agree.
        tokens_agree: whether every greedy token is the same.
        prompts: how many were asked, tokens: how many each answer has.
    """

    largest_logprob_difference: float
    tokens_agree: bool
    prompts: int = PROMPTS
    tokens: int = ANSWER_TOKENS


async def answers(engine: Any, revision: Revision) -> list[list[tuple[int, float]]]:
    """(token, logprob) of the adapter's greedy answers to some fixed random prompts; nothing comes from the cache."""
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    rng = random.Random(0)
    prompts = [[rng.randrange(vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(PROMPTS)]
    return await asyncio.gather(*(_answer(engine, revision, prompt) for prompt in prompts))


def compare(before: list[list[tuple[int, float]]], after: list[list[tuple[int, float]]]) -> Parity:
    """Of two rounds of `answers`."""
    largest, agree = 0.0, True
    for one, other in zip(before, after, strict=True):
        for (token, logprob), (again, logprob_again) in zip(one, other, strict=True):
            if token != again:
                agree = False
                break
            largest = max(largest, abs(logprob - logprob_again))
    return Parity(largest, agree)


async def _answer(engine: Any, revision: Revision, prompt: list[int]) -> list[tuple[int, float]]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    settings = SamplingParams(
        temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, logprobs=1, output_kind=RequestOutputKind.FINAL_ONLY
    )
    asked = {"prompt_token_ids": prompt, "cache_salt": uuid.uuid4().hex}
    final: Any = None
    async for output in engine.generate(
        asked, settings, request_id=f"parity-{uuid.uuid4().hex}", lora_request=revision.request()
    ):
        final = output
    (answer,) = final.outputs
    return [(token, place[token].logprob) for token, place in zip(answer.token_ids, answer.logprobs, strict=True)]
