"""What other requests get while an adapter is merged into the base weights."""

from enum import StrEnum


class MergePolicy(StrEnum):
    """What other requests get while an adapter is merged.

    COMPENSATE: the merged weight and the difference back, in the same step.
    EXCLUSIVE: the original weight; the merged one serves only steps in which all tokens are the merged adapter's.
    """

    COMPENSATE = "compensate"
    EXCLUSIVE = "exclusive"
