"""Adapter files: one description of each, whatever its format, and what writes them."""

from .file import load_adapter, open_adapter
from .hira import write_hira
from .model import Adapter, AdapterKind, ModuleUpdate, OrderStatus
from .portable import write_portable
from .source import AdapterFile, LoadOptions
from .summary import AdapterSummary, Fit, LayerSummary

__all__ = [
    "Adapter",
    "AdapterFile",
    "AdapterKind",
    "AdapterSummary",
    "Fit",
    "LayerSummary",
    "LoadOptions",
    "ModuleUpdate",
    "OrderStatus",
    "load_adapter",
    "open_adapter",
    "write_hira",
    "write_portable",
]
