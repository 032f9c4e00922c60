"""What a backend is, and how one is found: by name, the best that can serve, also from other packages.

The rest of the core knows backends by this protocol only. README.md has a whole one as an example.
"""

import importlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from smoa_kernels.blocks.layout import BlockStore, PlainBlocks, Tensors
from smoa_kernels.errors import ImplementationError, ShapeError
from smoa_kernels.update import DTYPES

if TYPE_CHECKING:
    from smoa_kernels.bank import LayerBank
    from smoa_kernels.cost import CostModel
    from smoa_kernels.plan import StepPlan

# The modules of smoa_kernels.backends, best first; backends of other packages come before them.
BUILT_IN = ("triton", "cpp", "torch", "reference")
# Entry points of other packages: each names a `Backend` object.
GROUP = "smoa_kernels.backends"


class BankState(Protocol):
    """What a backend keeps beside one bank: made once, never moved, told of every change."""

    def write(self, bank: "LayerBank") -> None:
        """Takes what the slots hold now."""


class Backend(Protocol):
    """Computes deltas on some devices. Subclass it: `delta` has to be written, the rest is a choice.

    One object serves the process and holds nothing; state belongs to a bank or to a plan.

    Attributes:
        name: for `implementation=` and error messages.
        keeps_whole: whether `pack` takes the whole weight, which `linear` then serves from.
    """

    name: str
    keeps_whole: bool = False

    def why_not(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Why it cannot serve, in words that follow "not <name>: "; None when it can. `dtype` is one of DTYPES."""
        return None

    def why_not_blocks(self, count: int) -> str | None:
        """Why it takes no partition of so many blocks; None when it does."""
        return None

    def reads_fp8(self, device: torch.device) -> bool:
        """Whether `pack` takes float8_e4m3fn blocks with a scale per row. Others are given dequantized ones."""
        return False

    def pack(
        self, blocks: Tensors, dtype: torch.dtype, scales: Tensors = (), whole: Tensors | None = None
    ) -> BlockStore:
        """Blocks of W, or of dW, as `delta` reads them.

        Args:
            blocks: [m_k, n_k] each, of one dtype and device.
            dtype: of the model, which `BlockStore.block` returns.
            scales: [m_k] fp32 per block where the blocks are fp8, else none.
            whole: the whole weight in sorted order, in bands: the rows of each block, then those of no block, with the
                columns of every block, then those of none; None = the blocks alone.
        """
        return PlainBlocks(blocks)

    def cost(self, device: torch.device, dtype: torch.dtype) -> "CostModel":
        """The constants that choose a way of serving where none were measured."""
        from smoa_kernels.cost import DEFAULT_COST

        return DEFAULT_COST

    def attach_bank(self, bank: "LayerBank") -> BankState | None:
        """State to keep as `bank.attached`, made when the bank is."""
        return None

    def attach_plan(self, plan: "StepPlan", bank: "LayerBank", captured: bool) -> None:
        """Makes what steps of a bank will need of a plan, before memory is measured or a graph captured.

        Args:
            plan: of the steps; bank: of one of their layers.
            captured: whether CUDA graphs will be captured: then kernels are compiled and loaded now.
        """
        return

    @abstractmethod
    def delta(self, y: Tensor, x: Tensor, bank: "LayerBank", plan: "StepPlan") -> None:
        """What `smoa_delta` does; the arguments have been checked."""

    def linear_reasons(self, bank: "LayerBank", plan: "StepPlan") -> Iterable[str]:
        """Why `linear` cannot serve a step all of whose tokens share the partition of a whole weight: one sentence
        each; nothing when it can."""
        return ()

    def linear(self, x: Tensor, bank: "LayerBank", plan: "StepPlan", bias: Tensor | None) -> Tensor:
        """What `smoa_linear` does, where `keeps_whole`; the arguments have been checked."""
        raise ShapeError("the single pass", [f"{self.name} keeps no whole weight."])


@cache
def backends() -> Mapping[str, Backend]:
    """All backends by name, best first.

    Raises:
        ImplementationError: one of another package cannot be loaded, or has a name that is taken.
    """
    found: dict[str, Backend] = {}
    built_in = [importlib.import_module(f"smoa_kernels.backends.{name}").BACKEND for name in BUILT_IN]
    for backend in (*_of_other_packages(), *built_in):
        if backend.name in found:
            raise ImplementationError(f"two backends are named {backend.name!r}; uninstall the package of one.")
        found[backend.name] = backend
    return MappingProxyType(found)


def _of_other_packages() -> Iterable[Backend]:
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            yield entry.load()
        except Exception as error:
            raise ImplementationError(
                f"the backend {entry.value} cannot be loaded: {error}. Mend its package or uninstall it."
            ) from error


def available_implementations(device: torch.device | str, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the backends that can serve tensors of this device and dtype, best first."""
    device_type = torch.device(device).type
    return tuple(name for name in backends() if _why_not(name, device_type, dtype) is None)


def default_implementation(device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that serves this device and dtype when none is asked for.

    Raises:
        ImplementationError: the dtype is served by none.
    """
    return chosen(torch.device(device), dtype).name


def chosen(device: torch.device, dtype: torch.dtype, wish: str | None = None) -> Backend:
    """The backend that is wished for, else the best that can serve.

    Raises:
        ImplementationError: it does not exist or cannot serve; names what can and why the others cannot.
    """
    for name, backend in backends().items():
        if wish in (None, name) and _why_not(name, device.type, dtype) is None:
            return backend
    available = ", ".join(available_implementations(device, dtype)) or "none"
    reasons = [f"{name}: {reason}" for name in backends() if (reason := _why_not(name, device.type, dtype)) is not None]
    raise ImplementationError(
        f"{'any implementation' if wish is None else repr(wish)} cannot serve {dtype} on {device}; "
        f"available: {available}." + "".join(f"\n  - not {reason}." for reason in reasons)
    )


def _why_not(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    return backends()[name].why_not(device_type, dtype)
