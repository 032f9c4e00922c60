"""How vLLM's processes wait for each other on a CPU: asleep, after a few milliseconds.

vLLM's workers and its engine core poll for a second before they sleep, which costs nothing where a GPU does the work.
On a CPU each of them keeps a core busy that the other one's model, the API server or a second server needs: where cores
are few an answer may wait for seconds.
"""

import sys
from typing import Any

POLL_S = 0.003
# ZeroMQ loses a wake-up now and then (a conflated pipe is written while its reader goes to sleep). vLLM looks by itself
# every five seconds, which was enough for readers that hardly ever slept while there was work.
RECHECK_MS = 20
_RECHECK = "SHM_READER_RECHECK_INTERVAL_MS"


def sleep_sooner(wrapped: Any, condition: Any, args: Any, kwargs: Any) -> None:
    """A wrapper of `SpinCondition.__init__`: what reads polls for 3 ms on a CPU, and then looks every 20 ms or when the
    writer wakes it. Does nothing with a vLLM that would sleep through a lost wake-up."""
    from vllm.platforms import current_platform

    wrapped(*args, **kwargs)
    queues = sys.modules[type(condition).__module__]
    if condition.is_reader and current_platform.is_cpu() and hasattr(queues, _RECHECK):
        setattr(queues, _RECHECK, RECHECK_MS)
        condition.busy_loop_s = POLL_S
