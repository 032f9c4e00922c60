"""Every error smoa-serve raises on purpose.

A user's mistake names the value found, what is allowed and the remedy. Reasons are collected and raised once, so that
one round of repairs is enough.
"""

from collections.abc import Sequence

SHOWN_CHARACTERS = 200


def shown(text: str) -> str:
    """What a user sent, quoted for a message: `repr`, which escapes what cannot be encoded, of at most a few lines."""
    more = f"… ({len(text)} characters)" if len(text) > SHOWN_CHARACTERS else ""
    return repr(text[:SHOWN_CHARACTERS]) + more


class SmoaError(Exception):
    """Base of all errors of this project. `str(error)` is fit to be shown to a user."""


class ConfigError(SmoaError):
    """A setting (flag, YAML key or environment variable) cannot be used."""


class BaseModelError(SmoaError):
    """The base checkpoint cannot be read or lacks a weight that is needed."""


class AdapterError(SmoaError):
    """An adapter cannot be read, does not fit the base, or is not supported.

    Args:
        source: what was read, as the user named it.
        reasons: every reason found, one sentence each.
    """

    def __init__(self, source: object, reasons: Sequence[str] | str) -> None:
        self.source = str(source)
        self.reasons = [reasons] if isinstance(reasons, str) else list(reasons)
        lines = "".join(f"\n  - {reason}" for reason in self.reasons)
        super().__init__(f"adapter {self.source!r} was refused:{lines}")


class AdapterNotFoundError(AdapterError):
    """There is no adapter at the path given."""


class PathNotAllowedError(SmoaError):
    """An adapter path given over HTTP lies outside the configured roots."""


class CompatibilityError(SmoaError):
    """The installed vLLM is not one this project knows, or a seam of it changed."""


class MoveAbandonedError(SmoaError):
    """An adapter was pinned while the automatic policy moved it."""


class MoveRefusedError(AdapterError):
    """An adapter cannot be moved to that step of the ladder now."""


class MergeLossError(SmoaError):
    """Rounding would remove more of an update than is allowed."""


class SeveralProcessesError(SmoaError):
    """Several API server processes share the engine, and one was asked for a change that the others would not see."""


class EngineGoneError(SmoaError):
    """The engine ended while it was asked for something."""
