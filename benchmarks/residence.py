"""Where the hot adapter of a comparison resides, and what its answers and everybody else's are there."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Any

import httpx

from smoa_serve.cli.client import ServerClient, ServerError
from smoa_serve.cli.loadgen import PROMPT_IDS, TIMEOUT_S

PROMPTS, PROMPT_TOKENS = 4, 48


class Place(StrEnum):
    """Where an adapter is put; merged comes with what others get."""

    SLOT = "slot"
    RESIDENT = "resident"
    COMPENSATE = "merged, compensate"
    EXCLUSIVE = "merged, exclusive"


_MERGES = {Place.COMPENSATE: "compensate", Place.EXCLUSIVE: "exclusive"}


class Hot:
    """The hot adapter of one server. The automatic policy leaves all adapters where they are, until it is let in.

    Args:
        url: of the server; nothing is moved or pinned there yet.
        name: of the adapter.

    Attributes:
        place: where it is.
    """

    def __init__(self, url: str, name: str) -> None:
        self._client, self.name = ServerClient(url), name
        self.place = Place.SLOT
        self._all("pin")

    @contextmanager
    def left_to_the_policy(self) -> Iterator[None]:
        """All adapters are the automatic policy's; afterwards they are in their slots again."""
        self._all("unpin")
        try:
            yield
        finally:
            self._all("pin")
            for entry in self._client.adapters():
                if entry["residence"] in ("merged", "resident"):
                    self._client.move(entry["name"], "slot")
            self.place = Place.SLOT

    def _all(self, target: str) -> None:
        for entry in self._client.adapters():
            self._client.move(entry["name"], target)

    def bring(self, place: Place, **options: object) -> dict[str, Any] | None:
        """Move it; what the server reports of the move, None where it was there.

        Args:
            place: where to.
            options: of a merge.
        """
        if place is self.place and not options:
            return None
        report: dict[str, Any]
        if place in _MERGES:
            # Rounding is not judged here, it is reported.
            wish: dict[str, object] = {"policy": _MERGES[place], "max_lost": 1.0, **options}
            report = self._client.move(self.name, "merge", wish)
        else:
            report = self._client.move(self.name, "slot")
            if place is Place.RESIDENT:
                report = self._client.move(self.name, "resident")
        self.place = place
        return report

    def policy(self) -> dict[str, Any]:
        """What the automatic policy says of itself."""
        found: dict[str, Any] = (
            httpx.get(f"{self._client.url}/v1/smoa/policy", timeout=TIMEOUT_S).raise_for_status().json()
        )
        return found

    @property
    def shown(self) -> str:
        """Where the server says that it is."""
        return next(str(entry["residence"]) for entry in self._client.adapters() if entry["name"] == self.name)


@dataclass(frozen=True)
class Difference:
    """Two rounds of logprobs of the same prompts.

    Attributes:
        largest, mean: absolute differences, nats.
        best_agree: share of the places at which the best token is the same.
    """

    largest: float
    mean: float
    best_agree: float


Scores = list[tuple[float, str]]  # per place: logprob of the prompt's token, the best token


def scores(url: str, model: str) -> Scores:
    """Logprobs of fixed random prompts: no sampling, so that rounding cannot lead two runs apart.

    Args:
        url: of a server without prefix caching.
        model: whom to ask.

    Raises:
        ServerError: it refused.
    """
    rng = Random(7)
    found: Scores = []
    for _ in range(PROMPTS):
        body = {
            "model": model,
            "prompt": rng.choices(PROMPT_IDS, k=PROMPT_TOKENS),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 1,
        }
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S)
        if not response.is_success:
            raise ServerError(f"{model}: {response.status_code}: {response.text[:500]}")
        places: Sequence[Mapping[str, Any] | None] = response.json()["choices"][0]["prompt_logprobs"]
        for token, place in zip(body["prompt"], places, strict=True):
            if place is not None:  # the first token follows nothing
                best = next(key for key, entry in place.items() if entry["rank"] == 1)
                found.append((float(place[str(token)]["logprob"]), best))
    return found


def difference(one: Scores, other: Scores) -> Difference:
    """Of two rounds of `scores`."""
    gaps = [abs(a - b) for (a, _), (b, _) in zip(one, other, strict=True)]
    same = sum(a == b for (_, a), (_, b) in zip(one, other, strict=True))
    return Difference(max(gaps), sum(gaps) / len(gaps), same / len(gaps))
