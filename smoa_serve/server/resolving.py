"""vLLM's LoRA resolvers: when they are asked, and where what they find may lie."""

import logging
import os
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from smoa_serve.errors import SHOWN_CHARACTERS, AdapterError, AdapterNotFoundError, PathNotAllowedError
from smoa_serve.sources.local import confine

logger = logging.getLogger(__name__)


async def find(resolver: Any, base_model: str, name: str, roots: Sequence[Path]) -> Path | None:
    """The folder that a resolver has for a name; None when it has none.

    Args:
        resolver: vLLM's or a user's.
        base_model: as it was given to vLLM.
        name: checked already: a resolver may join it to a path.
        roots: folders that adapters may be loaded from over HTTP.

    Raises:
        AdapterError: it failed, or what it found lies outside its folder.
    """
    kind = type(resolver).__name__
    try:
        found = await resolver.resolve_lora(base_model, name)
    except Exception as error:
        logger.exception("%s failed on the adapter name %s", kind, name)
        what = error.strerror if isinstance(error, OSError) else str(error)[:SHOWN_CHARACTERS]
        reason = f"{kind} could not use what it found under this name ({type(error).__name__}: {what})"
        raise AdapterError(name, f"{reason}; is its adapter_config.json complete?") from error
    if found is None:
        return None
    path = Path(os.path.abspath(found.lora_path))
    try:
        return confine(str(path), _folders(resolver, path, roots))
    except (AdapterNotFoundError, PathNotAllowedError) as error:
        logger.warning("%s found the adapter %s at %s: %s", kind, name, path, error)
        reason = f"what {kind} found lies outside its folder or is a link out of it; put a copy into the folder"
        raise AdapterError(name, reason) from None


def _folders(resolver: Any, found: Path, roots: Sequence[Path]) -> list[Path]:
    """Where it may lie: in the resolver's own folder if it names one, as vLLM's filesystem resolver does, else below a
    root or in the hub's cache. Without roots the folder found is trusted as the resolver is, but not its links."""
    own = getattr(resolver, "lora_cache_dir", None)
    if own:
        return [Path(own)]
    return [*(roots or [found]), Path(HF_HUB_CACHE)]


async def resolve_unknown(wrapped: Callable[..., Any], serving: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """A wrapper of `BaseServing._check_model`: resolvers are asked without VLLM_ALLOW_RUNTIME_LORA_UPDATING too."""
    refused = await wrapped(*args, **kwargs)
    if refused is None or not _asks(serving.models):
        return refused
    answer = await serving.models.resolve_lora(_model(args, kwargs))
    error = getattr(answer, "error", None)
    if error is None:
        return None
    return refused if error.code == HTTPStatus.NOT_FOUND else answer


async def resolve_unknown_pooling(wrapped: Callable[..., Any], serving: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """The same of `PoolingBaseServing._check_model`, which leaves unknown names to those who come later."""
    result = await wrapped(*args, **kwargs)
    name = _model(args, kwargs)
    if not _asks(serving.models) or serving._is_model_supported(name) or name in serving.models.lora_requests:
        return result
    answer = await serving.models.resolve_lora(name)
    error = getattr(answer, "error", None)
    if error is not None and error.code != HTTPStatus.NOT_FOUND:
        raise ValueError(error.message)  # which vLLM answers with 400
    return result


def _asks(models: Any) -> bool:
    """Whether we have to ask, since vLLM does not."""
    from vllm import envs

    return bool(getattr(models, "lora_resolvers", ())) and not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING


def _model(args: tuple[Any, ...], kwargs: Any) -> Any:
    return (args[0] if args else kwargs["request"]).model
