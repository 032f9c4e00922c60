"""A name is accepted only when every route of ours reaches it."""

import posixpath
from typing import get_args
from urllib.parse import urljoin

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import Match

from smoa_serve.registry.revisions import VERBS, Target, name_reason
from smoa_serve.server.routes.residence import router

PREFIX = "/v1/smoa/adapters"
# What names are made of, and what they must not be made of.
parts = st.sampled_from([*sorted(VERBS), "a", "0", "A9", ".", "..", "", "...", "a.", ".a", "a:b", ":", "-", "_", "%2e"])
odd = st.lists(parts, min_size=1, max_size=5).map("/".join)
names = odd | st.text("ab0._:/-@% ?#\\\n\0é", max_size=12) | st.text(max_size=8)


def reached(name: str, target: str) -> tuple[str, str] | None:
    """The name and the verb that the route of a move sees, after the client's path was sent."""
    path = httpx.URL(f"http://server{PREFIX}/{name}/{target}").path
    (route,) = [route for route in router.routes if "{target}" in getattr(route, "path", "")]
    match, scope = route.matches({"type": "http", "method": "POST", "path": path})
    if match is not Match.FULL:
        return None
    return scope["path_params"]["name"], scope["path_params"]["target"]


@given(names)
def test_an_accepted_name_is_reached_by_every_route_and_whoever_tidies_paths(name: str) -> None:
    if name_reason(name) is not None:
        return
    for target in sorted(VERBS):
        assert reached(name, target) == (name, target)
        path = f"{PREFIX}/{name}/{target}"
        assert posixpath.normpath(path) == path
        assert urljoin("http://server/", path) == f"http://server{path}"
    assert name.rpartition("/")[2] not in VERBS  # `{name}` alone is never another name and a verb
    assert "@" not in name


@given(names)
def test_a_refused_name_is_told_what_is_allowed(name: str) -> None:
    reason = name_reason(name)
    if reason is not None:
        assert "cannot be used" in reason
        assert "allowed are" in reason
        reason.encode()


@given(st.text(min_size=300))
def test_a_long_name_is_not_repeated_at_length(name: str) -> None:
    assert len(name_reason(name) or "") < 3000


@pytest.mark.parametrize("name", ["a/../b", "a/..", "a/.", "a//b", "a/", "a@0123", f"a@{'0' * 32}", "a/b\n", "\ud800"])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    assert name_reason(name) is not None


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_a_verb_ends_no_name(verb: str) -> None:
    for name in (verb, f"a/{verb}", f"a/b/{verb}"):
        assert verb in (name_reason(name) or "")
    for name in (f"{verb}/a", f"a{verb}", f"{verb}s"):
        assert name_reason(name) is None


def test_every_move_is_a_verb() -> None:
    assert set(get_args(Target)) <= VERBS
