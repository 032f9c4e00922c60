"""A tiny base, adapters with random numbers, and a server: for tests of whatever talks to this project.

    base = random_base(folder / "base")
    random_adapter(folder / "adapters" / "tuned", base, kind="smoa")
    with ServerProcess(base, "--adapters-dir", folder / "adapters") as server:
        answer = server.client().completions.create(model="tuned", prompt="The sky is", max_tokens=4)

`random_base` needs transformers, `ServerProcess.client` needs openai; both come with vLLM.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import torch
from safetensors.torch import save_file
from torch import Tensor

from .adapters import write_portable
from .adapters.model import Adapter, AdapterKind, ModuleUpdate, OrderStatus
from .base.checkpoint import BaseCheckpoint
from .errors import SmoaError

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# head_dim 32 is the least that vLLM's attention takes.
TINY_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256}
TINY_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
# Little cache, nothing asked of a hub, and one thread: a tiny model gains nothing from more, and threads that wait for
# each other on a busy machine make a step thirty times slower.
TINY_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
SMOA_SERVE = (sys.executable, "-m", "smoa_serve.cli.app")
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
TAIL_LINES = 25


def random_base(
    folder: Path,
    model_type: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    **config: Any,
) -> Path:
    """Write a tiny base checkpoint whose answers depend on every layer.

    Args:
        folder: where to; made.
        model_type: of a causal language model that transformers knows.
        seed: of the weights, which are Gaussian with variance 1 / H_in.
        dtype: of the stored weights.
        tokenizer: with the demo's tokenizer of 1024 tokens and its chat template; without, give `vocab_size`.
        config: what the model's configuration is given on top of `TINY_SIZES` and `TINY_HEADS`.

    Returns:
        The folder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words: dict[str, Any] = {}
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(__file__).parent / "demo" / "weights" / "base" / name, folder)
        read = AutoTokenizer.from_pretrained(folder)
        words = {"vocab_size": len(read), "pad_token_id": read.pad_token_id, "eos_token_id": read.eos_token_id}
    settings = AutoConfig.for_model(model_type, **(TINY_SIZES | TINY_HEADS | words | {"bos_token_id": None} | config))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder)
    return folder


