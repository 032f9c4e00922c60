"""Does memory hold under churn? Adapters loaded, replaced, moved, evicted and unloaded without end, every answer
compared."""

import asyncio
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness import Bar, Options, Row, of_kind, table
from benchmarks.harness.models import testing
from benchmarks.harness.servers import Server, running
from smoa_serve.errors import SmoaError

KINDS = ("smoa", "smoa", "hira", "lora")
CONTENTS = 24
WORKERS, NAMES = 4, 3  # names of each worker
SLOTS, HOST = 4, 6  # fewer than names: adapters are evicted from both all the time
TOKENS = 6
PROMPTS = tuple(tuple(20 + 3 * place % 100 for place in range(length)) for length in (5, 40))
TOLERANCE = NEAR_TIE = 1e-3  # float32, nats
WARM_UP = 500  # operations
Answer = list[tuple[str, float, float]]  # per token: text, logprob, distance of the best two


class ChurnError(SmoaError):
    """An answer was wrong, or the server refused what it has to do."""


def is_close(one: Answer, other: Answer) -> bool:
    """Whether two greedy completions are the same up to rounding; after a near tie they may part."""
    for (token, logprob, _), (again, logprob_again, margin) in zip(one, other, strict=True):
        if token != again:
            return margin < NEAR_TIE
        if abs(logprob - logprob_again) > TOLERANCE:
            return False
    return True


class Churn:
    """Operations and requests against one server, whose names each belong to one task, so that it is always known what
    a name means. `movable` says of each content whether it can be resident or merged."""

    def __init__(self, client: httpx.AsyncClient, contents: Sequence[Path], movable: Sequence[bool]) -> None:
        self._client, self._contents, self._movable = client, contents, movable
        self._random = random.Random(0)
        self._answers: list[list[Answer]] = []
        self.operations = self.requests = 0
        self.wrong: list[str] = []
        self.done: Counter[str] = Counter()

    async def learn(self) -> None:
        """Ask every content alone. Raises ChurnError where two cannot be told apart."""
        for index, path in enumerate(self._contents):
            name = f"churn-alone-{index}"
            await self._load(name, index, in_place=False)
            self._answers.append([await self._ask(name, prompt) for prompt in PROMPTS])
            await self._post("/v1/unload_lora_adapter", {"lora_name": name})
            for other, answers in enumerate(self._answers[:-1]):
                if is_close(answers[0], self._answers[-1][0]):
                    raise ChurnError(f"contents {path} and {self._contents[other]} answer alike; make them stronger")

    async def run(self, operations: int, look: Callable[[int], None] | None = None, every: int = 100) -> None:
        """So many operations, and requests beside them; `look` gets their number every so many of them."""
        watched = every

        async def work(worker: int) -> None:
            nonlocal watched
            names = [f"churn-{worker}-{index}" for index in range(NAMES)]
            loaded: dict[str, int] = {}  # what a name means
            merged: str | None = None
            while self.operations < operations and not self.wrong:
                name = merged or self._random.choice(names)
                merged = await self._operate(name, loaded, may_merge=worker == 0, is_merged=name == merged)
                self.operations += 1
                for name in self._random.sample(sorted(loaded), k=min(2, len(loaded))):
                    index = self._random.randrange(len(PROMPTS))
                    found, expected = await self._ask(name, PROMPTS[index]), self._answers[loaded[name]][index]
                    if not is_close(found, expected):
                        self.wrong.append(f"{name}: {found} instead of {expected}")
                if look is not None and self.operations >= watched:
                    watched += every
                    look(self.operations)
            for name in loaded:
                await self._post("/v1/unload_lora_adapter", {"lora_name": name})

        async with asyncio.TaskGroup() as group:
            for worker in range(WORKERS):
                group.create_task(work(worker))

    async def _operate(self, name: str, loaded: dict[str, int], *, may_merge: bool, is_merged: bool) -> str | None:
        """Do something to a name; returns it where it is merged then."""
        if name not in loaded:
            what = "load"
        elif is_merged:
            what = self._random.choice(("unmerge", "unmerge", "replace", "unload"))
        else:
            moves = ("resident", "slot", *(("merge",) if may_merge else ())) if self._movable[loaded[name]] else ()
            what = self._random.choice(("replace", "replace", "unload", "unload", *moves))
        self.done[what] += 1
        if what == "unload":
            await self._post("/v1/unload_lora_adapter", {"lora_name": name})
            del loaded[name]
        elif what in ("load", "replace"):
            loaded[name] = self._random.randrange(len(self._contents))
            await self._load(name, loaded[name], in_place=what == "replace")
        else:
            options = {"policy": self._random.choice(("compensate", "exclusive"))} if what == "merge" else {}
            response = await self._client.post(f"/v1/smoa/adapters/{name}/{what}", json=options)
            if response.status_code == httpx.codes.CONFLICT:  # evicted meanwhile: it stays what it was
                self.done[f"{what} refused"] += 1
                return None
            if not response.is_success:
                raise ChurnError(f"{what} {name}: {response.status_code}: {response.text[:500]}")
            return name if what == "merge" else None
        return None

    async def _load(self, name: str, content: int, *, in_place: bool) -> None:
        body = {"lora_name": name, "lora_path": str(self._contents[content]), "load_inplace": in_place}
        await self._post("/v1/load_lora_adapter", body)

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        response = await self._client.post(path, json=body)
        if not response.is_success:
            raise ChurnError(f"POST {path} {body}: {response.status_code}: {response.text[:500]}")
        return response

    async def _ask(self, name: str, prompt: Sequence[int]) -> Answer:
        body = {"model": name, "prompt": list(prompt), "max_tokens": TOKENS, "temperature": 0, "logprobs": 2}
        response = await self._post("/v1/completions", body | {"ignore_eos": True, "return_tokens_as_token_ids": True})
        self.requests += 1
        found = response.json()["choices"][0]["logprobs"]
        best = [sorted(top.values(), reverse=True) for top in found["top_logprobs"]]
        margins = [top[0] - top[1] for top in best]
        return list(zip(found["tokens"], found["token_logprobs"], margins, strict=True))


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


