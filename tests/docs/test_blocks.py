"""What README, tutorials and reference show is run, in order, against the demo's server, and prints what they say.

A block right below `<!-- server -->` is the server: it is started, and stays until another page wants another one. A
block right below `<!-- not run: WHY -->` is not run. A `text` block is what the block before it prints, line by line;
… stands for anything. Only the port is another one than the page says.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
# In the order in which they are run: pages of one server stand together.
PAGES = (
    "README.md",
    "docs/tutorials/serve.md",
    "docs/tutorials/train.md",
    "docs/reference/python-api.md",
    "docs/reference/portable-format.md",
    "docs/tutorials/hot.md",
)
# Every block that is not run, with the reason that the page gives.
NOT_RUN = {
    "README.md": ["it sets up .venv, which these tests run in; tests/demo runs the demo itself"],
    "docs/tutorials/serve.md": ["it sets up .venv, which these tests run in"],
}
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
ADDRESS = re.compile(r"(127\.0\.0\.1|localhost):8000")
SHELL = ("bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c")


@dataclass(frozen=True)
class Block:
    """One piece of code of a page.

    Attributes:
        line: where it begins; language, text: of the fence; mark: of the comment right above; printed: the next block,
            if that is `text`.
    """

    line: int
    language: str
    text: str
    mark: str
    printed: str


def blocks(page: str) -> list[Block]:
    """The code of a page, in order."""
    source = (ROOT / page).read_text(encoding="utf-8")
    found = list(BLOCK.finditer(source))
    result = []
    for match, after in zip(found, [*found[1:], None], strict=True):
        printed = after["text"] if after is not None and after["language"] == "text" else ""
        if match["language"] in {"bash", "python"}:
            line = source[: match.start("text")].count("\n") + 1
            result.append(Block(line, match["language"], match["text"], match["mark"] or "", printed))
    return result


class Terminal:
    """A folder like a checkout after `make demo`, terminals in it, and at most one server.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self._server: subprocess.Popen[bytes] | None = None
        self._serving = ""
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / "configs").symlink_to(ROOT / "configs")
        shutil.copytree(ROOT / "smoa_serve" / "demo" / "weights", folder / ".demo")
        # As a new terminal: the program is found only once the environment is activated.
        elsewhere = [part for part in os.environ["PATH"].split(os.pathsep) if Path(part) != Path(sys.prefix) / "bin"]
        self._environment = {
            "PATH": os.pathsep.join(elsewhere),
            "COLUMNS": "120",
            "SMOA_URL": f"http://127.0.0.1:{self._port}",
            "SMOA_SERVE_VLLM_PORT": str(self._port),
            "SMOA_STORE_DIR": str(folder / "store"),
            "SMOA_CACHE_DIR": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        }

    def serve(self, text: str) -> None:
        """Have the server that a page wants."""
        if text == self._serving:
            return
        self.close()
        log = self.folder / "server.log"
        with log.open("wb") as out:
            self._server = subprocess.Popen(
                [*SHELL, text], cwd=self.folder, env=os.environ | self._environment, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._serving = text
        deadline = time.monotonic() + 480
        while not self._is_ready():
            assert self._server.poll() is None, f"the server ended:\n{log.read_text()[-6000:]}"
            assert time.monotonic() < deadline, f"the server did not start:\n{log.read_text()[-6000:]}"
            time.sleep(0.5)

    def _is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{self._port}/health", timeout=5).is_success
        return False

    def run(self, block: Block, before: str) -> str:
        """What a block prints.

        Args:
            block: of a page.
            before: what a shell of this page has been told about its environment.
        """
        text = ADDRESS.sub(rf"\1:{self._port}", block.text)
        command = [*SHELL, before + text] if block.language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(
            command, cwd=self.folder, env=os.environ | self._environment, text=True, timeout=300,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"line {block.line} ended with {done.returncode}:\n{block.text}\n{done.stdout}"
        return done.stdout

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(self._server.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    self._server.wait(30)
        self._server, self._serving = None, ""


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """For all pages; no other test needs a server like it."""
    opened = Terminal(tmp_path_factory.mktemp("checkout"))
    try:
        yield opened
    finally:
        opened.close()


def missing(printed: str, output: str) -> list[str]:
    """Lines that a page shows and the output lacks; spaces count as one, … as anything."""
    lines = [" ".join(line.split()) for line in output.splitlines()]
    wanted = [" ".join(line.split()) for line in printed.splitlines() if line.strip()]
    patterns = [(one, ".*".join(re.escape(part) for part in one.split("…"))) for one in wanted]
    return [one for one, pattern in patterns if not any(re.fullmatch(pattern, line) for line in lines)]


def environment_lines(text: str) -> str:
    """What stays in a terminal after a block."""
    return "".join(f"{line}\n" for line in text.splitlines() if line.startswith(("source ", "export ")))


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_what_it_says(page: str, terminal: Terminal) -> None:
    ran, shell = 0, ""
    for block in blocks(page):
        if block.mark.startswith("not run:"):
            continue
        ran += 1
        if block.mark == "server":
            terminal.serve(block.text)
            continue
        output = terminal.run(block, shell)
        shell += environment_lines(block.text) if block.language == "bash" else ""
        lacking = missing(block.printed, output)
        assert lacking == [], f"{page}, line {block.line}, did not print\n{lacking}\nbut\n{output}"
    assert ran > 0


def test_blocks_that_are_not_run_are_these() -> None:
    tutorials = {str(page.relative_to(ROOT)) for page in (ROOT / "docs" / "tutorials").glob("*.md")}
    assert tutorials <= set(PAGES)
    found = {
        page: [b.mark.removeprefix("not run: ") for b in blocks(page) if b.mark.startswith("not")] for page in PAGES
    }
    assert {page: reasons for page, reasons in found.items() if reasons} == NOT_RUN


def test_every_fence_of_these_pages_is_a_block_or_output() -> None:
    for page in PAGES:
        fences = re.findall(r"^```(\w*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) % 2 == 0
        assert set(fences[::2]) <= {"bash", "python", "text"}, page


def test_what_is_shown_and_not_printed_is_found() -> None:
    assert missing("a  b\nc…e\n", "x\na b\ncde\n") == []
    assert missing("a b\nc…e\nf\n", "a\ncd\n") == ["a b", "c…e", "f"]
