"""What a SMoA fine-tune is told, and how it stands in a checkpoint."""

from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from ..base.spectral import even_ranks
from ..errors import ConfigError
from .checkpoint import Facts, rewrite_portable, settings_in
from .peft_type import SMOA

ORDERS = ("gram", "published")
HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT trains and saves a head with these
PORTABLE_ONLY = ("format", "format_version", "kind", "digest", "rank", "alpha", "metadata")


@dataclass
class SMoAConfig(PeftConfig):  # type: ignore[misc]
    """Settings of the SMoA method; the defaults are the published ones.

    Args:
        r: total rank; the branch of block k has `branch_ranks[k]` of it.
        num_blocks: K, the number of aligned blocks of every adapted weight.
        branch_ranks: r_k of each block, summing to r; None splits r evenly, the first blocks get the remainder. A block
            of rank 0 has no update.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: on the input of the update only.
        target_modules: names of modules (equal, or the end after a dot), one regular expression that matches in full,
            "all-linear", or None for the usual ones of the architecture.
        exclude_modules: taken away again, by the same rule.
        layers_to_transform: only these layer numbers.
        layers_pattern: name of the list of layers that the number follows.
        fan_in_fan_out: accepted for published configurations; the layout follows from the type of the layer.
        init_lora_weights: A kaiming-uniform, B zero. False draws B as well, for tests.
        order: "gram" (float64, the same on every machine) or "published" (float32 SVD on the CPU).
        modules: filled by PEFT models: what is recorded of each adapted module. Not for users.

    Raises:
        ConfigError: settings that contradict each other.
    """

    r: int = 8
    num_blocks: int = 2
    branch_ranks: list[int] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.05
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_lora_weights: bool = True
    order: str = "gram"
    modules: dict[str, Facts] = field(default_factory=dict, repr=False)
    # The remaining keys of a portable adapter_config.json: PEFT hands a file's keys to this constructor.
    format: InitVar[str | None] = None
    format_version: InitVar[int | None] = None
    kind: InitVar[str | None] = None
    digest: InitVar[str | None] = None
    rank: InitVar[int | None] = None
    alpha: InitVar[float | None] = None
    metadata: InitVar[dict[str, object] | None] = None

    def __post_init__(self, *portable: Any) -> None:
        super().__post_init__()
        self.peft_type = SMOA
        self._recorded = False
        given = {key: value for key, value in zip(PORTABLE_ONLY, portable, strict=True) if value is not None}
        if "format" in given:
            self._restore(given)
        elif given:
            raise ConfigError(f"SMoAConfig has no setting {', '.join(given)}; these are keys of a portable adapter")
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        self._check()

    @property
    def is_recorded(self) -> bool:
        """True when this comes from a checkpoint: blocks and scales are those recorded there."""
        return self._recorded

    @property
    def ranks(self) -> tuple[int, ...]:
        """r_k of each of the K blocks."""
        return even_ranks(self.r, self.num_blocks) if self.branch_ranks is None else tuple(self.branch_ranks)

    @property
    def scaling(self) -> float:
        """lora_alpha over the total rank."""
        return self.lora_alpha / self.r if self.r else 1.0

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration; after a model's tensors were written there, the whole portable checkpoint.

        `PeftModel.save_pretrained` writes its tensors first and calls this last, for every adapter: the tensors are
        then rewritten together with the configuration, whose digest depends on them.

        Raises:
            AdapterError: the tensors do not belong to this configuration or cannot be served.
        """
        settings = {key: sorted(v) if isinstance(v, set) else v for key, v in self.to_dict().items()}
        if kwargs.get("auto_mapping_dict"):
            settings["auto_mapping"] = kwargs["auto_mapping_dict"]
        if not rewrite_portable(Path(save_directory), settings):
            super().save_pretrained(save_directory, **kwargs)

    def _restore(self, portable: dict[str, Any]) -> None:
        """Take the settings out of a portable configuration, whoever wrote it."""
        for key, value in settings_in(portable, self.modules, self.num_blocks).items():
            if key in self.__dataclass_fields__:
                setattr(self, key, value)
        self._recorded = True

    def _check(self) -> None:
        reasons = []
        if self.num_blocks < 1 or self.r < 0:
            reasons.append(f"num_blocks={self.num_blocks} and r={self.r}: at least 1 block and no negative rank")
        if self.branch_ranks is not None:
            if len(self.branch_ranks) != self.num_blocks:
                reasons.append(f"branch_ranks has {len(self.branch_ranks)} entries for num_blocks={self.num_blocks}")
            if sum(self.branch_ranks) != self.r or min(self.branch_ranks, default=0) < 0:
                reasons.append(f"branch_ranks {self.branch_ranks} must be 0 or more and sum to r={self.r}")
        if self.order not in ORDERS:
            reasons.append(f"order={self.order!r}: allowed are {', '.join(ORDERS)}")
        if not 0 <= self.lora_dropout < 1:
            reasons.append(f"lora_dropout={self.lora_dropout}: from 0 to below 1")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            reasons.append("layers_to_transform needs target_modules as a list")
        if self.task_type in HEAD_TASKS:
            reasons.append(f"task_type={self.task_type}: PEFT would save a trained head, which a SMoA file cannot hold")
        if self.layers_pattern and self.layers_to_transform is None:
            reasons.append("layers_pattern needs layers_to_transform")
        if reasons:
            raise ConfigError("SMoAConfig: " + "; ".join(reasons))


def _as_set(names: Any) -> Any:
    return set(names) if isinstance(names, list) else names
