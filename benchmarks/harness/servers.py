"""The servers a comparison needs, all up at the same time."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.harness.models import home
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
FLAGS = ("--max-model-len", "1024", "--no-enable-prefix-caching")


@dataclass(frozen=True)
class Server:
    """One server of a comparison: with this project's plugin or stock vLLM, where LoRA is off without adapters.

    `adapters` is name → folder; `environment` are variables beside those that all servers have.
    """

    name: str
    plugin: bool
    adapters: Mapping[str, Path] = field(default_factory=dict)
    flags: tuple[str, ...] = FLAGS
    environment: Mapping[str, str] = field(default_factory=dict)

    def process(self, base: Path, log_file: Path) -> ServerProcess:
        flags = ["--served-model-name", "base", *self.flags]
        if on_gpu():
            flags += ["--gpu-memory-utilization", "0.25"]
        if self.adapters:
            flags += ["--max-loras", str(len(self.adapters)), "--max-lora-rank", str(SLOT_RANK)]
        pairs = [f"{name}={path}" for name, path in self.adapters.items()]
        environment = ENVIRONMENT | ({} if self.plugin else {"VLLM_PLUGINS": ""}) | dict(self.environment)
        program: Sequence[str] = SMOA_SERVE
        if self.plugin:
            flags += [part for pair in pairs for part in ("--adapter", pair)]
        else:
            program = (sys.executable, "-m", "vllm.entrypoints.cli.main")
            flags += ["--enable-lora", "--lora-modules", *pairs] if pairs else []
        return ServerProcess(base, *flags, program=program, log_file=log_file, environment=environment)


@contextmanager
def running(base: Path, servers: Sequence[Server]) -> Iterator[dict[str, ServerProcess]]:
    """Start all servers; gives them by name. All are shut down in the end.

    Raises:
        ServerStartError: one did not start.
    """
    made_for = base.resolve().parent.name.lstrip(".")
    logs = {server.name: home("logs") / f"{made_for}-{server.name.replace(' ', '-')}.log" for server in servers}
    processes = {server.name: server.process(base, logs[server.name]) for server in servers}
    with ExitStack() as stack:
        for process in processes.values():  # all at once: most of a start is imports on one core
            process.start()
            stack.callback(process.stop)
        for name, process in processes.items():
            process.wait_ready()
            print(f"server ready: {name}")
        yield processes


def on_gpu() -> bool:
    return torch.cuda.is_available()