def sample(session: int, client: httpx.Client, operations: int) -> Row:
    """Look at a server: anonymous memory by process title (pages of files are shared with whoever reads them), and the
    series of adapters that /metrics holds."""
    text = client.get("/metrics").raise_for_status().text
    series = sum(line.startswith("vllm:lora_requests_info{") for line in text.splitlines())
    sizes = anon_kib(session)
    row = {"kind": "sample", "operations": operations, "anon_kib": sizes, "total_kib": sum(sizes.values())}
    return row | {"lora_series": series}


def make_contents(base: Path, folder: Path, count: int = CONTENTS) -> tuple[list[Path], list[bool]]:
    """Random adapters of all kinds with updates about as large as the weights, and which of them can be moved."""
    kinds = [KINDS[index % len(KINDS)] for index in range(count)]
    paths = [folder / f"{kind}-{index}" for index, kind in enumerate(kinds)]
    for index, (kind, path) in enumerate(zip(kinds, paths, strict=True)):
        testing.random_adapter(path, base, kind=kind, ranks=(4,) * (2 + index % 3 if kind == "smoa" else 1), seed=index)
    return paths, [kind != "lora" for kind in kinds]


def growth(samples: Sequence[Row], warm_up: int) -> float:
    """Share by which memory grew: the median of the last fifth against that of the first fifth after the warm-up."""
    sizes = [row["total_kib"] for row in samples if row["operations"] > warm_up]
    part = max(1, len(sizes) // 5)
    return statistics.median(sizes[-part:]) / statistics.median(sizes[:part]) - 1


def cases(options: Options) -> tuple[int, int]:
    return (1500, 50) if options.quick else (10_500, 100)


def measure(case: tuple[int, int], options: Options) -> list[Row]:
    """A row per look at the server, and one of the whole run. Raises ChurnError if an answer was wrong, or refused."""
    operations, every = case
    samples: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="smoa-churn-") as name:
        folder = Path(name)
        base = testing.random_base(folder / "churn" / "base")
        contents, movable = make_contents(base, folder / "adapters")
        flags = ["--adapters-root", str(folder / "adapters"), "--dtype", "float32", "--enforce-eager"]
        # Pages of the KV cache count once they were used: few blocks, or it grows for as long as there are fresh ones.
        flags += ["--max-model-len", "256", "--num-gpu-blocks-override", "64", "--enable-lora"]
        flags += ["--max-loras", str(SLOTS), "--max-cpu-loras", str(HOST), "--max-lora-rank", "8"]
        environment = {"OMP_NUM_THREADS": "1", "SMOA_STORE_DIR": str(folder / "store")}
        environment["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] = "60"
        with running(base, [Server("churn", True, {}, tuple(flags), environment)]) as servers:
            server = servers["churn"]

            def look(done: int) -> None:
                with httpx.Client(base_url=server.url, timeout=120) as watcher:
                    samples.append(sample(server.process.pid, watcher, done))
                if done % (10 * every) < every:
                    print(f"{done} operations: {samples[-1]['total_kib'] / 1024:.1f} MiB {samples[-1]['anon_kib']}")

            async def churn_on() -> Churn:
                limits = httpx.Limits(max_connections=WORKERS)
                async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
                    churn = Churn(client, contents, movable)
                    await churn.learn()
                    await churn.run(operations, look, every)
                    return churn

            churn = asyncio.run(churn_on())
    if churn.wrong:
        raise ChurnError(f"after {churn.operations} operations: {churn.wrong[0]}")
    counts = {"operations": churn.operations, "requests": churn.requests, "done": dict(churn.done), "wrong": 0}
    return [*samples, {"kind": "churn", **counts, "growth": round(growth(samples, WARM_UP), 5)}]


def bars(rows: Sequence[Row]) -> list[Bar]:
    (whole,), samples = of_kind(rows, "churn"), of_kind(rows, "sample")
    sizes = [row["total_kib"] / 1024 for row in samples if row["operations"] > WARM_UP]
    name = "memory of all processes after against before, share"
    most = max(row["lora_series"] for row in samples)
    return [
        Bar(name, whole["growth"], None, (min(sizes), max(sizes)), 0.02),
        Bar("series of vllm:lora_requests_info", most, None, (0, most), 1),
    ]


def section(rows: Sequence[Row]) -> str:
    (whole,), samples = of_kind(rows, "churn"), of_kind(rows, "sample")
    done = ", ".join(f"{name} {count:,}" for name, count in whole["done"].items())
    words = "{operations:,} operations ({done}), {requests:,} requests, {wrong} wrong answers."
    words = words.format_map(whole | {"done": done})
    memory = {"operations": "{operations:,}", "memory, MiB": lambda row: f"{row['total_kib'] / 1024:.1f}"}
    some = [*samples[:: max(1, len(samples) // 10)], samples[-1]]
    return f"{words}\n\n{table(memory, some)}"
