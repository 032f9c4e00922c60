"""Sends this project's log lines where vLLM's go."""

import logging


def share_logging() -> None:
    """Take over vLLM's handlers and level, once vLLM has set itself up; nothing before, and nothing twice."""
    ours, theirs = logging.getLogger("smoa_serve"), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers, ours.level, ours.propagate = list(theirs.handlers), theirs.level, theirs.propagate
