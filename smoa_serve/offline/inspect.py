"""What `smoa-serve inspect` tells about an adapter, with or without its base."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..adapters import AdapterKind, AdapterSummary, LayerSummary, LoadOptions, open_adapter
from ..base.checkpoint import BaseCheckpoint
from ..base.orders import Progress
from ..errors import AdapterError

DEFAULT = LoadOptions()


@dataclass(frozen=True)
class AdapterReport:
    """Everything that is known about an adapter.

    Attributes:
        path: as given.
        kind: what computes it.
        format: "published", "portable", "hira" or "lora": the file format.
        config: adapter_config.json as read.
        file_bytes: size of the weight file.
        summary: of its content; None for a published adapter without a base that it fits.
        base_match: "exact" (the fingerprints of all weights agree), "shapes" (the file has no fingerprints; names and
            shapes fit), "no" (see problems), or None without a base.
        problems: every reason why it does not.
        modules: adapted layers.
    """

    path: str
    kind: AdapterKind
    format: str
    config: dict[str, object]
    file_bytes: int
    summary: AdapterSummary | None
    base_match: str | None
    problems: list[str]
    modules: list[LayerSummary]

    def as_json(self) -> dict[str, object]:
        """For `--json`: one object, the summary's facts among its own; null what is not known."""
        facts: dict[str, Any] = dict.fromkeys(AdapterSummary.model_fields) | {
            "kind": self.kind,
            "max_rank": max((rank for module in self.modules for rank in module.branch_ranks), default=0),
            "parameters": sum(module.parameters for module in self.modules),
            "bytes": sum(module.bytes for module in self.modules),
        }
        facts |= self.summary.model_dump(mode="json") if self.summary else {}
        facts["factor_bytes"] = facts.pop("bytes")
        own = asdict(self)
        del own["summary"]
        return own | facts


def inspect_adapter(
    path: str | Path,
    base: BaseCheckpoint | None = None,
    options: LoadOptions = DEFAULT,
    *,
    progress: Progress | None = None,
) -> AdapterReport:
    """Look at an adapter without serving it.

    Args:
        path: adapter as the user names it.
        base: when given, orders are computed and every tensor is bound; what does not fit is reported, not raised.
        options: see LoadOptions.
        progress: called while spectral orders are computed.

    Raises:
        AdapterError: the file itself cannot be read.
    """
    file = open_adapter(path, options, progress=progress)
    match, problems, fitting = None, [], None
    if base is not None:
        try:
            match, fitting = "exact" if file.check(base, "float32").exact else "shapes", base
        except AdapterError as error:
            match, problems = "no", error.reasons
    return AdapterReport(
        path=file.source.name,
        kind=file.kind,
        format=file.format,
        config=file.source.config,
        file_bytes=file.source.weights.nbytes,
        summary=None if file.needs_base and fitting is None else file.summary(fitting),
        base_match=match,
        problems=problems,
        modules=file.layers(fitting),
    )
