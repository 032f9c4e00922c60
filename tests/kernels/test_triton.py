"""The Triton kernels in Triton's interpreter.

In a process of its own: Triton decides when it is imported whether kernels are interpreted, and vLLM has imported it
in this one.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(1500)
def test_the_kernels_agree_with_the_reference(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / "interpreted.py"), str(HERE / "test_vectors.py"), "-k",
         "interpreted or triton", "-q", "-p", "no:cacheprovider", "--timeout=1300", f"--junitxml={report}"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=1400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    suite = ElementTree.parse(report).getroot()[0]
    assert int(suite.attrib["tests"]) - int(suite.attrib["skipped"]) >= 90
