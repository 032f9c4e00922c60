"""Fetching over https from a server with faults."""

import hashlib
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from sources_web import (
    CONFIG,
    WEIGHTS,
    Fault,
    Web,
    content,
    cut,
    drip,
    drip_head,
    etag,
    files_of,
    left_in,
    plainly,
    serving,
    silent,
    status,
)
from tenacity import RetryCallState, Retrying

from smoa_serve.errors import (
    AdapterError,
    AdapterNotFoundError,
    PathNotAllowedError,
    SourceUnavailableError,
    StorageError,
)
from smoa_serve.sources import Cache, SourcePolicy, fetch, fetching

FILES = files_of()
BACKOFF = fetching._BACKOFF
MakePolicy = Callable[..., SourcePolicy]


@pytest.fixture
def legal(web: Web) -> str:
    """The URL of an adapter on the server."""
    web.files.update({f"/a/legal/{name}": data for name, data in FILES.items()})
    return f"{web.url}/a/legal"


@pytest.fixture
def policy(web: Web, make_policy: MakePolicy) -> SourcePolicy:
    return make_policy(f"{web.url}/a/")


def test_an_adapters_files_are_fetched_and_nothing_else(
    legal: str, web: Web, policy: SourcePolicy, cache: Cache
) -> None:
    web.files["/a/legal/README.md"] = web.files["/a/legal/adapter_model.bin"] = b"more"
    with fetch(f"{legal}/", policy, cache) as fetched:
        assert content(fetched.folder) == FILES
        assert fetched.digest == fetched.folder.name
        assert fetched.resolved == etag(FILES[WEIGHTS])
        assert fetched.downloaded
    assert left_in(cache) == []
    assert {path for path, _ in web.asked} == {f"/a/legal/{name}" for name in FILES}


def test_what_the_cache_has_is_not_fetched_again_while_the_marks_are_the_same(
    legal: str, web: Web, policy: SourcePolicy, cache: Cache
) -> None:
    first = fetch(legal, policy, cache)
    again = fetch(legal, policy, Cache(cache.root))
    assert (again.folder, again.digest, again.resolved) == (first.folder, first.digest, first.resolved)
    assert not again.downloaded
    assert len(web.reads("/a/legal/" + WEIGHTS)) == 1
    web.files["/a/legal/" + WEIGHTS] = b"new"
    changed = fetch(legal, policy, cache)
    assert changed.downloaded
    assert changed.digest != first.digest
    assert content(first.folder) == FILES


def test_without_marks_it_is_fetched_each_time(legal: str, web: Web, policy: SourcePolicy, cache: Cache) -> None:
    web.marks = False
    first, second = fetch(legal, policy, cache), fetch(legal, policy, cache)
    assert second.downloaded
    assert first.digest == second.digest == second.resolved


@pytest.mark.parametrize("marks", [True, False], ids=["marks", "no marks"])
def test_a_read_that_is_cut_goes_on_where_it_ended(
    marks: bool, legal: str, web: Web, policy: SourcePolicy, cache: Cache
) -> None:
    web.marks = marks
    path = "/a/legal/" + WEIGHTS
    web.faults[path] = [cut(100_000), cut(100_000)]
    with fetch(legal, policy, cache) as fetched:
        assert content(fetched.folder) == FILES
    assert web.reads(path) == ([None, "bytes=100000-", "bytes=200000-"] if marks else [None, None, None])


def test_cuts_that_bring_something_are_borne_more_often_than_the_attempts(
    legal: str, web: Web, make_policy: MakePolicy, cache: Cache
) -> None:
    web.faults["/a/legal/" + WEIGHTS] = [cut(70_000)] * 4
    with fetch(legal, make_policy(web.url + "/", attempts=2), cache) as fetched:
        assert content(fetched.folder) == FILES


