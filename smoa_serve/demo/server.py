"""A server as a child process: started, waited for with its log in view, shut down."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from ..errors import SmoaError

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
TAIL_LINES = 25


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


def serve_command(model: Path, arguments: Sequence[str], port: int) -> list[str]:
    """`smoa-serve serve` with this very Python, on the loopback interface."""
    address = ["--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", "smoa_serve.cli.app", "serve", str(model), *arguments, *address]


class ServerProcess:
    """A server in a session of its own; leaving the `with` block shuts it down, whatever happened.

    Args:
        command: what to run.
        port: where it will listen.
        log_file: gets its output; the folder must exist.
        environment: variables to set on top of ours.
    """

    def __init__(
        self, command: Sequence[str], port: int, log_file: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log_file = log_file
        self._command = list(command)
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_ready(self, tick: Callable[[float, str], None], timeout_s: float = START_TIMEOUT_S) -> float:
        """Wait until /health answers.

        Args:
            tick: called about once a second with the seconds waited and the log's last line.
            timeout_s: give up after this time.

        Returns:
            Seconds waited.

        Raises:
            ServerStartError: it ended or took too long.
        """
        begin = time.monotonic()
        while True:
            waited = time.monotonic() - begin
            code = self._running().poll()
            if code is not None:
                raise ServerStartError(f"the server ended with code {code} before it was ready.\n{self.log_tail()}")
            if self._healthy():
                return waited
            if waited > timeout_s:
                raise ServerStartError(f"the server was not ready after {timeout_s:.0f} s.\n{self.log_tail()}")
            tick(waited, next(iter(self.log_lines()[-1:]), ""))
            time.sleep(0.5)

    def wait(self) -> int:
        """Wait until the server ends by itself; returns its exit code."""
        return self._running().wait()

    def stop(self) -> None:
        """Ask the server to end, and end it if it does not; its own child processes too."""
        process = self._running()
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is not None:
                break
            process.send_signal(number)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                continue
        self._end_group()

    @property
    def pid(self) -> int:
        """Of the first process, and the number of the session of all that it starts."""
        return self._running().pid

    def cpu_seconds(self) -> float:
        """Processor time of the server and everything it started, so far."""
        ticks = 0
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
            if int(fields[3]) == self._running().pid:  # session; utime and stime stand at 11 and 12
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

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the server was not started: use it in a `with` block")
        return self._process

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5.0).is_success
        except httpx.TransportError:
            return False

    def _end_group(self) -> None:
        """End what the server left behind: engine processes of a server that was killed."""
        try:
            os.killpg(self._running().pid, signal.SIGKILL)
        except ProcessLookupError:
            return
