"""Adapter files: readers and writers, and the one function that chooses among them."""

from .file import detect_kind, load_adapter
from .hira import write_hira
from .options import LoadOptions
from .portable import write_portable

__all__ = ["LoadOptions", "detect_kind", "load_adapter", "write_hira", "write_portable"]
