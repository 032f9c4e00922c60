"""Routes of this project in vLLM's API server; they stand under /v1 and so behind the same `--api-key`."""

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, Field

from smoa_serve.adapters import AdapterSummary
from smoa_serve.engine.messages import Residence, on_all_workers
from smoa_serve.residence.engine_client import served, several_processes
from smoa_serve.residence.loop import LadderLoop
from smoa_serve.server.errors import register, without_private_paths
from smoa_serve.server.routes import residence as moves
from smoa_serve.settings import process_settings

router = APIRouter(prefix="/v1/smoa")


class AdapterInfo(AdapterSummary):
    """One adapter as it is served now."""

    name: str
    residence: Residence = Field(description="merged, resident, slot, host or stored; the lowest of all workers")
    resident_bytes: int = Field(description="held for it while resident or merged, all workers")
    pinned: bool = Field(description="the automatic policy leaves it where it is")
    requests: int = Field(description="requests this content got under this name since it came")
    path: str = Field(description="as it was given")


class AdapterList(BaseModel):
    """All adapters."""

    object: str = "list"
    data: list[AdapterInfo]


@router.get("/adapters")
async def list_adapters(raw_request: Request) -> AdapterList:
    """Every adapter that can be asked for, and where it resides."""
    state = raw_request.app.state
    engine = state.engine_client
    models = state.openai_serving_models
    statuses = await state.smoa_ladder.statuses()
    counts = served(engine)
    data = []
    for name, revision in sorted(models.revisions.items()):
        here = on_all_workers(statuses, revision.lora_int_id)
        data.append(
            AdapterInfo(
                **revision.staged.model_dump(include=set(AdapterSummary.model_fields)),
                name=name,
                residence=here.residence,
                resident_bytes=here.resident_bytes,
                pinned=name in state.smoa_ladder.pinned,
                requests=counts[revision.engine_name],
                path=revision.requested_path,
            )
        )
    return AdapterList(data=data)


class PolicyInfo(BaseModel):
    """What the automatic policy may do, what it sees, and what it did last."""

    merge: bool
    resident: bool
    budget_bytes: int
    tokens_per_step: float = Field(description="base and adapters, weighted towards the last intervals")
    adapters: dict[str, float] = Field(description="tokens per step of each adapter that had any")
    pinned: list[str]
    moving: str | None = Field(description="the move that is under way, by hand or not")
    decisions: list[dict[str, str]] = Field(description="newest first: time, name, action, reason, result")


@router.get("/policy")
async def show_policy(raw_request: Request) -> PolicyInfo:
    """Why adapters reside where they do."""
    state = raw_request.app.state
    loop: LadderLoop = state.smoa_policy
    allowed, rates, store = loop.allowed, loop.rates, state.openai_serving_models.store.root
    names = {revision.lora_int_id: name for name, revision in state.openai_serving_models.revisions.items()}
    return PolicyInfo(
        merge=allowed.merge,
        resident=allowed.resident,
        budget_bytes=allowed.budget_bytes,
        tokens_per_step=rates.all,
        adapters={names[number]: rate for number, rate in sorted(rates.tokens.items()) if number in names and rate},
        pinned=sorted(state.smoa_ladder.pinned),
        moving=state.smoa_ladder.moving,
        decisions=[{key: without_private_paths(text, store) for key, text in one.items()} for one in loop.decisions],
    )


class EndpointPlugin:
    """The `vllm.endpoint_plugins` entry point. vLLM loads it when `VLLM_PLUGINS` names smoa_serve."""

    name = "smoa_serve"
    # All but the render server's, which has no engine.
    required_tasks = ("generate", "transcription", "embed", "classify", "token_embed", "token_classify")

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        from smoa_serve.server.routes import adapters as lora_routes  # vLLM's own modules, which are there by now

        app.include_router(router)
        app.include_router(moves.router)
        app.include_router(lora_routes.router)
        register(app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """The policy of this server; all else stands in vLLM's own state."""
        settings = process_settings()
        models = state.openai_serving_models
        state.smoa_ladder = models.ladder
        state.smoa_policy = LadderLoop(engine_client, models.ladder, settings)
        if engine_client.vllm_config.lora_config is not None and not several_processes(engine_client):
            # Kept in the state: a task that nothing refers to may be collected.
            state.smoa_policy_task = asyncio.create_task(state.smoa_policy.run(state))
