"""An adapter on disk: its folder is opened once, and what every format answers comes from what was opened."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..base.checkpoint import BaseCheckpoint
from ..base.orders import Progress
from ..errors import AdapterError, AdapterNotFoundError
from ..files.json_file import JsonError, load_json
from ..files.opened import OpenedFile
from ..files.tensors import all_tensors
from .model import Adapter, AdapterKind, Delta, OrderStatus
from .summary import AdapterSummary, Fit, LayerSummary

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER_FILES = (WEIGHTS_NAME, "adapter_model.bin")
# What a Trainer leaves: the whole model, adapter tensors among the base's.
FULL_STATE_FILES = ("model.safetensors", "pytorch_model.bin")
NAME_LIMIT = 1024  # characters of a tensor's name
FACTOR = re.compile(r"[._](lora|hira|smoa)_")  # in the name of a tensor that is an adapter's


class Identified(Protocol):
    """What a file holds: an `Adapter` or a `LoraAdapter`."""

    @property
    def digest(self) -> str:
        """sha256 (hex) of everything that changes the maths."""

    @property
    def order(self) -> OrderStatus | None:
        """Where the block ids come from; None for LoRA."""


Content = TypeVar("Content", bound=Identified)


@dataclass(frozen=True)
class LoadOptions:
    """How an adapter is read.

    Attributes:
        allow_pickle: read .bin files (through `torch.load(weights_only=True)`).
        strict_order: refuse an adapter whose spectral order is not fully determined (`order_error` above 0).
        config_path: adapter_config.json to use instead of the one beside the weights.
        adapter_name: which adapter of a folder or file that holds several.
        max_rank: refuse branches of a higher rank (R, not the total rank r).
        trained_dtype: "float32", "bfloat16" or "float16": the dtype that the base was loaded in for training, where
            that is not the stored one. A published adapter's order is then derived from weights cast the same way.
        check_device: where the float64 check of an order runs.
    """

    allow_pickle: bool = False
    strict_order: bool = False
    config_path: Path | None = None
    adapter_name: str | None = None
    max_rank: int | None = None
    trained_dtype: str | None = None
    check_device: str = "cpu"

    def rank_reasons(self, rank: int) -> list[str]:
        """Why an adapter whose widest branch has this rank cannot be taken."""
        if self.max_rank is None or rank <= self.max_rank:
            return []
        return [f"its widest branch has rank {rank}, the limit is {self.max_rank} (--max-lora-rank)"]


@dataclass(frozen=True, eq=False)
class Source:
    """Where one adapter is read from.

    Attributes:
        name: the path as the user gave it, for messages.
        folder: where the weight file lies.
        config: parsed adapter_config.json.
        weights: the weight file, opened.
        options: how it is read.
        progress: called while spectral orders are computed.
    """

    name: str
    folder: Path
    config: dict[str, object]
    weights: OpenedFile
    options: LoadOptions
    progress: Progress | None = None

    @property
    def is_full_state(self) -> bool:
        """True for a Trainer checkpoint: base weights stand beside the adapter's tensors."""
        return self.weights.path.name in FULL_STATE_FILES

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the weight file, on the CPU.

        Raises:
            AdapterError: a pickle that was not allowed, or a file that cannot be read or was written meanwhile.
        """
        return read_tensors(self.name, self.weights, allow_pickle=self.options.allow_pickle)

    def sha256(self) -> str:
        """Hex digest of the weight file; raises as `tensors` does."""
        with _readable(self.name), self.weights.reading() as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()


def open_source(path: str | Path, options: LoadOptions, progress: Progress | None = None) -> Source:
    """Find configuration and weights of an adapter, and open each once.

    Args:
        path: adapter folder, Trainer checkpoint folder, or the weight file itself.
        options: `adapter_name` picks a subfolder of that name where there is one.
        progress: called while spectral orders are computed.

    Raises:
        AdapterNotFoundError: nothing is there.
        AdapterError: configuration or weights are missing or unreadable, or were replaced between the two.
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
        config_file, config = _read_config(path, options.config_path or folder / CONFIG_NAME)
        weights = OpenedFile(given if given.is_file() else _find_weights(path, folder))
        if not (config_file.is_in_place() and weights.is_in_place()):
            raise AdapterError(path, "its files were replaced while they were opened; try again")
        return Source(str(path), folder, config, weights, options, progress)


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


def _read_config(source: object, file: Path) -> tuple[OpenedFile, dict[str, object]]:
    """A configuration file, and the JSON object in it."""
    if not file.is_file():
        what = f"there is no {file.name} beside it; a Trainer checkpoint has none"
        raise AdapterError(source, f"{what}: give one with --config FILE")
    opened = OpenedFile(file)
    try:
        with opened.reading() as handle:
            return opened, load_json(handle)
    except JsonError as error:
        raise AdapterError(source, f"{file.name} cannot be read: {error}") from error


