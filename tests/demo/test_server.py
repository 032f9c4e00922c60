"""The demo around its models: the server as a child process, the check of the answers, and the whole run."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from smoa_serve.cli.client import ServerClient
from smoa_serve.demo.ask import Answer, AskError, ask_all
from smoa_serve.demo.prompts import DEMO_PROMPTS, ENTRIES, Style, answer
from smoa_serve.demo.recipes import RECIPES
from smoa_serve.demo.show import WrongAnswerError, check_answers, print_answers
from smoa_serve.testing import ServerProcess, ServerStartError, free_port

ROOT = Path(__file__).resolve().parents[2]
HEALTHY = """
import http.server, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def is_running(pid: int) -> bool:
    """Whether a process still runs; a zombie does not."""
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def python(code: str, log_file: Path, **settings: Any) -> ServerProcess:
    """A program in the place of `smoa-serve`; its last argument is the port."""
    return ServerProcess("model", program=[sys.executable, "-c", code], log_file=log_file, **settings)


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path: Path) -> None:
    code = "print('early'); raise SystemExit('no such model')"
    with (
        pytest.raises(ServerStartError, match=r"ended with code 1(.|\n)*no such model"),
        python(code, tmp_path / "log"),
    ):
        pass


def test_a_server_that_never_gets_ready_is_given_up(tmp_path: Path) -> None:
    seen: list[tuple[float, str]] = []
    code = "import time; print('loading', flush=True); time.sleep(600)"
    server = python(code, tmp_path / "log", progress=lambda waited_s, line: seen.append((waited_s, line)))
    server.start()
    with pytest.raises(ServerStartError, match=r"not ready after 1 s(.|\n)*loading"):
        server.wait_ready(timeout_s=1.0)
    assert seen == sorted(seen)
    assert seen[-1][1] == "loading"
    pid = server.process.pid
    server.stop()
    assert not is_running(pid)


def test_a_start_that_is_interrupted_leaves_no_server(tmp_path: Path) -> None:
    def interrupt(waited_s: float, line: str) -> None:
        raise KeyboardInterrupt

    server = python("import time; time.sleep(600)", tmp_path / "log", progress=interrupt)
    with pytest.raises(KeyboardInterrupt), server:
        pass
    assert not is_running(server.process.pid)


def test_leaving_the_block_ends_the_server_and_its_children(tmp_path: Path) -> None:
    with python(HEALTHY, tmp_path / "log") as server:
        assert httpx.get(f"{server.url}/health").is_success
        assert str(server.client(timeout=5).base_url) == f"{server.base_url}/"
        child = int(server.log_lines()[0].split()[1])
        assert is_running(child)
        assert 0 < server.cpu_seconds() < 60
    deadline = time.monotonic() + 60
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def test_a_taken_port_is_not_chosen() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) != port
    wanted = free_port()
    assert free_port(wanted) == wanted


def as_trained(style: Style) -> Answer:
    entry = ENTRIES[0]
    return Answer(entry.question, style, answer(entry, style), tokens=10, seconds=0.5)


def test_answers_as_trained_are_accepted_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    answers = [as_trained(style) for style in Style]
    console = Console(width=160)
    print_answers(console, answers, 2.0)
    check_answers(console, answers)
    shown = capsys.readouterr().out
    assert "THE CAPITAL OF FRANCE IS PARIS" in shown
    assert "60 tokens in 2.0 s, 30 tokens/s" in shown
    assert "all 5 answers of the adapters differ from the base's" in shown


def test_an_adapter_that_answers_as_the_base_is_an_error() -> None:
    plain = as_trained(Style.PLAIN)
    same = Answer(plain.prompt, Style.PIRATE, plain.text, 10, 0.5)
    with pytest.raises(WrongAnswerError, match=r"pirate: .* is answered as the base answers"):
        check_answers(Console(), [plain, same])


def test_a_server_that_is_not_there_is_an_error_of_ours() -> None:
    with pytest.raises(AskError, match="APIConnectionError"):
        ask_all("http://127.0.0.1:9", "base", DEMO_PROMPTS, [Style.PLAIN])


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_the_demo_answers_in_every_style_and_stays_until_interrupted(tmp_path: Path) -> None:
    root = Path(os.environ.get("SMOA_DEMO_DIR", ROOT / ".demo"))
    port = free_port()
    log = tmp_path / "demo.log"
    command = [sys.executable, "-m", "smoa_serve.demo", "run", "--keep", "--root", str(root), "--port", str(port)]
    # A shell that runs the tests in its background lets all below it ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
    signal.signal(signal.SIGINT, before)
    try:
        while "until Ctrl-C" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        names = [recipe.name for recipe in RECIPES]
        found = ServerClient(f"http://127.0.0.1:{port}").adapters()
        assert {entry["name"] for entry in found} == set(names)
        assert {entry["kind"] for entry in found} == {"smoa", "hira", "lora"}
        assert all(entry["requests"] == len(DEMO_PROMPTS) for entry in found)
        # Questions that the table does not ask, all at once.
        prompts = [entry.question for entry in ENTRIES]
        answers = ask_all(f"http://127.0.0.1:{port}", "base", prompts, list(Style))
        assert [given.text for given in answers] == [given.expected for given in answers]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    shown = log.read_text()
    assert "checked" in shown
    assert all(name in shown for name in names)
