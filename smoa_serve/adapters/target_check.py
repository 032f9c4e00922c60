"""The modules that a configuration names against those that the file holds."""

from collections.abc import Collection

from ..base.checkpoint import BaseCheckpoint
from .config import AdapterConfig, Names
from .patterns import PatternError
from .targets import select_modules, unmatched

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer; the tensors say which


def target_reasons(
    config: AdapterConfig, modules: Collection[str], base: BaseCheckpoint, *, exclude_modules: Names | None = None
) -> list[str]:
    """Every difference between the targets of a configuration and the modules of a file.

    Args:
        config: what was configured; targets left out are not checked.
        modules: modules that the file has factors for.
        base: the base model, which says what is linear.
        exclude_modules: HiRA's exceptions.
    """
    targets = config.target_modules
    linear = set(base.linear_modules)
    reasons = [base.why_not_linear(name) for name in modules if name not in linear]
    if targets is None or targets == ALL_LINEAR:
        return reasons
    try:
        wanted = select_modules(
            base.linear_modules,
            targets,
            exclude_modules=exclude_modules,
            layers_to_transform=config.layers_to_transform,
            layers_pattern=config.layers_pattern,
        )
        idle = unmatched(base.linear_modules, targets)
    except PatternError as error:
        return [*reasons, f"target_modules or exclude_modules: {error}"]
    reasons += [f"target_modules: {target!r} names no linear layer of the base" for target in idle]
    reasons += [f"{name} is a target, but the file has no factors for it" for name in wanted if name not in modules]
    named = set(wanted)
    extra = (name for name in modules if name in linear and name not in named)
    return reasons + [f"the file has factors for {name}, which target_modules does not name" for name in extra]
