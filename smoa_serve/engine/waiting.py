"""How vLLM's processes wait for each other on a CPU: asleep, after a few milliseconds.

vLLM's workers and its engine core poll for a second before they sleep, which costs nothing where a GPU does the work.
On a CPU each of them keeps a core busy that the other one's model, the API server or a second server needs: where cores
are few an answer may wait for seconds.
"""

from typing import Any

# Longer than the millisecond for which ZeroMQ may take a notification for unread, and drop the next one.
POLL_S = 0.003


def sleep_sooner(wrapped: Any, condition: Any, args: Any, kwargs: Any) -> None:
    """A wrapper of `SpinCondition.__init__`: what reads polls for 3 ms on a CPU. The writer wakes it."""
    from vllm.platforms import current_platform

    wrapped(*args, **kwargs)
    if condition.is_reader and current_platform.is_cpu():
        condition.busy_loop_s = POLL_S
