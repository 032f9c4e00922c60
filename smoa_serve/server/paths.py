"""Adapters that are named by a repository of the hub."""

from pathlib import Path

from smoa_serve.errors import AdapterNotFoundError


def download(repository: str) -> Path:
    """A snapshot of a hub repository's adapter files, in the hub's own cache.

    Raises:
        AdapterNotFoundError: it cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=["adapter_config.json", "*.safetensors", "*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = f"it is no folder here, and the hub gave none: {str(error).splitlines()[0]}"
        raise AdapterNotFoundError(repository, reason) from None
