"""vLLM's message queue between processes, as this project leaves it on a CPU."""

import threading
import time
from typing import Any

import pytest

# On a GPU vLLM's way to wait is left alone.
pytestmark = [pytest.mark.engine, pytest.mark.matrix, pytest.mark.cpu]


@pytest.fixture(scope="module")
def queues() -> tuple[Any, Any]:
    """A writer and its reader, made by vLLM in a process that has the plugin."""
    from smoa_serve.plugin import register

    register()
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    writer = MessageQueue(1, 1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    ready = threading.Thread(target=reader.wait_until_ready)
    ready.start()
    writer.wait_until_ready()
    ready.join()
    return writer, reader


def test_a_reader_takes_no_processor_time_while_it_waits(queues: tuple[Any, Any]) -> None:
    writer, reader = queues
    writer.enqueue("first")
    assert reader.dequeue(timeout=10) == "first"
    before = time.thread_time()
    with pytest.raises(TimeoutError):
        reader.dequeue(timeout=0.5)
    assert time.thread_time() - before < 0.25  # polling would take nearly all of it


def test_a_reader_that_sleeps_gets_every_message(queues: tuple[Any, Any]) -> None:
    writer, reader = queues
    pauses = [0.0, 0.0005, 0.002, 0.003, 0.004, 0.02] * 20

    def write() -> None:
        for index, pause in enumerate(pauses):
            time.sleep(pause)
            writer.enqueue(index)

    thread = threading.Thread(target=write)
    thread.start()
    found = [reader.dequeue(timeout=30) for _ in pauses]
    thread.join()
    assert found == list(range(len(pauses)))


def test_a_lost_wake_up_costs_milliseconds_instead_of_seconds(
    queues: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = queues
    monkeypatch.setattr(writer._spin_condition, "notify", lambda: None)

    def write() -> None:
        time.sleep(0.2)
        writer.enqueue("unannounced")

    threading.Thread(target=write).start()
    begin = time.monotonic()
    assert reader.dequeue(timeout=30) == "unannounced"
    assert time.monotonic() - begin < 3  # vLLM alone: more than five