def test_a_server_that_ignores_ranges_is_read_from_the_start(
    legal: str, web: Web, policy: SourcePolicy, cache: Cache
) -> None:
    def whole(handler: Any, data: bytes, start: int) -> bool:
        handler.answer(200, data)
        return True

    web.faults["/a/legal/" + WEIGHTS] = [cut(100_000), whole]
    web.looks["/a/legal/" + WEIGHTS] = [whole] * 9
    with fetch(legal, policy, cache) as fetched:
        assert content(fetched.folder) == FILES


def another_content(handler: Any, data: bytes, start: int) -> bool:
    handler.part(files_of(1)[WEIGHTS], start)
    return True


def test_content_that_changes_in_between_is_never_mixed(
    legal: str, web: Web, policy: SourcePolicy, cache: Cache
) -> None:
    web.faults["/a/legal/" + WEIGHTS] = [cut(100_000), another_content]
    with fetch(legal, policy, cache) as fetched:
        assert content(fetched.folder) == FILES


def test_a_configuration_that_changes_after_it_was_read_is_fetched_again(
    legal: str, web: Web, policy: SourcePolicy, cache: Cache
) -> None:
    new = files_of(2)

    def publish(handler: Any, data: bytes, start: int) -> bool:
        time.sleep(0.2)  # the configuration has been read
        web.files.update({f"/a/legal/{name}": value for name, value in new.items()})
        handler.answer(200, data)
        return True

    web.faults["/a/legal/" + WEIGHTS] = [publish]
    with fetch(legal, policy, cache) as fetched:
        assert content(fetched.folder) == new


CHUNKED = "HTTP/1.1 200 OK\nETag: ETAG\nTransfer-Encoding: chunked"
LATER: dict[str, list[Fault]] = {
    "429": [status(429, Retry_After="0")] * 3,
    "503": [status(503)] * 3,
    "500": [status(500)] * 3,
    "cut": [cut(10)] * 3,
    "cut in the head": [plainly("HTTP/1.1 200 OK\nContent-Le")] * 3,
    "no HTTP": [plainly("220 mail.example ESMTP")] * 3,
    "silence": [silent] * 3,
    "drip": [drip(50, 0.2)] * 3,
    "wrong length": [plainly("HTTP/1.1 200 OK\nETag: ETAG\nContent-Length: 400000", lambda data, _: data)] * 3,
    "short length": [plainly("HTTP/1.1 200 OK\nETag: ETAG\nContent-Length: 1000", lambda data, _: data[:1000])] * 3,
    "always other content": [another_content] * 3,
    "chunks that end early": [plainly(CHUNKED, lambda data, _: b"40\r\n" + data[:64] + b"\r\n")] * 3,
    "range beyond the end": [status(416)] * 3,
}


@pytest.mark.parametrize("faults", LATER.values(), ids=LATER.keys())
def test_what_may_pass_is_tried_again_and_told_as_such(
    faults: list[Fault], legal: str, web: Web, make_policy: MakePolicy, cache: Cache
) -> None:
    policy = make_policy(web.url, stall_s=0.6)
    path = "/a/legal/" + WEIGHTS
    web.faults[path] = list(faults)
    with pytest.raises(SourceUnavailableError) as raised:
        fetch(legal, policy, cache)
    assert legal in str(raised.value)
    assert len(web.reads(path)) == 3
    assert left_in(cache) == []
    web.faults[path] = faults[:1]
    with fetch(legal, policy, cache) as fetched:
        assert content(fetched.folder) == FILES


def slow(handler: Any, data: bytes, start: int) -> bool:
    time.sleep(0.4)
    return False


def in_future(seconds: float) -> str:
    return formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize("asked", ["1", "date"])
def test_retry_after_is_obeyed(asked: str, legal: str, web: Web, policy: SourcePolicy, cache: Cache) -> None:
    web.looks["/a/legal/" + CONFIG] = [status(429, Retry_After="1" if asked == "1" else in_future(2))]
    began = time.monotonic()
    fetch(legal, policy, cache)
    assert 0.9 < time.monotonic() - began < 4


