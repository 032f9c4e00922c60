"""Routes of this project in vLLM's API server; they stand under /v1 and so behind the same `--api-key`."""

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, Field

from smoa_serve.http import moves
from smoa_serve.http.counting import served
from smoa_serve.http.ladder import Ladder, step_of

router = APIRouter(prefix="/v1/smoa")


class AdapterInfo(BaseModel):
    """One adapter as it is served now."""

    name: str
    kind: str = Field(description="smoa, hira or lora")
    digest: str = Field(description="sha256 of everything that changes the maths")
    rank: int = Field(description="total rank r")
    max_rank: int = Field(description="widest branch: what a slot must hold")
    num_blocks: int = Field(description="K")
    parameters: int
    bytes: int = Field(description="factors and block ids in host memory")
    residence: str = Field(description="merged, resident, slot, host or stored; the lowest of all workers")
    resident_bytes: int = Field(description="held for it while resident or merged, all workers")
    pinned: bool = Field(description="the automatic policy leaves it where it is")
    order: str | None = Field(description="recorded, recomputed or not-needed; none for LoRA")
    order_error: float = Field(description="worst expected relative error of a layer's update from the order")
    requests: int = Field(description="requests this content got under this name since the server started")
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
    statuses = await engine.collective_rpc("smoa_status")
    counts = served(engine)
    data = []
    for name, revision in sorted(models.revisions.items()):
        staged = revision.staged
        data.append(
            AdapterInfo(
                name=name,
                kind=staged.kind.value,
                digest=staged.digest,
                rank=staged.rank,
                max_rank=staged.max_rank,
                num_blocks=staged.num_blocks,
                parameters=staged.parameters,
                bytes=staged.nbytes,
                residence=step_of(statuses, revision.lora_int_id),
                resident_bytes=sum(
                    status.get("resident_bytes", {}).get(str(revision.lora_int_id), 0) for status in statuses
                ),
                pinned=name in state.smoa_ladder.pinned,
                order=staged.order.value if staged.order is not None else None,
                order_error=staged.order_error,
                requests=counts[revision.engine_name],
                path=revision.requested_path,
            )
        )
    return AdapterList(data=data)


class EndpointPlugin:
    """The `vllm.endpoint_plugins` entry point. vLLM loads it when `VLLM_PLUGINS` names smoa_serve."""

    name = "smoa_serve"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)
        app.include_router(moves.router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """The ladder of this server; all else is vLLM's own state."""
        state.smoa_ladder = Ladder(engine_client)
