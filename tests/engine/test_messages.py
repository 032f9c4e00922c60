"""What workers answer survives the way to the API server, and passes vLLM's serializers."""

import json
from dataclasses import fields
from typing import Any

import pytest
from smoa_kernels import CostModel

from smoa_serve.engine import messages
from smoa_serve.engine.messages import (
    AdapterStatus,
    Answer,
    Committed,
    LeftOut,
    Merged,
    ReadyReport,
    Removed,
    Residence,
    StageReport,
    Undone,
    WorkerStatus,
    on_all_workers,
)
from smoa_serve.errors import AdapterError, WorkerError

STATUS = WorkerStatus(
    "1.0",
    lora=True,
    refusal="why",
    switches_freely=True,
    cost=CostModel(5.0, 1.0, 4.0),
    steps=7,
    layers=2,
    weight_bytes=64,
    contents=[3, None],
    partitions=4,
    partition_bytes=32,
    adapters={
        0: AdapterStatus(tokens=9),
        3: AdapterStatus(Residence.MERGED, 5, 6, 7, tokens=8, alone=2, alone_steps=1),
        4: AdapterStatus(Residence.HOST),
    },
)
ANSWERS = [
    STATUS,
    WorkerStatus("1.0", lora=False),
    ReadyReport({1: ["no room"]}, {2: "path"}),
    Removed(True),
    LeftOut(),
    Merged(None),
    StageReport(["why"], True, "boom", True, 2, 3, {"layer": 0.5}),
    Committed(8),
    Undone(),
]


def test_every_answer_is_tried_and_names_a_method_of_the_workers() -> None:
    from smoa_serve.engine import rpc

    assert {type(one) for one in ANSWERS} == set(Answer.__subclasses__())
    assert {one.method for one in ANSWERS} == {method.__name__ for method in rpc.METHODS}


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: type(answer).__name__)
def test_an_answer_comes_back_from_the_wire_as_it_was(answer: Answer) -> None:
    assert type(answer).of_workers([answer.to_wire()]) == [answer]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: type(answer).__name__)
def test_the_wire_has_basic_types_only(answer: Answer) -> None:
    def check(value: Any) -> None:
        assert type(value) in (dict, list, str, int, float, bool, type(None)), value
        for part in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(part)

    check(answer.to_wire())
    json.dumps(answer.to_wire())


def test_what_a_worker_raised_is_raised_for_all() -> None:
    refused = messages.raised(AdapterError("legal", "no room"))
    with pytest.raises(WorkerError, match=r"(?s)smoa_merged failed on a worker: OSError: full; .*no room$"):
        Merged.of_workers([refused, {"merged": 1}, messages.raised(OSError("full")), refused])


def test_an_adapter_on_all_workers_is_as_low_as_on_the_lowest() -> None:
    low = WorkerStatus("1.0", lora=True, adapters={3: AdapterStatus(Residence.SLOT, 1, 1, 1, tokens=8)})
    assert on_all_workers([STATUS, low], 3) == AdapterStatus(Residence.SLOT, 6, 7, 8, 8, 2, 1)
    assert on_all_workers([STATUS, low], 4).residence is Residence.STORED
    assert [one.name for one in fields(AdapterStatus)] == list(vars(on_all_workers([low], 3)))
