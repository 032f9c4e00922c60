"""One summary: the same facts in files, routes and reports."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from smoa_serve.adapters import AdapterKind, AdapterSummary, OrderStatus, open_adapter
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.offline.inspect import inspect_adapter
from smoa_serve.server.app import AdapterInfo
from smoa_serve.store import AdapterStore

FIELDS = ["kind", "digest", "rank", "max_rank", "num_blocks", "parameters", "bytes", "order", "order_error"]


@pytest.fixture
def base(vectors: Path) -> BaseCheckpoint:
    return BaseCheckpoint.open(vectors / "e2e/tiny-llama/base")


@pytest.fixture
def published(vectors: Path) -> Path:
    return vectors / "e2e/tiny-llama/adapters/qv_r8_k2_safetensors"


@pytest.mark.parametrize("kind", AdapterKind)
@pytest.mark.parametrize("order", [*OrderStatus, None])
def test_a_summary_comes_back_from_its_json(kind: AdapterKind, order: OrderStatus | None) -> None:
    facts = {"rank": 6, "max_rank": 2, "num_blocks": 4, "parameters": 10, "bytes": 2**40, "order_error": 0.1}
    summary = AdapterSummary(kind=kind, digest="ab" * 32, order=order, **facts)
    text = summary.model_dump_json()
    assert list(json.loads(text)) == FIELDS
    assert AdapterSummary.model_validate_json(text) == summary
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        AdapterSummary.model_validate(json.loads(text) | {"revision": 1})


def test_what_is_staged_inspected_and_read_is_summarized_alike(
    base: BaseCheckpoint, published: Path, tmp_path: Path
) -> None:
    summary = open_adapter(published).summary(base)
    staged = AdapterStore(tmp_path / "store").stage(open_adapter(published), base)
    assert staged.model_dump(include=set(FIELDS)) == summary.model_dump()
    assert inspect_adapter(published, base).summary == summary
    assert open_adapter(staged.path).summary().digest == summary.digest


def test_the_route_says_the_summary_under_the_names_it_always_had() -> None:
    own = ["name", "residence", "resident_bytes", "pinned", "requests", "path"]
    assert sorted(AdapterInfo.model_fields) == sorted([*FIELDS, *own])


def test_a_report_says_the_summary_under_the_names_it_always_had(base: BaseCheckpoint, published: Path) -> None:
    own = ["path", "format", "config", "file_bytes", "factor_bytes", "base_match", "problems", "modules"]
    for report in (inspect_adapter(published, base), inspect_adapter(published)):
        told = json.loads(json.dumps(report.as_json()))
        assert sorted(told) == sorted([*own, *(field for field in FIELDS if field != "bytes")])
        assert (told["kind"], told["format"]) == ("smoa", "published")
        assert told["parameters"] == sum(module["parameters"] for module in told["modules"])