def read_tensors(source: object, file: OpenedFile, *, allow_pickle: bool) -> dict[str, Tensor]:
    """All tensors of a .safetensors or (if allowed) .bin file; raises as `Source.tensors`."""
    with _readable(source):
        safe = file.path.suffix == ".safetensors"
        tensors = _read_safetensors(source, file) if safe else _read_pickle(source, file, allow_pickle)
    reasons = _name_reasons(tensors)
    if reasons:
        raise AdapterError(source, reasons)
    return tensors


def _read_safetensors(source: object, file: OpenedFile) -> dict[str, Tensor]:
    try:
        tensors = all_tensors(file)
        if not file.is_large:
            return tensors
        # They are mapped, and what is served must not change with the file. The base's are only looked at.
        with file.reading():
            return {name: tensor.clone() if FACTOR.search(name) else tensor for name, tensor in tensors.items()}
    # The others for what a header may say and torch cannot make: dtypes that it lacks, sizes beyond any memory.
    except (SafetensorError, KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise AdapterError(source, f"{file.path.name} cannot be read: {error}") from error


def _read_pickle(source: object, file: OpenedFile, allow_pickle: bool) -> dict[str, Tensor]:
    name = file.path.name
    if not allow_pickle:
        raise AdapterError(
            source, f"{name} is a pickle; allow reading it with --allow-pickle, or convert it to safetensors"
        )
    with file.reading() as handle:
        try:
            state = torch.load(handle, map_location="cpu", weights_only=True)
        except Exception as error:  # a pickle that was tampered with may raise anything
            raise AdapterError(source, f"{name} cannot be read as a dictionary of tensors: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise AdapterError(source, f"{name} holds something else than a dictionary of tensors")
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


class AdapterFile(ABC, Generic[Content]):
    """One adapter, opened once.

    What is asked about a base is read with the first question and kept: what was verified is what is summarized,
    stored and merged, whatever becomes of the folder meanwhile. Every method but `slot_rank` raises AdapterError with
    every reason why the adapter cannot be read or does not fit the base. Without a base, what only a base tells is
    not checked.

    Args:
        source: what was opened.

    Attributes:
        kind: what computes the update.
        format: "published", "portable", "hira" or "lora".
        needs_base: its content cannot be told without the base.
        source: likewise.
    """

    kind: AdapterKind
    format: ClassVar[str]
    needs_base: ClassVar[bool] = False

    def __init__(self, source: Source) -> None:
        self.source = source
        self._known: tuple[BaseCheckpoint | None, Content] | None = None

    def read(self, base: BaseCheckpoint | None = None) -> Content:
        """The content, complete and checked; the same object until another base is asked about."""
        if self._known is None or self._known[0] is not base:
            self._known = None  # so that two contents are never held at once
            self._known = (base, self._read(base))
        return self._known[1]

    @abstractmethod
    def _read(self, base: BaseCheckpoint | None) -> Content: ...

    def _refuse(self, reasons: Sequence[str]) -> None:
        if reasons:
            raise AdapterError(self.source.name, reasons)

    @abstractmethod
    def slot_rank(self) -> int:
        """The rank a slot needs: the widest branch, for LoRA its r. Told by the configuration alone.

        Raises:
            AdapterError: the configuration is none, or leaves the rank open.
        """

    def summary(self, base: BaseCheckpoint | None = None) -> AdapterSummary:
        """What is known about it: from the factors, whatever the configuration allows."""
        content, layers = self.read(base), self.layers(base)
        ranks = [layer.branch_ranks for layer in layers]
        return AdapterSummary(
            kind=self.kind,
            digest=content.digest,
            rank=max(map(sum, ranks), default=0),
            max_rank=max(map(max, ranks), default=0),
            num_blocks=max(map(len, ranks), default=1),
            parameters=sum(layer.parameters for layer in layers),
            bytes=sum(layer.bytes for layer in layers),
            order=content.order,
            order_error=max((layer.order_error or 0.0 for layer in layers), default=0.0),
        )

    @abstractmethod
    def layers(self, base: BaseCheckpoint | None = None) -> list[LayerSummary]:
        """What is known about each layer; of a file that needs a base and has none, what its tensors tell."""

    @abstractmethod
    def check(self, base: BaseCheckpoint, dtype: str | None = None) -> Fit:
        """Bind every tensor, as a server would that serves in `dtype` ("float16"); by default in the base's own."""

    @abstractmethod
    def adapter(self, base: BaseCheckpoint | None = None) -> Adapter:
        """It in the canonical form; a LoRA adapter has none and is refused."""

    @abstractmethod
    def deltas(self, base: BaseCheckpoint) -> dict[str, Delta]:
        """Module → its dense update, as a function of the weight."""

    def base_mark(self, base: BaseCheckpoint) -> str:
        """Tells apart equal contents that were made for different bases; empty where nothing says so."""
        return ""

    @abstractmethod
    def write_private(self, folder: Path, base: BaseCheckpoint) -> None:
        """Write what was read into a folder (made if absent), to be served without a base and by any vLLM release.

        Raises:
            OSError, SafetensorError: it cannot be written.
        """
