"""Which implementations exist and which of them can serve a device and dtype here."""

import importlib.util
import os

import torch

from smoa_kernels.backends.cpp import build as cpp_build
from smoa_kernels.errors import ImplementationError

# In order of preference.
NAMES = ("triton", "cpp", "torch", "reference")


def available_implementations(device: torch.device | str, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the implementations that can serve tensors of this device and dtype, best first."""
    return tuple(name for name in NAMES if unavailable_reason(name, torch.device(device).type, dtype) is None)


def default_implementation(device: torch.device | str, dtype: torch.dtype) -> str:
    """The implementation that serves this device and dtype when none is asked for.

    Raises:
        ImplementationError: the dtype is served by none.
    """
    names = available_implementations(device, dtype)
    if not names:
        raise ImplementationError(_refusal("any implementation", torch.device(device), dtype))
    return names[0]


def require_implementation(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses an implementation that does not exist or cannot run.

    Raises:
        ImplementationError: names what is available and why the others are not.
    """
    if name not in NAMES or unavailable_reason(name, device.type, dtype) is not None:
        raise ImplementationError(_refusal(repr(name), device, dtype))


def unavailable_reason(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot serve, None when it can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if name == "triton":
        return _triton_reason(device_type, dtype)
    return cpp_build.unavailable_reason(device_type, dtype) if name == "cpp" else None


def native_fp8(device: torch.device) -> bool:
    """Whether the Triton kernels can read fp8 (e4m3) weights there: from compute capability 8.9 on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _triton_reason(device_type: str, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device_type == "cuda":
        return None
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        # For tests: slow, and tl.dot is wrong for bfloat16 there.
        return "its interpreter takes float32 and float16 only" if dtype is torch.bfloat16 else None
    return f"it serves CUDA devices, not {device_type}"


def _refusal(wish: str, device: torch.device, dtype: torch.dtype) -> str:
    available = ", ".join(available_implementations(device, dtype)) or "none"
    reasons = [
        f"{name}: {reason}" for name in NAMES if (reason := unavailable_reason(name, device.type, dtype)) is not None
    ]
    return f"{wish} cannot serve {dtype} on {device}; available: {available}." + "".join(
        f"\n  - not {reason}." for reason in reasons
    )
