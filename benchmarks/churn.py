"""Whether memory holds under churn: adapters loaded, replaced, moved, evicted and unloaded without end, every answer
compared."""

import asyncio
import json
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from smoa_kernels.testing import random_blocks

from benchmarks.bars import Bar
from benchmarks.fleet import ENVIRONMENT
from benchmarks.random_models import Shape, random_base
from smoa_serve.adapters import write_portable
from smoa_serve.adapters.model import Adapter, AdapterKind, ModuleUpdate, OrderStatus
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.base.orders import cache_root
from smoa_serve.base.spectral import even_ranks
from smoa_serve.errors import SmoaError
from smoa_serve.testing import ServerProcess

TINY = Shape("churn", 64, 2, 2, 1, 160, 512)
KINDS = ("smoa", "smoa", "hira", "lora")
CONTENTS = 24
WORKERS, NAMES = 4, 3  # names of each worker
SLOTS, HOST = 4, 6  # fewer than names: adapters are evicted from both all the time
TOKENS = 6
PROMPTS = tuple(tuple(20 + 3 * place % 100 for place in range(length)) for length in (5, 40))
TOLERANCE = NEAR_TIE = 1e-3  # float32, nats
GROWTH = 0.02
LIMIT_S = 3600.0


class ChurnError(SmoaError):
    """An answer was wrong, or the server refused what it has to do."""


@dataclass(frozen=True)
class Answer:
    """A greedy completion: token texts, the logprob of each, the distance of the best two."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    margins: tuple[float, ...]

    def is_close(self, other: "Answer") -> bool:
        """Whether they are the same up to rounding; after a near tie they may part."""
        for place, token in enumerate(self.tokens):
            if token != other.tokens[place]:
                return other.margins[place] < NEAR_TIE
            if abs(self.logprobs[place] - other.logprobs[place]) > TOLERANCE:
                return False
        return True


@dataclass
class Sample:
    """Memory at one moment.

    Attributes:
        operations: so far.
        anon_kib: anonymous memory by process title; pages of files are shared with whoever reads them.
        metrics_bytes: size of /metrics; lora_series: series of vllm:lora_requests_info in it.
        status: the memory fields of the first worker's `smoa_status`, empty where the server does not show them.
    """

    operations: int
    anon_kib: dict[str, int]
    metrics_bytes: int
    lora_series: int
    status: dict[str, Any] = field(default_factory=dict)

    @property
    def total_kib(self) -> int:
        """Of all processes."""
        return sum(self.anon_kib.values())


class Churn:
    """Operations and requests against one server, whose names each belong to one task, so that it is always known what
    a name means.

    Args:
        client: with the server's address and headers.
        contents: adapter folders that the server may load.
        movable: of each, whether it can be resident or merged.
        seed: of all choices.
        prefix: of the names.

    Attributes:
        operations, requests: so far; wrong: what did not answer as it should.
        done: kind of operation -> how many.
    """

    def __init__(
        self, client: httpx.AsyncClient, contents: Sequence[Path], movable: Sequence[bool], seed: int = 0,
        prefix: str = "churn",
    ) -> None:  # fmt: skip
        self._client, self._contents, self._movable, self._prefix = client, contents, movable, prefix
        self._random = random.Random(seed)
        self._answers: list[list[Answer]] = []
        self.operations = self.requests = 0
        self.wrong: list[str] = []
        self.done: Counter[str] = Counter()

    async def learn(self) -> None:
        """Ask every content alone. Raises ChurnError where two cannot be told apart."""
        for index, path in enumerate(self._contents):
            name = f"{self._prefix}-alone-{index}"
            await self._load(name, index, in_place=False)
            self._answers.append([await self._ask(name, prompt) for prompt in PROMPTS])
            await self._post("/v1/unload_lora_adapter", {"lora_name": name})
            for other, answers in enumerate(self._answers[:-1]):
                if answers[0].is_close(self._answers[-1][0]):
                    raise ChurnError(f"contents {path} and {self._contents[other]} answer alike; make them stronger")

    async def run(
        self, operations: int, look: Callable[[int], None] | None = None, every: int = 100, limit_s: float = LIMIT_S
    ) -> None:
        """So many operations, and requests beside them.

        Args:
            operations: how many more; limit_s: or as many as take so long.
            look: called with the number of operations.
            every: so many of them.
        """
        end, watched = self.operations + operations, self.operations + every
        deadline = time.monotonic() + limit_s

        async def work(worker: int) -> None:
            nonlocal watched
            state = _Names([f"{self._prefix}-{worker}-{index}" for index in range(NAMES)])
            while self.operations < end and time.monotonic() < deadline and not self.wrong:
                await self._operate(worker, state)
                self.operations += 1
                for name in self._random.sample(sorted(state.loaded), k=min(2, len(state.loaded))):
                    await self._check(name, state.loaded[name])
                if look is not None and self.operations >= watched:
                    watched += every
                    look(self.operations)
            for name in list(state.loaded):
                await self._post("/v1/unload_lora_adapter", {"lora_name": name})

        async with asyncio.TaskGroup() as group:
            for worker in range(WORKERS):
                group.create_task(work(worker))

    async def _operate(self, worker: int, state: "_Names") -> None:
        name = state.merged or self._random.choice(state.names)
        content = state.loaded.get(name)
        if content is None:
            what = "load"
        elif state.merged:
            what = self._random.choice(("unmerge", "unmerge", "replace", "unload"))
        else:
            moves = ("resident", "slot", *(("merge",) if worker == 0 else ())) if self._movable[content] else ()
            what = self._random.choice(("replace", "replace", "unload", "unload", *moves))
        self.done[what] += 1
        match what:
            case "load" | "replace":
                new = self._random.randrange(len(self._contents))
                await self._load(name, new, in_place=what == "replace")
                state.loaded[name], state.merged = new, None
            case "unload":
                await self._post("/v1/unload_lora_adapter", {"lora_name": name})
                del state.loaded[name]
                state.merged = None
            case "merge":
                policy = self._random.choice(("compensate", "exclusive"))
                if await self._move(name, "merge", {"policy": policy}):
                    state.merged = name
            case _:
                await self._move(name, what, {})
                state.merged = None

    async def _move(self, name: str, target: str, options: Mapping[str, Any]) -> bool:
        """Whether it was moved: one that is evicted meanwhile is refused, and stays what it was."""
        response = await self._client.post(f"/v1/smoa/adapters/{name}/{target}", json=options)
        if response.status_code == httpx.codes.CONFLICT:
            self.done[f"{target} refused"] += 1
            return False
        if not response.is_success:
            raise ChurnError(f"{target} {name}: {response.status_code}: {response.text[:500]}")
        return True

    async def _load(self, name: str, content: int, *, in_place: bool) -> None:
        body = {"lora_name": name, "lora_path": str(self._contents[content]), "load_inplace": in_place}
        await self._post("/v1/load_lora_adapter", body)

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        response = await self._client.post(path, json=body)
        if not response.is_success:
            raise ChurnError(f"POST {path} {body}: {response.status_code}: {response.text[:500]}")
        return response

    async def _check(self, name: str, content: int) -> None:
        index = self._random.randrange(len(PROMPTS))
        found = await self._ask(name, PROMPTS[index])
        if not found.is_close(self._answers[content][index]):
            self.wrong.append(f"{name}: {found} instead of {self._answers[content][index]}")

    async def _ask(self, name: str, prompt: Sequence[int]) -> Answer:
        body = {"model": name, "prompt": list(prompt), "max_tokens": TOKENS, "temperature": 0, "logprobs": 2}
        response = await self._post("/v1/completions", body | {"ignore_eos": True, "return_tokens_as_token_ids": True})
        self.requests += 1
        logprobs = response.json()["choices"][0]["logprobs"]
        best = [sorted(top.values(), reverse=True) for top in logprobs["top_logprobs"]]
        margins = tuple(top[0] - top[1] for top in best)
        return Answer(tuple(logprobs["tokens"]), tuple(logprobs["token_logprobs"]), margins)


@dataclass
class _Names:
    """What one task's names mean: name -> content; which of them is merged."""

    names: list[str]
    loaded: dict[str, int] = field(default_factory=dict)
    merged: str | None = None


