"""An adapter on disk before its format is known: its folder, its configuration and its weight file."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import AdapterError, AdapterNotFoundError
from ..files.json_file import JsonError, read_json
from ..files.tensors import all_tensors
from .options import LoadOptions

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER_FILES = (WEIGHTS_NAME, "adapter_model.bin")
# What a Trainer leaves: the whole model, adapter tensors among the base's.
FULL_STATE_FILES = ("model.safetensors", "pytorch_model.bin")
NAME_LIMIT = 1024  # characters of a tensor's name


@dataclass(frozen=True)
class Source:
    """Where one adapter is read from.

    Attributes:
        name: the path as the user gave it, for messages.
        folder: where the weight file lies.
        config: parsed adapter_config.json.
        weights: the weight file.
    """

    name: str
    folder: Path
    config: dict[str, object]
    weights: Path

    @property
    def is_full_state(self) -> bool:
        """True for a Trainer checkpoint: base weights stand beside the adapter's tensors."""
        return self.weights.name in FULL_STATE_FILES

    def read(self, options: LoadOptions) -> dict[str, Tensor]:
        """Every tensor of the weight file, on the CPU.

        Raises:
            AdapterError: a pickle that was not allowed, or a file that cannot be read.
        """
        return read_tensors(self.name, self.weights, allow_pickle=options.allow_pickle)


def open_source(path: str | Path, options: LoadOptions) -> Source:
    """Find configuration and weights of an adapter.

    Args:
        path: adapter folder, Trainer checkpoint folder, or the weight file itself.
        options: `adapter_name` picks a subfolder of that name where there is one.

    Raises:
        AdapterNotFoundError: nothing is there.
        AdapterError: configuration or weights are missing or unreadable.
    """
    with _readable(path):
        given = Path(path).expanduser()
        if not given.exists():
            raise AdapterNotFoundError(path, "there is no such file or folder")
        if not (given.is_dir() or given.is_file()):
            raise AdapterError(path, "it is neither a file nor a folder")
        folder = given if given.is_dir() else given.parent
        if options.adapter_name and given.is_dir():
            folder = _named_folder(path, given, options.adapter_name)
        config_file = options.config_path or folder / CONFIG_NAME
        config = read_config(path, config_file)
        weights = given if given.is_file() else _find_weights(path, folder)
        return Source(str(path), folder, config, weights)


@contextmanager
def _readable(source: object) -> Iterator[None]:
    """Turn what the operating system refuses into an error of the adapter."""
    try:
        yield
    except PermissionError as error:
        name = Path(str(error.filename)).name
        raise AdapterError(
            source, f"{name} cannot be read: permission denied; let the server's user read it"
        ) from error
    except JsonError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # a home that is not known, a null byte
        raise AdapterError(source, f"it cannot be read: {error}") from error


def read_config(source: object, file: Path) -> dict[str, object]:
    """The JSON object in a configuration file."""
    if not file.is_file():
        raise AdapterError(
            source, f"there is no {file.name} beside it; a Trainer checkpoint has none: give one with --config FILE"
        )
    try:
        with _readable(source):
            return read_json(file)
    except JsonError as error:
        raise AdapterError(source, f"{file.name} cannot be read: {error}") from error


def read_tensors(source: object, file: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """All tensors of a .safetensors or (if allowed) .bin file."""
    with _readable(source):
        safe = file.suffix == ".safetensors"
        tensors = _read_safetensors(source, file) if safe else _read_pickle(source, file, allow_pickle)
    reasons = _name_reasons(tensors)
    if reasons:
        raise AdapterError(source, reasons)
    return tensors


def _read_safetensors(source: object, file: Path) -> dict[str, Tensor]:
    try:
        return all_tensors(file)
    # The others for what a header may say and torch cannot make: dtypes that it lacks, sizes beyond any memory.
    except (SafetensorError, KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise AdapterError(source, f"{file.name} cannot be read: {error}") from error


def _read_pickle(source: object, file: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if not allow_pickle:
        raise AdapterError(
            source, f"{file.name} is a pickle; allow reading it with --allow-pickle, or convert it to safetensors"
        )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a pickle that was tampered with may raise anything
        raise AdapterError(source, f"{file.name} cannot be read as a dictionary of tensors: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise AdapterError(source, f"{file.name} holds something else than a dictionary of tensors")
    odd = [name for name, tensor in state.items() if not _is_plain(tensor)]
    if odd:
        raise AdapterError(source, [f"{name!r} is no dense tensor in memory" for name in odd])
    return dict(state)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's numbers are all there: none that is sparse, quantized or one number seen many times."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _name_reasons(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names that no module has, and that no message or file could hold."""
    odd = (name for name in tensors if len(name) > NAME_LIMIT or not name.isprintable())
    return [f"the tensor name {name[:100]!r} is no module's: too long, or not to be printed" for name in odd]


def _named_folder(source: object, folder: Path, name: str) -> Path:
    if Path(name).name != name or name == "..":
        raise AdapterError(source, f"the adapter name {name!r} is no plain name")
    return folder / name if (folder / name / CONFIG_NAME).is_file() else folder


def _find_weights(source: object, folder: Path) -> Path:
    names = ADAPTER_FILES + FULL_STATE_FILES
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise AdapterError(source, f"there is no weight file in it; looked for {', '.join(names)}")
