"""Routes of this project in vLLM's API server; they stand under /v1 and so behind the same `--api-key`."""

from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, Field

from smoa_serve.http.counting import served

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
    residence: str = Field(description="slot, host or stored; the lowest of all workers")
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
                residence=_residence(statuses, revision.lora_int_id),
                order=staged.order.value if staged.order is not None else None,
                order_error=staged.order_error,
                requests=counts[revision.engine_name],
                path=revision.requested_path,
            )
        )
    return AdapterList(data=data)


def _residence(statuses: list[dict[str, Any]], lora_int_id: int) -> str:
    ladder = ("stored", "host", "slot")
    found: list[str] = [status.get("residence", {}).get(str(lora_int_id), "stored") for status in statuses]
    return min(found, key=ladder.index)


class EndpointPlugin:
    """The `vllm.endpoint_plugins` entry point. vLLM loads it when `VLLM_PLUGINS` names smoa_serve."""

    name = "smoa_serve"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Nothing to keep: the routes read vLLM's own state."""
