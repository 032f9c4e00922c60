"""Regular expressions of adapter files: as `re` reads them, and never for long."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoa_serve.adapters.patterns import MatchTime, Pattern, PatternError
from smoa_serve.adapters.targets import matcher, unmatched

Q = "model.layers.0.self_attn.q_proj"
MODULES = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(30) for name in "qkvo"]
# `regex` sees at once that there is no "!"; the others would take either engine years.
FREEZING = [
    "(([a-z0-9]|[._])+)+!",
    r"(([a-z0-9]|[._])+)+(?!.)\bx?y",
    r"(?:[a-z._0-9]+){1,1000}(?!.)\bx?y",
    r"(.*.*.*)*(?<!j)\b(?!.)y?z|(a|b|[._a-z0-9])*(?!.)\bx?y",
]

atoms = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        "[ab]",
        "[^a]",
        r"\w",
        r"\d",
        "_",
        "0",
        "(?!b)",
        "(?=a)",
        "(?<=a)",
        "(?<!.)",
        "^",
        "$",
        r"\b",
    ]
)
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{,2}", "*?", "+?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        inner.map(lambda expression: f"({expression})"),
    ),
    max_leaves=6,
)


@given(expressions, st.lists(st.text("ab._0\n", max_size=7), max_size=8))
def test_ordinary_expressions_mean_what_they_mean_to_re(expression: str, names: list[str]) -> None:
    pattern = Pattern(expression, MatchTime(60))
    assert [pattern.fullmatch(name) for name in names] == [bool(re.fullmatch(expression, name)) for name in names]
    assert [pattern.match(name) for name in names] == [bool(re.match(expression, name)) for name in names]


@given(st.text(r"ab.*+?|()[]{}\^$-:0,1pdwzAZ=!<", max_size=12), st.lists(st.text("ab.0{}:e", max_size=5), max_size=4))
def test_any_text_is_refused_or_means_what_it_means_to_re(expression: str, names: list[str]) -> None:
    try:
        pattern = Pattern(expression, MatchTime(60))
    except PatternError:
        return
    assert [pattern.fullmatch(name) for name in names] == [bool(re.fullmatch(expression, name)) for name in names]


@given(st.lists(st.text("ab.", max_size=6), max_size=6), st.lists(st.text("ab.", max_size=8), max_size=8))
def test_names_are_equal_or_the_end_after_a_dot(targets: list[str], names: list[str]) -> None:
    wants = matcher(targets)
    expected = {name: any(name == target or name.endswith(f".{target}") for target in targets) for name in names}
    assert {name: wants(name) for name in names} == expected
    idle = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    assert unmatched(names, targets) == idle


@pytest.mark.parametrize("expression", FREEZING)
def test_an_expression_that_would_never_end_does(expression: str) -> None:
    started = time.process_time()
    pattern = Pattern(expression, MatchTime(0.2))
    try:
        found = {pattern.fullmatch(name) for name in MODULES}
    except PatternError as error:
        found = {str(error)}
    message = f"the regular expression {expression!r} is refused: matching it against the modules' names takes"
    assert found == {False} or next(iter(found)).startswith(message)
    assert time.process_time() - started < 30


def test_the_time_is_for_all_names_and_expressions_together() -> None:
    time_left = MatchTime(0.2)
    with pytest.raises(PatternError):
        Pattern(FREEZING[2], time_left).fullmatch(Q)
    with pytest.raises(PatternError, match="takes more than"):
        Pattern(".*", time_left).fullmatch(Q)


@pytest.mark.parametrize(
    ("expression", "what"),
    [
        ("(", "is no regular expression"),
        (r"\p{L}+", "brace|is no regular expression"),
        ("(?:abc){e<=1}", "a brace that repeats nothing"),
        ("[[:alpha:]]+", r"'\[:'"),
        ("(" * 2000 + ")" * 2000, "nested too deeply"),
        ("a" * 9000, "has 9000 characters, allowed are 8192"),
        (r"(?R)", "is no regular expression"),
    ],
)
def test_what_is_no_ordinary_expression_is_refused(expression: str, what: str) -> None:
    with pytest.raises(PatternError, match=what):
        Pattern(expression)


def test_a_wide_range_that_ignores_case_compiles_at_once() -> None:
    started = time.process_time()
    assert not Pattern("(?i)" + r"[\x00-\uffff]" * 600).fullmatch(Q)
    assert time.process_time() - started < 4  # `re` takes seven seconds
