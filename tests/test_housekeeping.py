"""Files that people and services expect of a project: they parse, and say what the rest of it says."""

import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from smoa_serve import __version__
from smoa_serve.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
FORMS = sorted(file for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if file.stem != "config")


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("setup_plan")


def test_the_workflow_is_what_ci_runs() -> None:
    workflow = read(ROOT / ".github/workflows/ci.yml")
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    assert workflow[True].keys() == {"push", "pull_request"}  # YAML reads `on` as a truth


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_an_issue_form_has_what_github_wants(file: Path) -> None:
    form = read(file)
    assert {"name", "description", "body"} <= form.keys()
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in fields}) == len(fields) > 0
    assert all(part["type"] == "textarea" and part["attributes"]["label"] for part in fields)


def test_the_citation_is_of_this_version_and_names_the_paper() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == __version__
    (paper,) = citation["references"]
    assert paper["url"].endswith("2605.21147")
    assert paper["title"]
    assert paper["authors"]


def test_the_version_is_written_in_one_place(project: dict[str, Any]) -> None:
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "smoa_serve/__init__.py"
    assert CliRunner().invoke(app, ["--version"]).output == f"smoa-serve {__version__}\n"


def test_both_packages_are_typed() -> None:
    assert (ROOT / "smoa_serve/py.typed").is_file()
    assert (ROOT / "kernels/smoa_kernels/py.typed").is_file()


def test_the_old_extra_is_the_dependency_group(project: dict[str, Any], plan: Any) -> None:
    group = plan.group_requirements(project["dependency-groups"], ["dev"])
    assert sorted(project["project"]["optional-dependencies"]["dev"]) == sorted(group)


def test_an_unknown_dependency_group_is_refused_with_those_there_are(plan: Any) -> None:
    groups = {"test": ["pytest"], "dev": [{"include-group": "test"}, "ruff", "pytest"]}
    assert plan.group_requirements(groups, ["dev"]) == ("pytest", "ruff")
    assert plan.group_requirements(groups, []) == ()
    with pytest.raises(SystemExit, match=r"no dependency group 'tests'; pyproject\.toml has test, dev"):
        plan.group_requirements(groups, ["tests"])


def test_set_up_says_how_the_command_is_found(plan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    said = importlib.import_module("setup_env").where(tmp_path / ".venv")
    assert ".venv/bin/smoa-serve" in said
    assert "source .venv/bin/activate" in said


def test_the_lock_names_versions_alone_and_all_that_ci_needs(project: dict[str, Any], plan: Any) -> None:
    lines = [line for line in plan.LOCK.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][\w.!]*", line)]
    locked = {line.partition("==")[0] for line in lines}
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *extras["cpu"], *extras["train"]]
    wanted += plan.group_requirements(project["dependency-groups"], ["dev"])
    assert {re.match(r"[A-Za-z0-9-]+", one)[0].lower() for one in wanted} <= locked  # type: ignore[index]


def test_a_lock_holds_no_build_and_nothing_of_the_setup_itself(plan: Any) -> None:
    found = [("torch", "2.13.0+cpu"), ("Typing_Extensions", "4.15"), ("uv", "1"), ("vllm", "0.32.0+cpu")]
    assert plan.lock_lines(found) == ["torch==2.13.0", "typing-extensions==4.15"]
    wanted = plan.make_plan(ROOT, "cpu", None, "", editable=True, locked=True)
    assert plan.requirements(wanted)[:2] == ["--constraint", str(plan.LOCK)]
    assert "--constraint" not in plan.requirements(plan.make_plan(ROOT, "cpu", None, "", editable=True))
