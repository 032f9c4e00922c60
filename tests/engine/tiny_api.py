"""The server that the tests of the API share: a tiny base, adapters with a plain effect, the expected answers."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file
from torch import Tensor

from smoa_serve.adapters import load_adapter
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.base.spectral import even_ranks
from smoa_serve.testing import random_adapter

# The tiny tokenizer's words are t0 … t127; these take the place of the last ones, so that it can write JSON.
JSON_WORDS = ("{", "}", ":", ",", '"name"', '"age"', '"ann"', '"bob"', "1", "2")


MAX_TOKENS = 16384
# Below this distance between the best two tokens, the rounding of a batch may decide which one is chosen.
NEAR_TIE = 1e-3
LOGPROB_TOLERANCE = 1e-3
# Tokens of an answer that have to be compared before such a tie, and the share of all tokens of a session.
LEAST_TOKENS, LEAST_SHARE = 2, 0.9


@dataclass
class Compared:
    """How much was compared; what follows another token cannot be.

    Attributes:
        asked: tokens of all answers that were found to be the expected ones; compared: those before a near tie.
    """

    asked: int = 0
    compared: int = 0

    def count(self, asked: int, compared: int) -> None:
        """One answer."""
        self.asked, self.compared = self.asked + asked, self.compared + compared

    def assert_enough(self) -> None:
        """At the end of a session."""
        assert self.compared >= LEAST_SHARE * self.asked, (
            f"near ties left {self.asked - self.compared} of {self.asked} tokens uncompared; choose other prompts"
        )


COMPARED = Compared()


@dataclass(frozen=True)
class Answer:
    """A greedy completion.

    Attributes:
        tokens: ids.
        logprobs: of each.
        margins: distance between the best two logprobs at each place.
    """

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]

    def differs(self, expected: "Answer", compared: Compared = COMPARED) -> str | None:
        """Where this is not the expected answer; None when it is, up to a near tie.

        Args:
            expected: what is right.
            compared: counts what was compared.
        """
        if len(self.tokens) != len(expected.tokens):
            return f"{len(self.tokens)} tokens instead of {len(expected.tokens)}"
        for place, token in enumerate(self.tokens):
            same = token == expected.tokens[place]
            if not same and expected.margins[place] >= NEAR_TIE:
                return f"at {place}: {self.tokens} instead of {expected.tokens}"
            allowed = LOGPROB_TOLERANCE + (0 if same else NEAR_TIE)
            if abs(self.logprobs[place] - expected.logprobs[place]) > allowed:
                return f"at {place}: logprob {self.logprobs[place]} instead of {expected.logprobs[place]}"
            if not same:
                if place < LEAST_TOKENS:
                    return f"at {place}: a near tie leaves nothing to compare; choose another prompt"
                compared.count(len(self.tokens), place)
                return None
        compared.count(len(self.tokens), len(self.tokens))
        return None

    def first(self, count: int) -> "Answer":
        """What it is when fewer tokens are asked for."""
        return Answer(self.tokens[:count], self.logprobs[:count], self.margins[:count])

    @classmethod
    def read(cls, logprobs: Any) -> "Answer":
        """From the `logprobs` of a completion asked with `GREEDY`."""
        tops = [sorted(top.values(), reverse=True) for top in logprobs.top_logprobs]
        tokens = [int(token.removeprefix("token_id:")) for token in logprobs.tokens]
        return cls(tokens, list(logprobs.token_logprobs), [top[0] - top[1] for top in tops])


GREEDY: dict[str, Any] = {
    "temperature": 0,
    "logprobs": 2,
    "extra_body": {"ignore_eos": True, "return_tokens_as_token_ids": True},
}


class Parts:
    """Puts a streamed answer together.

    Attributes:
        answer: so far.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self.answer = Answer([], [], [])

    def add(self, chunk: Any) -> None:
        """One part of the stream."""
        assert chunk.model == self._model
        for choice in chunk.choices:
            part = Answer.read(choice.logprobs)
            self.answer.tokens.extend(part.tokens)
            self.answer.logprobs.extend(part.logprobs)
            self.answer.margins.extend(part.margins)


@dataclass(frozen=True)
class MadeAdapter:
    """An adapter on disk, and its dense updates by module."""

    kind: str
    rank: int
    num_blocks: int
    path: Path
    deltas: Mapping[str, Tensor]