def anon_kib(session: int) -> dict[str, int]:
    """Title -> anonymous memory of every process of a session, titles that occur again with their number."""
    found: dict[str, int] = {}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda one: int(one.name)):
        with suppress(OSError, IndexError):  # it ended while we looked
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) != session:
                continue
            title = (folder / "comm").read_text().strip()
            lines = (folder / "smaps_rollup").read_text().splitlines()
            size = next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
            found[title if title not in found else f"{title} {folder.name}"] = size
    return found


def sample(session: int, client: httpx.Client, operations: int) -> Sample:
    """Look at a server.

    Args:
        session: process id of its first process.
        client: with its address and headers.
        operations: so far.
    """
    text = client.get("/metrics").raise_for_status().text
    series = sum(line.startswith("vllm:lora_requests_info{") for line in text.splitlines())
    answer = client.post("/collective_rpc", json={"method": "smoa_status"})
    status = answer.json()["results"][0] if answer.is_success else {}
    kept = ("partition_bytes", "partitions", "host_bytes", "contents", "tokens")
    return Sample(operations, anon_kib(session), len(text), series, {key: status[key] for key in kept if key in status})


def make_contents(base_dir: Path, folder: Path, count: int = CONTENTS) -> tuple[list[Path], list[bool]]:
    """Random adapters of all kinds with updates about as large as the weights, and which of them can be moved."""
    base = BaseCheckpoint.open(base_dir)
    modules = [name for name in base.linear_modules if name.endswith("_proj")]
    kinds = [KINDS[index % len(KINDS)] for index in range(count)]
    paths = [folder / f"{kind}-{index}" for index, kind in enumerate(kinds)]
    for index, (kind, path) in enumerate(zip(kinds, paths, strict=True)):
        generator = torch.Generator().manual_seed(index)
        if kind == "lora":
            _write_lora(base, modules, generator, path)
        else:
            _write_smoa(base, modules, generator, path, 1 if kind == "hira" else 2 + index % 3)
    return paths, [kind != "lora" for kind in kinds]


