"""Sources of adapters that nobody registered: a template's {name} is what a request calls its model."""

import re

from ..errors import AdapterError, ConfigError
from .uri import parse

_FIELD = "{name}"
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MOST_SEGMENTS = 8


def check_template(template: str) -> None:
    """Judge a template before it is used.

    Raises:
        ConfigError: no remote URI, or {name} is not there once, in its path.
    """
    head, field, tail = template.partition(_FIELD)
    rest = head.partition("://")[2]
    reason = None
    if not field or "{" in head + tail or "}" in head + tail:
        reason = "it has to hold {name} once, and no other braces"
    elif "/" not in rest or "@" in rest or "?" in rest:
        reason = "{name} has to stand in the path, behind the bucket, organisation or host, and in no revision or query"
    else:
        try:
            parse(f"{head}name{tail}")
        except AdapterError as error:
            reason = error.reasons[0]
    if reason is not None:
        raise ConfigError(f"the source template {template!r} cannot be used: {reason}")


def match_template(template: str, name: str) -> str | None:
    """The source that a template gives for a name; None where the name cannot be one of its adapters.

    A name is made of segments (letters, digits, ".", "_", "-"; a letter or digit first), joined by "/". None of these
    can leave the folder of the template, or be another repository, revision or query.

    Raises:
        ConfigError: see `check_template`.
    """
    check_template(template)
    segments = name.split("/")
    if len(segments) > (1 if template.lower().startswith("hf://") else _MOST_SEGMENTS):
        return None
    return template.replace(_FIELD, name) if all(_SEGMENT.fullmatch(segment) for segment in segments) else None