def test_pauses_grow() -> None:
    state = RetryCallState(Retrying(), None, (), {})
    pauses = []
    for state.attempt_number in range(1, 9):
        pauses.append(BACKOFF(state))
    assert pauses == sorted(pauses)
    assert pauses[0] < 0.5
    assert 9 < pauses[-1] <= 11


def test_a_wait_that_is_too_long_is_handed_on_at_once(legal: str, web: Web, policy: SourcePolicy, cache: Cache) -> None:
    web.looks["/a/legal/" + CONFIG] = [status(503, Retry_After="120")]
    began = time.monotonic()
    with pytest.raises(SourceUnavailableError, match="503") as raised:
        fetch(legal, policy, cache)
    assert raised.value.retry_after_s == 120
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("fault", [drip(900, 0.1), drip_head(0.1)], ids=["body", "head"])
def test_a_drip_that_never_stalls_ends_with_the_whole_time(
    fault: Fault, legal: str, web: Web, make_policy: MakePolicy, cache: Cache
) -> None:
    web.faults["/a/legal/" + WEIGHTS] = [fault] * 9
    began = time.monotonic()
    with pytest.raises(SourceUnavailableError):
        fetch(legal, make_policy(web.url, timeout_s=1.5, stall_s=0.9, attempts=9), cache)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "folder"])
def test_what_is_not_there_is_told_apart(name: str, legal: str, web: Web, policy: SourcePolicy, cache: Cache) -> None:
    expected = AdapterError if name == WEIGHTS else AdapterNotFoundError
    del web.files[f"/a/legal/{CONFIG if name == 'folder' else name}"]
    with pytest.raises(expected, match=r"adapter_model\.safetensors" if name == WEIGHTS else CONFIG) as raised:
        fetch(legal, policy, cache)
    assert type(raised.value) is expected
    assert left_in(cache) == []


def test_a_pickle_is_fetched_only_where_it_is_allowed(
    legal: str, web: Web, make_policy: MakePolicy, cache: Cache
) -> None:
    web.files["/a/legal/adapter_model.bin"] = web.files.pop("/a/legal/" + WEIGHTS)
    with pytest.raises(AdapterError, match="--allow-pickle"):
        fetch(legal, make_policy(web.url), cache)
    with fetch(legal, make_policy(web.url, allow_pickle=True), cache) as fetched:
        assert set(content(fetched.folder)) == {CONFIG, "adapter_model.bin"}


LASTING: dict[str, tuple[Fault, str]] = {
    "401": (status(401), "credentials"),
    "403": (status(403), "credentials"),
    "400": (status(400), "answers 400"),
    "packed": (status(200, Content_Encoding="gzip"), "packs its answer"),
    "no end": (plainly("HTTP/1.1 200 OK\nETag: ETAG"), "where the file ends"),
    "redirects to nothing": (status(302), "no address"),
    "redirects with a password": (status(302, Location="https://u:secret@localhost/x"), "no address"),
    "redirects to a file": (status(302, Location="file:///etc/passwd"), "no address"),
}


@pytest.mark.parametrize(("fault", "reason"), LASTING.values(), ids=LASTING.keys())
def test_what_does_not_pass_is_refused_at_the_first_attempt(
    fault: Fault, reason: str, legal: str, web: Web, policy: SourcePolicy, cache: Cache
) -> None:
    path = "/a/legal/" + WEIGHTS
    web.faults[path] = [fault]
    with pytest.raises(AdapterError, match=reason) as raised:
        fetch(legal, policy, cache)
    assert not isinstance(raised.value, SourceUnavailableError)
    assert "secret" not in str(raised.value)
    assert len(web.reads(path)) == 1
    assert left_in(cache) == []


