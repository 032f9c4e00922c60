"""The servers a comparison needs, all up at the same time, and the variants that are measured on them."""

import asyncio
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from smoa_serve.base.orders import cache_root
from smoa_serve.cli.bench import summary
from smoa_serve.cli.loadgen import Job, LoadResult, make_jobs, run_load
from smoa_serve.testing import SMOA_SERVE, ServerProcess

SLOT_RANK = 8  # the least --max-lora-rank of vLLM that holds r/K = 4 and LoRA's r = 4
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Several servers share the cores, one works at a time: none may bind threads of its own to a core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",
    # What is measured stays where it is, unless a server's own environment says otherwise.
    "SMOA_AUTO_RESIDENT": "0",
}
STOCK = {"VLLM_PLUGINS": ""}


@dataclass(frozen=True)
class Server:
    """One server of a comparison.

    Attributes:
        name: for people.
        plugin: with this project's plugin, or stock vLLM.
        adapters: name → folder; with none, LoRA is not even enabled.
        flags: of vLLM, beside those all servers have.
        environment: variables beside those all servers have.
    """

    name: str
    plugin: bool
    adapters: Mapping[str, Path]
    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def process(self, base: Path, log_file: Path, environment: Mapping[str, str]) -> ServerProcess:
        """How it is started."""
        flags = ["--served-model-name", "base", "--max-model-len", "1024", "--no-enable-prefix-caching", *self.flags]
        if on_gpu():
            flags += ["--gpu-memory-utilization", "0.25"]
        if self.adapters:
            flags += ["--max-loras", str(len(self.adapters)), "--max-lora-rank", str(SLOT_RANK)]
        if self.plugin:
            given = [part for name, path in self.adapters.items() for part in ("--adapter", f"{name}={path}")]
            flags += given
        elif self.adapters:
            flags += ["--enable-lora", "--lora-modules", *(f"{name}={path}" for name, path in self.adapters.items())]
        program = SMOA_SERVE if self.plugin else (sys.executable, "-m", "vllm.entrypoints.cli.main")
        return ServerProcess(base, *flags, program=program, log_file=log_file, environment=environment)


@dataclass(frozen=True)
class Variant:
    """What is asked of which server.

    Attributes:
        name: for people and results.
        server: name of the server.
        models: whom the streams ask, in turn.
    """

    name: str
    server: str
    models: tuple[str, ...]


@dataclass(frozen=True)
class Load:
    """The load of one repeat of one variant."""

    streams: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Repeat:
    """One measurement of one variant.

    Attributes:
        load: what the streams saw.
        cpu_s: processor time of the server meanwhile: what is comparable on a machine that others use too.
    """

    load: LoadResult
    cpu_s: float

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.load.tokens_per_s:.1f} tokens/s, {self.cpu_s:.1f} s of processor time"


@contextmanager
def running(base: Path, servers: Sequence[Server], console: Console) -> Iterator[dict[str, ServerProcess]]:
    """Start all servers; gives them by name. All are shut down in the end.

    Raises:
        ServerStartError: one did not start.
    """
    logs = cache_root() / "benchmarks" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        processes = {}
        for server in servers:  # all at once: most of a start is imports on one core
            environment = ENVIRONMENT | ({} if server.plugin else STOCK) | dict(server.environment)
            log = logs / f"{base.resolve().parent.name.lstrip('.')}-{server.name.replace(' ', '-')}.log"
            processes[server.name] = server.process(base, log, environment)
            processes[server.name].start()
            stack.callback(processes[server.name].stop)
        for name, process in processes.items():
            process.wait_ready()
            console.print(f"server ready: {name}", highlight=False)
        yield processes


def measure(
    servers: Mapping[str, ServerProcess], variants: Sequence[Variant], load: Load, repeats: int, console: Console
) -> dict[str, list[Repeat]]:
    """Every variant once per repeat, in turn and back, so that a machine that slows down slows all of them.

    Args:
        servers: all that the variants name.
        variants: what to measure.
        load: the same for all.
        repeats: how often.
        console: for progress.
    """
    for variant in variants:  # adapters come into their slots, buffers into being
        jobs = make_jobs(variant.models, max(load.streams, len(variant.models)), load.input_tokens, 4)
        asyncio.run(run_load(servers[variant.server].url, jobs, load.streams))
    results: dict[str, list[Repeat]] = {variant.name: [] for variant in variants}
    for repeat in range(repeats):
        for variant in variants if repeat % 2 == 0 else reversed(variants):
            jobs = make_jobs(variant.models, load.streams, load.input_tokens, load.output_tokens, seed=repeat + 1)
            found = one_repeat(servers[variant.server], jobs, load.streams)
            results[variant.name].append(found)
            console.print(f"repeat {repeat + 1} of {repeats}: {variant.name}: {found.words}", highlight=False)
    return results


def one_repeat(server: ServerProcess, jobs: Sequence[Job], streams: int) -> Repeat:
    """Send all jobs to a server and measure.

    Args:
        server: which is ready.
        jobs: what to ask.
        streams: concurrent requests.
    """
    before = server.cpu_seconds()
    result = asyncio.run(run_load(server.url, jobs, streams))
    return Repeat(result, server.cpu_seconds() - before)


def speeds(repeats: Sequence[Repeat]) -> list[float]:
    """Tokens/s of each."""
    return [repeat.load.tokens_per_s for repeat in repeats]


def figures(repeats: Sequence[Repeat]) -> dict[str, object]:
    """What a line of results says of all repeats of a variant: throughput, spread, processor time, latencies."""
    found = speeds(repeats)
    samples = [sample for repeat in repeats for sample in repeat.load.samples]
    return {
        "tokens_per_s": round(statistics.median(found), 2),
        "spread": [round(min(found), 2), round(max(found), 2)],
        "values": [round(speed, 2) for speed in found],
        "cpu_s": [round(repeat.cpu_s, 2) for repeat in repeats],
        **{key: round(value, 2) for key, value in summary(samples).items()},
    }


def on_gpu() -> bool:
    """Whether the servers run on one."""
    import torch

    return torch.cuda.is_available()