def random_adapter(
    folder: Path,
    base: Path,
    *,
    kind: AdapterKind | str = AdapterKind.SMOA,
    ranks: Sequence[int] = (4, 4),
    alpha: float | None = None,
    targets: Sequence[str] = LINEAR_LAYERS,
    seed: int = 0,
    block_seed: int | None = None,
    strength: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write an adapter with random factors: SMoA and HiRA in the portable format, LoRA as PEFT does.

    Args:
        folder: where to; made.
        base: Hugging Face folder.
        kind: "smoa", "hira" or "lora".
        ranks: r_k of each of the K blocks; HiRA and LoRA have one block of their sum.
        alpha: lora_alpha; the sum of the ranks by default, so that the scaling is 1.
        targets: last parts of the modules' names.
        seed: of the factors.
        block_seed: of the partition into blocks; those of one base usually share it. By default each has its own.
        strength: typical size of an entry of the update in units of the weight; at 1.0 answers differ at once.
        dtype: of the factors.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown kind, or no linear layer of the base has such a name.
    """
    kind, checkpoint = AdapterKind(kind), BaseCheckpoint.open(base)
    modules = [name for name in checkpoint.linear_modules if name.rpartition(".")[2] in targets]
    if not modules:
        known = sorted({name.rpartition(".")[2] for name in checkpoint.linear_modules})
        raise ValueError(f"no linear layer of {base} is called {' or '.join(targets)}; it has {', '.join(known)}")
    rank = sum(ranks)
    branches = tuple(ranks) if kind is AdapterKind.SMOA else (rank,)
    scaling = 1.0 if alpha is None else alpha / rank
    own = torch.Generator().manual_seed(seed)
    blocks = own if block_seed is None else torch.Generator().manual_seed(block_seed)
    updates = {}
    for name in modules:
        row_block, col_block = (torch.randperm(n, generator=blocks) % len(branches) for n in checkpoint.shape(name))
        a, b = _factors(row_block, col_block, branches, own)
        b *= strength / (scaling * max(branches) ** 0.5)
        ids = row_block.to(torch.int16), col_block.to(torch.int16)
        updates[name] = ModuleUpdate(a.to(dtype), b.to(dtype), *ids, branches, scaling, checkpoint.fingerprint(name))
    if kind is AdapterKind.LORA:
        return _write_lora(updates, rank, checkpoint, folder)
    order = OrderStatus.RECORDED if kind is AdapterKind.SMOA else OrderStatus.NOT_NEEDED
    return write_portable(Adapter(kind, updates, rank, len(branches), scaling * rank, order), folder)


def _factors(
    row_block: Tensor, col_block: Tensor, ranks: Sequence[int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Gaussian a [R, H_in] and b [H_out, R], zero above the rank of a coordinate's block."""
    size, live = torch.tensor(ranks), torch.arange(max(ranks))[:, None]  # [K], [R, 1]
    a = torch.randn(max(ranks), len(col_block), generator=generator) * (live < size[col_block])
    b = torch.randn(len(row_block), max(ranks), generator=generator) * (live < size[row_block]).T
    return a, b


def _write_lora(updates: Mapping[str, ModuleUpdate], rank: int, base: BaseCheckpoint, folder: Path) -> Path:
    """The factors as PEFT stores them; b in units of the weight's spread, which LoRA does not multiply by."""
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = update.a
        tensors[f"base_model.model.{name}.lora_B.weight"] = update.b * float(base.weight(name).float().std())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    alpha = next(iter(updates.values())).scaling * rank
    targets = sorted({name.rpartition(".")[2] for name in updates})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


class ServerStartError(SmoaError):
    """The server died or did not become ready; the message ends with its log."""


def free_port(preferred: int = 0) -> int:
    """A port of this machine that nobody listens on: the preferred one if it is free."""
    with socket.socket() as probe:
        # As servers do: a port that only waits for old connections to fade counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", preferred))
        except OSError:
            return free_port()
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """`smoa-serve serve` as a child process: `with` starts it, waits until it is ready, and shuts it down in the end.

    Args:
        model: folder or name of the base.
        flags: of `smoa-serve serve`.
        program: whose `serve` is started.
        port: where it listens, on the loopback interface; a free one by default.
        log_file: gets its output; by default a file in the folder for temporary ones, named in errors.
        environment: variables on top of this process's; the default suits a tiny model on a CPU.
        progress: called about once a second during the start, with the seconds waited and the log's last line.

    Attributes:
        url: of the server, without /v1.
        base_url: what OpenAI clients are given.
        command: how it is started.
    """

    def __init__(
        self,
        model: str | Path,
        *flags: str | Path,
        program: Sequence[str | Path] = SMOA_SERVE,
        port: int | None = None,
        log_file: Path | None = None,
        environment: Mapping[str, str] = TINY_ENVIRONMENT,
        progress: Callable[[float, str], None] | None = None,
    ) -> None:
        port = port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.base_url = f"{self.url}/v1"
        self.log_file = log_file or Path(tempfile.gettempdir()) / f"smoa-serve-{os.getpid()}-{port}.log"
        self.command = [*map(str, program), "serve", str(model), *map(str, flags)]
        self.command += ["--host", "127.0.0.1", "--port", str(port)]
        self._environment = {**os.environ, **environment}
        self._progress = progress
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def client(self, **settings: Any) -> Any:
        """An `openai.OpenAI` that does not retry: a failure must be seen. `settings` are its own, `api_key` for one."""
        from openai import OpenAI

        defaults: dict[str, Any] = {"base_url": self.base_url, "api_key": "none", "max_retries": 0}
        return OpenAI(**(defaults | settings))

    def start(self) -> None:
        """Start it without waiting, for those who start several at once; `wait_ready` and `stop` are theirs to call."""
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> float:
        """Wait until /health answers; returns the seconds waited.

        Raises:
            ServerStartError: it ended or took too long.
        """
        begin = time.monotonic()
        while True:
            waited = time.monotonic() - begin
            code = self.process.poll()
            if code is not None:
                raise ServerStartError(f"the server ended with code {code} before it was ready.\n{self.log_tail()}")
            if self._healthy():
                return waited
            if waited > timeout_s:
                raise ServerStartError(f"the server was not ready after {timeout_s:.0f} s.\n{self.log_tail()}")
            if self._progress is not None:
                self._progress(waited, next(iter(self.log_lines()[-1:]), ""))
            time.sleep(0.5)

    def wait(self) -> int:
        """Wait until the server ends by itself; returns its exit code."""
        return self.process.wait()

    def stop(self) -> None:
        """Ask the server to end, and end it if it does not; its own child processes too."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is not None:
                break
            self.process.send_signal(number)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                continue
        try:  # what it left behind: engine processes of a server that was killed
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """The API server; its pid is the number of the session of all that it starts.

        Raises:
            RuntimeError: it was not started.
        """
        if self._process is None:
            raise RuntimeError("the server was not started: use it in a `with` block")
        return self._process

    def cpu_seconds(self) -> float:
        """Processor time of the server and everything it started, so far."""
        ticks = 0
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
            if int(fields[3]) == self.process.pid:  # session; utime and stime stand at 11 and 12
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def log_lines(self) -> list[str]:
        """The log so far, without empty lines."""
        text = self.log_file.read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if line.strip()]

    def log_tail(self) -> str:
        """The end of the log, with its place."""
        lines = "\n".join(f"  | {line}" for line in self.log_lines()[-TAIL_LINES:])
        return f"The end of its log ({self.log_file}):\n{lines}"

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5.0).is_success
        except httpx.TransportError:
            return False
