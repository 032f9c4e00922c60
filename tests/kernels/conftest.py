"""Fixtures shared by the kernel tests."""

from collections.abc import Iterator

import pytest
import torch
from smoa_kernels import cost
from smoa_kernels.backends.cpp import build as cpp_build


@pytest.fixture
def generator() -> torch.Generator:
    """A source of random numbers that starts alike in every test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str | None]:
    """What the C++ kernel is limited to, in a test that is parametrised with it indirectly; None leaves it alone.

    The summary at the end counts the tests of each.
    """
    name: str | None = getattr(request, "param", None)
    if name is None:
        yield None
        return
    request.node.user_properties.append(("instruction_set", name))
    monkeypatch.setenv(cpp_build.LIMIT_VARIABLE, name)
    cost._cost_model.cache_clear()  # remembers the constants of what the environment allowed
    yield name
    cost._cost_model.cache_clear()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the C++ kernel do not exist, rather than skip, on a CPU that has none of its instruction sets."""
    empty = [item for item in items if "instruction_set" in getattr(item, "fixturenames", ()) and _has_no_case(item)]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if item not in empty]


def _has_no_case(item: pytest.Item) -> bool:
    return any("got empty parameter set" in str(mark.kwargs.get("reason")) for mark in item.iter_markers("skip"))
