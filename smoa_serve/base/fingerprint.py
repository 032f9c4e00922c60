"""Which frozen weight is meant: its shape, dtype and bytes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightFingerprint:
    """Identity of one frozen weight as stored in the base checkpoint.

    Attributes:
        shape: (H_out, H_in) after transposing Conv1D layouts.
        dtype: torch name without prefix, e.g. "bfloat16".
        sha256: hex digest of the stored bytes (row-major, as stored, before any transposition).
    """

    shape: tuple[int, int]
    dtype: str
    sha256: str
