"""Steps and their adapters, between a scheduler that keeps a record and workers that disagree."""

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.engine


class Scheduler:
    """Schedules what it is told to, and finishes requests."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.step: list[str] = []
        self.evicted: list[int] = []
        self.kv_cache_manager = SimpleNamespace(
            get_block_ids=lambda request_id: ([len(request_id)], [90]), evict_blocks=self._evict
        )

    def _evict(self, block_ids: set[int]) -> None:
        self.evicted += sorted(block_ids)

    def add(self, request_id: str, number: int | None, path: str = "p", in_place: bool = False) -> None:
        from vllm.lora.request import LoRARequest

        lora = None if number is None else LoRARequest(f"{path}-{number}", number, path, load_inplace=in_place)
        self.requests[request_id] = SimpleNamespace(
            request_id=request_id, lora_request=lora, client_index=3, trace_headers=None, status=None,
            is_finished=lambda: False, take_events=lambda: None, get_finished_reason=lambda: "error",
        )  # fmt: skip
        self.step.append(request_id)

    def schedule(self) -> Any:
        new = [SimpleNamespace(req_id=one) for one in self.step if self.requests[one].status is None]
        for one in self.step:
            self.requests[one].status = "running"
        return SimpleNamespace(num_scheduled_tokens=dict.fromkeys(self.step, 1), scheduled_new_reqs=new)

    def finish_requests(self, request_ids: list[str], finished_status: Any) -> None:
        for one in request_ids:
            del self.requests[one]
            self.step.remove(one)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        return {0: [one for one in scheduler_output.num_scheduled_tokens if one in self.requests]}


class Executor:
    """Workers: each with its slots, and the numbers that it fails to load."""

    def __init__(self, *fails: set[int]) -> None:
        self.fails = list(fails)
        self.slots: list[dict[int, str]] = [{} for _ in fails]
        self.calls: list[list[tuple[int, str, bool]]] = []

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        if method == "smoa_leave_out":
            for slots in self.slots:
                for number in args[0]:
                    slots.pop(number, None)
            return [{} for _ in self.slots]
        assert method == "smoa_ready"
        (requests,) = args
        self.calls.append([(one.lora_int_id, one.lora_path, one.load_inplace) for one in requests])
        answers = []
        for slots, fails in zip(self.slots, self.fails, strict=True):
            slots |= {one.lora_int_id: one.lora_path for one in requests if one.lora_int_id not in fails}
            failed = {one.lora_int_id: ["no room"] for one in requests if one.lora_int_id in fails}
            answers.append({"failed": failed, "active": dict(slots)})
        return answers


def admission_of(scheduler: Scheduler, executor: Executor) -> Any:
    from smoa_serve.engine import admission

    core: Any = SimpleNamespace(
        scheduler=scheduler, model_executor=executor, vllm_config=SimpleNamespace(lora_config=True)
    )
    admission.step(lambda: None, core, (), {})
    core.pin_lora = lambda number: admission.moves(lambda: None, core, (), {})
    return core


def step(core: Any) -> tuple[list[str], dict[str, str]]:
    """(requests that were answered, request that failed -> reason)."""
    outputs = core.scheduler.update_from_output(core.scheduler.schedule(), None)
    failed = {
        one.request_id: one.stop_reason for client, sent in outputs.items() if client == 3 for one in sent.outputs
    }
    return outputs[0], failed


def test_workers_are_asked_when_a_step_needs_what_they_do_not_all_have() -> None:
    scheduler, executor = Scheduler(), Executor(set(), set())
    core = admission_of(scheduler, executor)
    scheduler.add("base", None)
    assert step(core) == (["base"], {})
    assert executor.calls == []
    scheduler.add("one", 1)
    for _ in range(3):
        assert step(core) == (["base", "one"], {})
    assert executor.calls == [[(1, "p", False)]]
    core.pin_lora(3)  # which may take a slot
    step(core)
    assert len(executor.calls) == 2
    executor.slots[1] = {2: "p"}  # one of the workers has evicted it meanwhile
    scheduler.add("two", 2)
    step(core)
    step(core)
    assert len(executor.calls) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_on_one_worker_fails_its_own_requests_on_all(rank: int) -> None:
    scheduler, executor = Scheduler(), Executor(set(), set())
    executor.fails[rank] = {2}
    core = admission_of(scheduler, executor)
    for name, number in (("base", None), ("good", 1), ("bad", 2), ("worse!", 2)):
        scheduler.add(name, number)
    answered, failed = step(core)
    assert answered == ["base", "good"]
    assert failed == dict.fromkeys(("bad", "worse!"), "smoa-serve: no room")
    assert scheduler.evicted == [3, 90, 6, 90] * 2, "what the step left in their blocks is found by nobody"
    executor.fails[rank] = set()
    scheduler.add("again", 2)
    assert step(core) == (["base", "good", "again"], {})
    assert executor.calls[-1] == [(1, "p", False), (2, "p", False)], "a failure is for one step: all are asked again"


def test_a_number_means_one_path_at_a_time() -> None:
    scheduler, executor = Scheduler(), Executor(set())
    core = admission_of(scheduler, executor)
    scheduler.add("running", 7, "old")
    step(core)
    scheduler.add("new", 7, "new")
    answered, failed = step(core)
    assert answered == ["running"]
    assert "its number 7 is in use by 'old-7'" in failed["new"]
    scheduler.finish_requests(["running"], None)
    scheduler.add("alone", 7, "new")
    assert step(core) == (["alone"], {})
    assert executor.calls == [[(7, "old", False)], [(7, "new", False)]]


def test_loading_in_place_is_done_once_for_each_request() -> None:
    scheduler, executor = Scheduler(), Executor(set())
    core = admission_of(scheduler, executor)
    scheduler.add("first", 7, in_place=True)
    step(core)
    step(core)
    scheduler.finish_requests(["first"], None)
    scheduler.add("second", 7, in_place=True)
    step(core)
    assert executor.calls == [[(7, "p", True)]] * 2


def test_a_request_that_ends_by_itself_is_not_told_of_its_failure() -> None:
    scheduler, executor = Scheduler(), Executor({2})
    core = admission_of(scheduler, executor)
    scheduler.add("gone", 2)
    output = core.scheduler.schedule()
    scheduler.finish_requests(["gone"], None)
    assert core.scheduler.update_from_output(output, None) == {0: []}


def test_the_calls_that_are_watched_keep_their_signatures() -> None:
    """vLLM converts what comes over the wire by the annotations of the method."""
    import inspect

    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.core import EngineCore

    core: Any = object.__new__(EngineCore)
    core.scheduler, core.model_executor = Scheduler(), Executor(set())
    from smoa_serve.engine.admission import AdapterAdmission

    AdapterAdmission(core)
    assert inspect.signature(core.add_lora).parameters["lora_request"].annotation is LoRARequest
