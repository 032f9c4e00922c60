"""For tests on the fake engine: a clock that ticks, and no manager of vLLM's."""

import pytest


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake ranks can be asked, and do one piece of a move at a time."""
    from smoa_serve.engine import mover, rpc
    from smoa_serve.residence import engine_client
    from tests.residence.fakes import ticking

    monkeypatch.setattr(mover, "monotonic", ticking())
    monkeypatch.setattr(rpc, "_is_ours", lambda manager: True)
    monkeypatch.setattr(engine_client, "_NOTICE_S", 0.0)
