"""`target_modules` and its companions → module names, by the rules of the published code and of PEFT; and whether these
are the modules that a file holds."""

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise

from ..base.checkpoint import BaseCheckpoint
from .config import AdapterConfig, Names
from .patterns import MatchTime, Pattern, PatternError

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer; the tensors say which
LAYER_LISTS = ("layers", "h", "block", "blocks")  # where a layer index is looked for when no pattern is given


def select_modules(
    candidates: Iterable[str],
    target_modules: Sequence[str] | str,
    *,
    exclude_modules: Sequence[str] | str | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
) -> list[str]:
    """Modules that a configuration names, in the order of `candidates`.

    Args:
        candidates: linear modules of the base.
        target_modules: names (equal, or the end after a dot), or one regular expression that must match in full.
        exclude_modules: taken away again, by the same rule.
        layers_to_transform: keep only these layer numbers; applies to a list of names, as in the published code.
        layers_pattern: names of the list that the layer number follows ("layers" in "model.layers.3.mlp").

    Raises:
        PatternError: `target_modules` or `exclude_modules` is no regular expression, or takes too long to match.
    """
    by_layer = layers_to_transform is not None and not isinstance(target_modules, str)
    wanted = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform or ())
    patterns = (layers_pattern,) if isinstance(layers_pattern, str) else tuple(layers_pattern or LAYER_LISTS)
    time_left = MatchTime()
    wants = matcher(target_modules, time_left)
    excludes = matcher(exclude_modules or (), time_left)
    return [
        module
        for module in candidates
        if wants(module) and not excludes(module) and (not by_layer or layer_index(module, patterns) in wanted)
    ]


def unmatched(candidates: Iterable[str], target_modules: Sequence[str] | str) -> list[str]:
    """Targets that name no module at all.

    Raises:
        PatternError: `target_modules` is no regular expression, or takes too long to match.
    """
    names = list(candidates)
    if isinstance(target_modules, str):
        return [] if any(map(matcher(target_modules), names)) else [target_modules]
    ends = {end for name in names for end in name_ends(name)}
    return [target for target in target_modules if target not in ends]


def matcher(targets: Sequence[str] | str, time_left: MatchTime | None = None) -> Callable[[str], bool]:
    """Whether a module is named by a list of names (equal, or the end after a dot) or by a regular expression.

    Raises:
        PatternError: it is no regular expression; by the function returned, it takes too long.
    """
    if isinstance(targets, str):
        return Pattern(targets, time_left).fullmatch
    wanted = set(targets)
    return lambda module: any(end in wanted for end in name_ends(module))


def name_ends(module: str) -> list[str]:
    """A module's name, and all its ends after a dot."""
    parts = module.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def layer_index(module: str, patterns: Sequence[str] = LAYER_LISTS) -> int | None:
    """The layer number of a module: the one after the first list of layers named by `patterns`."""
    parts = module.split(".")
    for here, following in pairwise(parts):
        if here in patterns and following.isdigit():
            return int(following)
    return None


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
