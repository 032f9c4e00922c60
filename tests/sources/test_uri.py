"""Source URIs, what is allowed of them, templates: nothing leaves a prefix, and no secret is shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoa_serve.errors import AdapterError, ConfigError, PathNotAllowedError
from smoa_serve.sources import Cache, SourcePolicy, check_template, fetch, match_template
from smoa_serve.sources.uri import masked, parse

ALLOW = (
    "s3://bucket/adapters/",
    "hf://org",
    "hf://other/repo@v1",
    "https://host.example/a/",
    "http://host.example:8080",
)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/adapters/legal",
        "S3://bucket/adapters/a/b.zip",
        "hf://org/repo",
        "hf://org/repo@main/sub",
        "hf://org/repo@refs/pr/1",
        "hf://org/repo@refs%2Fpr%2F1/sub",
        "hf://other/repo@v1/sub",
        "https://HOST.example:443/a/legal?sig=1",
        "http://host.example:8080/x",
        "https://host.example/%61/legal",
    ],
)
def test_what_a_prefix_names_is_allowed(uri: str) -> None:
    place = SourcePolicy(allow=ALLOW).place(uri)
    assert place.scheme == uri.partition(":")[0].lower()
    assert "sig" not in place.shown


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/adapters-secret/x",
        "s3://bucket/x",
        "s3://bucket2/adapters/x",
        "s3://Bucket/adapters/x",
        "gs://bucket/adapters/x",
        "hf://org2/repo",
        "hf://other/repo@v2",
        "hf://other/repo",
        "http://host.example/a/x",
        "https://host.example:8443/a/x",
        "https://host.example.evil.example/a/x",
        "https://evil.example/a/x",
        "http://host.example/x",
    ],
)
def test_what_no_prefix_names_is_refused(uri: str) -> None:
    with pytest.raises(PathNotAllowedError, match="--source-allow"):
        SourcePolicy(allow=ALLOW).place(uri)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://bucket/adapters/../secret", "leads elsewhere"),
        ("s3://bucket/adapters/./x", "leads elsewhere"),
        ("s3://bucket/adapters//x", "empty"),
        ("s3://bucket/adapters/%2e%2e/x", "leads elsewhere"),
        ("https://host.example/a/%2e%2e/secret", "leads elsewhere"),
        ("https://host.example/a/%252e%252e/secret", "leads elsewhere"),
        ("https://host.example/a/..%2fsecret", "hides a slash"),
        ("https://host.example/a/x%5c..", "hides a slash"),
        ("https://host.example\\@evil.example/a/x", "no backslash"),
        ("https://host.example/a/x#y", "fragment"),
        ("s3://bucket/adapters/x?versionId=1", "query"),
        ("https://user:pw@host.example/a/x", "user name or password"),
        ("https://user:p/w@host.example/a/x", "user name or password"),
        ("s3://key:secret@bucket/x", "user name or password"),
        ("https:///a/x", "no name of a host"),
        ("https://host.example:99999999/a/x", "no name of a host"),
        ("https://ho st/a/x", "no name of a host"),
        ("https://[::1/a/x", "no name of a host"),
        ("ftp://host/x", "known are a path, file, hf, s3, gs, az, https, http"),
        ("s3://bucket", "names no adapter"),
        ("hf://org", "names no adapter"),
        ("hf://org/repo@../x", "no revision"),
        ("hf://org/repo@a%2F..%2Fb", "no revision"),
        ("s3://bucket/a\nb", "printable"),
        ("s3://bucket/" + "x" * 5000, "at most 4096"),
        ("s3://\ud800/x", "printable"),
    ],
)
def test_what_is_no_source_is_refused_with_the_reason(uri: str, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason) as raised:
        SourcePolicy(allow=("s3://", "https://", "hf://")).place(uri)
    assert not any(secret in str(raised.value) for secret in ("pw", "p/w", "secret@"))


@pytest.mark.parametrize("entry", ["s3:/x", "host.example", "ftp://x", "https://h/?a=1", "s3://b/../x", "10.0.0.1/8"])
def test_a_prefix_that_cannot_be_used_stops_the_start(entry: str) -> None:
    with pytest.raises(ConfigError, match="allowed source"):
        SourcePolicy(allow=(entry,))


def test_nothing_remote_is_allowed_by_default(cache: Cache) -> None:
    for uri in ("s3://b/x", "hf://org/repo", "https://host/x"):
        with pytest.raises(PathNotAllowedError, match="none is allowed"):
            fetch(uri, SourcePolicy(), cache)


@given(st.text(max_size=40), st.sampled_from(["s3://b/adapters/", "https://h/adapters/", "hf://org/"]))
def test_no_text_leaves_its_prefix(text: str, prefix: str) -> None:
    try:
        place = SourcePolicy(allow=(prefix,)).place(prefix + text)
    except (AdapterError, PathNotAllowedError):
        return
    again = parse(place.url()) if place.scheme == "https" else place
    assert again.is_under(parse(prefix, prefix=True))
    assert not {"..", ".", ""} & set(again.segments)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:p@h/x?sig=1 and more", "https://***@h/x?*** and more"),
        ("at 'https://h/x?X-Amz-Signature=1'", "at 'https://h/x?***'"),
        ("https://user:p/w@h/x", "https://***@h/x"),
        ("hf://org/repo@main", "hf://org/repo@main"),
        ("hf://u:t@org/repo", "hf://***@org/repo"),
        ("nothing to hide?", "nothing to hide?"),
    ],
)
def test_secrets_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.parametrize(
    ("template", "name", "source"),
    [
        ("s3://bucket/adapters/{name}", "legal", "s3://bucket/adapters/legal"),
        ("s3://bucket/adapters/{name}", "team/legal-2.1_b", "s3://bucket/adapters/team/legal-2.1_b"),
        ("s3://bucket/adapters/{name}/final.zip", "legal", "s3://bucket/adapters/legal/final.zip"),
        ("https://host/{name}.tar", "legal", "https://host/legal.tar"),
        ("hf://org/{name}", "legal", "hf://org/legal"),
        ("hf://org/smoa-{name}", "legal", "hf://org/smoa-legal"),
    ],
)
def test_a_template_gives_a_names_source(template: str, name: str, source: str) -> None:
    assert match_template(template, name) == source


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/../b", "a//b", "/a", "a/", "a b", "a?b", "a#b", "a%2e", "a\\b", "a@b", "a:b",
             "-a", ".a", "é", "a\n", "x" * 129, "a/" * 8 + "a", "{name}", "https://evil"]
)  # fmt: skip
def test_a_name_that_could_leave_the_template_has_no_source(name: str) -> None:
    assert match_template("s3://bucket/adapters/{name}", name) is None


def test_a_name_on_the_hub_is_one_repository() -> None:
    assert match_template("hf://org/{name}", "other/repo") is None


@given(st.text(max_size=60))
def test_no_name_leaves_its_template(name: str) -> None:
    for template in ("s3://b/adapters/{name}", "https://h/adapters/{name}", "hf://org/{name}"):
        source = match_template(template, name)
        if source is not None:
            place = SourcePolicy(allow=(template.partition("{")[0],)).place(source)
            assert source == template.replace("{name}", name)
            assert not {"", ".", ".."} & set(place.segments)


@pytest.mark.parametrize(
    "template",
    ["s3://{name}/x", "s3://{name}", "{name}", "https://host:{name}/x", "s3://b/x", "s3://b/{name}/{name}", "s3://b/{x}",
     "hf://org/repo@{name}", "https://h/x?y={name}", "ftp://h/{name}", "s3://b/../{name}", "/adapters/{name}"],
)  # fmt: skip
def test_a_template_that_cannot_be_used_stops_the_start(template: str) -> None:
    with pytest.raises(ConfigError, match="source template"):
        check_template(template)
