"""Raises at the n-th place of what a worker does for an adapter: before and after every call of the functions below.

These functions are sent to the workers by value, so this module imports nothing that only the tests can.
"""

import errno
from collections.abc import Callable
from typing import Any

# Nothing can raise after the last line of these, which counts or takes what is returned.
BEFORE_ONLY = ("acquire",)
# module, class or None, functions
POINTS: tuple[tuple[str, str | None, tuple[str, ...]], ...] = (
    ("smoa_serve.store", "AdapterStore", ("entry",)),
    ("smoa_serve.engine.worker", None, ("load_adapter",)),
    ("smoa_serve.engine.manager", None, ("bind_modules",)),
    ("smoa_serve.engine.manager", "SmoaModelManager", ("check_lora", "_add_adapter", "remove_adapter")),
    ("smoa_serve.engine.linear", "SmoaLinearMixin", ("set_lora", "reset_lora")),
    ("smoa_serve.engine.weights", "ServedWeight", ("block", "whole")),
    ("smoa_kernels.blocks.source", "PartitionSource", ("acquire", "keep")),
    (
        "smoa_kernels.bank",
        "LayerBank",
        ("_write", "_wipe", "_changed", "make_resident", "drop_resident", "hold_merged", "drop_merged"),
    ),
    ("smoa_kernels.residents", None, ("delta_block",)),
    ("smoa_serve.engine.merging", None, ("exchange_of",)),
    ("smoa_serve.engine.mover", "Mover", ("commit",)),
    ("smoa_serve.engine.exchange", "HandlerExchange", ("_open", "_put", "_pack", "switch", "undo", "checksum")),
    ("smoa_serve.engine.exchange", "PlainExchange", ("_open", "_put", "_pack", "_write", "undo", "checksum")),
)
KINDS = ("RuntimeError", "OutOfMemoryError", "ENOSPC")


def arm(worker: Any, rank: int, place: int | None, kind: str) -> None:
    """Count the places that `rank` passes from now on, and raise at one of them.

    Args:
        worker: vLLM's.
        rank: which worker.
        place: 0 for the first; None only counts.
        kind: of KINDS.
    """
    import functools
    import importlib
    import itertools

    if worker.rank != rank:
        return
    counter, passed, patched = itertools.count(), [], []

    def reach(label: str) -> None:
        passed.append(label)
        if next(counter) == place:
            raise _error(kind, label)

    def watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            reach(f"before {name}")
            result = function(*args, **kwargs)
            if name.rpartition(".")[2] not in BEFORE_ONLY:
                reach(f"after {name}")
            return result

        return call

    def _error(kind: str, label: str) -> Exception:
        import torch

        if kind == "OutOfMemoryError":
            return torch.OutOfMemoryError(f"injected {label}")
        if kind == "ENOSPC":
            return OSError(errno.ENOSPC, f"No space left on device: injected {label}")
        return RuntimeError(f"injected {label}")

    for module, cls, names in POINTS:
        owner = importlib.import_module(module)
        if cls is not None:
            owner = getattr(owner, cls)
        for name in names:
            original = owner.__dict__[name] if name in vars(owner) else getattr(owner, name)
            inherited = name not in vars(owner)
            setattr(owner, name, watched(original, f"{cls or module.rpartition('.')[2]}.{name}"))
            patched.append((owner, name, original, inherited))
    worker.smoa_faults = (passed, patched)


def disarm(worker: Any) -> list[str]:
    """The places that were passed since `arm`; everything is as it was."""
    passed, patched = getattr(worker, "smoa_faults", ([], []))
    for owner, name, original, inherited in patched:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
    worker.smoa_faults = ([], [])
    return list(passed)


def forget_partitions(worker: Any) -> None:
    """Drop every block of W that no slot uses."""
    manager = worker.model_runner.lora_manager._adapter_manager
    for layer in manager.mover.layers.values():
        for cache in layer.smoa_bank._source._caches:
            for digest in [digest for digest, held in cache._held.items() if held.users == 0]:
                del cache._held[digest]


def held(worker: Any) -> dict[str, Any]:
    """What this worker holds: which adapters, where, and every byte that a slot, a move or a block of W takes.

    Factors in slots of no adapter have to be zero.
    """
    manager = worker.model_runner.lora_manager._adapter_manager
    free = [slot for slot, lora_id in enumerate(manager.lora_index_to_id) if lora_id is None]
    left = []
    for name, layer in manager.mover.layers.items():
        bank = layer.smoa_bank
        for slot in free:
            if any(entry is not None for entry in bank.slots[slot]):
                left.append(f"{name}: slot {slot} has entries")
            if any(bool(storage[slot].any()) for storage in (*bank.a, *bank.b)):
                left.append(f"{name}: slot {slot} has factors")
    users = {
        name: [sum(p.users for p in cache.held) for cache in layer.smoa_bank._source._caches]
        for name, layer in manager.mover.layers.items()
    }
    taken = {
        name: [
            sum(slots[index] is not None for slots in layer.smoa_bank.slots[:-1])
            for index in range(len(layer.smoa_bank.slices))
        ]
        for name, layer in manager.mover.layers.items()
    }
    mover, merger = manager.mover, manager.mover.merger
    return {
        "registered": sorted(manager.list_adapters()),
        "active": sorted(manager._active_adapters),
        "slots": sorted(lora_id for lora_id in manager.lora_index_to_id if lora_id is not None),
        "resident": sorted(mover.residents),
        "in progress": [mover.state.value, mover.moving],
        "merged": merger.lora_id,
        "merge bytes": merger.nbytes,
        "recovered": sum(layer.smoa_weight._recovered is not None for layer in mover.layers.values()),
        "resident bytes": sum(
            layer.smoa_bank.resident_bytes(slot)
            for layer in mover.layers.values()
            for slot in range(manager.lora_slots)
        ),
        "left": left,
        "partitions counted wrong": [name for name in users if users[name] != taken[name]],
    }