def copy_base(base: Path, out: Path) -> Path:
    """The same weights with a tokenizer that can write JSON, and room for streams that run for seconds."""
    shutil.copytree(base, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"max_position_embeddings": MAX_TOKENS}))
    file = out / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for index, word in enumerate(JSON_WORDS, start=len(vocabulary) - len(JSON_WORDS)):
        del vocabulary[f"t{index}"]
        vocabulary[word] = index
    file.write_text(json.dumps(tokenizer))
    return out


def make_smoa(
    base_path: Path, out: Path, *, rank: int, num_blocks: int, targets: Sequence[str], seed: int, hira: bool = False
) -> MadeAdapter:
    """A random portable adapter with random block ids; its update is about as large as the weight."""
    kind, alpha = ("hira", rank) if hira else ("smoa", 2 * rank)
    ranks = even_ranks(rank, num_blocks)
    random_adapter(out, base_path, kind=kind, ranks=ranks, alpha=alpha, targets=targets, seed=seed)
    base = BaseCheckpoint.open(base_path)
    deltas = {name: update.dense(base.weight(name)) for name, update in load_adapter(out, base).modules.items()}
    return MadeAdapter(kind, rank, num_blocks, out, deltas)


def make_lora(base_path: Path, out: Path, *, rank: int, targets: Sequence[str], seed: int) -> MadeAdapter:
    """A random LoRA adapter as PEFT writes it; its update is about as large as the weight."""
    random_adapter(out, base_path, kind="lora", ranks=(rank,), alpha=2 * rank, targets=targets, seed=seed)
    tensors, deltas = load_file(out / "adapter_model.safetensors"), {}
    for name in (name.removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name):
        product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        deltas[name.removeprefix("base_model.model.")] = 2.0 * product
    return MadeAdapter("lora", rank, 1, out, deltas)


class Reference:
    """transformers on merged weights, float32: the expected answers."""

    def __init__(self, base: Path, adapters: Mapping[str, MadeAdapter]) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        self._stored = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        self._adapters = adapters
        self._merged: str | None = None
        self._greedy: dict[tuple[str | None, tuple[int, ...]], tuple[list[int], list[Tensor]]] = {}

    @torch.inference_mode()
    def logprobs(self, name: str | None, tokens: Sequence[int]) -> Tensor:
        """[len(tokens), vocabulary]: after each token. None is the base model."""
        if name != self._merged:
            state: dict[str, Any] = dict(self._stored)
            for module, delta in self._adapters[name].deltas.items() if name else ():
                state[f"{module}.weight"] = state[f"{module}.weight"] + delta
            self._model.load_state_dict(state)
            self._merged = name
        logits: Tensor = self._model(torch.tensor([list(tokens)])).logits[0]
        return torch.log_softmax(logits, -1)

    def greedy(self, name: str | None, prompt: Sequence[int], count: int) -> tuple[list[int], Tensor]:
        """The tokens that follow, and the logprobs [count, vocabulary] they were chosen by."""
        tokens, rows = self._greedy.setdefault((name, tuple(prompt)), ([], []))
        while len(tokens) < count:
            rows.append(self.logprobs(name, [*prompt, *tokens])[-1])
            tokens.append(int(rows[-1].argmax()))
        return tokens[:count], torch.stack(rows[:count])


ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
SMOA: dict[str, dict[str, Any]] = {
    "smoa-r8-k2": {"rank": 8, "num_blocks": 2, "targets": ATTENTION + MLP},
    "smoa-r16-k4": {"rank": 16, "num_blocks": 4, "targets": ("q_proj", "v_proj", *MLP)},
    "smoa-r7-k3": {"rank": 7, "num_blocks": 3, "targets": ("o_proj", "down_proj", "k_proj")},
    "smoa-r8-k1": {"rank": 8, "num_blocks": 1, "targets": ATTENTION},
    "hira-r4": {"rank": 4, "num_blocks": 1, "targets": ("q_proj", "up_proj", "down_proj"), "hira": True},
}
BASE = "base-model"
API_KEY = "sesame"
NUM_SLOTS, HOST_ADAPTERS = 4, 6


