"""Regular expressions out of adapter files, matched in bounded time.

`re` cannot be stopped, and a short expression keeps it busy for ever. `regex` reads ordinary expressions as `re` does,
and takes a time limit; what it alone gives a meaning to is refused.
"""

import re
import time

import regex

from ..errors import shown

MATCH_LIMIT_S = 2.0
LENGTH_LIMIT = 8192
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_REPEAT = re.compile(r"\{(\d+(,\d*)?|,\d+)\}")
_IGNORES_CASE = re.compile(r"\(\?[a-zA-Z]*i")


class PatternError(re.error):
    """An expression is none, means more to `regex` than to `re`, or takes too long. Says which and why."""


class MatchTime:
    """What is left of the time for the expressions of one adapter.

    Args:
        limit_s: for all of them together.
    """

    def __init__(self, limit_s: float = MATCH_LIMIT_S) -> None:
        self.limit_s = self.left_s = limit_s


class Pattern:
    """One expression.

    Args:
        expression: as `re` takes it.
        time_left: shared with other expressions; its own `MATCH_LIMIT_S` by default.

    Raises:
        PatternError: it cannot be used.
    """

    def __init__(self, expression: str, time_left: MatchTime | None = None) -> None:
        self.expression = expression
        self._time = time_left or MatchTime()
        _refuse_unusable(expression)
        try:
            if not _IGNORES_CASE.search(expression):  # compiling that takes `re` seconds for each wide range
                re.compile(expression)
            self._compiled = regex.compile(expression, cache_pattern=False)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise PatternError(f"{shown(expression)} is no regular expression: {what}") from None

    def fullmatch(self, name: str) -> bool:
        """Whether all of `name` matches.

        Raises:
            PatternError: the time is over.
        """
        return self._bounded(self._compiled.fullmatch, name)

    def match(self, name: str) -> bool:
        """Whether the beginning of `name` matches.

        Raises:
            PatternError: the time is over.
        """
        return self._bounded(self._compiled.match, name)

    def _bounded(self, matcher: object, name: str) -> bool:
        started = time.monotonic()
        try:
            if self._time.left_s <= 0:
                raise TimeoutError
            # Without the interpreter's lock: other requests go on meanwhile.
            found = matcher(name, timeout=self._time.left_s, concurrent=True)  # type: ignore[operator]
        except TimeoutError:
            self._time.left_s = 0
            limit = f"matching it against the modules' names takes more than {self._time.limit_s:g} s"
            raise PatternError(
                f"the regular expression {shown(self.expression)} is refused: {limit}; use plain names, or an "
                "expression without repetitions inside repetitions"
            ) from None
        except MemoryError:
            raise PatternError(f"the regular expression {shown(self.expression)} takes too much memory") from None
        self._time.left_s -= time.monotonic() - started
        return found is not None


def _refuse_unusable(expression: str) -> None:
    if len(expression) > LENGTH_LIMIT:
        raise PatternError(
            f"the regular expression {shown(expression)} has {len(expression)} characters, allowed are {LENGTH_LIMIT}; "
            "give a list of names"
        )
    bare = _REPEAT.sub("", _ESCAPED.sub("", expression))
    if "{" in bare or "[:" in bare:
        raise PatternError(
            f"the regular expression {shown(expression)} has a brace that repeats nothing, or '[:'; no module name has "
            "them: write '\\{' or '[\\:'"
        )
