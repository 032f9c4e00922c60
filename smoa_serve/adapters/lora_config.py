"""What a PEFT LoRA configuration computes, by PEFT's own rules; what would compute anything else is refused."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, field_validator

from ..errors import AdapterError
from .config import AdapterConfig, Count, Names, Number, parse_config
from .patterns import MatchTime
from .source import Source
from .targets import ALL_LINEAR, layer_index, matcher, name_ends

# The update of a plain LoRA does not depend on them: how factors began, and defaults of features that are off.
INIT_ONLY = frozenset(
    {
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "qalora_group_size",
        "runtime_config",
    }
)
# Names of features whose update has another formula → what to say about them.
VARIANTS: Mapping[str, str] = {
    "alora_invocation_tokens": "an activated LoRA begins in the middle of a prompt",
    "arrow_config": "Arrow mixes several adapters",
    "ensure_weight_tying": "it ties adapters of several layers",
    "kasa_config": "KaSA changes the base weights",
    "layer_replication": "it repeats layers of the base",
    "lora_bias": "trained biases are not supported",
    "megatron_config": "its layers are Megatron's",
    "monteclora_config": "MonteCLoRA samples its factors",
    "trainable_token_indices": "trained token embeddings are not supported",
    "use_bdlora": "its factors are block-diagonal",
    "use_dora": "DoRA rescales the whole weight",
    "use_qalora": "QALoRA pools its inputs",
    "velora_config": "VeLoRA is not known here",
}
SMOA_ONLY_KEYS = ("num_blocks", "branch_ranks")
# PEFT leaves the base as it is for these, and reads the factors like any others.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
EXPERT_PARAMETERS = {".experts.base_layer": "gate_up_proj", ".experts": "down_proj"}


class LoraConfig(AdapterConfig):
    """PEFT's LoRA configuration, with PEFT's defaults."""

    peft_type: Literal["LORA"]
    r: Count = 8
    lora_alpha: Number = 8
    use_rslora: Annotated[bool, Field(strict=True)] = False
    rank_pattern: dict[str, Count] = Field(default_factory=dict)
    alpha_pattern: dict[str, Number] = Field(default_factory=dict)
    exclude_modules: Names | None = None
    target_parameters: list[str] | None = None
    fan_in_fan_out: Annotated[bool, Field(strict=True)] = False
    init_lora_weights: bool | str = True

    @field_validator("init_lora_weights")
    @classmethod
    def _base_unchanged(cls, value: bool | str) -> bool | str:
        if isinstance(value, bool) or value.lower() in PLAIN_INITS:
            return value
        raise ValueError(
            f"{value!r} changes the base weights for training, and the update belongs to the changed ones; convert the "
            "adapter with PEFT's path_initial_model_for_weight_conversion (its files say true), or train from another "
            "start"
        )

    @field_validator("target_parameters")
    @classmethod
    def _experts_only(cls, value: list[str] | None) -> list[str] | None:
        others = [name for name in value or () if not name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
        if others:
            raise ValueError(f"single parameters ({', '.join(others)}) are not supported as targets")
        return value

    def ranks_and_scalings(self, modules: Sequence[str]) -> tuple[dict[str, tuple[int, float]], list[str]]:
        """Module → its rank and what B A is multiplied with; and a reason for each key of a pattern that decides for
        none of them.

        Raises:
            re.error: a key is no regular expression.
        """
        ranks, idle = _by_pattern("rank_pattern", self.rank_pattern, self.r, modules, self._time)
        alphas, idle_alphas = _by_pattern("alpha_pattern", self.alpha_pattern, self.lora_alpha, modules, self._time)
        divisors = {module: math.sqrt(rank) if self.use_rslora else rank for module, rank in ranks.items()}
        return {m: (int(ranks[m]), alphas[m] / divisors[m]) for m in modules}, idle + idle_alphas

    @cached_property
    def _time(self) -> MatchTime:
        """For all expressions of the configuration together."""
        return MatchTime()

    @cached_property
    def _wants(self) -> Callable[[str], bool]:
        return matcher(self.target_modules or [], self._time)

    @cached_property
    def _excludes(self) -> Callable[[str], bool]:
        return matcher(self.exclude_modules or [], self._time)

    @property
    def takes_all(self) -> bool:
        """True for PEFT's word for every linear layer."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def is_target(self, module: str) -> bool:
        """Whether PEFT gives the module factors; see its `check_target_module_exists`.

        Raises:
            re.error: a target is no regular expression.
        """
        if self._excludes(module):
            return False
        if not set(name_ends(module)).isdisjoint(self.target_parameters or ()):
            return True
        if isinstance(self.target_modules, str):
            return self.takes_all or self._wants(module)
        if module in (self.target_modules or ()):
            return True
        return self._wants(module) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None:
            return True
        if not self.layers_pattern:
            found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
            index = int(found[1]) if found else None
        else:
            patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
            found_indices = (layer_index(module, [pattern]) for pattern in patterns)
            index = next((i for i in found_indices if i is not None), None)
        return index is not None and index in ([wanted] if isinstance(wanted, int) else wanted)


