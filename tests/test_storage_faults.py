"""The disk fails at every single operation of staging, keeping an order, converting and merging: whole or nothing."""

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from typer.testing import CliRunner

from smoa_serve.adapters import LoadOptions, hira, load_adapter, lora, open_adapter, portable
from smoa_serve.base import orders as order_cache
from smoa_serve.base.checkpoint import BaseCheckpoint
from smoa_serve.base.orders import OrderCache
from smoa_serve.cli.app import app
from smoa_serve.errors import AdapterError, SmoaError, StorageError
from smoa_serve.offline import checkpoint as merge_module
from smoa_serve.offline.checkpoint import load_deltas, merge
from smoa_serve.offline.convert import TargetFormat, convert
from smoa_serve.store import AdapterStore

Q = "model.layers.0.self_attn.q_proj"
# What Python tells its audit hooks of operations on files that may fail for want of room or rights.
EVENTS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.chmod",
    "os.rmdir",
    "os.remove",
    "os.listdir",
    "os.scandir",
    "shutil.copyfile",
}


@dataclass
class Disk:
    """The seam: fails at operation number `fails_at` below `folder`, and at all later ones where `stays` is set."""

    folder: str = "/nowhere"
    fails_at: int = -1
    number: int = errno.ENOSPC
    stays: bool = False
    count: int = 0
    seen: list[str] = field(default_factory=list)

    def step(self, event: str, path: object) -> None:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(self.folder):
            return
        self.count += 1
        self.seen.append(f"{event} {path}")
        if self.count == self.fails_at or (self.stays and 0 < self.fails_at < self.count):
            raise OSError(self.number, os.strerror(self.number), os.fspath(path))


DISK = Disk()
_HOOKED: list[bool] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in EVENTS and arguments:
        DISK.step(event, arguments[0])


@contextmanager
def failing(folder: Path, at: int = -1, number: int = errno.ENOSPC, *, stays: bool = False) -> Iterator[Disk]:
    """Operations below `folder` are counted, and number `at` fails."""
    if not _HOOKED:
        sys.addaudithook(_audit)  # for ever; it does nothing outside of this block
        _HOOKED.append(True)
    DISK.__init__(str(folder), at, number, stays)  # type: ignore[misc]
    try:
        yield DISK
    finally:
        DISK.folder = "/nowhere"


@pytest.fixture(autouse=True)
def safetensors_fail_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors writes in Rust, which tells no audit hook; its errors have the system's text in them."""

    def counted(save: Callable[..., Any]) -> Callable[..., Any]:
        def write(tensors: Any, file: Any, **options: Any) -> None:
            try:
                DISK.step("safetensors", file)
                save(tensors, file, **options)
                DISK.step("safetensors after writing", file)
            except OSError as error:
                text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                raise SafetensorError(text) from None

        return write

    for module in (portable, hira, lora, order_cache, merge_module):
        monkeypatch.setattr(module, "save_file", counted(module.save_file))


@pytest.fixture
def base(vectors: Path) -> BaseCheckpoint:
    return BaseCheckpoint.open(vectors / "e2e/tiny-llama/base")


@pytest.fixture
def adapters(vectors: Path) -> Path:
    return vectors / "e2e/tiny-llama/adapters"


def refusal(call: Callable[[], object]) -> SmoaError | None:
    """What a call raises; only errors for users are let through."""
    try:
        call()
    except SmoaError as error:
        return error
    return None


def write_hira(folder: Path) -> Path:
    """An adapter of one layer with random factors."""
    folder.mkdir()
    tensors = {"hira_A": torch.randn(2, 4), "hira_B": torch.randn(6, 2)}
    save_file({f"base_model.model.{Q}.{name}": t for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "HIRA", "r": 2, "target_modules": ["q_proj"]}))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but locks."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("before", ["nothing", "a damaged copy"])
