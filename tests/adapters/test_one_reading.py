"""A folder is opened once: what was verified is what is described, stored and merged, whatever becomes of it."""

import gc
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from smoa_serve.adapters import AdapterFile, load_adapter, open_adapter, write_portable
from smoa_serve.adapters.lora import LoraFile
from smoa_serve.adapters.portable import CanonicalFile
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.errors import AdapterError
from smoa_serve.files import opened
from smoa_serve.store import AdapterStore

Q = "model.layers.0.self_attn.q_proj"
FORMATS = ("published", "portable", "hira", "lora")
LONG_AGO = 1_000_000_000


@pytest.fixture
def base(make_base: Callable[..., Path]) -> BaseCheckpoint:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    return BaseCheckpoint.open(make_base({f"{Q}.weight": weight}))


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


def written(folder: Path, kind: str, seed: int, base: BaseCheckpoint) -> Path:
    """An adapter of one layer; the seed decides its factors and its scale, but no size."""
    if kind == "portable":
        published = written(folder.with_name(f"{folder.name}-published"), "published", seed, base)
        write_portable(load_adapter(published, base), folder)
        shutil.rmtree(published)
    else:
        folder.mkdir()
        generator = torch.Generator().manual_seed(seed)
        name = {"published": "lora_{}.0.weight", "hira": "hira_{}", "lora": "lora_{}.weight"}[kind]
        factors = {"A": torch.randn(2, 4, generator=generator), "B": torch.randn(6, 2, generator=generator)}
        tensors = {f"base_model.model.{Q}.{name.format(side)}": factor for side, factor in factors.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        peft_type = {"published": "SMOA"}.get(kind, kind.upper())
        config: dict[str, object] = {"peft_type": peft_type, "r": 2, "target_modules": ["q_proj"]}
        config |= {} if kind == "hira" else {"lora_alpha": seed}
        config |= {"num_blocks": 1} if kind == "published" else {}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    for file in folder.iterdir():
        os.utime(file, (LONG_AGO, LONG_AGO))
    return folder


def replaced(folder: Path, other: Path) -> None:
    """As a careful writer does it: new files take the place of the old ones."""
    for file in other.iterdir():
        shutil.copy(file, folder / f"new-{file.name}")
        (folder / f"new-{file.name}").replace(folder / file.name)


def overwritten(folder: Path, other: Path) -> None:
    """As `cp` does it: the files stay and their bytes change."""
    for file in other.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def swapped(folder: Path, other: Path) -> None:
    """The whole folder becomes another."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    shutil.copytree(other, folder)
    shutil.rmtree(aside)


def removed(folder: Path, _: Path) -> None:
    """Nothing is left."""
    shutil.rmtree(folder)


CHANGES = (replaced, overwritten, swapped, removed)
Change = Callable[[Path, Path], None]


def digest(path: Path, base: BaseCheckpoint) -> str:
    return open_adapter(path).summary(base).digest


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", FORMATS)
def test_what_was_verified_is_what_is_stored(
    base: BaseCheckpoint, store: AdapterStore, tmp_path: Path, kind: str, change: Change
) -> None:
    path, other = written(tmp_path / "one", kind, 1, base), written(tmp_path / "two", kind, 2, base)
    file = open_adapter(path)
    assert file.check(base).layers == 1
    verified, update = file.summary(base), file.deltas(base)[Q](base.weight(Q))
    assert verified.digest != digest(other, base)
    change(path, other)
    file.write_private(tmp_path / "store", base)
    assert digest(tmp_path / "store", base) == verified.digest
    staged = AdapterStore(tmp_path / "a-store").stage(file, base)
    assert (staged.digest, digest(staged.path, base)) == (verified.digest, verified.digest)
    assert torch.equal(file.deltas(base)[Q](base.weight(Q)), update)
    assert [layer.name for layer in file.layers(base)] == [Q]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", FORMATS)
def test_what_changes_between_opening_and_the_first_question_is_an_error_or_never_seen(
    base: BaseCheckpoint, store: AdapterStore, tmp_path: Path, kind: str, change: Change
) -> None:
    path, other = written(tmp_path / "one", kind, 1, base), written(tmp_path / "two", kind, 2, base)
    expected, file = digest(path, base), open_adapter(path)
    change(path, other)
    if change is overwritten:
        with pytest.raises(AdapterError, match="was changed while it was read; try again"):
            store.stage(file, base)
        with pytest.raises(AdapterError, match="was changed while it was read; try again"):
            file.source.sha256()
        assert not store.root.exists()
    else:
        assert store.stage(file, base).digest == expected
        assert len(file.source.sha256()) == 64


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_folder_that_changes_while_it_is_staged_is_stored_as_it_was_verified(
    base: BaseCheckpoint, store: AdapterStore, tmp_path: Path, kind: str, change: Change, monkeypatch: Any
) -> None:
    path, other = written(tmp_path / "one", kind, 1, base), written(tmp_path / "two", kind, 2, base)
    expected = digest(path, base)
    for cls in (CanonicalFile, LoraFile):
        write = cls.write_private

        def late(file: AdapterFile[Any], folder: Path, base: BaseCheckpoint, write: Any = write) -> None:
            change(path, other)
            write(file, folder, base)

        monkeypatch.setattr(cls, "write_private", late)
    staged = store.stage(store.open(path), base)
    assert (staged.digest, digest(staged.path, base)) == (expected, expected)
    assert expected in staged.path.name


@contextmanager
def swapping(path: Path, others: tuple[Path, Path]) -> Iterator[None]:
    """The folder becomes one and the other in turn, as fast as that goes."""
    ends = threading.Event()

    def swap() -> None:
        number = 0
        while not ends.is_set():
            aside, new = path.with_name(f"aside-{number}"), path.with_name(f"new-{number}")
            shutil.copytree(others[number % 2], new)
            path.rename(aside)
            new.rename(path)
            shutil.rmtree(aside)
            number += 1

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


@pytest.mark.parametrize("kind", ["published", "lora"])
def test_configuration_and_weights_are_of_one_moment(base: BaseCheckpoint, tmp_path: Path, kind: str) -> None:
    """The two differ in their factors and in their scale: the scale of the one with the factors of the other shows."""
    others = written(tmp_path / "one", kind, 1, base), written(tmp_path / "two", kind, 2, base)
    whole = {digest(path, base) for path in others}
    path = shutil.copytree(others[0], tmp_path / "served")
    seen = set()
    with swapping(path, others):
        for _ in range(300):
            try:
                seen.add(digest(path, base))
            except AdapterError:
                continue
    assert seen <= whole
    assert seen


@pytest.mark.parametrize("kind", FORMATS)
def test_a_large_file_is_mapped_and_its_factors_are_not(
    base: BaseCheckpoint, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = written(tmp_path / "one", kind, 1, base), written(tmp_path / "two", kind, 2, base)
    expected = digest(path, base)
    monkeypatch.setattr(opened, "READ_WHOLE_BYTES", 1)
    file = open_adapter(path)
    removed_name = path.with_name("moved")
    path.rename(removed_name)  # it is read by its number
    assert file.summary(base).digest == expected
    overwritten(removed_name, other)
    file.write_private(tmp_path / "copy", base)
    assert digest(tmp_path / "copy", base) == expected
    with pytest.raises(AdapterError, match="was changed while it was read"):
        file.layers()


def test_an_adapter_that_nobody_refers_to_is_closed(base: BaseCheckpoint, tmp_path: Path) -> None:
    path = written(tmp_path / "one", "hira", 1, base)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    files = [open_adapter(path) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before + 20  # the configuration is read and closed
    assert {file.slot_rank() for file in files} == {2}
    files.clear()
    assert len(os.listdir("/proc/self/fd")) == before
