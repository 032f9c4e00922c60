"""Private copies that are deleted or damaged while the server runs, with more adapters than host memory holds."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.engine

PROMPT = [13, 97, 88, 114, 5, 31, 64]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def ask_all(tiny: Any) -> Callable[..., None]:
    """Ask every adapter that was loaded at start-up: more than there are slots, as many as host memory holds."""

    def ask() -> None:
        for model in tiny.models:
            assert tiny.ask(model, PROMPT).differs(tiny.solo(model, PROMPT)) is None, model

    return ask


@pytest.fixture
def extra(tiny: Any) -> Iterator[dict[str, Any]]:
    """Two adapters more, so that never all are in host memory."""
    made = {f"extra-{seed}": tiny.make(f"extra-{seed}", seed=seed) for seed in (301, 302)}
    for name, adapter in made.items():
        tiny.load(name, adapter.path).raise_for_status()
    yield made
    for name, adapter in made.items():
        tiny.unload(name)
        shutil.rmtree(adapter.path, ignore_errors=True)


def copies(tiny: Any) -> list[Path]:
    """The folders of the store."""
    store = tiny.server.log.parent / "store"
    return [folder for folder in store.iterdir() if folder.is_dir() and not folder.name.startswith(".")]


def copy_of(tiny: Any, name: str) -> Path:
    digest = tiny.server.adapters()[name]["digest"]
    (found,) = [folder for folder in copies(tiny) if digest in folder.name]
    return found


def damage(folder: Path) -> None:
    """Change the last bytes of the weights in place; the file's times are put back."""
    file = folder / WEIGHTS
    before = file.stat()
    with file.open("r+b") as handle:
        handle.seek(-4, os.SEEK_END)
        last = handle.read()
        handle.seek(-4, os.SEEK_END)
        handle.write(bytes(byte ^ 0x5A for byte in last))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def read(tiny: Any, model: str, *, stream: bool) -> None:
    """Ask, and take the answer to its end."""
    list(tiny.client.completions.create(model=model, prompt=PROMPT, max_tokens=4, stream=stream))


def delete(folder: Path) -> None:
    shutil.rmtree(folder)


def empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


@pytest.mark.parametrize("harm", [delete, damage, empty])
def test_copies_that_were_harmed_are_made_again_from_where_they_came(
    harm: Callable[[Path], None], tiny: Any, ask_all: Callable[..., None], extra: dict[str, Any]
) -> None:
    ask_all()
    expected = {name: tiny.ask(name, PROMPT) for name in extra}
    names = [folder.name for folder in copies(tiny)]
    for folder in copies(tiny):
        harm(folder)
    for _ in range(2):
        ask_all()
        for name, answer in expected.items():
            assert tiny.ask(name, PROMPT).differs(answer) is None
    served = {entry["digest"] for entry in tiny.server.adapters().values()}
    back = [name for name in names if any(digest in name for digest in served)]
    assert {folder.name for folder in copies(tiny)} >= set(back)


@pytest.mark.parametrize("harm", [delete, damage])
def test_a_copy_that_cannot_be_made_again_fails_its_own_requests_alone(
    harm: Callable[[Path], None], tiny: Any, ask_all: Callable[..., None], extra: dict[str, Any]
) -> None:
    ask_all()
    (lost, adapter), (other, _) = extra.items()
    expected, alone = tiny.ask(lost, PROMPT), tiny.ask(other, PROMPT)
    aside = adapter.path.with_name("aside")
    adapter.path.rename(aside)
    harm(copy_of(tiny, lost))
    try:
        ask_all()  # it leaves host memory
        for stream in (False, True, False):
            with pytest.raises(openai.APIError, match=f"adapter '{lost}' cannot be served") as failed:
                read(tiny, lost, stream=stream)
            assert "load it again" in str(failed.value)
            if not stream:
                assert isinstance(failed.value, openai.APIStatusError)
                assert failed.value.status_code in (503, 400)  # before vLLM had errors that name their status: 400
        with pytest.raises(openai.APIError, match="cannot be served"):
            tiny.client.chat.completions.create(
                model=lost, messages=[{"role": "user", "content": "t5 t9"}], max_tokens=4, n=2
            )
        assert tiny.ask(other, PROMPT).differs(alone) is None
        ask_all()
    finally:
        aside.rename(adapter.path)
    assert tiny.ask(lost, PROMPT).differs(expected) is None, "where it came from there is the same content again"
    ask_all()


def test_other_content_where_a_copy_came_from_is_not_taken_for_it(
    tiny: Any, ask_all: Callable[..., None], extra: dict[str, Any]
) -> None:
    lost, adapter = next(iter(extra.items()))
    ask_all()
    delete(copy_of(tiny, lost))
    shutil.rmtree(adapter.path)
    tiny.make(lost, seed=303)
    with pytest.raises(openai.APIStatusError, match="cannot be served"):
        tiny.ask(lost, PROMPT)
    tiny.load(lost, adapter.path, load_inplace=True).raise_for_status()
    assert tiny.ask(lost, PROMPT).tokens
    ask_all()


def test_one_series_tells_routers_which_adapters_run(tiny: Any, ask_all: Callable[..., None]) -> None:
    import httpx

    ask_all()
    text = httpx.get(f"{tiny.server.url}/metrics", headers=tiny.server.headers).raise_for_status().text
    series = [line for line in text.splitlines() if line.startswith("vllm:lora_requests_info{")]
    assert len(series) == 1, series
    assert "@" not in series[0]
    assert 'max_lora="4"' in series[0]


def test_a_copy_that_was_replaced_between_check_and_reading_is_not_served(vectors: Path, tmp_path: Path) -> None:
    from smoa_serve.adapters import open_adapter
    from smoa_serve.base.checkpoint import BaseCheckpoint
    from smoa_serve.engine.worker import SmoaWorkerManager
    from smoa_serve.errors import AdapterError
    from smoa_serve.store import AdapterStore

    folder = vectors / "e2e/tiny-llama"
    base, store = BaseCheckpoint.open(folder / "base"), AdapterStore(tmp_path / "store")
    names = ("qv_r8_k2_safetensors", "paper_targets_r6_k4_safetensors")
    known, other = (store.stage(open_adapter(folder / "adapters" / name), base) for name in names)
    lie = known.model_copy(update={"path": other.path})
    worker: Any = SimpleNamespace(_private_copy=lambda request: lie)
    with pytest.raises(AdapterError, match="its private copy was replaced while it was read") as refused:
        SmoaWorkerManager._load_adapter(worker, SimpleNamespace())
    assert refused.value.source == known.source
