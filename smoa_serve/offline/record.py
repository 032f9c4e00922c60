"""What a merged checkpoint says of itself: which adapters its weights hold, so that none is merged twice unnoticed."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..adapters import AdapterKind, AdapterSummary
from ..adapters.source import Source
from ..base.checkpoint import BaseCheckpoint
from ..errors import BaseModelError
from ..files.json_file import JsonError, read_json

RECORD_NAME = "merged_adapters.json"


class MergedAdapter(BaseModel):
    """One adapter that was merged.

    Attributes:
        name: folder or file it was read from, without its path.
        kind: what computed it.
        digest: its identity, whatever file it came from; a published SMoA adapter's depends on the base.
        file_sha256: of its weight file.
        base_model: what its configuration says it was trained on.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    kind: AdapterKind
    digest: str
    file_sha256: str
    base_model: str | None = None

    @classmethod
    def of(cls, source: Source, summary: AdapterSummary) -> "MergedAdapter":
        """Of an adapter that was read."""
        base_model = source.config.get("base_model_name_or_path")
        return cls(
            name=Path(source.name).resolve().name,
            kind=summary.kind,
            digest=summary.digest,
            file_sha256=source.sha256(),
            base_model=base_model if isinstance(base_model, str) else None,
        )


class MergeRecord(BaseModel):
    """The file in a merged checkpoint.

    Attributes:
        base: name of the folder that was merged into first.
        adapters: what was merged, in this order.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    base: str
    adapters: list[MergedAdapter] = Field(default_factory=list)


def read_record(base: BaseCheckpoint) -> MergeRecord:
    """What was merged into a checkpoint; nothing where it says nothing.

    Raises:
        BaseModelError: its record cannot be read.
    """
    file = base.path / RECORD_NAME
    try:
        return MergeRecord.model_validate(read_json(file))
    except FileNotFoundError:
        return MergeRecord(base=base.path.resolve().name)
    except (OSError, JsonError, ValidationError) as error:
        raise BaseModelError(f"base model {base.path.name!r}: {RECORD_NAME} cannot be read: {error}") from error


def write_record(base: BaseCheckpoint, adapter: MergedAdapter, folder: Path) -> None:
    """Write what a folder holds that was merged from `base` and an adapter."""
    before = read_record(base)
    record = before.model_copy(update={"adapters": [*before.adapters, adapter]})
    (folder / RECORD_NAME).write_text(json.dumps(record.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")


def merged_note(base: BaseCheckpoint) -> str | None:
    """One sentence about a base that holds adapters already; None of one that holds none."""
    record = read_record(base)
    if not record.adapters:
        return None
    names = ", ".join(repr(adapter.name) for adapter in record.adapters)
    return (
        f"base model {base.path.name!r} holds merged adapters ({names}): only what was trained on it, and not on "
        f"{record.base!r}, is exact on it"
    )


def repeat_reasons(base: BaseCheckpoint, adapter: MergedAdapter) -> list[str]:
    """Why an adapter should not be merged into a checkpoint, by what that holds already."""
    record = read_record(base)
    if not record.adapters:
        return []
    same = [a for a in record.adapters if adapter.digest == a.digest or adapter.file_sha256 == a.file_sha256]
    reasons = [f"it was merged into {base.path.name!r} before, as {other.name!r}" for other in same]
    trained_on = Path(adapter.base_model).name if adapter.base_model else None
    if trained_on is not None and trained_on.lower() != base.path.resolve().name.lower():
        held = ", ".join(repr(a.name) for a in record.adapters)
        reasons.append(f"it was trained on {adapter.base_model!r}, and {base.path.name!r} holds {held} besides")
    return reasons
