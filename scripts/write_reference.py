"""Writes the generated parts of docs/reference: `python scripts/write_reference.py`; `--check` only compares.

HTTP routes come from the OpenAPI schema of this project's own routers, metrics from the calls that make them, Python
names from `__all__` of the packages. The text around the marks is written by hand and kept.
"""

import argparse
import ast
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
BEGIN, END = "<!-- generated:begin by scripts/write_reference.py -->", "<!-- generated:end -->"
OURS = "/v1/smoa/"
METRICS = {"Gauge": "", "Counter": "_total", "Histogram": "", "Summary": ""}  # kind → what is put behind a name
Schema = dict[str, Any]


def http() -> str:
    """The routes under /v1/smoa, as the API server mounts them."""
    from fastapi import FastAPI

    from smoa_serve.server.app import EndpointPlugin

    app = FastAPI()
    EndpointPlugin().attach_router(app)
    schema = app.openapi()
    parts = []
    for path, methods in sorted(schema["paths"].items()):
        if path.startswith(OURS):
            parts += [_route(method.upper(), path, route, schema) for method, route in methods.items()]
    return "\n\n".join(parts)


def _route(method: str, path: str, route: Schema, schema: Schema) -> str:
    lines = [f"### {method} {path}", _sentence(route["description"])]
    parameters = [
        (one["name"], _kind(one["schema"]), "yes" if one["required"] else "no", one.get("description", ""))
        for one in route.get("parameters", ())
    ]
    if parameters:
        lines.append(_table(("in the path", "type", "needed", "meaning"), parameters))
    if "requestBody" in route:
        body = _resolved(_json_schema(route["requestBody"]), schema)
        optional = "" if route["requestBody"].get("required") else ", which may be left out"
        lines.append(f"Body{optional}:\n\n{_fields(body, schema, default=True)}")
    answer = _resolved(_json_schema(route["responses"]["200"]), schema)
    lines.append(f"Answer:\n\n{_fields(answer, schema, default=False)}")
    for name, inner in _inner(answer, schema):
        lines.append(f"An entry of `{name}`:\n\n{_fields(inner, schema, default=False)}")
    return "\n\n".join(lines)


def _json_schema(part: Schema) -> Schema:
    found: Schema = part["content"]["application/json"]["schema"]
    return found


def _resolved(found: Schema, schema: Schema) -> Schema:
    """A schema behind references; of "this or null", this."""
    for one in found.get("anyOf", ()):
        if one.get("type") != "null":
            return _resolved(one, schema)
    if "$ref" in found:
        return _resolved(schema["components"]["schemas"][found["$ref"].rpartition("/")[2]], schema)
    return found


def _inner(answer: Schema, schema: Schema) -> Iterator[tuple[str, Schema]]:
    """The objects in lists of an answer."""
    for name, one in answer.get("properties", {}).items():
        inner = _resolved(one.get("items", {}), schema)
        if "properties" in inner:
            yield name, inner


def _fields(found: Schema, schema: Schema, *, default: bool) -> str:
    needed = found.get("required", ())
    rows = []
    for name, one in found.get("properties", {}).items():
        row = [f"`{name}`", _kind(one | _enum(one, schema))]
        if default:
            row.append("needed" if name in needed else f"`{json.dumps(one.get('default')).strip(chr(34))}`")
        rows.append((*row, one.get("description", "")))
    return _table(("field", "type", "default", "meaning") if default else ("field", "type", "meaning"), rows)


def _enum(one: Schema, schema: Schema) -> Schema:
    resolved = _resolved(one, schema)
    return {"enum": resolved["enum"]} if "enum" in resolved else {}


def _kind(one: Schema) -> str:
    if "enum" in one:
        return ", ".join(f"`{value}`" for value in one["enum"])
    if "anyOf" in one:
        return " or ".join(_kind(inner) for inner in one["anyOf"])
    if one.get("type") == "array":
        return f"list of {_kind(one.get('items', {}))}"
    if isinstance(one.get("additionalProperties"), dict):
        return f"object of {_kind(one['additionalProperties'])}"
    limits = {"exclusiveMinimum": "above", "minimum": "at least", "maximum": "at most"}
    return " ".join(
        [one.get("type", "object"), *(f"{word} {one[key]:g}" for key, word in limits.items() if key in one)]
    )


def metrics() -> str:
    """Every metric that this project adds: found where it is made, so that nothing has to be imported."""
    rows = []
    for file in sorted((ROOT / "smoa_serve").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in METRICS and node.args:
                rows += _metric(node.func.id, node)
    return _table(("name", "kind", "labels", "meaning"), sorted(rows))


def _metric(kind: str, call: ast.Call) -> list[tuple[str, ...]]:
    values = [ast.literal_eval(argument) for argument in call.args if isinstance(argument, ast.Constant | ast.List)]
    if len(values) < 2 or not str(values[0]).startswith("smoa_"):
        return []
    labels = ", ".join(f"`{label}`" for label in values[2]) if len(values) > 2 else ""
    return [(f"`{str(values[0]).removesuffix(METRICS[kind])}{METRICS[kind]}`", kind.lower(), labels, str(values[1]))]


def python() -> str:
    """The public names of every package that has `__all__`, and of smoa_serve.testing."""
    files = [*sorted((ROOT / "smoa_serve").rglob("__init__.py")), ROOT / "smoa_serve" / "testing.py"]
    named = [(file.relative_to(ROOT), file) for file in files]
    named.append((Path("smoa_kernels/__init__.py"), ROOT / "kernels" / "smoa_kernels" / "__init__.py"))
    public = [(".".join(name.with_suffix("").parts).removesuffix(".__init__"), file) for name, file in named]
    return "\n\n".join(_package(name, file) for name, file in public if file.exists() and _public(file))


def _public(file: Path) -> list[str]:
    """`__all__`; of a module without one that is no package, what it defines."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value))
    made = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return [] if file.name == "__init__.py" else sorted(name for name in made if not name.startswith("_"))


def _package(name: str, file: Path) -> str:
    module = importlib.import_module(name)
    rows = [(f"`{one}`", _sentence(inspect.getdoc(getattr(module, one)) or "a type")) for one in _public(file)]
    return f"## {name}\n\n{_sentence(module.__doc__ or '')}\n\n{_table(('name', 'what it is'), rows)}"


def _sentence(text: str) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(text.split("\n\n", maxsplit=1)[0].split())


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


PAGES: dict[str, Callable[[], str]] = {"http.md": http, "metrics.md": metrics, "python-api.md": python}


def expected(page: str) -> str:
    """A page as it should be.

    Raises:
        ValueError: it has no marks.
    """
    text = (REFERENCE / page).read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"docs/reference/{page}: it needs one {BEGIN} and one {END}")
    pattern = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n{PAGES[page]()}\n{END}", text)


def main() -> int:
    """Write the pages; 1 when `--check` finds one that is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say which pages are stale")
    check = parser.parse_args().check
    stale = [page for page in PAGES if expected(page) != (REFERENCE / page).read_text(encoding="utf-8")]
    for page in stale:
        print(f"docs/reference/{page} {'is stale' if check else 'written'}")
        if not check:
            (REFERENCE / page).write_text(expected(page), encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