@pytest.mark.parametrize("told", [True, False], ids=["before", "during"])
def test_what_is_too_large_is_refused(told: bool, legal: str, web: Web, make_policy: MakePolicy, cache: Cache) -> None:
    path, sent = "/a/legal/" + WEIGHTS, 0

    def endless(handler: Any, data: bytes, start: int) -> bool:
        nonlocal sent
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while start == 0:
            handler.wfile.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            sent += 65536
        return True

    if not told:
        web.marks = False
        web.looks[path], web.faults[path] = [plainly("HTTP/1.1 200 OK\nTransfer-Encoding: chunked")], [endless]
    with pytest.raises(AdapterError, match="allowed are 250000"):
        fetch(legal, make_policy(web.url, max_bytes=250_000), cache)
    assert len(web.reads(path)) == (0 if told else 1)
    assert sent < 10_000_000
    assert left_in(cache) == []


def test_a_redirect_is_followed_within_the_prefixes_hosts(
    legal: str, web: Web, policy: SourcePolicy, cache: Cache
) -> None:
    web.files["/blobs/1"] = web.files["/a/legal/" + WEIGHTS]
    for held in (web.looks, web.faults):
        held["/a/legal/" + WEIGHTS] = [status(302, Location="/blobs/1")] * 3
    with fetch(legal, policy, cache) as fetched:
        assert content(fetched.folder) == FILES


@pytest.mark.parametrize(
    "there", ["https://127.0.0.1:1/x", "http://169.254.169.254/latest/meta-data", "https://other.example/x"]
)
def test_a_redirect_to_another_host_is_refused(
    there: str, legal: str, web: Web, policy: SourcePolicy, cache: Cache, connections: list[Any]
) -> None:
    web.faults["/a/legal/" + WEIGHTS] = [status(307, Location=there)]
    with pytest.raises(PathNotAllowedError, match=r"redirects to .* not allowed; allowed are https://localhost"):
        fetch(legal, policy, cache)
    assert {port for _, port in connections} == {web.server_port}


def test_redirects_in_a_circle_end(legal: str, web: Web, policy: SourcePolicy, cache: Cache) -> None:
    web.faults["/a/legal/" + WEIGHTS] = [status(302, Location="/a/legal/" + WEIGHTS)] * 20
    with pytest.raises(AdapterError, match="more than 5 times"):
        fetch(legal, policy, cache)


