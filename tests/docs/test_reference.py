"""The generated parts of docs/reference are what the code says now."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import write_reference  # noqa: E402


@pytest.mark.parametrize("page", write_reference.PAGES)
def test_a_generated_page_is_current(page: str) -> None:
    found = (write_reference.REFERENCE / page).read_text(encoding="utf-8")
    assert found == write_reference.expected(page), "stale: run python scripts/write_reference.py"


def test_the_check_says_which_page_is_stale(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(write_reference, "PAGES", {"metrics.md": lambda: "| other |"})
    monkeypatch.setattr(sys, "argv", ["write_reference.py", "--check"])
    assert write_reference.main() == 1
    assert capsys.readouterr().out == "docs/reference/metrics.md is stale\n"


def test_a_page_without_marks_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "http.md").write_text("no marks")
    monkeypatch.setattr(write_reference, "REFERENCE", tmp_path)
    with pytest.raises(ValueError, match=r"http\.md: it needs one"):
        write_reference.expected("http.md")


def test_every_route_of_ours_has_its_place_on_the_page() -> None:
    page = write_reference.http()
    assert page.count("### ") == len({"adapters", "move", "policy"})
    assert "`resident_bytes`" in page
    assert "`max_lost`" in page


def test_the_digest_of_the_specification_is_the_readers(tmp_path: Path) -> None:
    """The example of docs/reference/portable-format.md, on another adapter than the one it shows."""
    text = (ROOT / "docs" / "reference" / "portable-format.md").read_text(encoding="utf-8")
    program = text.split("```python\n")[1].split("```")[0]
    weights = ROOT / "smoa_serve" / "demo" / "weights" / "adapters"
    program = program.replace(".demo/adapters/pirate", str(weights / "french"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert f'"digest": "{done.stdout.strip()}"' in (weights / "french" / "adapter_config.json").read_text()
