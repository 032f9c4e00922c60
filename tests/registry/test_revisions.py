"""Names that users see, and names that the engine keys its caches by."""

from pathlib import Path
from typing import Any

import pytest

from smoa_serve.adapters.model import AdapterKind
from smoa_serve.registry.revisions import Revision, name_reason, visible_name
from smoa_serve.store import StagedAdapter


def revision(name: str, digest: str) -> Revision:
    facts: dict[str, Any] = dict.fromkeys(("rank", "max_rank", "num_blocks", "parameters", "bytes"), 1)
    staged = StagedAdapter(
        kind=AdapterKind.SMOA, digest=digest, path=Path("x"), order=None, order_error=0.0, source="x", **facts
    )
    return Revision(name, 1, staged, "x", Path("x"))


@pytest.mark.parametrize("name", ["legal", "team/legal:v2", "a@b", "x" * 256])
def test_the_visible_name_comes_back_from_the_engines(name: str) -> None:
    assert visible_name(revision(name, "ab" * 32).engine_name) == name


def test_other_content_has_another_engine_name() -> None:
    assert revision("legal", "ab" * 32).engine_name != revision("legal", "cd" * 32).engine_name


@pytest.mark.parametrize("name", ["base-model", "user@example", "legal@" + "z" * 32])
def test_a_name_without_a_digest_is_left_as_it_is(name: str) -> None:
    assert visible_name(name) == name


@pytest.mark.parametrize("name", ["", " legal", "legal\n", "-x", "a b", "x" * 257, "legal@" + "0" * 32])
def test_names_that_cannot_be_served_are_explained(name: str) -> None:
    assert "allowed are" in (name_reason(name) or "")


@pytest.mark.parametrize("name", ["legal", "team/legal:v2", "org.legal-v2_1"])
def test_good_names(name: str) -> None:
    assert name_reason(name) is None


def test_adapters_by_modality_are_refused_rather_than_left_out() -> None:
    from vllm.config.lora import LoRAConfig

    from smoa_serve.registry.revisions import default_mm_reason

    assert default_mm_reason(None) is None
    assert default_mm_reason(LoRAConfig()) is None
    reason = default_mm_reason(LoRAConfig(default_mm_loras={"image": "/a", "audio": "/b"}))
    assert reason is not None
    assert "--default-mm-loras (audio, image) is not supported" in reason