def test_credentials_of_netrc_stay_with_their_host(
    legal: str, web: Web, make_policy: MakePolicy, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine localhost login me password s3cret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serving("http") as other:
        other.files["/x"] = web.files["/a/legal/" + WEIGHTS]
        there = f"http://127.0.0.1:{other.server_port}"
        for held in (web.looks, web.faults):
            held["/a/legal/" + WEIGHTS] = [status(302, Location=f"{there}/x")] * 3
        with fetch(legal, make_policy(web.url, there), cache) as fetched:
            assert content(fetched.folder) == FILES
        assert all(headers["Authorization"].startswith("Basic ") for headers in web.headers)
        assert other.headers
        assert not any("Authorization" in headers for headers in other.headers)


def test_a_certificate_that_is_not_trusted_is_refused(
    legal: str, policy: SourcePolicy, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(AdapterError, match="SSL_CERT_FILE") as raised:
        fetch(legal, policy, cache)
    assert not isinstance(raised.value, SourceUnavailableError)


def test_many_who_ask_at_once_cause_one_download(legal: str, web: Web, policy: SourcePolicy, cache: Cache) -> None:
    path = "/a/legal/" + WEIGHTS
    web.faults[path] = [slow]
    with ThreadPoolExecutor(16) as pool:
        fetched = list(pool.map(lambda _: fetch(legal, policy, cache), range(16)))
    assert {one.digest for one in fetched} == {fetched[0].digest}
    assert [one.downloaded for one in fetched].count(True) == 1
    assert len(web.reads(path)) == 1
    assert len(web.asked) == 6  # two looks at two files, and the reads


def test_who_waits_tries_itself_when_the_first_fails(
    legal: str, web: Web, make_policy: MakePolicy, cache: Cache
) -> None:
    def slow_failure(handler: Any, data: bytes, start: int) -> bool:
        time.sleep(0.4)
        handler.answer(403, b"")
        return True

    web.looks["/a/legal/" + CONFIG] = [slow_failure]
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(fetch, legal, make_policy(web.url), cache) for _ in range(2)]
        errors = [type(call.exception()) for call in calls]
    assert sorted(errors, key=str) == sorted([AdapterError, type(None)], key=str)


def test_files_of_one_adapter_come_side_by_side(legal: str, web: Web, policy: SourcePolicy, cache: Cache) -> None:
    both = threading.Barrier(2, timeout=5)

    def together(handler: Any, data: bytes, start: int) -> bool:
        both.wait()
        return False

    for name in FILES:
        web.faults[f"/a/legal/{name}"] = [together]
    with fetch(legal, policy, cache) as fetched:
        assert content(fetched.folder) == FILES
    assert not both.broken
    assert all(not web.faults[f"/a/legal/{name}"] for name in FILES)  # both were asked for, at the same time


def test_a_signed_query_goes_to_the_server_and_nowhere_else(
    legal: str, web: Web, policy: SourcePolicy, cache: Cache
) -> None:
    with fetch(f"{legal}?sig=s3cret", policy, cache) as fetched:
        assert content(fetched.folder) == FILES
        assert "s3cret" not in repr(fetched)
        assert fetched.uri == f"{legal}?***"
    kept = [str(file).encode() + (file.read_bytes() if file.is_file() else b"") for file in cache.root.rglob("*")]
    assert not [one for one in kept if b"s3cret" in one]
    web.looks["/a/legal/" + CONFIG] = [status(403)]
    with pytest.raises(AdapterError) as raised:
        fetch(f"{legal}?sig=s3cret", policy, cache)
    assert "s3cret" not in str(raised.value)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Addresses that sockets connect to."""
    made: list[Any] = []
    connect = socket.socket.connect

    def recorded(self: socket.socket, address: Any) -> None:
        made.append(address[:2])
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", recorded)
    return made


class Resolver:
    """`socket.getaddrinfo`, with what each name means one time after the other."""

    def __init__(self, **names: list[list[str]]) -> None:
        self.names = {name.replace("_", "."): answers for name, answers in names.items()}
        self.asked: list[str] = []
        self._real = socket.getaddrinfo

    def __call__(self, host: Any, port: Any, *rest: Any, **named: Any) -> Any:
        if host not in self.names:
            return self._real(host, port, *rest, **named)
        self.asked.append(host)
        answers = self.names[host]
        now = answers.pop(0) if len(answers) > 1 else answers[0]
        if not now:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [found for address in now for found in self._real(address, port, *rest, **named)]


def test_a_name_that_changes_its_meaning_leads_to_the_address_that_was_judged(
    web: Web, make_policy: MakePolicy, cache: Cache, monkeypatch: pytest.MonkeyPatch, connections: list[Any]
) -> None:
    resolver = Resolver(cdn_example=[["192.88.99.1"], ["127.0.0.1"]])
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    monkeypatch.setattr("smoa_serve.sources.http._CONNECT_S", 0.3)
    policy = make_policy(f"https://cdn.example:{web.server_port}", attempts=1)
    with pytest.raises(SourceUnavailableError):
        fetch(f"https://cdn.example:{web.server_port}/a/legal", policy, cache)
    assert resolver.asked == ["cdn.example"]
    assert connections == [("192.88.99.1", web.server_port)]
    with pytest.raises(PathNotAllowedError, match="not public"):
        fetch(f"https://cdn.example:{web.server_port}/a/legal", policy, cache)
    assert len(connections) == 1
    assert web.asked == []


PRIVATE_4 = "127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1"
PRIVATE_6 = "::1 fe80::1 fc00::1 fec0::1 ff02::1 ::ffff:127.0.0.1 64:ff9b::7f00:1 2002:7f00:1::"


@pytest.mark.parametrize("address", f"{PRIVATE_4} {PRIVATE_6}".split())
def test_a_name_of_an_address_that_is_not_public_is_refused_before_a_connection(
    address: str, make_policy: MakePolicy, cache: Cache, monkeypatch: pytest.MonkeyPatch, connections: list[Any]
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 443)) for one in ("8.8.8.8", address)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(PathNotAllowedError, match=r"cdn\.example leads to an address that is not public") as raised:
        fetch("https://cdn.example/a", make_policy("https://cdn.example/", "https://10.9.9.9/"), cache)
    assert address not in str(raised.value).replace("10.0.0.0/8", "")
    assert connections == []


def test_a_network_that_is_named_is_connected_to(
    legal: str, web: Web, make_policy: MakePolicy, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Resolver(cdn_example=[["127.0.0.1"]]))
    there = legal.replace("localhost", "cdn.example")
    with fetch(there, make_policy(there, "127.0.0.0/8"), cache) as fetched:
        assert content(fetched.folder) == FILES


def test_a_name_that_cannot_be_resolved_may_be_later(
    make_policy: MakePolicy, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Resolver(cdn_example=[[]]))
    with pytest.raises(SourceUnavailableError, match="Name or service not known"):
        fetch("https://cdn.example/a", make_policy("https://cdn.example", attempts=1), cache)


def test_proxies_of_the_environment_are_not_used(
    legal: str, policy: SourcePolicy, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with fetch(legal, policy, cache) as fetched:
        assert content(fetched.folder) == FILES


def test_plain_http_is_fetched_only_where_a_prefix_names_it(make_policy: MakePolicy, cache: Cache) -> None:
    with serving("http") as plain:
        plain.files.update({f"/a/{name}": data for name, data in FILES.items()})
        with pytest.raises(PathNotAllowedError):
            fetch(f"{plain.url}/a", make_policy(plain.url.replace("http:", "https:")), cache)
        with fetch(f"{plain.url}/a", make_policy(plain.url), cache) as fetched:
            assert content(fetched.folder) == FILES


def test_an_adapter_that_the_cache_cannot_hold_is_refused_before_it_is_fetched(
    legal: str, web: Web, policy: SourcePolicy, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match="may hold 1000 bytes"):
        fetch(legal, policy, Cache(tmp_path / "small", max_bytes=1000))
    assert web.reads("/a/legal/" + WEIGHTS) == []


def test_a_process_that_waits_longer_than_allowed_says_so(
    legal: str, make_policy: MakePolicy, web: Web, cache: Cache
) -> None:
    policy = make_policy(web.url, timeout_s=0.3)
    key = hashlib.sha256("\n".join((legal, *policy.names)).encode()).hexdigest()
    with cache.lock(key, 1), pytest.raises(SourceUnavailableError, match="another call still fetches it"):
        fetch(legal, policy, cache)


def test_one_download_over_several_processes(make_policy: MakePolicy, cache: Cache) -> None:
    path = f"/a/{WEIGHTS}"
    with serving("http") as plain:
        plain.files.update({f"/a/{name}": data for name, data in FILES.items()})
        plain.faults[path] = [slow]
        policy = make_policy(plain.url)

        def in_process(answers: Any) -> None:
            fetched = fetch(f"{plain.url}/a", policy, cache)
            answers.put((os.getpid(), fetched.digest, fetched.downloaded))

        forking = multiprocessing.get_context("fork")
        answers = forking.Queue()
        running = [forking.Process(target=in_process, args=(answers,)) for _ in range(4)]
        for process in running:
            process.start()
        pids, digests, downloaded = zip(*(answers.get(timeout=60) for _ in running), strict=True)
        for process in running:
            process.join(60)
        assert len(plain.reads(path)) == 1
    assert (len(set(pids)), len(set(digests)), downloaded.count(True)) == (4, 1, 1)
