"""Which frozen weight is meant: its shape, dtype and bytes."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

Size = Annotated[int, Field(strict=True, ge=1)]


@dataclass(frozen=True)
class WeightFingerprint:
    """Identity of one frozen weight as stored in the base checkpoint.

    Attributes:
        shape: (H_out, H_in) after transposing Conv1D layouts.
        dtype: torch name without prefix, e.g. "bfloat16".
        sha256: hex digest of the stored bytes (row-major, as stored, before any transposition).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # where it is read from a file

    shape: tuple[Size, Size]
    dtype: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