def test_staging_fails_whole_at_every_operation(
    make_base: Callable[..., Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    before: str,
    number: int,
    stays: bool,
) -> None:
    base = BaseCheckpoint.open(make_base({f"{Q}.weight": torch.randn(6, 4)}))
    path, another = write_hira(tmp_path / "one"), write_hira(tmp_path / "two")
    other = AdapterStore(tmp_path / "store").stage(open_adapter(another), base)

    def prepare() -> None:
        shutil.rmtree(tmp_path / "store")
        AdapterStore(tmp_path / "store").stage(open_adapter(another), base)
        if before != "nothing":
            copy = AdapterStore(tmp_path / "store").stage(open_adapter(path), base).path
            (copy / "adapter_config.json").write_text("{")

    prepare()
    with failing(tmp_path / "store") as disk:
        whole = AdapterStore(tmp_path / "store").stage(open_adapter(path), base)
    expected, points = tree(whole.path), disk.count
    assert points > 10, disk.seen
    refused = 0
    for point in range(1, points + 1):
        prepare()
        with failing(tmp_path / "store", point, number, stays=stays) as disk:
            error = refusal(lambda: AdapterStore(tmp_path / "store").stage(open_adapter(path), base))
        if isinstance(error, StorageError):
            assert os.strerror(number) in str(error)
            assert "set SMOA_STORE_DIR to another folder" in str(error)
        elif error is not None:  # read back, which is no writing
            assert "right after it was written" in str(error)
        refused += error is not None
        mine = AdapterStore(tmp_path / "store")
        listed = mine.entry(whole.path)
        assert listed is None or tree(listed.path) == expected, disk.seen
        assert mine.entry(other.path) is not None
        assert mine.stage(mine.open(path), base) == whole
        assert tree(whole.path) == expected
        assert not [entry for entry in mine.root.iterdir() if entry.name.startswith((".new-", ".old-"))]
    assert refused > points / 3
    record_property("points", points)


def test_a_copy_that_is_there_is_used_from_a_read_only_store(
    base: BaseCheckpoint, adapters: Path, tmp_path: Path
) -> None:
    path = adapters / "qv_r8_k2_safetensors"
    staged = AdapterStore(tmp_path / "store").stage(open_adapter(path), base)

    def only_reading(event: str, target: object) -> None:
        if event == "open" or event.endswith(("listdir", "scandir")):
            return
        Disk.step(DISK, event, target)

    with failing(tmp_path / "store", 1, errno.EROFS, stays=True):
        DISK.step = only_reading  # type: ignore[method-assign]
        try:
            assert AdapterStore(tmp_path / "store").stage(open_adapter(path), base) == staged
        finally:
            del DISK.step
    assert not list((tmp_path / "store").glob(".new-*"))


def test_what_a_process_that_is_gone_left_is_removed_at_the_next_start(
    base: BaseCheckpoint, adapters: Path, tmp_path: Path
) -> None:
    root = tmp_path / "store"
    staged = AdapterStore(root).stage(open_adapter(adapters / "qv_r8_k2_safetensors"), base)
    gone, busy = root / f".new-smoa-{'0' * 64}", root / f".new-hira-{'1' * 64}"
    old, recent, ancient = root / f".old-{staged.path.name}", root / ".new-abcd1234", root / ".old-abcd1234"
    for folder in (gone, busy, old, recent, ancient):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"half")
    long_ago = time.time() - 3 * 24 * 3600
    os.utime(ancient, (long_ago, long_ago))
    with FileLock(root / f".{busy.name.removeprefix('.new-')}.lock"):
        AdapterStore(root)
        assert [folder.exists() for folder in (gone, busy, old, recent, ancient)] == [False, True, False, True, False]
    AdapterStore(root)
    assert not busy.exists()
    assert AdapterStore(root).entry(staged.path) is not None


