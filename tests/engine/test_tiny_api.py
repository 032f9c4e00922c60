"""The comparison that tests over HTTP rest on: what is wrong is seen, and what could not be compared is counted."""

from typing import Any

import pytest

TOKENS, LOGPROBS = [5, 6, 7, 8, 9], [-0.5, -0.4, -0.3, -0.2, -0.1]


@pytest.fixture
def expected(tiny_api: Any) -> Any:
    """An answer that is nearly tied at its fourth place."""
    return tiny_api.Answer(TOKENS, LOGPROBS, [1.0, 1.0, 1.0, 1e-5, 1.0])


@pytest.mark.parametrize(
    ("tokens", "logprobs", "says"),
    [
        (TOKENS[:-1], LOGPROBS[:-1], "4 tokens instead of 5"),
        ([5, 6, 1, 8, 9], LOGPROBS, "at 2: "),
        (TOKENS, [-0.5, -0.4, -0.3, -0.2, -0.11], "at 4: logprob -0.11 instead of -0.1"),
        ([5, 6, 7, 1, 9], [-0.5, -0.4, -0.3, -0.9, -0.1], "at 3: logprob -0.9"),
    ],
    ids=["length", "token", "logprob", "another token that is no tie"],
)
def test_another_answer_is_seen(
    tiny_api: Any, expected: Any, tokens: list[int], logprobs: list[float], says: str
) -> None:
    compared = tiny_api.Compared()
    assert says in tiny_api.Answer(tokens, logprobs, [1.0] * len(tokens)).differs(expected, compared)
    assert compared == tiny_api.Compared()


def test_what_follows_a_near_tie_is_counted_as_not_compared(tiny_api: Any, expected: Any) -> None:
    compared = tiny_api.Compared()
    other = tiny_api.Answer([5, 6, 7, 1, 2], LOGPROBS, [1.0] * 5)
    assert expected.differs(expected, compared) is None
    assert (compared.asked, compared.compared) == (5, 5)
    compared.assert_enough()
    assert other.differs(expected, compared) is None
    assert (compared.asked, compared.compared) == (10, 8)
    with pytest.raises(AssertionError, match="2 of 10 tokens uncompared"):
        compared.assert_enough()


def test_an_answer_that_is_tied_at_once_proves_nothing(tiny_api: Any) -> None:
    expected = tiny_api.Answer(TOKENS, LOGPROBS, [1e-5] * 5)
    other = tiny_api.Answer([1, *TOKENS[1:]], LOGPROBS, [1.0] * 5)
    assert "at 0: a near tie leaves nothing to compare" in other.differs(expected, tiny_api.Compared())
