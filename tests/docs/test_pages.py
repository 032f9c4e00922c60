"""Every page can be reached, every link leads somewhere, and the pages for newcomers are written in short sentences."""

import ast
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINKED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md", *PAGES]
PLAIN = [ROOT / "README.md", *(page for page in PAGES if page.parent.name in {"tutorials", "guides"})]
MOST_WORDS = 25
# Where these stood before; nothing may lead there.
GONE = ("docs/operations.md", "docs/training.md", "docs/architecture.md", "docs/faults.md")

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
GENERATED = re.compile(r"<!-- (\S+):begin.*?<!-- \1:end -->", re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """As GitHub and the site make them from headings; of two that are equal, the second gets a number."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", title)
        text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
        slug = re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text).strip())
        number = next(i for i in range(1000) if (f"{slug}-{i}" if i else slug) not in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


def broken(page: Path) -> Iterator[str]:
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            yield f"{target}: there is no such file"
        elif page.is_relative_to(DOCS) and not file.is_relative_to(DOCS):
            yield f"{target}: the site does not have it"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            yield f"{target}: there is no such heading"


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(broken(page)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Here we are\n[a](#here-we-are) [b](#there) [c](other.md)\n```\n[d](code.md)\n```\n")
    assert list(broken(page)) == ["#there: there is no such heading", "other.md: there is no such file"]


def test_every_page_is_in_the_navigation_once() -> None:
    def files(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from files(inner)

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(files(config["nav"])) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_the_index_leads_to_every_page() -> None:
    linked = {(DOCS / target.partition("#")[0]).resolve() for target in LINK.findall(prose(DOCS / "index.md"))}
    assert set(PAGES) - {DOCS / "index.md"} <= linked


@pytest.mark.parametrize("old", GONE)
def test_nothing_leads_to_a_page_that_is_gone(old: str) -> None:
    kept = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "mkdocs.yml", *PAGES, *ROOT.glob("configs/*")]
    kept += [*ROOT.glob("smoa_serve/**/*.py"), *ROOT.glob("kernels/**/*.md"), *ROOT.glob("benchmarks/**/*.py")]
    assert not (ROOT / old).exists()
    assert [name(file) for file in kept if old in file.read_text(encoding="utf-8")] == []


def units(text: str) -> Iterator[str]:
    """Paragraphs and list items, each on one line; no code, tables, headings, comments or generated parts."""
    text = re.sub(r"<!--.*?-->", "", GENERATED.sub("", FENCE.sub("\n\n", text)), flags=re.DOTALL)
    text = re.sub(r"^(#|\||    ).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*([-*]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    for unit in re.split(r"\n\s*\n", text):
        yield " ".join(unit.split())


def sentences(text: str) -> Iterator[str]:
    for unit in units(text):
        plain = LINK.sub(lambda match: re.sub(r"!?\[([^\]]*)\].*", r"\1", match[0]), unit)
        plain = re.sub(r"`[^`]+`", "CODE", plain).replace("**", "")
        yield from (part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z0-9])", plain) if part)


def words(sentence: str) -> int:
    return len(re.findall(r"[^\W_][\w'’.,/-]*", sentence))


@pytest.mark.parametrize("page", PLAIN, ids=name)
def test_no_sentence_is_long(page: Path) -> None:
    long = [f"{words(one)} words: {one}" for one in sentences(page.read_text("utf-8")) if words(one) > MOST_WORDS]
    assert long == []


def test_a_long_sentence_is_found() -> None:
    text = f"# A title that may be {'long ' * 30}\nShort one. Long {'word ' * 26}.\n- `One two` is [here](there.md).\n"
    assert [words(one) for one in sentences(text)] == [2, 27, 3]


def story() -> list[tuple[str, str]]:
    """(function, file) of each step that docs/explain/architecture.md tells."""
    text = (DOCS / "explain" / "architecture.md").read_text(encoding="utf-8")
    return re.findall(r"^\| \d+ \|.*\| `(\w+)` \| `([\w/]+\.py)` \|$", text, re.MULTILINE)


def test_each_step_of_the_story_is_a_function_of_its_file() -> None:
    assert len(story()) >= 12
    for function, file in story():
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        made = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert function in made, f"{file} has no {function}: docs/explain/architecture.md tells of it"