def _write_smoa(
    base: BaseCheckpoint, modules: Sequence[str], generator: torch.Generator, out: Path, num_blocks: int
) -> None:
    rank = 4 * num_blocks
    ranks = even_ranks(rank, num_blocks)
    updates = {}
    for name in modules:
        rows, cols = base.shape(name)
        a, b = torch.randn(4, cols, generator=generator), torch.randn(rows, 4, generator=generator) / 2
        ids = [random_blocks(size, num_blocks, generator) for size in (rows, cols)]
        updates[name] = ModuleUpdate(a, b, *ids, ranks, 1.0, base.fingerprint(name))
    kind, order = AdapterKind.SMOA, OrderStatus.RECORDED
    if num_blocks == 1:
        kind, order = AdapterKind.HIRA, OrderStatus.NOT_NEEDED
    write_portable(Adapter(kind, updates, rank, num_blocks, float(rank), order), out)


def _write_lora(base: BaseCheckpoint, modules: Sequence[str], generator: torch.Generator, out: Path) -> None:
    tensors = {}
    for name in modules:
        rows, cols = base.shape(name)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, cols, generator=generator) * 0.1
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in modules})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": targets, "bias": "none"}
    (out / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def growth(samples: Sequence[Sample], warm_up: int) -> float:
    """Share by which memory grew: the median of the last fifth against that of the first fifth after the warm-up."""
    sizes = [one.total_kib for one in samples if one.operations > warm_up]
    part = max(1, len(sizes) // 5)
    return statistics.median(sizes[-part:]) / statistics.median(sizes[:part]) - 1


def run(quick: bool) -> tuple[list[dict[str, object]], list[Bar]]:
    """10,000 operations, or 1,500.

    Returns:
        Rows for the results, and the bars.
    """
    operations, warm_up, every = (1500, 500, 50) if quick else (10_500, 500, 100)
    console = Console(stderr=True)
    folder = Path(tempfile.mkdtemp(prefix="smoa-churn-"))
    try:
        base = _loud_base(folder / "base")
        contents, movable = make_contents(base, folder / "adapters")
        samples, churn = _serve(base, folder, contents, movable, operations, every, console)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if churn.wrong:
        raise ChurnError(f"after {churn.operations} operations: {churn.wrong[0]}")
    grown = growth(samples, warm_up)
    rows: list[dict[str, object]] = [{"kind": "sample", **vars(one), "total_kib": one.total_kib} for one in samples]
    rows.append(
        {
            "kind": "churn",
            "operations": churn.operations,
            "requests": churn.requests,
            "done": dict(churn.done),
            "wrong": len(churn.wrong),
            "growth": round(grown, 5),
        }
    )
    sizes = [one.total_kib / 1024 for one in samples if one.operations > warm_up]
    most = max(one.lora_series for one in samples)
    return rows, [
        Bar("memory of all processes after against before, share", grown, None, (min(sizes), max(sizes)), GROWTH),
        Bar("series of vllm:lora_requests_info", most, None, (0, most), 1),
    ]


def _loud_base(out: Path) -> Path:
    """A random base whose logits are far enough apart for answers to be told apart."""
    shutil.copytree(random_base(TINY), out)
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 20
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _serve(
    base: Path,
    folder: Path,
    contents: Sequence[Path],
    movable: Sequence[bool],
    operations: int,
    every: int,
    console: Console,
) -> tuple[list[Sample], Churn]:
    flags = ["--served-model-name", "base", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    # Pages of the KV cache count once they were used: few blocks, or it would grow for as long as there are fresh ones.
    flags += ["--num-gpu-blocks-override", "64"]
    flags += ["--max-loras", str(SLOTS), "--max-cpu-loras", str(HOST), "--max-lora-rank", "8", "--enable-lora"]
    flags += ["--adapters-root", str(folder / "adapters")]
    environment = ENVIRONMENT | {
        "OMP_NUM_THREADS": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # for the workers' own accounts
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60",
        "SMOA_STORE_DIR": str(folder / "store"),
    }
    samples: list[Sample] = []
    logs = cache_root() / "benchmarks" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with (
        ServerProcess(base, *flags, log_file=logs / "churn.log", environment=environment) as server,
        httpx.Client(base_url=server.url, timeout=120) as watcher,
    ):

        def look(done: int) -> None:
            samples.append(sample(server.process.pid, watcher, done))
            if done % (10 * every) < every:
                now = samples[-1]
                mib = {name: size // 1024 for name, size in now.anon_kib.items()}
                console.print(f"{done} operations: {now.total_kib / 1024:.1f} MiB {mib}", highlight=False)

        async def churn_on() -> Churn:
            limits = httpx.Limits(max_connections=WORKERS)
            async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
                churn = Churn(client, contents, movable)
                await churn.learn()
                await churn.run(operations, look, every)
                return churn

        return samples, asyncio.run(churn_on())
