"""`target_modules` and its companions → module names, by the rules of the published code and of PEFT."""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

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
        re.error: `target_modules` or `exclude_modules` is no regular expression.
    """
    by_layer = layers_to_transform is not None and not isinstance(target_modules, str)
    wanted = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform or ())
    patterns = (layers_pattern,) if isinstance(layers_pattern, str) else tuple(layers_pattern or LAYER_LISTS)
    return [
        module
        for module in candidates
        if matches(module, target_modules)
        and not (exclude_modules and matches(module, exclude_modules))
        and (not by_layer or layer_index(module, patterns) in wanted)
    ]


def unmatched(candidates: Iterable[str], target_modules: Sequence[str] | str) -> list[str]:
    """Targets that name no module at all."""
    names = list(candidates)
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    as_given = isinstance(target_modules, str)
    return [t for t in targets if not any(matches(name, t if as_given else [t]) for name in names)]


def matches(module: str, targets: Sequence[str] | str) -> bool:
    """Whether one module is named by a list of names or by a regular expression."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def layer_index(module: str, patterns: Sequence[str] = LAYER_LISTS) -> int | None:
    """The layer number of a module: the one after the first list of layers named by `patterns`."""
    parts = module.split(".")
    for here, following in pairwise(parts):
        if here in patterns and following.isdigit():
            return int(following)
    return None
