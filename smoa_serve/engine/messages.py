"""What workers answer, typed. As a dictionary it passes vLLM's serializers; its keys stand in this module alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, ClassVar, Literal, Self

from smoa_kernels import CostModel

from smoa_serve.errors import SmoaError, WorkerError

_RAISED = "raised"


class Residence(StrEnum):
    """Where an adapter resides, lowest rung first.

    STORED: a private copy on disk. HOST: factors in host memory. SLOT: factors on the device.
    RESIDENT: its blocks of dW beside the weights too. MERGED: in the weights.
    """

    STORED = "stored"
    HOST = "host"
    SLOT = "slot"
    RESIDENT = "resident"
    MERGED = "merged"

    @property
    def rung(self) -> int:
        """0 for the lowest."""
        return list(Residence).index(self)


@dataclass(frozen=True)
class Answer:
    """Of one worker to one method; by itself, that it was done.

    Attributes:
        method: of the worker.
    """

    method: ClassVar[str]

    def to_wire(self) -> dict[str, Any]:
        """Of basic types only."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Self:
        """What `to_wire` made."""
        return cls(**wire)

    @classmethod
    def of_workers(cls, answers: Sequence[dict[str, Any]]) -> list[Self]:
        """The answers of all workers.

        Raises:
            WorkerError: what workers raised.
        """
        found = sorted({answer[_RAISED] for answer in answers if _RAISED in answer})
        if found:
            raise WorkerError(f"{cls.method} failed on a worker: {'; '.join(found)}")
        return [cls.from_wire(answer) for answer in answers]


def raised(error: Exception) -> dict[str, Any]:
    """In place of an answer: a worker says what was raised. vLLM's executor stops reading at the first worker that
    raises; the next call would take the answers of the others for its own."""
    return {_RAISED: str(error) if isinstance(error, SmoaError) else f"{type(error).__name__}: {error}"}


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter, on one worker or on all.

    Attributes:
        residence: of all workers, the lowest.
        resident_bytes: held for it while it is resident or merged, or on the way there.
        block_bytes: of the blocks of W that it uses in a slot: what blocks of its own would take.
        host_bytes: of factors and block ids in host memory.
        tokens: that it took so far; alone: of these, those in steps that had no others; alone_steps: these steps.
    """

    residence: Residence = Residence.STORED
    resident_bytes: int = 0
    block_bytes: int = 0
    host_bytes: int = 0
    tokens: int = 0
    alone: int = 0
    alone_steps: int = 0


@dataclass(frozen=True)
class WorkerStatus(Answer):
    """What one worker knows: proof that the plugin is in this process, and where each adapter resides.

    Attributes:
        version: of smoa-serve.
        lora: whether adapters are enabled.
        refusal: why SMoA is not served, or None.
        switches_freely: steps may run on merged or original weights as suits them.
        cost: the kernels' cost model, None where no layer takes SMoA.
        steps: engine steps so far.
        layers: how many take SMoA; weight_bytes: of all their weights.
        contents: of each slot, the number of the adapter that is in it, or None.
        partitions: blocks of W held, counted by layer and slice; partition_bytes: of them and their orders.
        adapters: lora_int_id -> one adapter; 0 has the tokens of the base. On the wire, a dictionary a field.
    """

    method = "smoa_status"

    version: str
    lora: bool
    refusal: str | None = None
    switches_freely: bool = False
    cost: CostModel | None = None
    steps: int = 0
    layers: int = 0
    weight_bytes: int = 0
    contents: list[int | None] = field(default_factory=list)
    partitions: int = 0
    partition_bytes: int = 0
    adapters: dict[int, AdapterStatus] = field(default_factory=dict)

    def counts(self, of: Literal["tokens", "alone", "alone_steps"]) -> dict[int, int]:
        """lora_int_id -> a counter of its, where it is not 0."""
        return {number: getattr(one, of) for number, one in self.adapters.items() if getattr(one, of)}

    def to_wire(self) -> dict[str, Any]:
        """See the base class."""
        wire = super().to_wire() | {"cost": self.cost and asdict(self.cost)}
        adapters = wire.pop("adapters")
        for column in fields(AdapterStatus):
            found = {str(number): getattr(one, column.name) for number, one in adapters.items()}
            wire[column.name] = {number: _plain(value) for number, value in found.items() if value != column.default}
        return wire

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Self:
        """See the base class."""
        columns = {column.name: wire[column.name] for column in fields(AdapterStatus)}
        columns["residence"] = {number: Residence(where) for number, where in columns["residence"].items()}
        adapters = {
            int(number): AdapterStatus(**{name: found[number] for name, found in columns.items() if number in found})
            for number in set().union(*columns.values())
        }
        cost = wire["cost"] and CostModel(**wire["cost"])
        rest = {name: value for name, value in wire.items() if name not in columns}
        return cls(**rest | {"cost": cost, "adapters": adapters})


def _plain(value: int | Residence) -> int | str:
    """vLLM's serializers take no enum."""
    return value.value if isinstance(value, Residence) else value


def on_all_workers(statuses: Sequence[WorkerStatus], lora_int_id: int) -> AdapterStatus:
    """One adapter on the whole server: the lowest residence, the bytes of all workers, the tokens of the first one."""
    found = [status.adapters.get(lora_int_id, AdapterStatus()) for status in statuses]
    sizes = ("resident_bytes", "block_bytes", "host_bytes")
    everywhere = {size: sum(getattr(one, size) for one in found) for size in sizes}
    lowest = min((one.residence for one in found), key=lambda where: where.rung)
    return replace(found[0], residence=lowest, **everywhere)


@dataclass(frozen=True)
class ReadyReport(Answer):
    """How bringing adapters into slots went.

    Attributes:
        failed: lora_int_id -> every reason; active: lora_int_id -> requested path, of all adapters in slots.
    """

    method = "smoa_ready"

    failed: dict[int, list[str]]
    active: dict[int, str]


@dataclass(frozen=True)
class Removed(Answer):
    """Whether an adapter was here."""

    method = "smoa_remove"

    removed: bool


@dataclass(frozen=True)
class LeftOut(Answer):
    """Adapters were forgotten for the next step."""

    method = "smoa_leave_out"


@dataclass(frozen=True)
class Merged(Answer):
    """The lora_int_id of what is merged into the weights, or None."""

    method = "smoa_merged"

    merged: int | None


@dataclass(frozen=True)
class StageReport(Answer):
    """How far a move is.

    Attributes:
        refused: every reason why the adapter cannot be moved; lasting: the same adapter would be refused again.
        failed: what was raised, None when nothing was.
        ready: it can be committed; finished: layers done, of `layers`.
        lost: of a merge that is ready: layer -> share of the update that rounding removes.
    """

    method = "smoa_stage"

    refused: list[str] = field(default_factory=list)
    lasting: bool = False
    failed: str | None = None
    ready: bool = False
    finished: int = 0
    layers: int = 0
    lost: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Committed(Answer):
    """An adapter is at its new place from the next step on.

    Attributes:
        bytes: held for it on this worker.
    """

    method = "smoa_commit"

    bytes: int


@dataclass(frozen=True)
class Undone(Answer):
    """An adapter is in its slot again, if it was above it."""

    method = "smoa_undo"