def pattern_name(module: str) -> str:
    """The name that patterns and targets are compared with: fused experts go by their parameters."""
    for ending, parameter in EXPERT_PARAMETERS.items():
        if module.endswith(ending):
            return f"{module.removesuffix('.base_layer')}.{parameter}"
    return module


def read_lora_config(source: Source) -> tuple[LoraConfig | None, list[str]]:
    """The configuration of a LoRA adapter, or every reason why it is no plain LoRA or cannot be told."""
    config = {key: value for key, value in source.config.items() if key not in INIT_ONLY}
    reasons = [
        f"adapter_config.json has {key!r}: this is a SMoA adapter, but peft_type says LORA"
        for key in SMOA_ONLY_KEYS
        if config.get(key) is not None
    ]
    reasons += [
        f"adapter_config.json: {key} is set, which is not served: {why}"
        for key, why in VARIANTS.items()
        if config.get(key) not in (None, False, [])
    ]
    reasons += [
        f"adapter_config.json: {key} is None, expected a number"
        for key in ("r", "lora_alpha")
        if config.get(key, 8) is None
    ]
    # A key of a later PEFT that is switched off changes nothing.
    known = LoraConfig.model_fields
    plain = {
        key: value
        for key, value in config.items()
        if key in known or (value and key not in VARIANTS and key not in SMOA_ONLY_KEYS)
    }
    try:
        parsed = parse_config(LoraConfig, source.name, plain)
    except AdapterError as error:
        return None, reasons + error.reasons
    return parsed, reasons + _target_reasons(parsed)


def _target_reasons(config: LoraConfig) -> list[str]:
    if not config.target_modules and not config.target_parameters:
        return ["adapter_config.json: target_modules names nothing, so PEFT would adapt nothing or choose by itself"]
    reasons = []
    if isinstance(config.target_modules, str) and (config.layers_to_transform is not None or config.layers_pattern):
        reasons.append("layers_to_transform and layers_pattern go with a list of target_modules, not with a text")
    if config.layers_pattern and config.layers_to_transform is None:
        reasons.append("layers_pattern goes with layers_to_transform")
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
    reasons += [f"layers_pattern: {name!r} is no plain name" for name in patterns if not name.isidentifier()]
    return [f"adapter_config.json: {reason}" for reason in reasons]


def _by_pattern(
    field: str, pattern: Mapping[str, float], default: float, modules: Sequence[str], time_left: MatchTime
) -> tuple[dict[str, float], list[str]]:
    """Module → value by PEFT's `get_pattern_key`: the first key that is, as a regular expression, the end of the
    module's name after a dot."""
    values, used = {}, set()
    keys = {key: matcher(rf"(.*\.)?({key})", time_left) for key in pattern}
    for module in modules:
        name = pattern_name(module)
        key = next((key for key, is_end in keys.items() if is_end(name)), name)
        used.add(key)
        values[module] = pattern.get(key, default)
    return values, [
        f"adapter_config.json: {field}: {key!r} decides for none of the modules (a key is a regular expression for the "
        "end of a module's name, and the first that matches counts)"
        for key in pattern
        if key not in used
    ]
