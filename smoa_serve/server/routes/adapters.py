"""vLLM's routes that load and unload adapters, mounted by us: its own come with a variable that opens other doors."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from smoa_serve.server.errors import json_response
from smoa_serve.server.models import SmoaServingModels

router = APIRouter(prefix="/v1", dependencies=[Depends(validate_json_request)])


def _models(raw_request: Request) -> SmoaServingModels:
    models: SmoaServingModels = raw_request.app.state.openai_serving_models
    return models


Models = Annotated[SmoaServingModels, Depends(_models)]


@router.post("/load_lora_adapter")
async def load_lora_adapter(request: LoadLoRAAdapterRequest, models: Models) -> Response:
    """Serve an adapter of any kind under a name. Bodies and answers are vLLM's."""
    return _response(await models.load_lora_adapter(request))


@router.post("/unload_lora_adapter")
async def unload_lora_adapter(request: UnloadLoRAAdapterRequest, models: Models) -> Response:
    """Serve a name no longer; what runs ends on it."""
    return _response(await models.unload_lora_adapter(request))


def _response(answer: Any) -> Response:
    return Response(answer) if isinstance(answer, str) else json_response(answer)
