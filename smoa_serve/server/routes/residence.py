"""Routes that move adapters up and down the ladder of residence."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from smoa_serve.engine.messages import Residence
from smoa_serve.errors import AdapterNotFoundError, MoveRefusedError
from smoa_serve.registry.revisions import Revision, Target
from smoa_serve.residence import parity
from smoa_serve.residence.engine_client import check_one_process
from smoa_serve.residence.ladder import Ladder, Move
from smoa_serve.residence.policy import MAX_LOST
from smoa_serve.settings import OthersGet

router = APIRouter(prefix="/v1/smoa")


class MergeRequest(BaseModel):
    """How to merge."""

    model_config = ConfigDict(extra="forbid")

    policy: OthersGet = Field(default=OthersGet.COMPENSATE, description="what requests of others get meanwhile")
    max_lost: float = Field(
        default=MAX_LOST, gt=0, le=1, description="largest share of an update that rounding may remove"
    )
    check: bool = Field(default=False, description="ask some prompts before and after, and compare")


class MoveReport(BaseModel):
    """Where an adapter resides now, and what it took."""

    name: str
    step: Residence
    seconds: float
    longest_call_ms: float = Field(description="longest that one piece of the work kept the engine from its next step")
    bytes: int
    lost: float | None = Field(default=None, description="share of the update that rounding removed, worst layer")
    largest_logprob_difference: float | None = None
    tokens_agree: bool | None = None


@router.post("/adapters/{name:path}/{target}")
async def move(
    raw_request: Request,
    name: str,
    target: Target,
    options: MergeRequest | None = None,
) -> MoveReport:
    """Merge, un-merge, keep resident, back to the slot. What is moved by hand stays there: the automatic policy is kept
    away as by `pin`, until `unpin`."""
    state = raw_request.app.state
    ladder: Ladder = state.smoa_ladder
    check_one_process(state.engine_client, "adapters stay where they are")
    revision = _revision(state.openai_serving_models.revisions, name)
    report = await _move(state.engine_client, ladder, revision, target, options or MergeRequest())
    if target == "unpin":
        ladder.pinned.discard(name)
    elif name in state.openai_serving_models.revisions:  # pins end with the name
        ladder.pinned.add(name)
    return report


async def _move(engine: Any, ladder: Ladder, revision: Revision, target: str, options: MergeRequest) -> MoveReport:
    match target:
        case "merge":
            return await _merge(engine, ladder, revision, options)
        case "resident":
            return _report(revision.name, await ladder.make_resident(revision))
        case "unmerge" | "slot":
            return _report(revision.name, await ladder.to_slot(revision))
        case _:
            return _report(revision.name, Move(await ladder.residence(revision), 0.0, 0.0, 0))


async def _merge(engine: Any, ladder: Ladder, revision: Revision, options: MergeRequest) -> MoveReport:
    if options.check and engine.vllm_config.model_config.runner_type == "pooling":
        raise MoveRefusedError(revision.name, "check asks prompts and this base generates nothing: merge without")
    before = await parity.answers(engine, revision) if options.check else None
    report = _report(revision.name, await ladder.merge(revision, options.policy, options.max_lost))
    if before is not None:
        found = parity.compare(before, await parity.answers(engine, revision))
        report.largest_logprob_difference = found.largest_logprob_difference
        report.tokens_agree = found.tokens_agree
    return report


def _revision(revisions: dict[str, Revision], name: str) -> Revision:
    if name not in revisions:
        served = ", ".join(sorted(revisions)) or "none"
        raise AdapterNotFoundError(name, f"no adapter of this name is served; served are: {served}")
    return revisions[name]


def _report(name: str, done: Move) -> MoveReport:
    facts = dict(vars(done))
    return MoveReport(name=name, step=facts.pop("residence"), **facts)