class Tiny:
    """The tiny base on a server with `NUM_SLOTS` slots and host memory for `HOST_ADAPTERS` adapters.

    Attributes:
        server: asks for an API key.
        client: the official one, with the key.
        base: folder of the base, whose tokenizer can write JSON.
        root: folder that adapters may be loaded from.
        resolved: folder of vLLM's filesystem resolver.
        adapters: loaded at start-up by name; a test that unloads one loads it again.
        models: every name that can be asked for.
        reference: transformers on merged weights.
    """

    def __init__(self, server: Any, base: Path, root: Path, resolved: Path, adapters: dict[str, MadeAdapter]) -> None:
        self.server, self.base, self.root, self.resolved, self.adapters = server, base, root, resolved, adapters
        self.models = [BASE, *adapters]
        self.reference = Reference(base, adapters)
        self.client = server.client()
        self._solo: dict[tuple[str, tuple[int, ...], int], Answer] = {}

    def make(self, name: str, seed: int, **facts: Any) -> MadeAdapter:
        """Another SMoA adapter below the root, on every linear layer unless told otherwise."""
        return make_smoa(
            self.base, self.root / name, seed=seed, **({"rank": 8, "num_blocks": 2, "targets": ATTENTION + MLP} | facts)
        )

    def ask(self, model: str, prompt: Sequence[int], max_tokens: int = 8) -> Answer:
        """A greedy completion."""
        completion = self.client.completions.create(model=model, prompt=list(prompt), max_tokens=max_tokens, **GREEDY)
        assert completion.model == model
        return Answer.read(completion.choices[0].logprobs)

    def stream_settings(self, model: str, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
        """What a client is given for the same as a stream, to be put together by `Parts`."""
        return GREEDY | {"model": model, "prompt": list(prompt), "max_tokens": max_tokens, "stream": True}

    def parts(self, model: str) -> Parts:
        """An empty answer to put a stream of `model` into."""
        return Parts(model)

    def metric(self, name: str) -> float:
        """The sum of a counter or gauge of /metrics over all its labels."""
        lines = httpx.get(f"{self.server.url}/metrics", headers=self.server.headers).raise_for_status().text.split("\n")
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0] == name)

    def load(self, name: str, path: Path | str, *, load_inplace: bool = False) -> httpx.Response:
        """POST /v1/load_lora_adapter."""
        body = {"lora_name": name, "lora_path": str(path), "load_inplace": load_inplace}
        return self.server.post("/v1/load_lora_adapter", body)

    def unload(self, name: str) -> httpx.Response:
        """POST /v1/unload_lora_adapter."""
        return self.server.post("/v1/unload_lora_adapter", {"lora_name": name})

    def solo(self, model: str, prompt: Sequence[int], max_tokens: int = 8) -> Answer:
        """The answer of an adapter loaded at start-up; asked once."""
        key = (model, tuple(prompt), max_tokens)
        if key not in self._solo:
            self._solo[key] = self.ask(model, prompt, max_tokens)
        return self._solo[key]

    def residence(self) -> dict[str, str]:
        """Where every revision in the engine resides, by its number there: loaded ones and those that still drain."""
        response = self.server.post("/collective_rpc", {"method": "smoa_status"})
        return dict(response.raise_for_status().json()["results"][0]["residence"])


def start_tiny(recorded_base: Path, folder: Path, start: Callable[..., Any], arguments: Sequence[str]) -> Tiny:
    """Make everything and start the server."""
    base, root, resolved = copy_base(recorded_base, folder / "base"), folder / "adapters", folder / "resolved"
    resolved.mkdir()
    adapters = {name: make_smoa(base, root / name, seed=seed, **SMOA[name]) for seed, name in enumerate(SMOA)}
    adapters["lora-r4"] = make_lora(base, root / "lora-r4", rank=4, targets=ATTENTION + MLP, seed=9)
    line = f"--served-model-name {BASE} --api-key {API_KEY} --max-lora-rank 8 --max-model-len {MAX_TOKENS}"
    slots = f"--max-loras {NUM_SLOTS} --max-cpu-loras {HOST_ADAPTERS}"
    modules = [f"{name}={adapter.path}" for name, adapter in adapters.items()]
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        # A resolver beside us, which finds nothing that a test did not put into its folder.
        "VLLM_PLUGINS": "smoa_serve,lora_filesystem_resolver",
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(resolved),
        # Longer than the clients keep idle connections: none meets one that the server is closing.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60",
        "SMOA_ALLOW_PICKLE": "1",
        "SMOA_ADAPTER_ROOTS": str(root),
    }
    server = start(base, *arguments, *line.split(), *slots.split(), "--lora-modules", *modules, **environment)
    server.api_key = API_KEY
    return Tiny(server, base, root, resolved, adapters)
