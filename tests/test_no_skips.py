"""A test that skips fails the run; only what needs a GPU may."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SKIPPING = """
import pytest

@pytest.mark.skip(reason="an old habit")
def test_by_mark(): pass

def test_by_call(): pytest.skip("no data")

@pytest.fixture
def missing(): pytest.skip("no server")

def test_by_fixture(missing): pass

@pytest.mark.parametrize("case", [])
def test_without_a_case(case): pass

@pytest.mark.gpu
def test_on_a_gpu(): pytest.skip("no GPU")

@pytest.mark.xfail(reason="known", strict=True)
def test_known(): assert False

def test_that_runs(): pass
"""
WHOLE_FILE = "import pytest\npytest.importorskip('no_such_package')\ndef test_unseen(): pass\n"


def run(folder: Path, content: str, *options: str) -> subprocess.CompletedProcess[str]:
    """pytest on one file under this folder's conftest."""
    shutil.copy(HERE / "conftest.py", folder)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu: x\n  cpu: x\n")
    (folder / "test_some.py").write_text(content)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["alone", "with workers"])
def test_a_skip_is_a_failure_unless_it_waits_for_a_gpu(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run(tmp_path, SKIPPING, *options)
    assert done.returncode == 1, done.stdout
    summary = done.stdout.splitlines()[-1]
    for part in ("1 failed", "3 errors", "1 passed", "1 skipped", "1 xfailed"):
        assert part in summary, done.stdout
    assert "no data\nOnly tests marked `gpu` may skip" in done.stdout


def test_a_file_that_skips_is_an_error(tmp_path: Path) -> None:
    done = run(tmp_path, WHOLE_FILE)
    assert done.returncode not in (0, 5), done.stdout
    assert "no_such_package" in done.stdout
    assert "Only tests marked `gpu` may skip" in done.stdout
