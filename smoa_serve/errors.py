"""Every error smoa-serve raises on purpose.

A user's mistake names the value found, what is allowed and the remedy. Reasons are collected and raised once, so that
one round of repairs is enough.
"""

from collections.abc import Sequence

_SHOWN = 100  # reasons in a message, of which a file may give a million
_SHOWN_CHARACTERS = 1000


def _line(reason: str) -> str:
    """A reason as one line that every terminal and JSON encoder takes, whatever names a file has."""
    text = reason if len(reason) <= _SHOWN_CHARACTERS else f"{reason[:_SHOWN_CHARACTERS]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


SHOWN_CHARACTERS = 200


def shown(text: str) -> str:
    """What a user sent, quoted for a message: `repr`, which escapes what cannot be encoded, of at most a few lines."""
    more = f"… ({len(text)} characters)" if len(text) > SHOWN_CHARACTERS else ""
    return repr(text[:SHOWN_CHARACTERS]) + more


_BULLET = "\n  - "


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
        lines = "".join(f"{_BULLET}{_line(reason)}" for reason in self.reasons[:_SHOWN])
        if len(self.reasons) > _SHOWN:
            lines += f"{_BULLET}and {len(self.reasons) - _SHOWN} more reasons"
        super().__init__(f"adapter {self.source!r} was refused:{lines}")


def reasons_in(text: str) -> list[str]:
    """The reasons in what another process said of an `AdapterError`; empty when it was none."""
    return text.split(_BULLET)[1:]


class AdapterNotFoundError(AdapterError):
    """There is no adapter at the path given."""


class SourceUnavailableError(AdapterError):
    """An adapter cannot be fetched at the moment; the same call may work later.

    Args:
        source: as for AdapterError.
        reasons: likewise.
        retry_after_s: what the other side asked to wait, seconds; None where it did not say.
    """

    def __init__(self, source: object, reasons: Sequence[str] | str, *, retry_after_s: float | None = None) -> None:
        super().__init__(source, reasons)
        self.retry_after_s = retry_after_s


class StorageError(SmoaError):
    """A folder of this machine cannot be written: it is full, read-only, or belongs to somebody else."""


class PathNotAllowedError(SmoaError):
    """An adapter path given over HTTP lies outside the configured roots."""


class CompatibilityError(SmoaError):
    """The installed vLLM is not one this project knows, or a seam of it changed."""


class MoveAbandonedError(SmoaError):
    """An adapter was pinned while the automatic policy moved it."""


class AdapterBusyError(AdapterError):
    """An adapter cannot be moved as things are now; later it may be."""


class MoveRefusedError(AdapterError):
    """An adapter cannot be moved to that step of the ladder.

    Args:
        source: as for AdapterError.
        reasons: likewise.
        lasting: the same content would be refused again.
    """

    def __init__(self, source: object, reasons: Sequence[str] | str, *, lasting: bool = False) -> None:
        super().__init__(source, reasons)
        self.lasting = lasting


class MoveFailedError(SmoaError):
    """A move failed half-way and was undone on every worker; it can be asked for again."""


class WorkerError(SmoaError):
    """A worker could not do what all workers were asked for."""


def reasons_of(error: BaseException) -> list[str]:
    """What a failure says to a user: the reasons of a refusal, or what was raised."""
    if isinstance(error, AdapterError):
        return error.reasons
    return [str(error) if isinstance(error, SmoaError) else f"{type(error).__name__}: {error}"]


class MergeLossError(SmoaError):
    """Rounding would remove more of an update than is allowed."""


class SeveralProcessesError(SmoaError):
    """Several API server processes share the engine, and one was asked for a change that the others would not see."""


class EngineGoneError(SmoaError):
    """The engine ended while it was asked for something."""