def test_an_order_that_cannot_be_kept_is_computed_and_used(
    base: BaseCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = base.linear_modules[0]
    expected = OrderCache(tmp_path / "good").get(base, name)
    with failing(tmp_path / "counted") as disk:
        OrderCache(tmp_path / "counted").get(base, name)
    assert disk.count > 3
    for point in range(1, disk.count + 1):
        for stays in (False, True):
            root = tmp_path / f"cache-{point}-{stays}"
            with failing(root, point, errno.ENOSPC, stays=stays):
                order = OrderCache(root).get(base, name)
            assert torch.equal(order.rows, expected.rows)
            again = OrderCache(root).get(base, name)
            assert torch.equal(again.cols, expected.cols)
            assert not list(root.rglob("*.tmp")) or stays
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize("to", [TargetFormat.PORTABLE, TargetFormat.HIRA])
def test_converting_fails_whole_at_every_operation(
    base: BaseCheckpoint, adapters: Path, tmp_path: Path, to: TargetFormat
) -> None:
    path = adapters / "qv_r8_k2_safetensors"
    with failing(tmp_path / "out") as disk:
        convert(path, tmp_path / "out" / "x", to, base)
    expected, points = tree(tmp_path / "out" / "x"), disk.count
    assert points > 5
    for point in range(1, points + 1):
        shutil.rmtree(tmp_path / "out")
        with failing(tmp_path / "out", point):
            error = refusal(lambda: convert(path, tmp_path / "out" / "x", to, base))
        assert error is None or "free some space there, or choose another --out" in str(error)
        assert tree(tmp_path / "out") in ({}, {f"x/{name}": data for name, data in expected.items()})
        if not (tmp_path / "out" / "x").exists():
            convert(path, tmp_path / "out" / "x", to, base)
        assert tree(tmp_path / "out" / "x") == expected


def test_merging_fails_whole_at_every_operation(base: BaseCheckpoint, adapters: Path, tmp_path: Path) -> None:
    deltas = load_deltas(adapters / "qv_r8_k2_safetensors", base)
    with failing(tmp_path / "out") as disk:
        merge(base, deltas, tmp_path / "out" / "x")
    for point in range(1, disk.count + 1):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with failing(tmp_path / "out", point):
            error = refusal(lambda: merge(base, deltas, tmp_path / "out" / "x"))
        assert error is None or "free some space there, or choose another --out" in str(error)
        if (tmp_path / "out" / "x").exists():
            assert BaseCheckpoint.open(tmp_path / "out" / "x").tensors.keys() == base.tensors.keys()
        else:
            assert tree(tmp_path / "out") == {}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_an_adapter_that_cannot_be_read_is_refused_by_its_name(
    base: BaseCheckpoint, adapters: Path, tmp_path: Path, number: int
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapters / "qv_r8_k2_safetensors", folder)
    with failing(folder) as disk:
        load_adapter(folder, base)
    assert disk.count >= 1
    for point in range(1, disk.count + 1):
        with failing(folder, point, number), pytest.raises(AdapterError, match="cannot be read") as refused:
            load_adapter(folder, base)
        assert str(folder) in str(refused.value)


def test_a_folder_that_may_not_be_entered_is_refused(
    base: BaseCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Path, **_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", closed)
        with pytest.raises(AdapterError, match="permission denied; let the server's user read it"):
            load_adapter(tmp_path / "closed", base)
    for path in ("~nobody-of-this-name/x", "a\0b"):
        with pytest.raises(AdapterError):
            load_adapter(path, base, LoadOptions())


def test_a_full_disk_is_one_line_on_the_command_line(base: BaseCheckpoint, adapters: Path, tmp_path: Path) -> None:
    command = ["convert", str(adapters / "qv_r8_k2_safetensors"), "--base", str(base.path), "--out"]
    with failing(tmp_path / "out", 2):
        result = CliRunner().invoke(app, [*command, str(tmp_path / "out" / "x")])
    assert result.exit_code == 1
    assert "error: --out" in result.output
    assert "No space left on device" in result.output
    assert "Traceback" not in result.output
    assert json.dumps(sorted(tree(tmp_path))) == "[]"
